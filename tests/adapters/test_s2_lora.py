"""S2-LoRA: sharing, equality with LoRA, the proximal step, compaction, counts, refusals."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import WhisperConfig, WhisperForConditionalGeneration

from shoestring import assets
from shoestring.adapters import S2LoRA, S2LoRAConfig
from shoestring.adapters.s2_lora import compact, ranks_in_use
from shoestring.recipe import Moment, Recipe, attached_to
from shoestring.testing.adapters import adapted, batch, chain, counted_step, trainable, two_layers
from shoestring.testing.assets import need


class Stack(nn.Module):
    """Four square layers of 12 and one of 12 -> 7: two shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.square:
            x = torch.tanh(layer(x))
        return self.head(x)


TARGETS = [*(f"square.{i}" for i in range(4)), "head"]


def stack(dtype: torch.dtype = torch.float32) -> Stack:
    torch.manual_seed(0)
    return Stack().to(dtype)


def s2(dtype: torch.dtype = torch.float32, **settings: object) -> PeftModel:
    """Random factors and coefficients on all five layers."""
    config = S2LoRAConfig(**{"r": 6, "target_modules": list(TARGETS), "init_weights": False, **settings})
    model = get_peft_model(stack(dtype), config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.coefficients.copy_(torch.randn(config.r, generator=torch.Generator().manual_seed(5)))
    return model


def layers_of(model: nn.Module) -> list[S2LoRA]:
    return [m for m in model.modules() if isinstance(m, S2LoRA)]


@pytest.mark.parametrize("init", ["kaiming", "adalora"])
def test_both_starts_are_the_pretrained_model_bit_by_bit(init: str):
    x = torch.randn(3, 12)
    model = get_peft_model(stack(), S2LoRAConfig(target_modules=list(TARGETS), init=init)).eval()
    with torch.no_grad():
        assert torch.equal(model(x), stack()(x))


def test_with_one_layer_and_coefficients_of_one_it_is_lora():
    ours = adapted(S2LoRAConfig, lambda: {"r": 4, "alpha": 8}, target_modules=["first"])
    lora = get_peft_model(two_layers(), LoraConfig(r=4, lora_alpha=8, target_modules=["first"])).eval()
    (layer,) = layers_of(ours)
    a, b = layer.factors()
    lora_a, lora_b = (getattr(lora.base_model.model.first, f"lora_{x}")["default"].weight for x in "AB")
    with torch.no_grad():
        layer.coefficients.fill_(1)
        lora_a.copy_(a)
        lora_b.copy_(b)
    torch.testing.assert_close(ours(batch()), lora(batch()), rtol=1e-6, atol=1e-6)
    ours(batch()).square().mean().backward()
    lora(batch()).square().mean().backward()
    shared = layer.shared_state[0]
    for name, parameter in zip(layer.names, (lora_a, lora_b), strict=True):
        torch.testing.assert_close(shared.get_parameter(name).grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_gradients_of_shared_factors_are_sums_over_layers_of_a_dense_reference():
    model = s2(torch.float64, alpha=9)
    x = torch.randn(5, 12, dtype=torch.float64)
    model(x).square().sum().backward()
    parameters = trainable(model)
    grads = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    base, layers = stack(torch.float64), layers_of(model)
    shared = layers[0].shared_state[0]
    y = x
    for i, (linear, layer) in enumerate(zip([*base.square, base.head], layers, strict=True)):
        shape = "12x12" if i < 4 else "7x12"
        a, b = shared.get_parameter(f"a_{shape}"), shared.get_parameter(f"b_{shape}")
        y = y @ (linear.weight + 1.5 * b @ torch.diag(layer.coefficients) @ a).T + linear.bias
        y = torch.tanh(y) if i < 4 else y
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    y.square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_factors_stand_once_a_shape_in_model_optimizer_and_file(tmp_path: Path):
    model = s2()
    count = 6 * (12 + 12) + 6 * (12 + 7) + 5 * 6
    assert sum(p.numel() for p in trainable(model).values()) == count
    assert len(torch.optim.SGD(trainable(model).values(), lr=1).param_groups[0]["params"]) == 4 + 5
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in held.values()) == count
    assert sum("a_12x12" in name for name in held) == 1
    file = tmp_path / "adapter_model.safetensors"
    names = 8 + int.from_bytes(file.read_bytes()[:8], "little")  # the names and shapes of nine tensors
    assert file.stat().st_size == 4 * count + names


def test_the_file_of_one_group_of_three_layers_is_within_a_kilobyte_of_its_numbers(tmp_path: Path):
    model = s2(target_modules=[f"square.{i}" for i in range(3)])
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - 4 * (6 * (12 + 12) + 3 * 6) < 1024


def test_whisper_small_trains_the_papers_share_and_keeps_131_times_less_state_than_lora():
    config = WhisperConfig(
        d_model=768,
        encoder_layers=12,
        decoder_layers=12,
        encoder_attention_heads=12,
        decoder_attention_heads=12,
        encoder_ffn_dim=3072,
        decoder_ffn_dim=3072,
    )
    attention = ["q_proj", "k_proj", "v_proj", "out_proj"]
    counts = []
    for make in (S2LoRAConfig, LoraConfig):
        with torch.device("meta"):
            base = WhisperForConditionalGeneration(config)
            total = sum(p.numel() for p in base.parameters())
            counts.append(
                sum(p.numel() for p in trainable(get_peft_model(base, make(r=32, target_modules=attention))).values())
            )
    assert counts[0] == 2 * 768 * 32 + 144 * 32 == 53_760
    assert 0.0002 < counts[0] / total < 0.00025
    assert 131 < counts[1] / counts[0] < 132  # and so two moments of Adam


def sgd_moment(model: nn.Module, learning_rate: float) -> Moment:
    return Moment(model, torch.optim.SGD(trainable(model).values(), lr=learning_rate), step=1)


def test_the_proximal_step_shrinks_by_learning_rate_times_sparsity_to_exact_zeros():
    model = s2(sparsity=0.5)
    with torch.no_grad():
        for layer in layers_of(model):
            layer.coefficients.copy_(torch.tensor([1.0, -1.0, 0.04, -0.04, 0.0, 0.06]))
    model.peft_config["default"].on_step_end(sgd_moment(model, 0.1))
    for layer in layers_of(model):
        torch.testing.assert_close(layer.coefficients, torch.tensor([0.95, -0.95, 0, 0, 0, 0.01]), atol=1e-7, rtol=0)
        assert (layer.coefficients == 0).sum() == 3


def test_a_step_takes_a_hundredth_of_the_learning_rate_off_the_factors_and_nothing_off_the_coefficients():
    model = s2(sparsity=0.0)
    before = {name: p.clone() for name, p in trainable(model).items()}
    model.peft_config["default"].on_step_end(sgd_moment(model, 0.5))
    for name, parameter in trainable(model).items():
        expected = before[name] * (1 if "coefficients" in name else 1 - 0.5 * 0.01)
        torch.testing.assert_close(parameter, expected, rtol=1e-6, atol=0)
    model = s2(sparsity=0.0, factor_decay=0.0)
    before = {name: p.clone() for name, p in trainable(model).items()}
    model.peft_config["default"].on_step_end(sgd_moment(model, 0.5))
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())


def test_ranks_in_use_are_counted_by_layer():
    model = s2()
    with torch.no_grad():
        layers_of(model)[1].coefficients[[0, 3]] = 0
    counts = ranks_in_use(model)
    assert list(counts.values()) == [6, 4, 6, 6, 6]
    assert next(iter(counts)).endswith("square.0")


def test_much_sparsity_takes_every_coefficient_to_zero_and_the_base_back():
    config = S2LoRAConfig(r=3, target_modules=list(TARGETS), sparsity=1e4, init_weights=False)
    x = torch.randn(3, 12)
    with torch.no_grad():
        expected = stack()(x)
    with Recipe(config)(stack()) as model:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        attached_to(model).event("on_step_end", Moment(model, optimizer, step=1))
        assert all((layer.coefficients == 0).all() for layer in layers_of(model))
        with torch.no_grad():
            assert torch.equal(model(x), expected)


def test_the_penalty_is_sparsity_times_the_l1_norm_and_takes_no_proximal_step():
    model = s2(sparsity=0.01, sparsity_by="penalty")
    config = model.peft_config["default"]
    expected = 0.01 * sum(layer.coefficients.abs().sum() for layer in layers_of(model))
    torch.testing.assert_close(config.added_loss(model, {}, None), expected)
    before = [layer.coefficients.clone() for layer in layers_of(model)]
    config.on_step_end(sgd_moment(model, 1.0))
    assert all(torch.equal(a, layer.coefficients) for a, layer in zip(before, layers_of(model), strict=True))
    assert s2(sparsity=0.01).peft_config["default"].added_loss(model, {}, None) is None


@pytest.mark.parametrize("alpha", [None, 12])
def test_compaction_drops_ranks_that_are_zero_everywhere_and_changes_no_output(alpha: float | None, tmp_path: Path):
    model = s2(torch.float64, alpha=alpha)
    with torch.no_grad():
        for index, layer in enumerate(layers_of(model)):
            layer.coefficients[[1, 4]] = 0
            if index == 4:  # the shape of its own needs fewer
                layer.coefficients[[0, 1, 2]] = 0
            elif index:
                layer.coefficients[3] = 0  # zero in some layers, not in all: stays
    x = torch.randn(9, 12, dtype=torch.float64)
    expected = model(x)
    assert compact(model) == 4
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-15)
    assert sum(p.numel() for p in trainable(model).values()) == 4 * (12 + 12) + 4 * (12 + 7) + 5 * 4
    model(x).sum().backward()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(stack(torch.float64), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(again(x), expected, rtol=1e-14, atol=1e-14)
    assert compact(again) == 4


def test_merged_equals_unmerged():
    model = s2(alpha=9)
    x = torch.randn(63, 12)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_still_share_their_factors():
    for twin in (copy.deepcopy(s2()), pickle.loads(pickle.dumps(s2()))):
        first, *others = layers_of(twin)
        assert all(layer.shared_state[0] is first.shared_state[0] for layer in others)
        assert first.shared_state[0] is not layers_of(s2())[0].shared_state[0]
        assert sum(p.numel() for p in trainable(twin).values()) == 6 * (12 + 12) + 6 * (12 + 7) + 5 * 6


def test_an_optimizer_keeps_less_state_than_for_lora_by_the_formula():
    """Twelve square layers of 96 and r = 4 in place of 144 of 768 and r = 32: 16 times less by the same formula."""

    def state(config: Any) -> int:
        config.target_modules = {str(i) for i in range(12)}
        model = get_peft_model(nn.Sequential(*(nn.Linear(96, 96) for _ in range(12))), config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        model(torch.randn(2, 96)).sum().backward()
        optimizer.step()
        return sum(t.nbytes for s in optimizer.state.values() for name, t in s.items() if name != "step")

    count = 2 * 96 * 4 + 12 * 4
    assert state(S2LoRAConfig(r=4)) == 2 * 4 * count
    assert state(LoraConfig(r=4)) / state(S2LoRAConfig(r=4)) == 12 * 2 * 96 * 4 / count


def test_the_packaged_whisper_learns_by_it():
    need("whisper-tiny-en")
    torch.manual_seed(0)
    base = WhisperForConditionalGeneration.from_pretrained(assets.model_folder("whisper-tiny-en"))
    blocks, width = 3 * base.config.decoder_layers, base.config.d_model  # encoder, decoder and cross-attention
    config = S2LoRAConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"])
    sound = torch.randn(1, base.config.num_mel_bins, 3000)
    batch = {"input_features": sound, "labels": torch.tensor([[50257, 50362, 632, 318, 257, 50256]])}
    losses = []
    with Recipe(config)(base) as model:
        learned = [p for p in model.parameters() if p.requires_grad]
        assert sum(p.numel() for p in learned) == 16 * 2 * width + 4 * blocks * 16
        optimizer = torch.optim.AdamW(learned, lr=1e-2)
        for index in range(3):
            loss = model(**batch).loss
            losses.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            attached_to(model).event("on_step_end", Moment(model, optimizer, index + 1))
            optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0], losses


def test_compaction_of_an_adapter_that_learned_nothing_keeps_one_rank():
    model = s2()
    with torch.no_grad():
        for layer in layers_of(model):
            layer.coefficients.zero_()
    assert compact(model) == 1
    x = torch.randn(3, 12)
    with torch.no_grad():
        assert torch.equal(model(x), stack()(x))
    with pytest.raises(ValueError, match="no s2_lora adapter named 'other'"):
        compact(model, "other")


def test_a_layer_keeps_two_tensors_of_r_numbers_a_token_beside_lora_no_dense_delta():
    r, tokens, width = 8, 16, 96
    configs = S2LoRAConfig(r=r), LoraConfig(r=r)
    ours, lora = (counted_step(chain(config, widths=(width,)), tokens).saved_bytes for config in configs)
    inputs, inner, coefficients = 3 * tokens * width, 4 * tokens * r, 4 * r  # the first input is the model's own
    assert lora == 4 * (inputs + inner)
    assert ours == 4 * (inputs + 2 * inner + coefficients)


def test_the_output_is_that_of_the_dense_delta():
    layer = layers_of(s2())[0]
    x = torch.randn(2, 63, 12)
    torch.testing.assert_close(layer.delta_output(x), F.linear(x, layer.delta_weight()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r of s2_lora must be at least 1, got 0"),
        ({"sparsity": -1e-3}, "sparsity of s2_lora must be at least 0, got -0.001"),
        ({"sparsity": float("nan")}, "sparsity of s2_lora must be a number, got nan"),
        ({"factor_decay": -1.0}, r"factor_decay of s2_lora must be at least 0, got -1\.0"),
        ({"sparsity_by": "magic"}, "sparsity_by of s2_lora must be 'proximal' or 'penalty', got 'magic'"),
        ({"init": "zeros"}, "init of s2_lora must be 'kaiming' or 'adalora', got 'zeros'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        S2LoRAConfig(**settings)


def test_no_layer_to_adapt_is_refused():
    with pytest.raises(ValueError, match="squares"):
        get_peft_model(stack(), S2LoRAConfig(target_modules=["squares"]))
