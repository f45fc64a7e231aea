"""The contract of weight adapters: what holds for every method, whatever it computes.

    @pytest.mark.parametrize("check", ADAPTER_CHECKS)
    def test_my_method(check):
        run_adapter_check(check, MyConfig, lambda: {"r": 3})

Each check takes the config class and a function that returns fresh settings: without target_modules and init_weights,
such that init_weights=True starts exactly as the pretrained model, and without dropout. It raises AssertionError when
the method breaks the promise its docstring states. What a method cannot do it declares in `Adapter.cannot`, by the name
of the check and with the reason; the check then must fail, by a promise that is broken or a ValueError. Models are
tiny, of odd sizes, and built from fixed seeds.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from ..adapters.base import AdaptedLayer, Adapter, AdapterConfig, adapter_parameters
from ..fakes import without_values
from ..memory import Ledger, MemoryReport
from ..recipe import Recipe, attached_to, load
from .declared import must_fail
from .tiny_models import seeded, tensors_left_behind

MakeSettings = Callable[[], dict[str, Any]]
Check = Callable[[type[AdapterConfig], MakeSettings], None]
TARGETS = ["first", "second"]
TOKENS = 63


class TwoLayers(nn.Module):
    """first: 24 -> 40, GELU, second: 40 -> 16; beside them layers that no linear method adapts. x: [..., 24]."""

    first: Any
    second: Any

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 24)
        self.image = nn.Conv2d(3, 24, 2)
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


def two_layers(dtype: torch.dtype = torch.float32) -> TwoLayers:
    """The same weights at every call."""
    with seeded(0):
        return TwoLayers().to(dtype)


def tiny_llama() -> LlamaForCausalLM:
    """Two blocks, width 24, grouped heads, gated feed-forward part of 40; the same weights at every call."""
    with seeded(0):
        config = LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
            bos_token_id=1,
            eos_token_id=2,
        )
        return LlamaForCausalLM(config)


LLAMA_TARGETS = ["v_proj", "down_proj"]


def batch(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """[2, 63, 24], standard normal."""
    return torch.randn(2, TOKENS, 24, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(seed: int = 1) -> Tensor:
    """[2, 63] token numbers below 50."""
    return torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def adapted(
    config_class: type[AdapterConfig],
    make_settings: MakeSettings,
    model: nn.Module | None = None,
    init_weights: bool = False,
    seed: int = 2,
    **more: Any,
) -> PeftModel:
    """`model`, or two layers, in eval mode under an adapter; random and not the identity unless init_weights."""
    settings: dict[str, Any] = {
        "target_modules": list(TARGETS),
        "init_weights": init_weights,
        **make_settings(),
        **more,
    }
    with seeded(seed):
        peft_model = get_peft_model(two_layers() if model is None else model, config_class(**settings))
    return peft_model.eval()


def chain(
    config: PeftConfig, num_layers: int = 4, widths: Sequence[int] = (96,), dtype: torch.dtype = torch.float32
) -> PeftModel:
    """So many linear layers, of these widths in turn, all of them adapted."""
    sizes = pairwise(widths[i % len(widths)] for i in range(num_layers + 1))
    config.target_modules = {str(i) for i in range(num_layers)}
    with seeded(0):
        layers = nn.Sequential(*(nn.Linear(*size, dtype=dtype) for size in sizes))
        return get_peft_model(layers, config)


def counted_step(model: nn.Module, num_tokens: int) -> MemoryReport:
    """What a forward and a backward of so many tokens through a chain take."""
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Linear))
    with Ledger(model) as ledger:
        model(torch.randn(num_tokens, weight.shape[1], dtype=weight.dtype)).sum().backward()
    return ledger.report()


def methods_in(model: nn.Module) -> list[Adapter]:
    """Every adapter in the model."""
    return [module for module in model.modules() if isinstance(module, Adapter)]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_close(actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    """Raise AssertionError with `what` and the largest difference."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, msg=lambda text: f"{what}: {text}")


def assert_near(actual: Tensor, expected: Tensor, what: str, share: float = 0.05) -> None:
    """Raise AssertionError with `what` if the difference is longer than that share of what is expected."""
    error = float((actual - expected).norm() / expected.norm())
    assert error <= share, f"{what} is off by {error:.3g} of its length"


def check_starts_as_the_pretrained_model(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """With init_weights=True the output is the base model's, to rounding, in eval and in training mode."""
    x, expected = batch(), two_layers()(batch())
    model = adapted(config_class, make_settings, init_weights=True)
    assert_close(model(x), expected, "a fresh adapter changed the output", atol=1e-6)
    assert_close(model.train()(x), expected, "a fresh adapter changed the output in training mode", atol=1e-6)


def check_random_start_is_not_the_pretrained_model(
    config_class: type[AdapterConfig], make_settings: MakeSettings
) -> None:
    """With init_weights=False the output differs from the base model's by more than rounding."""
    x = batch()
    assert (adapted(config_class, make_settings)(x) - two_layers()(x)).abs().max() > 1e-3


def check_same_seed_gives_the_same_start(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Start values depend on torch's seed and on nothing else."""
    first, second, other = (trainable(adapted(config_class, make_settings, seed=seed)) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def check_trains_only_its_own_parameters(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Only adapter parameters train; after steps of Adam the base weights are bit-equal, and the loss has fallen."""
    model = adapted(config_class, make_settings, init_weights=True)
    prefix = f"{config_class.method.name}_"
    foreign = [name for name in trainable(model) if prefix not in name]
    assert not foreign, f"{foreign[0]} trains, but is no part of the adapter"
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    with seeded(3):
        target = two_layers()(batch()).detach() + 0.3 * torch.randn(16)
    optimizer = torch.optim.Adam(trainable(model).values(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = (model(batch()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.99 * losses[0], f"20 steps took the loss from {losses[0]:.4g} to {losses[-1]:.4g} only"
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in base.items()), "training moved a base weight"
    assert all(parameters[name].grad is None for name in base), "a base weight has a gradient"


def check_every_parameter_gets_a_gradient(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Away from the start, every trainable parameter has a finite, non-zero gradient."""
    model = adapted(config_class, make_settings)
    model(batch()).square().mean().backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
        assert parameter.grad.abs().max() > 0, f"the gradient of {name} is zero"


def check_gradients_are_those_of_the_output(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """In double precision, gradients for input and parameters agree with differences along random directions."""
    model = adapted(config_class, make_settings, two_layers(torch.float64)).double()
    x = batch(torch.float64)[:1, :3].clone().requires_grad_(True)
    inputs = {"input": x, **trainable(model)}
    score = partial(_scored, model, x, torch.randn_like(model(x)))
    gradients = torch.autograd.grad(score(), list(inputs.values()))
    for (name, value), gradient in zip(inputs.items(), gradients, strict=True):
        direction = torch.randn_like(value)
        expected = _difference(score, value, direction)
        assert_close((gradient * direction).sum(), expected, f"the gradient for {name}", rtol=1e-4, atol=1e-5)


@torch.no_grad()
def _difference(function: Callable[[], Tensor], value: Tensor, direction: Tensor, size: float = 1e-7) -> Tensor:
    """The derivative of `function` where `value` moves along `direction`, by two evaluations.

    size: so short that hardly a step crosses the kink of a ReLU, and long enough for double precision.
    """
    before = value.clone()
    ends = []
    for sign in (1, -1):
        value.copy_(before + sign * size * direction)
        ends.append(function())
    value.copy_(before)
    return (ends[0] - ends[1]) / (2 * size)


def check_weights_of_the_layers_train_too(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """In double precision, a layer's weight that trains has its gradient, beside an adapter and under a frozen one."""
    model = adapted(config_class, make_settings, two_layers(torch.float64)).double()
    own = list(trainable(model).values())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}
    weights = {name: layer.get_base_layer().get_parameter("weight").requires_grad_() for name, layer in layers.items()}
    for x in (batch(torch.float64), batch(torch.float64)[:1, :3]):  # few tokens may go another way than many
        score = partial(_scored, model, x, torch.randn_like(model(x)))
        for beside in (True, False):
            for parameter in own:
                parameter.requires_grad_(beside)
            found = torch.autograd.grad(score(), list(weights.values()), allow_unused=True)
            for (name, weight), gradient in zip(weights.items(), found, strict=True):
                assert gradient is not None, f"{name}: its weight trains and has no gradient"
                direction = torch.randn_like(weight)
                expected = _difference(score, weight, direction)
                assert_close((gradient * direction).sum(), expected, f"the gradient of {name}", rtol=1e-4, atol=1e-4)


def _scored(model: nn.Module, x: Tensor, weights: Tensor) -> Tensor:
    score: Tensor = (model(x) * weights).sum()
    return score


def check_any_shape_of_batch(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """One vector, a list of vectors and a batch of sequences give the same rows, with gradients."""
    model = adapted(config_class, make_settings)
    x = batch()
    whole = model(x)
    assert_close(model(x.flatten(0, 1)), whole.flatten(0, 1), "[126, 24] differs from [2, 63, 24]")
    assert_close(model(x[0, 0]), whole[0, 0], "[24] differs from [2, 63, 24]")
    model(x[0, 0]).sum().backward()


def check_saved_and_loaded_gives_the_same_output(
    config_class: type[AdapterConfig], make_settings: MakeSettings
) -> None:
    """`save_pretrained` and `from_pretrained` restore the output bit by bit; the file holds adapter tensors only."""
    model = adapted(config_class, make_settings)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        held = load_file(Path(folder) / "adapter_model.safetensors")
        again = PeftModel.from_pretrained(two_layers(), folder).eval()
    tensors = [[*adapter_parameters(a), *a.state_dict(keep_vars=True).values()] for a in methods_in(model)]
    own = {id(t): t for some in tensors for t in some}
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in own.values()), "the file has other tensors"
    assert torch.equal(again(batch()), model(batch())), "the loaded adapter gives another output"


def check_loads_through_the_meta_device(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Loading with low_cpu_mem_usage=True gives the same output and leaves nothing on the meta device."""
    model = adapted(config_class, make_settings)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(two_layers(), folder, low_cpu_mem_usage=True).eval()
    assert not [name for name, p in again.named_parameters() if p.is_meta]
    assert torch.equal(again(batch()), model(batch()))


def check_merges_or_refuses(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Merged equals unmerged and comes back bit by bit; a change of outputs refuses to merge, and says why."""
    model = adapted(config_class, make_settings)
    before, expected = base_state(two_layers()), model(batch())
    if any(adapter.update == "new_output" for adapter in methods_in(model)):
        with pytest.raises(ValueError, match=f"{config_class.method.name}.*cannot be merged"):
            model.merge_adapter()
        assert torch.equal(model(batch()), expected), "a refused merge changed the model"
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()
        return
    model.merge_adapter()
    assert_close(model(batch()), expected, "merged differs from unmerged", rtol=1e-5, atol=2e-5)
    model.unmerge_adapter()
    assert torch.equal(model(batch()), expected), "merging and unmerging changed the adapted output"
    with model.disable_adapter():
        assert torch.equal(model(batch()), two_layers()(batch())), "merging and unmerging changed a base weight"
    plain = copy.deepcopy(model).merge_and_unload()
    assert not methods_in(plain)
    assert set(plain.state_dict()) == set(before), "merge_and_unload left other tensors than the base model has"
    assert_close(plain(batch()), expected, "merge_and_unload differs from the adapter", rtol=1e-5, atol=2e-5)


def check_disabled_is_the_base(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """With the adapter disabled the output is the base model's, bit by bit, and the adapter's again after."""
    model, expected = adapted(config_class, make_settings), two_layers()(batch())
    with_adapter = model(batch())
    with model.disable_adapter():
        assert torch.equal(model(batch()), expected)
    assert torch.equal(model(batch()), with_adapter)


def check_two_adapters_switch(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Two adapters of the method stand side by side, each gives its own output, and deleting one leaves the other."""
    model = adapted(config_class, make_settings)
    first = model(batch())
    settings = {"target_modules": list(TARGETS), "init_weights": False, **make_settings()}
    with seeded(9):
        model.add_adapter("other", config_class(**settings))
    assert torch.equal(model.eval()(batch()), first), "adding an adapter changed the active one"
    model.set_adapter("other")
    other = model(batch())
    assert (other - first).abs().max() > 1e-3, "both adapters give the same output"
    own = {name for name in trainable(model) if "default" in name}
    assert not own, f"{own} of the inactive adapter trains"
    model.set_adapter("default")
    assert torch.equal(model(batch()), first)
    model.delete_adapter("other")
    assert torch.equal(model(batch()), first)
    assert not [name for name, _ in model.named_parameters() if "other" in name], "delete_adapter left parameters"


def check_bfloat16_base_keeps_a_float32_adapter(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """On a bfloat16 base the adapter stays float32; the output is bfloat16 and near that on a float32 base."""
    model = adapted(config_class, make_settings, two_layers(torch.bfloat16))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    y = model(batch(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable(model).values())
    exact = adapted(config_class, make_settings, two_layers(torch.bfloat16).float())
    wanted = exact(batch(torch.bfloat16).float())
    error = (y.float() - wanted).abs().max() / wanted.abs().max()
    assert error < 0.03, f"bfloat16 differs from float32 by {float(error):.3f} of the largest output"


def check_autocast(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Under bfloat16 autocast a float32 model gives bfloat16 outputs near the float32 ones, and float32 gradients."""
    model = adapted(config_class, make_settings)
    wanted = model(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    error = (y.float() - wanted).abs().max() / wanted.abs().max()
    assert error < 0.03, f"autocast differs from float32 by {float(error):.3f} of the largest output"
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient under autocast"
        assert parameter.grad.dtype == torch.float32


def check_refuses_other_layers(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Embeddings and convolutions are refused by name and type, unless the method lists them; so is a missing name."""
    for name, kind in (("words", nn.Embedding), ("image", nn.Conv2d)):
        if issubclass(kind, config_class.method.layer_types):
            continue
        with pytest.raises((TypeError, ValueError), match=f"{name}.*{kind.__name__}"):
            adapted(config_class, make_settings, target_modules=[name])
    with pytest.raises(ValueError, match="frist"):
        adapted(config_class, make_settings, target_modules=["frist"])


def check_conv1d_equals_the_transposed_linear(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """On transformers' Conv1D, which keeps [in, out], the method does what it does on the Linear of the same weight."""
    plain = two_layers()
    turned = two_layers()
    turned.first = Conv1D(40, 24)
    with torch.no_grad():
        turned.first.weight.copy_(plain.first.weight.T)
        turned.first.bias.copy_(plain.first.bias)
    expected = adapted(config_class, make_settings, plain)
    model = adapted(config_class, make_settings, turned)
    assert_close(model(batch()), expected(batch()), "Conv1D differs from the transposed Linear")
    for one in (expected, model):
        one(batch()).square().mean().backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in trainable(expected).items()}
    for name, parameter in trainable(model).items():
        assert_close(parameter.grad, gradients[name], f"the gradient of {name} on Conv1D")  # type: ignore[arg-type]


def check_four_bit_base(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """On a bitsandbytes 4-bit base, outputs and gradients are those on the dequantised weight; the base stays."""
    bnb = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is missing: pip install 'shoestring[quant]'", exc_type=ImportError
    )

    def four_bit() -> TwoLayers:  # sizes are multiples of 32, as bitsandbytes wants them on a CPU
        with seeded(0):
            model = TwoLayers()
            model.first, model.second = nn.Linear(64, 32), nn.Linear(32, 16)
            layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
            layer.load_state_dict(model.first.state_dict())
            model.first = layer.to("cpu")
            return model

    quantised, restored = four_bit(), four_bit()
    layer: Any = quantised.first
    packed = layer.weight.data.clone()
    restored.first = nn.Linear(64, 32)
    with torch.no_grad():
        restored.first.weight.copy_(bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
        restored.first.bias.copy_(layer.bias)
    x = torch.randn(2, TOKENS, 64, generator=torch.Generator().manual_seed(1))
    expected = adapted(config_class, make_settings, restored)
    model = adapted(config_class, make_settings, quantised)
    with torch.no_grad(), model.disable_adapter():
        model(x)  # inference first: on some CPUs it changes the layout of the weight
    with torch.no_grad():
        assert_close(model(x), expected(x), "4-bit inference differs from the dequantised weight", 2e-2, 2e-2)
    y = model.train()(x)  # that change rounds the scales to bfloat16, hence the tolerances
    assert_close(y, expected.train()(x), "4-bit differs from the dequantised weight", rtol=0, atol=5e-3)
    y.square().mean().backward()
    expected(x).square().mean().backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in trainable(expected).items()}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient on a 4-bit base"
        assert_near(parameter.grad, gradients[name], f"the gradient of {name} on a 4-bit base")
    assert torch.equal(layer.weight.data, packed), "the 4-bit weight changed"


def check_deepcopy_is_independent(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """A deep copy gives the same output and shares no parameter; training it leaves the original alone."""
    model = adapted(config_class, make_settings)
    expected = model(batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), expected)
    assert len(trainable(twin)) == len(trainable(model))
    with torch.no_grad():
        for parameter in trainable(twin).values():
            parameter.add_(0.1)
    assert torch.equal(model(batch()), expected), "changing the copy changed the original"
    assert not torch.equal(twin(batch()), expected), "the copy does not use its own parameters"


def check_gradient_checkpointing_gives_equal_gradients(
    config_class: type[AdapterConfig], make_settings: MakeSettings
) -> None:
    """In a transformers model, recomputing blocks in backward gives equal gradients, by either way of checkpointing."""

    def gradients(**checkpointing: Any) -> dict[str, Tensor]:
        model = adapted(config_class, make_settings, tiny_llama(), target_modules=list(LLAMA_TARGETS)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(checkpointing)
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in trainable(model).items()}  # type: ignore[misc]

    expected = gradients()
    for reentrant in (False, True):
        for name, gradient in gradients(use_reentrant=reentrant).items():
            assert gradient is not None, f"{name} has no gradient under checkpointing (use_reentrant={reentrant})"
            assert_close(gradient, expected[name], f"the gradient of {name} under checkpointing", atol=1e-7)


def check_moves_with_its_model(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """A model that is moved to another device takes all tensors of the adapters along."""
    left = tensors_left_behind(adapted(config_class, make_settings, tiny_llama(), target_modules=list(LLAMA_TARGETS)))
    assert not left, f"{left[0]} stays behind when the model is moved: make it a buffer"


def check_runs_without_values(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """A step with fake tensors, as a planner makes it, runs; all that trains has a gradient of the right shape."""
    model = adapted(config_class, make_settings, tiny_llama(), target_modules=list(LLAMA_TARGETS)).train()
    mode = FakeTensorMode()
    without_values(model, mode)
    ids = mode.from_tensor(tokens())
    with mode:
        model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, f"{name} has no gradient with fake tensors"
        assert parameter.grad.shape == parameter.shape


def check_keeps_no_tensors_after_a_forward(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """After a forward, in effect or disabled, an adapter holds no tensor that it did not hold before."""
    model = adapted(config_class, make_settings, tiny_llama(), target_modules=list(LLAMA_TARGETS))

    def held() -> list[str]:
        return [k for adapter in methods_in(model) for k, v in vars(adapter).items() if isinstance(v, Tensor)]

    before = held()
    model(input_ids=tokens())
    assert held() == before
    with model.disable_adapter():
        model(input_ids=tokens())
    assert held() == before


def check_unload_leaves_the_base(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """peft's unload gives back the base layers and their outputs, with no hook left over."""
    base = two_layers()
    layers, expected = dict(base.named_modules()), base(batch())
    plain = adapted(config_class, make_settings, base).unload()
    assert plain is base
    assert dict(plain.named_modules()) == layers, "unload left other modules"
    assert torch.equal(plain(batch()), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks or m._backward_hooks for m in plain.modules())


def check_a_recipe_undoes_it(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """A recipe leaves modules, hooks, weights, what trains, training modes and peft's marks as they were."""
    base = tiny_llama().train()
    base.lm_head.weight.requires_grad_(False)
    state, ids = base_state(base), tokens()
    expected = base(input_ids=ids).logits
    before = [(name, m, set(vars(m)), len(m._forward_pre_hooks), m.training) for name, m in base.named_modules()]
    learns = [(name, p.requires_grad) for name, p in base.named_parameters()]
    config = config_class(target_modules=list(LLAMA_TARGETS), init_weights=False, **make_settings())
    with Recipe(config)(base) as model:
        assert (model(input_ids=ids, labels=ids).logits - expected).abs().max() > 1e-4
        model(input_ids=ids, labels=ids).loss.backward()
    assert before == [
        (name, m, set(vars(m)), len(m._forward_pre_hooks), m.training) for name, m in base.named_modules()
    ]
    assert learns == [(name, p.requires_grad) for name, p in base.named_parameters()]
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert torch.equal(base(input_ids=ids).logits, expected)


def check_a_recipe_saves_and_loads_it(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """A recipe with the method goes to YAML and back, and `load` restores model and recipe from a folder."""
    config = config_class(target_modules=list(LLAMA_TARGETS), init_weights=False, **make_settings())
    recipe = Recipe(config)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    with seeded(4):
        model = recipe.apply(tiny_llama()).eval()
    expected = model(input_ids=tokens()).logits
    with TemporaryDirectory() as folder:
        attached_to(model).save(folder)
        again = load(tiny_llama(), folder).eval()
    assert torch.equal(again(input_ids=tokens()).logits, expected)
    assert attached_to(again).recipe == recipe


def check_stacks_beside_lora(config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """In one recipe with peft's LoRA on other layers, both train, both are saved, and both are undone."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    own = config_class(target_modules=list(LLAMA_TARGETS), init_weights=False, **make_settings())
    for recipe in (Recipe(lora, own), Recipe(own, lora)):
        base = tiny_llama()
        kinds = [type(m) for m in base.modules()]
        with seeded(4):
            model = recipe.apply(base).eval()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        for part in ("lora_", f"{config_class.method.name}_"):
            gradients = [p.grad for name, p in trainable(model).items() if part in name]
            assert gradients, f"nothing of {part} trains in {recipe}"
            assert all(g is not None and torch.isfinite(g).all() for g in gradients)
        expected = model(input_ids=tokens()).logits
        with TemporaryDirectory() as folder:
            attached_to(model).save(folder)
            again = load(tiny_llama(), folder).eval()
        assert torch.equal(again(input_ids=tokens()).logits, expected)
        assert Recipe.remove(model) is base
        assert [type(m) for m in base.modules()] == kinds


ADAPTER_CHECKS: list[Check] = [
    value for name, value in list(globals().items()) if name.startswith("check_") and callable(value)
]


def run_adapter_check(check: Check, config_class: type[AdapterConfig], make_settings: MakeSettings) -> None:
    """Run one check on one method; a check the method says it cannot pass must fail, and is marked so.

    What it draws at random is the same at every call.

    Raises AssertionError if the check fails, or passes although the method declares in `cannot` that it does not.
    """
    reason = config_class(**make_settings()).adapter_class.cannot.get(check.__name__)
    with seeded(4), warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        if reason is None:
            check(config_class, make_settings)
            return
        must_fail(
            lambda: check(config_class, make_settings),
            check.__name__,
            config_class.method.name,
            reason,
            by=(AssertionError, ValueError),
        )
