"""Block-affine adaptation as a recipe on peft's MiSS: its equations, merging, counts, memory, refusals."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, MissConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from packaged import losses_of, minilm_and_reviews
from shoestring.memory import Ledger, MemoryReport
from shoestring.recipe import Recipe
from shoestring.testing.adapters import (
    TARGETS,
    TwoLayers,
    batch,
    chain,
    counted_step,
    tiny_llama,
    tokens,
    trainable,
    two_layers,
)
from shoestring.testing.tiny_models import seeded

# the modes of peft's MissConfig: the words of its setting `init_weights`, then further settings. 24 -> 40 -> 16
MODES = {"bat": {"init_weights": "bat"}, "default": {}, "mini": {"init_weights": "mini", "mini_r": 4}}
CASES = [("bat", 8), ("bat", 4), ("bat", 1), ("default", 8), ("default", 7), ("default", 24), ("mini", 8), ("mini", 5)]


def miss(mode: str, r: int, model: nn.Module | None = None, start: bool = False, seed: int = 2) -> PeftModel:
    """`model`, or two layers, under MiSS; its values random, up to 0.1, unless `start`."""
    base = two_layers() if model is None else model
    config = MissConfig(r=r, target_modules=list(TARGETS), **MODES[mode])
    adapted = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    if not start:
        torch.manual_seed(seed)
        with torch.no_grad():
            for block in blocks(adapted):
                block.uniform_(-0.1, 0.1)
    return adapted


def blocks(model: PeftModel) -> list[nn.Parameter]:
    """D of the first and of the second layer."""
    return [getattr(model.base_model.model, name).miss_block["default"] for name in TARGETS]


def changed(mode: str, weight: Tensor, d: Tensor) -> Tensor:
    """W' by the equations, block by block."""
    num_rows, num_columns = weight.shape
    if mode == "bat":
        r = d.shape[-1]
        return torch.cat(
            [
                torch.cat([w @ d[a] + d[a] + w for w in weight[a * r : (a + 1) * r].split(r, dim=1)], dim=1)
                for a in range(num_rows // r)
            ]
        )
    r = d.shape[0]
    columns = [d[column % r] for column in range(num_columns)]
    if mode == "mini":
        columns = [torch.cat([c] * (num_rows // len(c))) for c in columns]
    return weight + torch.stack(columns, dim=1)


def plain(mode: str, base: TwoLayers, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The two layers with dense changed weights."""
    hidden = F.gelu(F.linear(x, changed(mode, base.first.weight, first), base.first.bias))
    return F.linear(hidden, changed(mode, base.second.weight, second), base.second.bias)


@pytest.mark.parametrize("mode", MODES)
def test_it_starts_as_the_pretrained_model(mode: str):
    found, expected = miss(mode, 8, start=True)(batch()), two_layers()(batch())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("mode", "r"), CASES)
def test_outputs_and_gradients_are_those_of_the_equations_in_double_precision(mode: str, r: int, seed: int):
    model, base = miss(mode, r, two_layers(torch.float64).double(), seed=seed), two_layers(torch.float64)
    with torch.no_grad():
        for block in blocks(model):
            block.data = block.double()
    found = []
    for function in (model, lambda x: plain(mode, base, x, *blocks(model))):
        x = batch(torch.float64).requires_grad_()
        y = function(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *blocks(model)])])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


def test_the_default_is_lora_whose_a_is_identities_side_by_side():
    model = miss("default", 8)
    lora = get_peft_model(two_layers(), LoraConfig(r=8, lora_alpha=8, target_modules=list(TARGETS))).eval()
    with torch.no_grad():
        for name, block in zip(TARGETS, blocks(model), strict=True):
            layer = getattr(lora.base_model.model, name)
            a = layer.lora_A["default"].weight
            a.copy_(torch.eye(8).repeat(1, a.shape[1] // 8))
            layer.lora_B["default"].weight.copy_(block.T)
    torch.testing.assert_close(model(batch()), lora(batch()), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_the_default_is_the_sum_of_chunks_times_the_outputs_gradient():
    model = miss("default", 7)
    layer = model.base_model.model.first
    x = batch().flatten(0, 1)
    dy = torch.randn(len(x), 40)
    layer(x).backward(dy)
    chunk_sum = F.pad(x, (0, 4)).view(len(x), 4, 7).sum(1)
    torch.testing.assert_close(blocks(model)[0].grad, chunk_sum.T @ dy, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_bat_is_that_of_its_formula():
    model = miss("bat", 4, two_layers(torch.float64))
    d = blocks(model)[0]
    d.data = d.double()
    x = batch(torch.float64).flatten(0, 1)
    dy = torch.randn(len(x), 40, dtype=torch.float64)
    model.base_model.model.first(x).backward(dy)
    weight, dense = (m.view(10, 4, 6, 4).transpose(1, 2) for m in (two_layers(torch.float64).first.weight, dy.T @ x))
    expected = (weight.mT @ dense + dense).sum(1)
    torch.testing.assert_close(d.grad, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("mode", "r"), CASES)
def test_merged_equals_unmerged_and_unmerging_restores_the_weight(mode: str, r: int):
    model, base = miss(mode, r), two_layers()
    expected = model(batch())
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name in TARGETS:
        restored = getattr(model.base_model.model, name).base_layer.weight
        torch.testing.assert_close(restored, getattr(base, name).weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(batch()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "r", "count"),
    [("bat", 8, 8 * (40 + 16)), ("default", 8, 8 * (40 + 16)), ("default", 7, 7 * (40 + 16)), ("mini", 5, 2 * 5 * 4)],
)
def test_it_trains_r_numbers_an_output_or_r_times_mini_r(mode: str, r: int, count: int):
    assert sum(p.numel() for p in trainable(miss(mode, r)).values()) == count


def test_the_count_of_the_paper_for_its_largest_table():
    """Llama-2-7B, all seven linear layers of 32 blocks, r = 64."""
    with torch.device("meta"):
        block = nn.ModuleDict({n: nn.Linear(4096, 4096, bias=False) for n in ("q", "k", "v", "o")})
        block.update({n: nn.Linear(4096, 11008, bias=False) for n in ("gate", "up")})
        block["down"] = nn.Linear(11008, 4096, bias=False)
        for init in (True, "bat"):
            model = get_peft_model(nn.Sequential(block), MissConfig(target_modules=list(block), init_weights=init))
            assert 32 * sum(p.numel() for p in trainable(model).values()) == 87_031_808
            model.unload()


def test_the_default_converts_to_lora_exactly_and_bat_does_not():
    errors = {}
    for mode in ("default", "bat"):
        model = miss(mode, 8)
        config, state = convert_to_lora(model, rank=8)
        lora = get_peft_model(two_layers(), config).eval()
        set_peft_model_state_dict(lora, state)
        errors[mode] = float((lora(batch()) - model(batch())).detach().abs().max())
    assert errors["default"] < 1e-4
    assert errors["bat"] > 1e-2


def step(config: MissConfig | LoraConfig, num_tokens: int = 96) -> MemoryReport:
    return counted_step(chain(config, widths=(64,)), num_tokens)


@pytest.mark.parametrize("r", [8, 16])
def test_the_default_keeps_r_numbers_a_token_and_no_input(r: int):
    assert step(MissConfig(r=r)).saved_bytes == 4 * 96 * r * 4


def test_the_default_peaks_below_lora_of_as_many_parameters():
    ours, lora = (step(c, 512) for c in (MissConfig(r=16), LoraConfig(r=8)))
    assert ours.trainable_bytes == lora.trainable_bytes
    assert ours.peak_bytes < lora.peak_bytes


def test_bat_keeps_its_input_and_two_dense_weights_a_layer():
    """The copy that it multiplies and the changed one: what `recompute` beside it is for."""
    ours = step(MissConfig(r=16, init_weights="bat")).saved_bytes
    # the first layer's input is the model's own, and needs no gradient that would read the changed weight
    assert ours == (4 + 3) * 64 * 64 * 4 + 3 * 96 * 64 * 4


def test_bat_adds_products_of_the_weight_and_no_products_of_tokens():
    with torch.device("meta"):
        config = MissConfig(r=16, init_weights="bat", target_modules=["0"])
        model = get_peft_model(nn.Sequential(nn.Linear(256, 128)), config)
        for num_tokens in (64, 640):
            with FlopCounterMode(display=False) as counter:
                model(torch.randn(num_tokens, 256))
            assert counter.get_total_flops() == 2 * 256 * 128 * (num_tokens + 16)


def kept(recipe: list[object]) -> tuple[int, dict[str, Tensor]]:
    """Bytes kept by a training step of a tiny decoder, and its gradients."""
    torch.manual_seed(0)
    model = Recipe.from_list(recipe).apply(tiny_llama().train())
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.normal_(std=0.05)
    with Ledger(model) as ledger:
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    return ledger.report().saved_bytes, {name: p.grad for name, p in trainable(model).items()}


@pytest.mark.parametrize("init_weights", ["bat", True])
def test_recompute_beside_it_changes_no_gradient_and_keeps_less(init_weights: str | bool):
    miss = {"miss": {"r": 4, "init_weights": init_weights, "target_modules": ["q_proj", "v_proj", "down_proj"]}}
    most, expected = kept([miss])
    least, found = kept([miss, "recompute"])
    assert least < 0.5 * most
    assert len(expected) == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_bat_hides_an_adapter_that_stands_on_the_layer_before_it():
    """A fault of peft's, and why the page says to put them on different layers; tell it there when this fails."""
    lora = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
    bat = MissConfig(r=4, target_modules=["v_proj"], init_weights="bat")
    expected = tiny_llama()(input_ids=tokens()).logits
    torch.manual_seed(0)
    assert torch.equal(Recipe(lora, bat).apply(tiny_llama()).eval()(input_ids=tokens()).logits, expected)
    assert not torch.equal(Recipe(bat, lora).apply(tiny_llama()).eval()(input_ids=tokens()).logits, expected)


def test_a_small_d_survives_a_bfloat16_weight():
    """W D + D is formed in D's float32; in bfloat16, 1 + 1/1024 would be 1."""
    layer = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(layer.weight)
    model = get_peft_model(nn.Sequential(layer), MissConfig(r=8, init_weights="bat", target_modules=["0"]))
    d = model.base_model.model[0].miss_block["default"]
    assert d.dtype == torch.float32
    with torch.no_grad():
        d.fill_(2.0**-13)
    delta = model.base_model.model[0].get_delta_weight("default", layer.weight)
    torch.testing.assert_close(layer.weight + delta, torch.full((8, 8), 1 + 9 * 2.0**-13), rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_on_a_packed_base_it_is_that_on_the_unpacked_weight(mode: str):
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    packed, restored = two_layers(), two_layers()
    packed.first, restored.first = bnb.nn.Linear4bit(64, 32, quant_type="nf4"), nn.Linear(64, 32)
    packed.first.load_state_dict(restored.first.state_dict())
    packed.first = packed.first.to("cpu")
    packed.second = restored.second = nn.Linear(32, 16)
    layer: nn.Module = packed.first
    with torch.no_grad():
        restored.first.weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    x, found = torch.randn(5, 64), []
    for model in (miss(mode, 8, restored).train(), miss(mode, 8, packed).train()):
        (y := model(x)).sum().backward()
        found.append((y, *(block.grad for block in blocks(model))))
    for ours, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_conv1d_is_refused():
    model = nn.Sequential(Conv1D(16, 24))
    with pytest.raises((ValueError, TypeError), match="Conv1D"):
        get_peft_model(model, MissConfig(r=8, target_modules=["0"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 5, "init_weights": "bat"}, r"fully divisible into \[r, r\] blocks"),
        ({"r": 8, "init_weights": "mini", "mini_r": 7}, "mini_r is divided along the out_features dimension"),
        ({"r": 48}, r"`r` \(48\) must be less than or equal to in_features \(24\)"),
        ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        get_peft_model(two_layers(), MissConfig(target_modules=list(TARGETS), **settings))


@pytest.mark.parametrize("init_weights", ["bat", True])
def test_a_packaged_encoder_learns_reviews_with_it(init_weights: str | bool):
    base, inputs = minilm_and_reviews(16)
    settings = {"r": 16, "init_weights": init_weights, "target_modules": ["query", "value"]}
    recipe = Recipe.from_list([{"miss": {**settings, "modules_to_save": ["classifier"]}}])
    with seeded(0):
        losses = losses_of(recipe.apply(base).train(), inputs, own="miss_", steps=8, lr=2e-3)
    assert losses[-1] < 0.9 * losses[0]
