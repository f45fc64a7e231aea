"""PaCA: gradients of dense columns, merging bit by bit, which columns, what is kept, 4-bit bases, refusals."""

import pytest
import torch
from families import gpt2
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoestring.adapters import PaCA, PaCAConfig
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.adapters import (
    TARGETS,
    adapted,
    assert_near,
    base_state,
    batch,
    chain,
    counted_step,
    tiny_llama,
    tokens,
    trainable,
    two_layers,
)
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import DECODER, decoder, seeded, step
from shoestring.training import RunSettings, train


def pacas(model: nn.Module) -> list[PaCA]:
    return [m for m in model.modules() if isinstance(m, PaCA)]


def with_conv1d(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = two_layers()
    first = Conv1D(40, 24)
    with torch.no_grad():
        first.weight.copy_(model.first.weight.T)
        first.bias.copy_(model.first.bias)
    model.first = first
    return model.to(dtype)


def trained(model: PeftModel, steps: int = 5) -> PeftModel:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for seed in range(steps):
        optimizer.zero_grad()
        model(batch(next(model.parameters()).dtype, seed)).float().square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("make", [two_layers, with_conv1d])
@pytest.mark.parametrize("alpha", [None, 3])
def test_gradients_are_the_columns_of_dense_ones_in_double_precision(make, alpha):
    for seed in range(3):
        model = adapted(PaCAConfig, lambda: {"r": 5, "alpha": alpha}, make(torch.float64), seed=seed).double()
        dense = make(torch.float64)
        scale = 1 if alpha is None else alpha / 5
        for name, paca in zip(TARGETS, pacas(model), strict=True):
            weight = getattr(dense, name).weight
            out_in = weight.data if name == "second" or make is two_layers else weight.data.T
            out_in[:, paca.columns] += scale * paca.delta.detach()
        x, y = (batch(torch.float64).requires_grad_() for _ in range(2))
        torch.testing.assert_close(model(x), dense(y), rtol=1e-12, atol=1e-12)
        model(x).square().sum().backward()
        dense(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-10)
        for name, paca in zip(TARGETS, pacas(model), strict=True):
            gradient = getattr(dense, name).weight.grad
            gradient = gradient if gradient.shape[0] == len(paca.delta) else gradient.T
            wanted = scale * gradient[:, paca.columns]
            torch.testing.assert_close(paca.delta.grad, wanted, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [two_layers, with_conv1d])
def test_start_merged_and_unmerged_are_equal_bit_by_bit(make, dtype: torch.dtype):
    x = batch(dtype)
    model = adapted(PaCAConfig, lambda: {"r": 5, "alpha": 3}, make(dtype), init_weights=True)
    assert torch.equal(model(x), make(dtype)(x)), "a fresh adapter is the pretrained model"
    base = base_state(model.get_base_model())
    expected = trained(model)(x)
    assert not torch.equal(expected, make(dtype)(x))
    assert all(torch.equal(v, base[k]) for k, v in model.get_base_model().state_dict().items() if "paca_" not in k)
    model.merge_adapter()
    assert torch.equal(model(x), expected)
    model.unmerge_adapter()
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, base[k]) for k, v in model.get_base_model().state_dict().items() if "paca_" not in k)
    assert torch.equal(model.merge_and_unload()(x), expected)


def test_evaluation_sees_the_weights_of_the_last_step():
    model = trained(adapted(PaCAConfig, lambda: {"r": 5}, init_weights=True), steps=3)
    dense = two_layers()
    with torch.no_grad():
        for name, paca in zip(TARGETS, pacas(model), strict=True):
            getattr(dense, name).weight[:, paca.columns] += paca.delta
    assert torch.equal(model(batch()), dense(batch()))


def test_the_base_is_whole_after_a_forward_and_after_a_backward():
    model = adapted(PaCAConfig, lambda: {"r": 5}).train()
    expected = base_state(two_layers())

    def whole() -> bool:
        held = {k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()}
        return all(torch.equal(held[name], value) for name, value in expected.items())

    loss = model(batch()).square().mean()
    assert whole()
    loss.backward()
    assert whole()


def test_a_layer_that_a_forward_uses_twice_gets_the_sum_of_both_gradients():
    torch.manual_seed(0)
    model = get_peft_model(Twice(), PaCAConfig(r=3, target_modules=["layer"], init_weights=False)).double()
    (paca,) = pacas(model)
    dense = Twice().double()
    dense.layer.weight.data = model.get_base_model().layer.base_layer.weight.data.clone()
    dense.layer.bias.data = model.get_base_model().layer.base_layer.bias.data
    dense.layer.weight.data[:, paca.columns] += paca.delta.detach()
    x = torch.randn(5, 9, dtype=torch.float64)
    for each in (model, dense):
        each(x).square().sum().backward()
    torch.testing.assert_close(paca.delta.grad, dense.layer.weight.grad[:, paca.columns], rtol=1e-12, atol=1e-12)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).tanh())


def llama_with(**settings) -> PeftModel:
    config = PaCAConfig(target_modules=["q_proj", "o_proj", "down_proj"], **{"r": 6, **settings})
    return get_peft_model(tiny_llama(), config)


def chosen(model: nn.Module) -> list[list[int]]:
    return [paca.columns.tolist() for paca in pacas(model)]


def test_columns_are_sorted_each_once_differ_between_layers_and_follow_the_seed_alone():
    torch.manual_seed(3)
    first = chosen(llama_with())
    torch.manual_seed(4)
    assert chosen(llama_with()) == first
    assert chosen(llama_with(seed=1)) != first
    assert all(sorted(set(columns)) == columns and len(columns) == 6 for columns in first)
    widths = [24, 24, 40] * 2
    assert all(columns[-1] < width for columns, width in zip(first, widths, strict=True))
    assert len({tuple(columns) for columns in first}) == 6, "layers of one shape have columns of their own"
    fewer = get_peft_model(tiny_llama(), PaCAConfig(r=6, target_modules=["q_proj", "down_proj"]))
    assert chosen(fewer) == [first[0], first[2], first[3], first[5]], "whatever else is adapted"
    reach = {i for seed in range(60) for i in chosen(llama_with(seed=seed))[0]}
    assert reach == set(range(24)), "every column may be drawn"


def test_by_weight_it_takes_the_columns_of_the_largest_norm():
    for make in (two_layers, with_conv1d):
        model = adapted(PaCAConfig, lambda: {"r": 5, "selection": "weight"}, make(), init_weights=True)
        for name, columns in zip(TARGETS, chosen(model), strict=True):
            norms = getattr(two_layers(), name).weight.norm(dim=0)
            assert columns == sorted(norms.argsort(descending=True)[:5].tolist())


ROWS = [
    {"input_ids": [4, 8, 15, 16, 23, 42, 0], "attention_mask": [1, 1, 1, 1, 1, 1, 0]},
    {"input_ids": [7, 7, 3, 1, 40, 2, 9], "labels": [-100, -100, 3, 1, 40, 2, 9]},
    {"input_ids": [11, 12, 30]},
]


def test_by_gradient_it_takes_the_columns_of_the_largest_sum_of_squares():
    targets = ["q_proj", "o_proj", "down_proj"]
    config = PaCAConfig(r=6, target_modules=targets, selection="gradient", calibration_rows=3)
    config.see_data({"train": ROWS})
    base = tiny_llama()
    model = get_peft_model(base, config)

    dense, scores = tiny_llama().eval(), {}
    for row in ROWS:
        length = sum(row.get("attention_mask", [1] * len(row["input_ids"])))
        ids = torch.tensor([row["input_ids"][:length]])
        labels = torch.tensor([row["labels"]]) if "labels" in row else ids
        dense.zero_grad()
        dense(input_ids=ids, labels=labels).loss.backward()
        for name, module in dense.named_modules():
            if name.endswith(tuple(targets)):
                scores[name] = scores.get(name, 0) + module.weight.grad.square().sum(0)
    wanted = [sorted(s.argsort(descending=True)[:6].tolist()) for s in scores.values()]
    assert chosen(model) == wanted
    assert not any(p.grad is not None for p in model.parameters())


def test_by_gradient_it_needs_data_with_a_loss_and_restores_the_model():
    settings = {
        "r": 3,
        "selection": "gradient",
        "calibration_rows": 2,
        "calibration_max_tokens": 32,
        "target_modules": ["q_proj"],
    }
    with pytest.raises(SettingError, match="calibrated on data when it is attached, and has seen none"):
        Recipe(PaCAConfig(**settings)).apply(tiny_llama())
    with pytest.raises(SettingError, match="has only 1 rows"):
        Recipe(PaCAConfig(**settings)).apply(tiny_llama(), data={"train": ROWS[:1]})
    base = tiny_llama().train()
    base.lm_head.weight.requires_grad_(False)
    learns = [p.requires_grad for p in base.parameters()]
    config = PaCAConfig(**{**settings, "r": 30})
    with pytest.raises(ValueError, match=r"q_proj: r of paca is 30"):
        Recipe(config).apply(base, data={"train": ROWS})
    assert learns == [p.requires_grad for p in base.parameters()]
    assert base.training
    assert not any(m._forward_hooks for m in base.modules())
    config = PaCAConfig(r=3, selection="gradient", calibration_rows=1, target_modules=list(TARGETS))
    config.see_data({"train": [{"x": [[0.0] * 24]}]})
    with pytest.raises(SettingError, match=r"TwoLayers gives no loss for calibration row 0 \(x\)"):
        get_peft_model(two_layers(), config)


def test_what_gradients_chose_is_saved_and_needs_no_data_to_load(tmp_path):
    config = PaCAConfig(r=3, selection="gradient", calibration_rows=3, target_modules=["q_proj"], init_weights=True)
    model = Recipe(config).apply(tiny_llama(), data={"train": ROWS})
    first = chosen(model)
    attached_to(model).save(tmp_path / "run")
    assert chosen(load(tiny_llama(), tmp_path / "run")) == first


def test_it_trains_r_times_out_numbers_a_layer():
    count = 5 * (40 + 16)
    assert sum(p.numel() for p in trainable(adapted(PaCAConfig, lambda: {"r": 5})).values()) == count


def saved_bytes(config: PeftConfig) -> int:
    return counted_step(chain(config), 64).saved_bytes


def test_a_layer_keeps_its_columns_of_the_input_and_nothing_else():
    assert saved_bytes(PaCAConfig(r=8)) == 4 * 64 * 8 * 4
    assert saved_bytes(PaCAConfig(r=8)) < 0.15 * saved_bytes(LoraConfig(r=4))
    frozen = chain(PaCAConfig(r=8))
    frozen.requires_grad_(False)
    assert saved_bytes_of_inputs(frozen) == 0


def saved_bytes_of_inputs(model: nn.Module) -> int:
    x = torch.randn(64, 96, requires_grad=True)
    with Ledger(model) as ledger:
        model(x).sum().backward()
    return ledger.report().saved_bytes


def test_adapters_of_two_names_add_up_and_stand_on_lora():
    model = adapted(PaCAConfig, lambda: {"r": 5}, target_modules=["first"]).double()
    more = PaCAConfig(r=24, alpha=12, target_modules=["first"], init_weights=False)
    model.add_adapter("other", more)
    model.double().base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.first
    weight = layer.base_layer.weight + sum(layer.get_delta_weight(name) for name in ("default", "other"))
    x = torch.randn(7, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.base_layer.bias))

    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    paca = PaCAConfig(r=4, target_modules=["q_proj"], init_weights=False)
    both = Recipe(lora, paca).apply(tiny_llama())
    both(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable(both).values())


@pytest.mark.parametrize("make", [two_layers, with_conv1d])
def test_it_is_lora_of_rank_r_exactly(make):
    model = adapted(PaCAConfig, lambda: {"r": 5, "alpha": 3}, make())
    expected = model(batch())
    config, state = convert_to_lora(model, rank=5)
    lora = get_peft_model(make(), config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(lora(batch()), expected, rtol=1e-6, atol=1e-6)


def test_a_saved_adapter_holds_the_columns_and_is_refused_by_a_narrower_model(tmp_path):
    model = adapted(PaCAConfig, lambda: {"r": 5})
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in held} == {"delta", "columns"}
    other = two_layers()
    other.first = nn.Linear(15, 40)
    with pytest.raises(SettingError, match=r"first: the saved columns of paca go .* has 15 inputs \(15 -> 40\)"):
        PeftModel.from_pretrained(other, tmp_path)
    (name,) = (name for name in held if "first" in name and "columns" in name)
    save_file({**held, name: held[name].flip(0)}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(SettingError, match="first: the saved columns of paca are not in ascending order"):
        PeftModel.from_pretrained(two_layers(), tmp_path)


@pytest.mark.parametrize("double", [False, True])
def test_on_a_4_bit_base_it_keeps_the_columns_alone_and_learns(double: bool):
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    torch.manual_seed(0)
    settings = {"compute_dtype": torch.float32, "compress_statistics": double, "quant_type": "nf4"}
    model = nn.Sequential(*(bnb.nn.Linear4bit(64, 64, **settings) for _ in range(3))).to("cpu")
    weights = [bnb.functional.dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for m in model]
    model = get_peft_model(model, PaCAConfig(r=4, target_modules=["0", "1", "2"], init_weights=False))
    dense = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    for layer, weight, paca, mine in zip(dense, weights, pacas(model), model.get_base_model(), strict=True):
        layer.weight.data = weight
        layer.weight.data[:, paca.columns] += paca.delta.detach()
        layer.bias.data = mine.base_layer.bias.data.clone()
    x = torch.randn(48, 64)
    with Ledger(model) as ledger:
        y = model(x)
        y.square().mean().backward()
    assert ledger.report().saved_bytes == 3 * 48 * 4 * 4 + y.numel() * 4, "and the output, for the square"
    dense(x).square().mean().backward()
    torch.testing.assert_close(y, dense(x), rtol=0, atol=5e-3)
    for layer, paca in zip(dense, pacas(model), strict=True):
        assert_near(paca.delta.grad, layer.weight.grad[:, paca.columns], "the gradient", share=5e-3)


def test_by_weight_it_reads_a_4_bit_base():
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    config = PaCAConfig(r=4, target_modules=["0"], selection="weight")
    (columns,) = chosen(get_peft_model(nn.Sequential(layer), config))
    assert columns == sorted(weight.norm(dim=0).argsort(descending=True)[:4].tolist())


@pytest.mark.parametrize("make", [decoder, gpt2])
@pytest.mark.parametrize(
    "other",
    [
        "recompute",
        "chunked_loss",
        {"token_windows": {"window_tokens": 4}},
        {"token_tune": {"keep_fraction": 1.0}},
        {"token_tune": {"keep_fraction": 0.5}},
    ],
    ids=str,
)
def test_gradients_beside_techniques_of_other_kinds_are_columns_of_dense_ones(make, other):
    targets = ["q_proj", "down_proj"] if make is decoder else ["c_attn", "mlp.c_proj"]
    settings = {"r": 5, "alpha": 3, "target_modules": targets, "init_weights": False}
    with seeded(2):
        model = Recipe.from_list([{"paca": settings}, other]).apply(make())
    step(model, DECODER.batch())
    dense = make()
    layers = {name.removeprefix("base_model.model.").partition(".paca_.")[0]: m for name, m in model.named_modules()}
    layers = {name: m for name, m in layers.items() if isinstance(m, PaCA)}
    assert len(layers) == 4
    for name, paca in layers.items():
        layer = dense.get_submodule(name)
        out_in = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data
        out_in[:, paca.columns] += paca.scale * paca.delta.detach()
    sampled = isinstance(other, dict) and "token_tune" in other  # changes the gradient; the others must not
    step(Recipe.from_list([other]).apply(dense) if sampled else dense, DECODER.batch())
    for name, paca in layers.items():
        layer = dense.get_submodule(name)
        whole = layer.weight.grad.T if isinstance(layer, Conv1D) else layer.weight.grad
        assert_near(paca.delta.grad, paca.scale * whole[:, paca.columns], name, share=1e-4)


def test_what_it_cannot_do_is_refused_by_name():
    with pytest.raises(ValueError, match="r of paca must be a whole number of at least 1, got 0"):
        PaCAConfig(r=0)
    with pytest.raises(ValueError, match="selection of paca must be one of random, weight, gradient, got 'norm'"):
        PaCAConfig(selection="norm")
    with pytest.raises(ValueError, match="seed of paca has no effect with selection='weight'"):
        PaCAConfig(selection="weight", seed=3)
    with pytest.raises(ValueError, match="calibration_rows of paca has no effect"):
        PaCAConfig(calibration_rows=3)
    with pytest.raises(ValueError, match=r"first: r of paca is 25, but this layer of 24 -> 40 has 24 columns"):
        adapted(PaCAConfig, lambda: {"r": 25}, target_modules=["first"])
    with pytest.raises(TypeError, match=r"image is of type Conv2d"):
        adapted(PaCAConfig, lambda: {"r": 2}, target_modules=["image"])
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"lm_head: .* held by model.embed_tokens and lm_head together"):
        get_peft_model(tied, PaCAConfig(r=2, target_modules=["lm_head"]))
    shared = two_layers()
    shared.second = nn.Linear(24, 40)
    shared.second.weight = shared.first.weight
    with pytest.raises(ValueError, match=r"first: .* held by first and second together"):
        adapted(PaCAConfig, lambda: {"r": 2}, shared)


@pytest.mark.slow
def test_a_packaged_decoder_chooses_by_gradients_of_its_data_and_learns_it(tmp_path):
    need("smollm2", "gsm8k-test")
    settings = {
        "r": 16,
        "selection": "gradient",
        "calibration_rows": 2,
        "calibration_max_tokens": 96,
        "target_modules": ["v_proj", "down_proj"],
    }
    run = {
        "model": "packaged:smollm2",
        "task": "causal-lm",
        "data": {"train": "packaged:gsm8k-test", "text": "question", "max_length": 96, "max_train_rows": 4},
        "recipe": [{"paca": settings}],
        "train": {
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
        },
        "output_dir": str(tmp_path / "run"),
    }
    losses = [loss for _, loss in train(RunSettings.from_dict(run)).losses]
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses
