"""L4Q: its equation and gradients, its start, warm-up, memory, refusals; rounding learned and rounding after."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from shoestring.adapters import L4Q, L4QConfig
from shoestring.adapters.l4q import adapters_in
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.quantisation import (
    PackedLinear,
    dequantise,
    load_packed,
    pack_model,
    round_to_nearest,
    save_packed,
)
from shoestring.quantisation.groups import bounds, to_groups
from shoestring.quantisation.packed_model import TENSORS_FILE
from shoestring.quantisation.packing import unpack
from shoestring.recipe import Recipe, attached_to
from shoestring.technique import Moment
from shoestring.testing.adapters import (
    TARGETS,
    adapted,
    batch,
    chain,
    counted_step,
    tiny_llama,
    tokens,
    trainable,
    two_layers,
)
from shoestring.testing.assets import need
from shoestring.testing.packed_layers import KINDS, pack_layer
from shoestring.training import RunSettings, train

PARTS = (".codes", ".step", ".offset")


def one_layer(out_features: int = 13, in_features: int = 12, seed: int = 0, **settings) -> L4Q:
    """An adapter in float64 with random factors, away from its start."""
    torch.manual_seed(seed)
    config = L4QConfig(init_weights=False, **{"r": 3, "group_size": 4, **settings})
    return L4Q(nn.Linear(in_features, out_features), config).double()


def reference_weight(adapter: L4Q, weight: Tensor) -> Tensor:
    """W' in plain differentiable operations, the rounding as a constant that is added."""
    low, high = bounds(adapter.bits)
    step = adapter.log_step.exp()[..., None]
    offset = 0 if adapter.offset is None else step * adapter.offset[..., None]
    merged = (weight + adapter.scale * adapter.b @ adapter.a).unflatten(1, (-1, adapter.group_size))
    clamped = ((merged - offset) / step).clamp(low, high)
    codes = clamped + (clamped.round() - clamped).detach()
    return (step * codes + offset).flatten(1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 2},
        {"bits": 3, "group_size": 12, "alpha": 5.0},
        {"bits": 4, "group_size": 1},
        {"bits": 5, "learn_offset": False},
        {"bits": 8, "group_size": 3, "r": 1},
    ],
)
def test_outputs_and_all_gradients_are_those_of_rounding_gone_straight_through(settings: dict, seed: int):
    adapter = one_layer(seed=seed, **settings)
    weight = torch.randn(13, 12, dtype=torch.float64).mul_(0.2).requires_grad_()
    bias = torch.randn(13, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 5, 13, dtype=torch.float64)
    inputs = [x, weight, bias, *adapter.parameters()]

    expected = nn.functional.linear(x, reference_weight(adapter, weight), bias)
    wanted = torch.autograd.grad((expected * up).sum(), inputs)
    y = adapter.linear(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for got, want in zip(torch.autograd.grad((y * up).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    positions = torch.cat([block.positions for block in adapter._factors(weight).blocks()])
    low, high = bounds(adapter.bits)
    if adapter.bits < 8:
        assert (positions < low).any(), "weights are clipped below"
        assert (positions > high).any(), "and above"
    torch.testing.assert_close(adapter.new_weight(weight), reference_weight(adapter, weight), rtol=1e-12, atol=1e-12)


def test_gradients_of_step_and_offset_are_those_of_the_paper_on_numbers_worked_out_by_hand():
    adapter = one_layer(1, 4, r=1, bits=2, group_size=4)
    with torch.no_grad():
        adapter.b.zero_()
        adapter.log_step.fill_(0.5).log_()  # t = 0.5
        adapter.offset.fill_(0.5)  # b = 0.25
    # (W - b) / t, to which codes -2 .. 1 belong: below, on the lower bound, inside, above
    positions = torch.tensor([[-3.0, -2.0, 0.25, 1.75]], dtype=torch.float64)
    codes = torch.tensor([[-2.0, -2.0, 0.0, 1.0]], dtype=torch.float64)
    weight = 0.5 * positions + 0.25
    torch.testing.assert_close(adapter.new_weight(weight), 0.5 * codes + 0.25)
    x = torch.eye(4, dtype=torch.float64)
    d = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=torch.float64)  # dL/dW'
    adapter.linear(x, weight, None).backward(d.T)
    d_step = 1 * -2 + 10 * (-2 + 2) + 100 * (0 - 0.25) + 1000 * 1
    d_offset = 1 + 1000
    torch.testing.assert_close(adapter.offset.grad, torch.tensor([[0.5 * d_offset]], dtype=torch.float64))
    with_log = 0.5 * (d_step + 0.5 * d_offset)  # t = exp(u), b = t z
    torch.testing.assert_close(adapter.log_step.grad, torch.tensor([[with_log]], dtype=torch.float64))
    masked = torch.tensor([[0.0, 10.0, 100.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(adapter.b.grad, masked @ adapter.a.detach().T)


@pytest.mark.parametrize("side", [0, 1])
def test_a_weight_exactly_on_a_bound_counts_as_inside(side: int):
    adapter = one_layer(1, 4, r=1, bits=4, group_size=4, learn_offset=False)
    with torch.no_grad():
        adapter.b.zero_()
        adapter.log_step.zero_()
    bound = bounds(4)[side]
    weight = torch.tensor([[bound, bound * (1 + 1e-12), 0.0, bound]], dtype=torch.float64, requires_grad=True)
    adapter.linear(torch.eye(4, dtype=torch.float64), weight, None).sum().backward()
    assert weight.grad.tolist() == [[1.0, 0.0, 1.0, 1.0]]


def test_the_scale_of_lsq_makes_a_plain_step_that_of_step_and_offset_themselves():
    plain, scaled = one_layer(bits=3), one_layer(bits=3)
    scaled.lsq_scale = True
    weight, x = torch.randn(13, 12, dtype=torch.float64).mul_(0.3), torch.randn(5, 12, dtype=torch.float64)
    for adapter in (plain, scaled):
        adapter.linear(x, weight, None).square().sum().backward()
    step, offset = plain.log_step.detach().exp(), plain.offset.detach()
    d_offset = plain.offset.grad / step  # db, and dt of u's gradient, t (dt + z db)
    d_step = plain.log_step.grad / step - offset * d_offset
    rate, lsq = 1e-7, 1 / (4 * bounds(3)[1]) ** 0.5
    new_step = (scaled.log_step.detach() - rate * scaled.log_step.grad).exp()
    new_offset = new_step * (offset - rate * scaled.offset.grad)
    total = d_step + offset * d_offset  # t moves b = t z along
    torch.testing.assert_close((new_step - step) / rate, -lsq * total, rtol=1e-4, atol=1e-5)
    moved_by_step = offset * (new_step - step)
    moved = new_offset - step * offset - moved_by_step
    torch.testing.assert_close(moved / rate, -lsq * d_offset, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain.b.grad, scaled.b.grad, rtol=0, atol=0)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_starts_as_the_pretrained_weight_rounded_to_nearest(bits: int, dtype: torch.dtype):
    model = adapted(L4QConfig, lambda: {"bits": bits, "group_size": 8}, two_layers(dtype), init_weights=True)
    for name, adapter in adapters_in(model).items():
        weight = two_layers(dtype).get_submodule(name.split(".")[2]).weight.detach()
        low, high = bounds(bits)
        rounded = dequantise(*round_to_nearest(weight, bits, 8))
        made = adapter._factors(weight).quantised(torch.float32)
        middle = (to_groups(weight.float(), 8) / adapter.log_step.exp()[..., None] % 1 - 0.5).abs().flatten(1) < 1e-3
        assert middle.float().mean() < 0.05, "weights in the middle between two codes may go to either"
        torch.testing.assert_close(made[~middle], rounded[~middle], rtol=1e-5, atol=0)
        for block in adapter._factors(weight).blocks():
            assert low <= block.positions.min(), "nothing is clipped"
            assert block.positions.max() <= high
        half = to_groups(made - weight.float(), 8).abs() / adapter.log_step.exp()[..., None]
        assert half.max() <= 0.5 * (1 + 1e-5)
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}


def test_groups_of_zeros_start_with_the_mean_step_of_the_layer():
    base = nn.Linear(8, 3)
    with torch.no_grad():
        base.weight[0] = 0
    adapter = L4Q(base, L4QConfig(group_size=4, bits=3))
    with torch.no_grad():
        adapter.start(base.weight)
    step = adapter.log_step.exp()
    torch.testing.assert_close(step[0], step[1:].mean().expand(2))
    assert not adapter.new_weight(base.weight)[0].any()
    with torch.no_grad():
        adapter.start(torch.zeros(3, 8))
    assert (adapter.log_step == adapter.log_step[0, 0]).all()


def test_with_16_bits_it_is_lora():
    adapter = one_layer()
    adapter.bits = 16
    weight, x = torch.randn(13, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    merged = weight + adapter.scale * adapter.b @ adapter.a
    with torch.no_grad():
        adapter.start(merged)
        adapter.offset.zero_()
    y = adapter.linear(x, weight, None)
    assert (y - x @ merged.T).norm() < 1e-3 * y.norm()
    y.square().sum().backward()
    expected = torch.autograd.grad((x @ merged.T).square().sum(), [adapter.a, adapter.b])
    for got, want in zip((adapter.a.grad, adapter.b.grad), expected, strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()


def test_steps_stay_positive_whatever_the_optimizer_does():
    model = adapted(L4QConfig, lambda: {"group_size": 4, "bits": 3}).train()
    optimizer = torch.optim.Adam(trainable(model).values(), lr=100.0)
    for _ in range(5):
        for parameter in trainable(model).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    for name, adapter in adapters_in(model).items():
        weight = two_layers().get_submodule(name.split(".")[2]).weight.detach()
        for block in adapter._factors(weight).blocks():
            assert (block.step > 0).all()
            assert torch.isfinite(block.weight()).all()


def test_parameters_stay_in_32_bits_when_the_model_is_cast():
    adapter = L4Q(nn.Linear(8, 4), L4QConfig(group_size=4, r=2))
    with torch.no_grad():
        adapter.log_step.fill_(-3.14159)
    before = adapter.log_step.detach().clone()
    adapter.to(torch.bfloat16)
    assert torch.equal(adapter.log_step, before)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert {p.dtype for p in adapter.double().parameters()} == {torch.float64}


@pytest.mark.parametrize(("learn_offset", "count"), [(True, 2), (False, 1)])
def test_it_trains_two_factors_and_a_step_and_an_offset_a_group(learn_offset: bool, count: int):
    settings = {"r": 3, "group_size": 8, "learn_offset": learn_offset}
    model = adapted(L4QConfig, lambda: settings)
    groups = 40 * 24 // 8 + 16 * 40 // 8
    assert sum(p.numel() for p in trainable(model).values()) == 3 * (24 + 40 + 40 + 16) + count * groups


def test_the_default_is_all_linear_layers_but_the_head():
    model = get_peft_model(tiny_llama(), L4QConfig(group_size=8))
    names = {name.split(".")[-3] for name in adapters_in(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def trained_through_a_warm_up(warmup_steps: int, optimizer_class: type = torch.optim.Adam) -> list[dict[str, Tensor]]:
    """Copies of steps and offsets after each of four optimizer steps of a recipe, the start first."""
    config = L4QConfig(
        target_modules=["v_proj", "down_proj"], group_size=8, bits=3, warmup_steps=warmup_steps, init_weights=False
    )
    model = Recipe(config).apply(tiny_llama()).train()
    attached = attached_to(model)
    optimizer = optimizer_class(trainable(model).values(), lr=1e-2)
    seen = []
    for step in range(5):
        seen.append({n: p.detach().clone() for n, p in trainable(model).items() if n.endswith(("log_step", "offset"))})
        attached.event("on_step_begin", Moment(model, optimizer, step))
        optimizer.zero_grad()
        model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
        optimizer.step()
        attached.event("on_step_end", Moment(model, optimizer, step + 1))
    return seen


def test_steps_and_offsets_learn_from_the_end_of_the_warm_up_on():
    seen = trained_through_a_warm_up(2)
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in seen[0])
    assert any(not torch.equal(seen[2][name], seen[3][name]) for name in seen[0])
    at_once = trained_through_a_warm_up(0)
    assert any(not torch.equal(at_once[0][name], at_once[1][name]) for name in at_once[0])


def test_gradients_of_the_grid_are_scaled_where_the_optimizer_is_plain_sgd():
    config = L4QConfig(target_modules=["first"], group_size=8)
    model = get_peft_model(two_layers(), config)
    (adapter,) = adapters_in(model).values()
    for make, expected in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        config.on_step_begin(Moment(model, make(trainable(model).values(), lr=0.1), 100))
        assert adapter.lsq_scale is expected
    always = L4QConfig(lsq_scale=True)
    always.on_step_begin(Moment(model, torch.optim.AdamW(trainable(model).values()), 100))
    assert adapter.lsq_scale


def test_steps_and_offsets_are_without_weight_decay():
    config = L4QConfig(target_modules=list(TARGETS), group_size=8, warmup_steps=3)
    model = get_peft_model(two_layers(), config)
    (group,) = config.parameter_groups(model)
    assert group["weight_decay"] == 0
    grids = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
    assert grids == {n for n in trainable(model) if n.endswith(("log_step", "offset"))}
    assert config.idle_parameters(model) == grids
    config.warmup_steps = 0
    assert config.idle_parameters(model) == {name for name in grids if name.endswith("offset")}


def test_gradients_of_accumulated_batches_add_up_and_nothing_dense_is_left_behind():
    model = adapted(L4QConfig, lambda: {"group_size": 8, "bits": 3})
    parts = []
    for seed in (1, 2):
        model.zero_grad()
        model(batch(seed=seed)).square().mean().backward()
        parts.append({name: p.grad.clone() for name, p in trainable(model).items()})
    model.zero_grad()
    for seed in (1, 2):
        model(batch(seed=seed)).square().mean().backward()
    for name, parameter in trainable(model).items():
        torch.testing.assert_close(parameter.grad, parts[0][name] + parts[1][name])


def test_only_the_layer_inputs_are_kept_for_backward():
    between = 64 * 4 * (192 + 256 + 192)  # inputs of layers 2 to 4; the first one's is the model's own
    assert counted_step(chain(L4QConfig(r=4, group_size=64), widths=(256, 192)), 64).saved_bytes == between


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("depth", [2, 6])
def test_the_peak_is_loras_the_grids_and_three_matrices_of_one_layer(depth: int, dtype: torch.dtype):
    sizes = (512, 768)
    configs = L4QConfig(r=4, group_size=128), LoraConfig(r=4)
    l4q, lora = (counted_step(chain(config, depth, sizes, dtype), 64).peak_bytes for config in configs)
    gradients_of_grids = depth * 2 * 512 * 768 // 128 * 4
    weights_of_grids = gradients_of_grids
    assert l4q - lora <= 3 * 512 * 768 * dtype.itemsize + gradients_of_grids + weights_of_grids


@pytest.mark.slow
def test_a_step_of_a_decoder_peaks_below_1_03_of_lora():
    """Linear layers with the widths of a decoder of a billion weights, 4096 tokens, counted without computing.

    Activations hide the matrices of a layer, which the test above counts one by one.
    """

    def peak(config) -> int:
        with torch.device("meta"):
            block = [(2048, 2048), (2048, 512), (512, 2048), (2048, 8192), (8192, 2048)]
            model = nn.Sequential(*(nn.Linear(*sizes, bias=False, dtype=torch.bfloat16) for sizes in block * 2))
            config.target_modules = {str(i) for i in range(len(block) * 2)}
            adapted_model = get_peft_model(model, config).bfloat16()  # or LoRA keeps x in 32 bits too
            optimizer = torch.optim.AdamW(trainable(adapted_model).values())
            with Ledger(adapted_model) as ledger:
                adapted_model(torch.empty(4096, 2048, dtype=torch.bfloat16)).sum().backward()
                optimizer.step()
        return ledger.report().peak_bytes

    lora = peak(LoraConfig(r=4))
    assert peak(L4QConfig(r=4)) <= 1.03 * lora
    assert peak(L4QConfig(r=4, learn_offset=False)) <= 1.03 * lora


def test_three_bits_learned_end_below_lora_rounded_after():
    def in_three_bits(weight: Tensor) -> Tensor:
        return dequantise(*round_to_nearest(weight.detach(), 3, 16))

    def fit(config, seed: int, on_rounded: bool = False) -> float:
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(32, 24, bias=False))
        x = torch.randn(256, 32)
        change = torch.randn(24, 3) @ torch.randn(3, 32) * 0.05
        y = x @ (base[0].weight.detach() + change).T
        if on_rounded:
            base[0].weight.data = in_three_bits(base[0].weight)
        model = get_peft_model(base, config)
        optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
        for _ in range(120):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        if isinstance(config, LoraConfig):
            model = model.merge_and_unload()
            model[0].weight.data = in_three_bits(model[0].weight)
        with torch.no_grad():
            return float((model(x) - y).square().mean())

    for seed in range(3):
        learned = fit(L4QConfig(r=4, bits=3, group_size=16, target_modules=["0"]), seed)
        after = [fit(LoraConfig(r=4, target_modules=["0"]), seed, on_rounded) for on_rounded in (False, True)]
        assert learned < 0.9 * min(after), (seed, learned, after)


@pytest.mark.parametrize("other", [{"recompute": {}}, {"chunked_loss": {}}, {"token_tune": {"keep_fraction": 0.5}}])
def test_it_trains_beside_techniques_that_save_memory(other: dict):
    own = {"l4q": {"group_size": 8, "r": 2, "bits": 4}}
    model = Recipe.from_list([own, other]).apply(tiny_llama()).train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = {n: p.grad for n, p in trainable(model).items() if not n.endswith("offset")}
    assert all(g is not None and torch.isfinite(g).all() for g in gradients.values())
    if "recompute" in other:
        alone = Recipe.from_list([own]).apply(tiny_llama()).train()
        alone.load_state_dict(model.state_dict())
        alone(input_ids=tokens(), labels=tokens()).loss.backward()
        for name, parameter in trainable(alone).items():
            torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits of l4q must be a whole number from 2 to 8, got 1"),
        ({"bits": 9}, "bits of l4q must be a whole number from 2 to 8, got 9"),
        ({"bits": 4.0}, "bits of l4q must be a whole number from 2 to 8, got 4.0"),
        ({"r": 0}, "r of l4q must be at least 1, got 0"),
        ({"group_size": 0}, "group_size of l4q must be at least 1, got 0"),
        ({"warmup_steps": -1}, "warmup_steps of l4q must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        L4QConfig(**settings)
    with pytest.raises(SettingError, match=message):
        Recipe.from_list([{"l4q": settings}])


def test_groups_that_do_not_divide_the_inputs_are_refused_naming_the_layer():
    with pytest.raises(ValueError, match=r"^first: group_size must divide the layer's 24 inputs, got 16; take"):
        get_peft_model(two_layers(), L4QConfig(group_size=16, target_modules=list(TARGETS)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_is_refused_naming_the_layer(kind: str):
    model = two_layers()
    pack_layer(model, "first", kind)
    with pytest.raises(ValueError, match=r"^first: its weight, of type Linear(4bit)?, is quantised already"):
        get_peft_model(model, L4QConfig(group_size=8, target_modules=list(TARGETS)))


def test_tied_weights_are_refused_naming_the_layers():
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    with pytest.raises(ValueError, match=r"^lm_head: its weight is that of model\.embed_tokens too"):
        get_peft_model(model, L4QConfig(group_size=8, target_modules=["lm_head"]))


def test_two_of_them_on_one_layer_cannot_be_active_together():
    model = adapted(L4QConfig, lambda: {"group_size": 8})
    model.add_adapter("other", L4QConfig(group_size=4, target_modules=list(TARGETS)))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="l4q cannot have several active adapters"):
        model(batch())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_saved_steps_that_are_not_positive_numbers_are_refused_naming_the_layer(tmp_path, value: float):
    adapted(L4QConfig, lambda: {"group_size": 8}).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    name = next(n for n in held if n.endswith("second.l4q_.log_step"))
    held[name][3, 1] = value
    save_file(held, file)
    with pytest.raises(ValueError, match=r"second\.l4q_\.default\.log_step holds steps that are zero or no number"):
        PeftModel.from_pretrained(two_layers(), tmp_path)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("learn_offset", [True, False])
def test_packing_a_layer_gives_codes_in_range_that_give_the_training_output(learn_offset: bool, bits: int):
    low, high = bounds(bits)
    for dtype in (torch.float32, torch.bfloat16):
        settings = {"group_size": 8, "bits": bits, "learn_offset": learn_offset}
        model = adapted(L4QConfig, lambda settings=settings: settings, two_layers(dtype))
        expected = model(batch(dtype))
        packed = pack_model(copy.deepcopy(model))
        assert torch.equal(packed(batch(dtype)), expected)
        for adapter, name in zip(adapters_in(model).values(), TARGETS, strict=True):
            layer, base = packed.get_submodule(name), getattr(model.base_model.model, name).base_layer
            codes = torch.cat([block.codes.flatten(1) for block in adapter._factors(base.weight.detach()).blocks()])
            assert low <= codes.min() <= codes.max() <= high
            assert torch.equal(unpack(layer.codes, bits, layer.in_features).int() + low, codes.int())
        model.merge_adapter()
        assert torch.equal(packed.first.weight, model.base_model.model.first.base_layer.weight)


@pytest.mark.slow
def test_a_packaged_decoder_learns_in_the_trainer_and_is_packed(tmp_path):
    need("smollm2", "gsm8k-test")
    run = {
        "model": {"name": "packaged:smollm2", "dtype": "float32"},
        "task": "causal-lm",
        "data": {"train": "packaged:gsm8k-test", "text": "question", "max_length": 96, "max_train_rows": 3},
        "recipe": [{"l4q": {"group_size": 64, "warmup_steps": 1}}],
        "train": {
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "learning_rate": 2e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 0,
        },
        "output_dir": str(tmp_path / "run"),
    }
    trained: list[nn.Module] = []
    report = train(RunSettings.from_dict(run), on_ready=lambda ready: trained.append(ready.trainer.model))
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < 0.8 * losses[0], losses

    model = trained[0].eval()
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        packed = pack_model(model)
        assert torch.equal(packed(input_ids=ids).logits, expected)
        save_packed(packed, tmp_path / "packed")
        again = load_packed(AutoModelForCausalLM, tmp_path / "packed")
        assert torch.equal(again(input_ids=ids).logits, expected)
    linear = sum(m.in_features * m.out_features for m in packed.modules() if isinstance(m, PackedLinear))
    stored = sum(t.nbytes for n, t in load_file(tmp_path / "packed" / TENSORS_FILE).items() if n.endswith(PARTS))
    assert linear == 106_168_320
    assert stored == linear * (4 / 8 + 2 * 4 / 64), "four bits a weight, and two numbers a group"
