"""HUT: its equation, parity with peft's HiRA, merging, what it keeps for backward, operations, refusals."""

import pytest
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from shoestring.adapters import HUT, HUTConfig
from shoestring.errors import SettingError
from shoestring.recipe import Recipe
from shoestring.testing.adapters import TARGETS, adapted, batch, chain, counted_step, trainable, two_layers


def huts(model: nn.Module) -> list[HUT]:
    return [m for m in model.modules() if isinstance(m, HUT)]


def test_the_equation_on_numbers_small_enough_to_check_by_hand():
    weight = torch.tensor([[1.0, 2.0], [3.0, -4.0]])
    hut = HUT(nn.Linear(2, 2), HUTConfig(r=1, alpha=2))
    with torch.no_grad():
        hut.a.copy_(torch.tensor([[1.0], [-1.0]]))
        hut.b.copy_(torch.tensor([[0.5, 1.0]]))
    # 1 + 2 A B = [[2, 3], [0, -1]]
    assert torch.equal(hut.new_weight(weight), torch.tensor([[2.0, 6.0], [0.0, 4.0]]))
    literal = HUT(nn.Linear(2, 2), HUTConfig(r=1, form="literal"))
    assert torch.equal(literal.new_weight(weight), weight)
    literal.load_state_dict(hut.state_dict())
    assert torch.equal(literal.new_weight(weight), torch.tensor([[0.5, 2.0], [-1.5, 4.0]]))


@pytest.mark.parametrize("form", ["residual", "literal"])
def test_both_forms_start_as_the_pretrained_weight_bit_by_bit(form: str):
    weight = torch.randn(7, 5)
    assert torch.equal(HUT(nn.Linear(5, 7), HUTConfig(r=3, form=form)).new_weight(weight), weight)


def test_outputs_and_gradients_are_those_of_hira():
    ours = adapted(HUTConfig, lambda: {"r": 3})
    theirs = get_peft_model(two_layers(), HiraConfig(r=3, target_modules=list(TARGETS), init_weights=True)).eval()
    layers = [getattr(theirs.base_model.model, name) for name in TARGETS]
    for hut, layer in zip(huts(ours), layers, strict=True):
        with torch.no_grad():
            layer.hira_A["default"].copy_(hut.b)
            layer.hira_B["default"].copy_(hut.a)
    x, y = (batch().requires_grad_() for _ in range(2))
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    pairs = [(ours(x), theirs(y)), (x.grad, y.grad)]
    for hut, layer in zip(huts(ours), layers, strict=True):
        pairs += [(hut.a.grad, layer.hira_B["default"].grad), (hut.b.grad, layer.hira_A["default"].grad)]
    for mine, wanted in pairs:
        assert float(wanted.abs().max()) > 0
        torch.testing.assert_close(mine / wanted.abs().max(), wanted / wanted.abs().max(), rtol=0, atol=1e-6)


def dense(hut: HUT, weight: Tensor) -> Tensor:
    """W' as the equation has it, without the wrapper's rebuilding."""
    product = hut.a @ hut.b
    return weight * (1 + hut.scale * product) if hut.residual else weight * product


@pytest.mark.parametrize("settings", [{"r": 3, "alpha": 6}, {"r": 4, "form": "literal"}])
def test_outputs_and_gradients_are_those_of_a_dense_reference_in_double_precision(settings: dict):
    model = adapted(HUTConfig, lambda: settings, two_layers(torch.float64)).double()
    first, second = huts(model)
    x = batch(torch.float64)
    model(x).square().sum().backward()
    grads = [p.grad.clone() for p in trainable(model).values()]
    model.zero_grad()
    base = two_layers(torch.float64)
    hidden = torch.nn.functional.gelu(x @ dense(first, base.first.weight).T + base.first.bias)
    expected = hidden @ dense(second, base.second.weight).T + base.second.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    expected.square().sum().backward()
    for grad, parameter in zip(grads, trainable(model).values(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("r", [1, 2, 8])
def test_the_weight_side_equals_the_token_side(r: int):
    """(W * (A B)) x is the sum over k of A[:, k] * (W (B[k] * x)): r products with the base weight itself."""
    torch.manual_seed(0)
    base = nn.Linear(11, 7, bias=False)
    hut = HUT(base, HUTConfig(r=r, init_weights=False))
    x = torch.randn(63, 11)
    tokens = base(x) + sum(hut.scale * hut.a[:, k] * base(hut.b[k] * x) for k in range(r))
    torch.testing.assert_close(x @ hut.new_weight(base.weight).T, tokens, rtol=1e-5, atol=1e-5)


def test_the_literal_form_of_one_rank_more_reproduces_the_residual_form():
    torch.manual_seed(0)
    base = nn.Linear(11, 7)
    residual = HUT(base, HUTConfig(r=3, alpha=6, init_weights=False))
    literal = HUT(base, HUTConfig(r=4, form="literal"))
    with torch.no_grad():  # its first column and row of ones stay
        literal.a[:, 1:] = residual.scale * residual.a
        literal.b[1:] = residual.b
    torch.testing.assert_close(literal.new_weight(base.weight), residual.new_weight(base.weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["residual", "literal"])
def test_both_forms_start_as_the_pretrained_model_bit_by_bit(form: str):
    model = get_peft_model(two_layers(), HUTConfig(r=3, form=form, target_modules=list(TARGETS))).eval()
    with torch.no_grad():
        assert torch.equal(model(batch()), two_layers().eval()(batch()))


@pytest.mark.parametrize("form", ["residual", "literal"])
def test_a_pretrained_weight_that_trains_too_gets_its_gradient(form: str):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    hut = HUT(nn.Linear(5, 7), HUTConfig(r=3, form=form, init_weights=False)).double()
    upstream = torch.randn(7, 5, dtype=torch.float64)
    found = torch.autograd.grad((hut.new_weight(weight) * upstream).sum(), [weight, hut.a, hut.b])
    wanted = torch.autograd.grad((dense(hut, weight) * upstream).sum(), [weight, hut.a, hut.b])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_blocks_of_rows_make_up_the_whole_gradient():
    torch.manual_seed(0)
    weight = torch.randn(301, 257, dtype=torch.float64)  # 16 blocks, the last one short
    hut = HUT(nn.Linear(257, 301), HUTConfig(r=2, init_weights=False)).double()
    upstream = torch.randn_like(weight)
    found = torch.autograd.grad((hut.new_weight(weight) * upstream).sum(), [hut.a, hut.b])
    wanted = torch.autograd.grad((dense(hut, weight) * upstream).sum(), [hut.a, hut.b])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("form", ["residual", "literal"])
def test_merged_equals_unmerged_and_unmerging_brings_the_weight_back_bit_by_bit(form: str):
    model = adapted(HUTConfig, lambda: {"r": 3, "form": form})
    base = model.base_model.model.first.base_layer
    before, expected = base.weight.clone(), model(batch())
    model.merge_adapter()
    assert not torch.equal(base.weight, before)
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.weight, before)


def test_merged_equals_unmerged_in_bfloat16_within_two_percent():
    model = adapted(HUTConfig, lambda: {"r": 3}, two_layers(torch.bfloat16))
    expected = model(batch(torch.bfloat16)).float()
    model.merge_adapter()
    error = (model(batch(torch.bfloat16)).float() - expected).abs().max() / expected.abs().max()
    assert error < 0.02


def test_a_small_factor_survives_bfloat16():
    """1 + N would round to 1 for N below 1/256; W + W * N keeps it, in the adapter's float32."""
    model = adapted(HUTConfig, lambda: {"r": 1}, two_layers(torch.bfloat16))
    hut = huts(model)[0]
    with torch.no_grad():
        hut.a.fill_(1)
        hut.b.fill_(2**-10)
    layer = model.base_model.model.first
    weight = layer.base_layer.weight.float()
    torch.testing.assert_close(layer._new_weight([hut]), weight * (1 + 2**-10), rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("form", "count"), [("residual", 3 * (24 + 40 + 40 + 16)), ("literal", 3 * (24 + 40 + 40 + 16))]
)
def test_it_trains_r_times_in_plus_out_numbers_a_layer(form: str, count: int):
    assert sum(p.numel() for p in trainable(adapted(HUTConfig, lambda: {"r": 3, "form": form})).values()) == count


def test_only_the_layer_inputs_are_kept_for_backward():
    between = 64 * 4 * (192 + 256 + 192)  # inputs of layers 2 to 4; the first one's is the model's own
    assert counted_step(chain(HUTConfig(r=8), widths=(256, 192)), 64).saved_bytes == between


@pytest.mark.parametrize("depth", [2, 6])
def test_the_peak_is_loras_and_one_dense_tensor_of_one_layer(depth: int):
    chains = (chain(config(r=8), depth, (1024, 768)) for config in (HUTConfig, LoraConfig))
    peaks = [counted_step(model, 64).peak_bytes for model in chains]
    assert peaks[0] - peaks[1] <= 1.1 * 1024 * 768 * 4


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_forward_adds_operations_that_do_not_grow_with_the_tokens(tokens: int):
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(1024, 512)), HUTConfig(r=8, target_modules=["0"]))
        x = torch.randn(tokens, 1024, requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = model(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    gemm, product = 2 * tokens * 1024 * 512, 2 * 8 * 1024 * 512
    assert forward.get_total_flops() == gemm + product
    # the dense weight gradient that LoRA never forms, W' again, and its two factors
    assert backward.get_total_flops() == 2 * gemm + 3 * product
    of_lora = 2 * tokens * 8 * (1024 + 512)  # beside the layer, in the forward; twice that in the backward
    assert (product < of_lora) == (tokens > 1024 * 512 / (1024 + 512))
    assert gemm + 4 * product > 3 * of_lora, "in the whole step LoRA takes fewer"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r of hut must be at least 1, got 0"),
        ({"form": "bad"}, "form of hut must be 'residual' or 'literal', got 'bad'"),
        ({"form": "literal", "alpha": 4}, "alpha of hut scales the residual form only"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HUTConfig(**settings)


def test_layers_whose_weight_is_no_matrix_are_refused_by_name():
    with pytest.raises(TypeError, match="hut adapts Linear and Conv1D only, but target module 0 is of type Conv2d"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), HUTConfig(target_modules=["0"]))


def test_dropout_is_no_setting_of_hut():
    """On a path that replaces the weight, dropout of x would change the base model's output."""
    with pytest.raises(SettingError, match="unknown setting 'dropout'"):
        Recipe.from_list([{"hut": {"dropout": 0.1}}])


def test_unmerging_what_was_never_merged_warns():
    model = adapted(HUTConfig, lambda: {"r": 3})
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_a_merged_layer_without_its_saved_copy_is_not_unmerged_and_says_so():
    model = adapted(HUTConfig, lambda: {"r": 3})
    expected = model(batch())
    model.merge_adapter()
    model.base_model.model.first._unmerged_weight = None
    with pytest.raises(ValueError, match="default cannot be unmerged: the weight from before merging was not kept"):
        model.unmerge_adapter()
    torch.testing.assert_close(model(batch()), expected, rtol=1e-5, atol=2e-5)
