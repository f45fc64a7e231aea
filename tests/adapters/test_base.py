"""The base of adapters: a method of one's own, rebuilt weights, shared state, start values, taps, refusals."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.adapters import Adapter, AdapterConfig, BottleneckConfig, HUTConfig, S2LoRAConfig, register
from shoestring.adapters.base import AdaptedLayer, linear_with_rebuilt_weight
from shoestring.memory import Ledger
from shoestring.testing import ADAPTER_CHECKS, run_adapter_check
from shoestring.testing.adapters import adapted, batch, trainable, two_layers


class RowScale(Adapter):
    """W' = W * g / |W|, a gain for each row that starts at the row's norm: it reads the weight."""

    name = "row_scale"

    def __init__(self, base: nn.Linear, config: "RowScaleConfig"):
        super().__init__()
        rows = base.weight.shape[1] if "Conv1D" in type(base).__name__ else base.out_features
        self.gain = nn.Parameter(torch.rand(rows) + 0.5)

    def start(self, weight: Tensor) -> None:
        """The norms of the rows."""
        self.gain.copy_(weight.float().norm(dim=1))

    def new_weight(self, weight: Tensor) -> Tensor:
        """Every row at the length of its gain."""
        return weight * (self.gain / weight.norm(dim=1))[:, None]


@dataclass(kw_only=True)
class RowScaleConfig(AdapterConfig):
    """No settings of its own."""

    method: ClassVar = RowScale


@pytest.fixture
def row_scale() -> Iterator[type[AdapterConfig]]:
    """The method above, registered for one test."""
    tables = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    yield register(RowScaleConfig)
    for table in tables:
        del table["ROW_SCALE"]


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_a_method_from_outside_passes_the_contract(check, row_scale):
    run_adapter_check(check, row_scale, dict)


def test_the_contract_catches_a_method_that_breaks_it(row_scale, monkeypatch):
    checks = {check.__name__: check for check in ADAPTER_CHECKS}
    monkeypatch.setattr(RowScale, "start", lambda self, weight: None)
    with pytest.raises(AssertionError, match=r"declares that it cannot|changed the output"):
        run_adapter_check(checks["check_starts_as_the_pretrained_model"], row_scale, dict)
    monkeypatch.setattr(RowScale, "cannot", {"check_starts_as_the_pretrained_model": "starts at random"})
    with pytest.raises(pytest.xfail.Exception, match="row_scale cannot: starts at random"):
        run_adapter_check(checks["check_starts_as_the_pretrained_model"], row_scale, dict)
    monkeypatch.setattr(RowScale, "start", lambda self: None)
    with pytest.raises(TypeError, match="positional argument"):
        run_adapter_check(checks["check_starts_as_the_pretrained_model"], row_scale, dict)
    monkeypatch.setattr(RowScale, "cannot", {"check_disabled_is_the_base": "not true"})
    with pytest.raises(AssertionError, match="declares that it cannot pass check_disabled_is_the_base, but it does"):
        run_adapter_check(checks["check_disabled_is_the_base"], row_scale, dict)


def test_start_values_from_weights_are_set_once_and_not_on_loading(row_scale, tmp_path: Path):
    model = adapted(row_scale, dict, init_weights=True)
    layer = model.base_model.model.first
    torch.testing.assert_close(layer.adapters["default"].gain, layer.base_layer.weight.norm(dim=1))
    with torch.no_grad():
        layer.adapters["default"].gain.mul_(2)
    model.save_pretrained(tmp_path)
    for quick in (False, True):
        again = PeftModel.from_pretrained(two_layers(), tmp_path, low_cpu_mem_usage=quick)
        assert torch.equal(again.base_model.model.first.adapters["default"].gain, layer.adapters["default"].gain)


def test_registering_a_name_twice_is_refused(row_scale):
    with pytest.raises(ValueError, match="An adapter method named 'row_scale' is already registered"):
        register(RowScaleConfig)


def test_a_method_must_override_one_update():
    class Nothing(Adapter):
        name = "nothing"

    with pytest.raises(TypeError, match="Nothing overrides none of delta_weight, new_weight, new_output"):
        Nothing()


@pytest.mark.parametrize("shape", [(5,), (63, 5), (2, 9, 5)])
def test_a_rebuilt_weight_gives_the_gradients_of_a_kept_one(shape: tuple[int, ...]):
    torch.manual_seed(0)
    weight, a, b = torch.randn(3, 5), torch.randn(3, 2, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    x = torch.randn(shape, requires_grad=True)
    y = linear_with_rebuilt_weight(x, lambda: weight + (a @ b).tanh(), [a, b])
    expected = F.linear(x, weight + (a @ b).tanh())
    assert torch.equal(y, expected)
    given = torch.autograd.grad(y.square().sum(), (x, a, b))
    wanted = torch.autograd.grad(expected.square().sum(), (x, a, b))
    for one, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_rebuilt_weight_is_not_kept_and_not_built_in_vain():
    built = []

    def make() -> Tensor:
        built.append(1)
        return weight * a

    weight, a = torch.randn(300, 400), torch.randn(300, 1, requires_grad=True)
    layer = nn.Linear(1, 1)  # the ledger wants a model
    with Ledger(layer) as ledger:
        x = torch.randn(7, 400) * 1.0
        layer(torch.ones(1, 1))
        y = linear_with_rebuilt_weight(x, make, [a])
        y.sum().backward()
    assert ledger.report().saved_bytes < 300 * 400 * 4 / 4
    assert len(built) == 2
    with torch.no_grad():
        linear_with_rebuilt_weight(x, make, [a])
    assert len(built) == 3
    # parameters that do not train: only x gets a gradient
    a.requires_grad_(False)
    x.requires_grad_(True)
    (dx,) = torch.autograd.grad(linear_with_rebuilt_weight(x, make, [a]).sum(), x)
    torch.testing.assert_close(dx, (weight * a).sum(0).expand(7, -1), rtol=1e-4, atol=1e-4)


def test_a_rebuilt_weight_under_torch_checkpoint():
    model = adapted(HUTConfig, lambda: {"r": 3})
    model(batch()).square().mean().backward()
    wanted = {name: p.grad.clone() for name, p in trainable(model).items()}
    model.zero_grad()
    checkpoint(model, batch(), use_reentrant=False).square().mean().backward()
    for name, parameter in trainable(model).items():
        assert torch.equal(parameter.grad, wanted[name])


def test_shared_state_trains_only_while_its_adapter_is_active():
    model = adapted(S2LoRAConfig, lambda: {"r": 3})
    with torch.random.fork_rng(devices=[]):
        model.add_adapter("other", S2LoRAConfig(r=3, target_modules=["first", "second"], init_weights=False))
    shared = model.base_model.s2_lora_shared

    def states() -> dict[str, set[bool]]:
        return {name: {p.requires_grad for p in module.parameters()} for name, module in shared.items()}

    assert states() == {"default": {True}, "other": {False}}
    model.set_adapter("other")
    assert states() == {"default": {False}, "other": {True}}
    model.delete_adapter("other")
    assert list(shared) == ["default"]


def test_two_active_adapters_of_a_weight_compose_in_order():
    model = adapted(HUTConfig, lambda: {"r": 2})
    model.add_adapter("other", HUTConfig(r=2, target_modules=["first"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.first
    one, two = layer.adapters["default"], layer.adapters["other"]
    weight = two.new_weight(one.new_weight(layer.base_layer.weight))
    x = batch()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.base_layer.bias))
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_safe_merge_refuses_nan_and_changes_nothing():
    model = adapted(HUTConfig, lambda: {"r": 2})
    layer = model.base_model.model.first
    before = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.adapters["default"].a[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaNs detected: merging \['default'\].* nothing was changed"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


def test_a_model_that_moved_while_merged_is_unmerged_where_it_is_now():
    model = adapted(HUTConfig, lambda: {"r": 2})
    layer = model.base_model.model.first
    before = layer.base_layer.weight.clone()
    layer.merge()
    model.to(torch.float64)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.double())
    assert layer.base_layer.weight.dtype == torch.float64


def test_merging_into_a_packed_weight_warns_and_unmerging_brings_it_back():
    bnb = pytest.importorskip("bitsandbytes", exc_type=ImportError)
    model = two_layers()
    packed = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    packed.load_state_dict(nn.Linear(64, 32).state_dict())
    model.first = packed.to("cpu")
    model.second = nn.Linear(32, 16)
    model = adapted(HUTConfig, lambda: {"r": 2}, model).train()
    layer = model.base_model.model.first
    before, x = layer.get_base_weight().clone(), torch.randn(3, 64)
    expected = model(x)
    with pytest.warns(UserWarning, match="packed and rounded again in merging"):
        layer.merge()
    assert not torch.equal(layer.get_base_weight(), before)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.4 * float(expected.detach().std()))
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_weight(), before, rtol=1e-3, atol=0)


def test_a_weight_rebuilt_over_another_adapters_layer_is_refused():
    lora = get_peft_model(two_layers(), LoraConfig(r=2, target_modules=["first"]))
    model = get_peft_model(lora, HUTConfig(r=2, target_modules=["first"]), adapter_name="mine")
    with pytest.raises(TypeError, match="hut rebuilds the weight of a layer that Linear of another adapter already"):
        model(batch())


def test_layers_that_are_read_and_not_called_are_refused():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    with pytest.raises(TypeError, match=r"attention\.out_proj belongs to nn.MultiheadAttention"):
        get_peft_model(Attention(), HUTConfig(r=2, target_modules=["out_proj"]))


def test_adapters_mixed_within_a_batch_are_refused():
    layer = adapted(HUTConfig, lambda: {"r": 2}).base_model.model.first
    with pytest.raises(ValueError, match="takes one set of adapters a batch; adapter_names is not supported"):
        layer(batch(), adapter_names=["default", "__base__"])


def test_a_layer_that_is_refused_is_named_with_its_reason():
    with pytest.raises(ValueError, match="first: reduction_factor of bottleneck must divide the width 40, got 7"):
        adapted(BottleneckConfig, lambda: {"reduction_factor": 7})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_modules": "first", "layers_to_transform": [0]},
            "need target_modules as a list of names, got the reg",
        ),
        ({"target_modules": ["first"], "layers_pattern": "layers"}, "layers_pattern has no effect without"),
        ({"target_modules": ["first"], "bias": "some"}, "bias of hut must be 'none', 'all' or 'hut_only', got 'some'"),
    ],
)
def test_wrong_common_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HUTConfig(**settings)


@pytest.mark.parametrize(
    ("bias", "names"), [("none", set()), ("all", {"first", "second", "image"}), ("hut_only", {"first"})]
)
def test_bias_chooses_which_biases_train(bias: str, names: set[str]):
    model = adapted(HUTConfig, lambda: {"r": 2}, target_modules=["first"], bias=bias)
    biases = {name for name in trainable(model) if "bias" in name}
    assert {name.split("model.")[-1].split(".")[0] for name in biases} == names


def test_the_adapted_layers_are_the_only_change_of_the_module_tree():
    base = two_layers()
    before = {name: type(m) for name, m in base.named_modules()}
    model = adapted(HUTConfig, lambda: {"r": 2}, base).base_model.model
    changed = [name for name, kind in before.items() if type(model.get_submodule(name)) is not kind]
    assert changed == ["first", "second"]
    assert all(isinstance(model.get_submodule(name), AdaptedLayer) for name in changed)
