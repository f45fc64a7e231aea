"""Weight adapters: what every method that changes one layer has in common, written once on Hugging Face peft.

A method is a small `nn.Module` with the parameters of one adapter on one layer. It overrides one of

    delta_weight()            W' = W + delta       merged exactly; computed beside the base layer, or with it where
                                                   linear(x, W, bias) is there too
    new_weight(W)             W' = f(W)            merged exactly; W' is rebuilt in backward, never kept; beside it
                                                   through(x, layer) where tokens, not weights, are cheaper to change
    new_output(x, y, base)    y' = g(x, y)         cannot be merged

Injection, active adapters, merging, dtypes, devices, quantised bases, shared state and saving are here or in peft.
Shapes: weights are [out, in] for a method whatever the layer's own layout (Conv1D keeps [in, out]).
"""

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial, reduce
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
    check_target_module_exists,
    onload_layer,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..fakes import has_values
from ..precision import autocast_dtype, autocast_off
from ..technique import Events


class MethodName(str):
    """A `peft_type` beside peft's closed enum; `.value` is what peft's messages read."""

    @property
    def value(self) -> str:
        """The name as plain text."""
        return str(self)


@dataclass(kw_only=True)
class AdapterConfig(PeftConfig, Events):
    """Fields every weight adapter takes; a method's config adds only its own. Names are peft's.

    target_modules: names or a regular expression of the layers to adapt; None: the usual ones of the architecture.
    exclude_modules: names or a regular expression of layers to leave out.
    layers_to_transform: indices of blocks to adapt; needs target_modules as a list.
    layers_pattern: name of the block list, where it cannot be guessed.
    modules_to_save: other modules trained and saved whole, such as a classification head.
    bias: which biases train too: "none", "all" or "<method>_only".
    init_weights: True starts as the pretrained model; False starts at random, for tests.
    """

    method: ClassVar[type["Adapter"]]
    values_follow = False  # True on a config whose adapter is about to be filled from a file

    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = field(default=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MethodName(self.method.name.upper())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{each.name} of {self.method.name} must be a number, got nan.")
        alpha = getattr(self, "alpha", None)
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha of {self.method.name} must be above 0, got {alpha}.")
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                "layers_to_transform and layers_pattern need target_modules as a list of names, "
                f"got the regular expression {self.target_modules!r}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform; give both or neither.")
        if self.bias not in ("none", "all", f"{self.method.name}_only"):
            raise ValueError(
                f"bias of {self.method.name} must be 'none', 'all' or '{self.method.name}_only', got {self.bias!r}."
            )

    @property
    def adapter_class(self) -> type["Adapter"]:
        """The class of its adapters: `method`, or that of the chosen form where forms differ in what they update."""
        return self.method

    def default_targets(self, model: nn.Module) -> set[str] | str | None:
        """The layers to adapt when target_modules is None; None leaves the choice to peft's table."""
        return None

    def before_injection(self, model: nn.Module) -> None:
        """Settle what depends on the model, such as the targets, before an adapter is put on it, a loaded one too."""
        if self.target_modules is None:
            self.target_modules = self.default_targets(model)

    def after_removal(self, model: nn.Module) -> None:
        """Undo what `before_injection` did to the base; the adapter is gone."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in peft, marked as that of an adapter whose values follow."""
        config = super().from_pretrained(*args, **kwargs)
        config.values_follow = True
        return config

    def prepare(self, model: nn.Module) -> None:
        """Look at the whole model, before the first layer of a new adapter is adapted; see `layers_in`.

        Not called when values are about to be loaded, without init_weights, and on tensors without values.
        """

    def layers_in(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers of `model` that the adapter is about to be put on, by name, adapted by others or not."""
        adapted = tuple(f"{key}." for key, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        keys = [key for key, _ in model.named_modules() if key and not key.startswith(adapted)]
        return {key: model.get_submodule(key) for key in keys if check_target_module_exists(self, key)}

    def tap(self, model: nn.Module, key: str) -> str | None:
        """The name of the module whose input the adapter at `key` reads beside its own; None: it reads no other."""
        return None

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """What the adapter at `key` is built with beside the config, by name, where layers differ in their sizes."""
        return {}


class Adapter(nn.Module):
    """The trainable part of one method on one layer. Subclasses override exactly one of the three updates.

    Built as `Method(base, config)`, followed by the shared state where `shared` makes some, by `tap=module` where
    `AdapterConfig.tap` names one, and by what `AdapterConfig.of_layer` gives.

    layer_types: classes of layers the method can adapt.
    cannot: names of contract checks the method cannot pass, each with the reason.
    alone: no second adapter may be active on the same layer.
    decides_when_packed: `prefers_tokens` is asked on a quantised base too, whose weight is unpacked either way.
    tapped: the input of the module that `AdapterConfig.tap` names, during one forward; else None.
    """

    name: ClassVar[str]
    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, Conv1D)
    cannot: ClassVar[Mapping[str, str]] = MappingProxyType({})
    alone: bool = False
    decides_when_packed: ClassVar[bool] = False

    tapped: Tensor | None = None
    tap_hook: tuple[RemovableHandle, ...] = ()
    shared_state: tuple[nn.Module, ...] = ()  # a tuple, so that the shared module is not registered once a layer

    def __init__(self) -> None:
        super().__init__()
        if self.update not in ("new_output", "new_weight", "delta_weight"):
            raise TypeError(f"{type(self).__name__} overrides none of delta_weight, new_weight, new_output.")

    @classmethod
    def can_adapt(cls, layer: nn.Module) -> bool:
        """Whether the method has a place on this layer: by class, and quantised layers as linear ones."""
        if isinstance(layer, cls.layer_types):
            return True
        return nn.Linear in cls.layer_types and is_quantised(layer)

    @classmethod
    def shared(cls, model: nn.Module, config: Any) -> nn.Module | None:
        """What all layers of one adapter share (factors, routers; as buffers what is frozen); None: nothing."""
        return None

    def start(self, weight: Float[Tensor, "out in"]) -> None:
        """Set start values that depend on the pretrained weight; not called when values are about to be loaded."""

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """What is added to the pretrained weight."""
        raise NotImplementedError(type(self).__name__)

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """`x @ delta_weight().T`; override where a factored product is cheaper than building the delta."""
        return linear_with_rebuilt_weight(x, self.delta_weight, adapter_parameters(self))

    def linear(
        self, x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """`x @ (weight + delta_weight()).T + bias`; override where that is cheaper than the layer and `delta_output`.

        Called where the adapter is the only active one and the layer's weight is there as numbers, not quantised.
        """
        raise NotImplementedError(type(self).__name__)

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The weight to use in place of the pretrained one. Must give the same result each time it is called."""
        return weight + self.delta_weight()

    def packed(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> nn.Module:
        """A layer with integers of few bits that gives what the adapted one gives; see `quantisation.pack_model`."""
        raise NotImplementedError(type(self).__name__)

    def new_bias(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> Tensor | None:
        """The bias to merge, for methods that add to it; `weight` is that before this adapter."""
        return bias

    def through(self, x: Float[Tensor, "*batch in"], layer: Callable[[Tensor], Tensor]) -> Float[Tensor, "*batch out"]:
        """What `new_weight` and `new_bias` give, by calling `layer`, the layer before this adapter, on a changed x.

        Override where the change of x is linear or affine. The base weight is then neither copied nor dequantised.
        """
        raise NotImplementedError(type(self).__name__)

    def prefers_tokens(self, num_tokens: int) -> bool:
        """Whether `through`, where it is overridden, is cheaper than a new weight for so many tokens."""
        return True

    def new_output(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The output to use in place of `y = base(x)`."""
        raise NotImplementedError(type(self).__name__)

    @property
    def update(self) -> str:
        """Which of the three updates the method overrides."""
        for kind in ("new_output", "new_weight", "delta_weight"):
            if not self._has_default(kind):
                return kind
        return "none"

    @property
    def reads_weight(self) -> bool:
        """Whether it may compute with the weight of its layer, which is then not called."""
        always_through = not self._has_default("through") and self._has_default("prefers_tokens")
        return not self._has_default("linear") or (self.update == "new_weight" and not always_through)

    def _has_default(self, function: str) -> bool:
        return getattr(type(self), function) is getattr(Adapter, function)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters, or of those it shares."""
        return next((p.dtype for p in adapter_parameters(self)), torch.float32)

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """By parameter, what each of its dimensions runs over, so that others can slice it; {}: it cannot be sliced.

        "out" and "in": outputs and inputs of the layer; an input that is left out counts as zero. "rank": inner units,
        of which any can be left out. "read": outputs that it reads, which must all be there. "": anything else.
        """
        return {}

    def read_tap(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook on the tapped module: remember its input until the adapted layer has run."""
        self.tapped = args[0] if args else next(iter(kwargs.values()))


class _RebuiltWeight(torch.autograd.Function):
    """y = x W'^T with W' = make(): W' is built again in backward instead of being kept from forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Callable[[], Tensor], *parameters: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(x, *parameters)
        return F.linear(x, make().to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        trained = [p for p, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True) if needed]
        with autocast_off(dy):  # as in forward, wherever backward is called
            with torch.enable_grad():
                weight = ctx.make()
            dx = (dy @ weight.detach().to(dy.dtype)) if ctx.needs_input_grad[0] else None
            given: Iterator[Tensor | None] = iter(())
            if trained:
                edge, dtype = get_gradient_edge(weight), weight.dtype
                del weight  # its gradient is as large: never both at once
                d_weight = (dy.flatten(0, -2).T @ x.flatten(0, -2)).to(dtype)
                given = iter(torch.autograd.grad(edge, trained, d_weight, allow_unused=True))
        return dx, None, *(next(given) if needed else None for needed in ctx.needs_input_grad[2:])


def linear_with_rebuilt_weight(
    x: Float[Tensor, "*batch in"], make: Callable[[], Float[Tensor, "out in"]], parameters: list[Tensor]
) -> Float[Tensor, "*batch out"]:
    """`x @ make().T` in x's dtype, keeping x and `parameters` for backward but not the weight `make` builds.

    parameters: every tensor that may need a gradient through `make`. Backward builds the weight a second time and
    holds one dense [out, in] gradient for a moment; second derivatives are not available.
    """
    lower = autocast_dtype(x)
    with autocast_off(x):
        x = x.to(lower) if lower else x
        if not torch.is_grad_enabled():
            return F.linear(x, make().to(x.dtype))
        vector = x.dim() == 1
        y = _RebuiltWeight.apply(x[None] if vector else x, make, *parameters)
        return y[0] if vector else y


class _KeptInput(torch.autograd.Function):
    """y = run(x), which is run again in backward: x is all that is kept from forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x, *parameters)
        return run(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        x = x.detach().requires_grad_(needed[0])
        wanted = [tensor for tensor, is_needed in zip((x, *parameters), needed, strict=True) if is_needed]
        with autocast_off(dy):
            with torch.enable_grad():
                y = ctx.run(x)
            given = iter(torch.autograd.grad(y, wanted, dy, allow_unused=True))
        dx, *others = (next(given) if is_needed else None for is_needed in needed)
        return dx, None, *others


def keeping_only_input(
    x: Float[Tensor, "*batch in"], run: Callable[[Tensor], Tensor], parameters: list[Tensor]
) -> Float[Tensor, "*batch out"]:
    """`run(x)` in x's dtype or autocast's, keeping x and `parameters` for backward and nothing that `run` makes.

    run: called with autocast off, and once more in backward: it must give the same result each time.
    parameters: every tensor that may need a gradient through `run`. Second derivatives are not available.
    """
    lower = autocast_dtype(x)
    with autocast_off(x):
        x = x.to(lower) if lower else x
        return _KeptInput.apply(x, run, *parameters) if torch.is_grad_enabled() else run(x)


class AdaptedLayer(nn.Module, BaseTunerLayer):
    """A layer with named adapters that change its output: `y = base(x)`, then each active adapter's update in turn."""

    def __init__(self, base_layer: nn.Module, prefix: str, **quantisation: Any):
        super().__init__()
        self.base_layer = base_layer
        self.adapter_layer_names = (prefix,)
        setattr(self, prefix, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantisation)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters on this layer by name."""
        return getattr(self, self.adapter_layer_names[0])

    def add(self, adapter_name: str, adapter: Adapter, inference_mode: bool, started: bool) -> None:
        """Put one more adapter on the layer. started: its values stand already or are about to be loaded."""
        self.adapters[adapter_name] = adapter
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not started and type(adapter).start is not Adapter.start:
            with torch.no_grad():
                adapter.start(self.weight_out_in())
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """As in peft, but buffers keep their dtype: peft gives parameters their float32 back later, and no buffers."""
        parts = list(self.adapters[adapter_name].modules()) if adapter_name in self.adapters else []
        held = [(part, name, buffer) for part in parts for name, buffer in part.named_buffers(recurse=False)]
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for part, name, buffer in held:
            part._buffers[name] = buffer.to(part._buffers[name].device)  # type: ignore[union-attr]

    def get_base_weight(self) -> Tensor:
        """As in peft, from the layout that can be dequantised."""
        self._leave_inference_layout()
        return super().get_base_weight()

    def _leave_inference_layout(self) -> None:
        """Undo the other order of 4-bit weights that bitsandbytes takes up at inference on some CPUs.

        In that order peft dequantises to wrong values and bitsandbytes gives no gradients.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            self.get_base_layer().state_dict()  # before saving, bitsandbytes turns the order back, in place

    def weight_out_in(self) -> Tensor:
        """The base layer's weight as [out, in], dequantised where the base is quantised; it may train, too."""
        layer = self.get_base_layer()
        weight: Tensor = layer.weight if self.quantization_backend is None else self.get_base_weight()  # type: ignore[assignment]
        return weight.T if isinstance(layer, Conv1D) else weight

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """As in peft; for layers without a `weight`, such as layer scales, those of their first parameter."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None and (first := next(base_layer.parameters(), None)) is not None:
            return first.device, first.dtype
        return device, dtype

    def active(self) -> list[Adapter]:
        """The adapters in effect, in order.

        Raises ValueError if one of several must be alone on its layer.
        """
        if self.disable_adapters or self.merged:
            return []
        chosen: list[Adapter] = [self.adapters[name] for name in self.active_adapters if name in self.adapters]  # type: ignore[misc]
        if len(chosen) > 1 and any(adapter.alone for adapter in chosen):
            raise ValueError(
                f"{chosen[0].name} cannot have several active adapters on one {type(self.get_base_layer()).__name__}; "
                f"activate one of {', '.join(self.active_adapters)}."
            )
        return chosen

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer's output with the active adapters applied."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if "adapter_names" in kwargs:
            raise ValueError(
                f"{type(self).__name__} takes one set of adapters a batch; adapter_names is not supported."
            )
        if self.quantization_backend is not None and torch.is_grad_enabled() and (self.training or x.requires_grad):
            self._leave_inference_layout()
        try:
            return self._adapted(x, self.active(), *args, **kwargs)
        finally:  # of adapters out of effect too, and when checkpointing stops a recomputation early
            for adapter in self.adapters.values():
                adapter.tapped = None  # type: ignore[assignment]

    def _adapted(self, x: Tensor, adapters: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        y = self.base_layer(x, *args, **kwargs)
        for adapter in adapters:
            y = adapter.new_output(x, y, self.base_layer).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the update is not a change of a weight."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.adapters:
                self._refuse_merge(self.adapters[name])  # type: ignore[arg-type]

    def unmerge(self) -> None:
        """Nothing to do: such adapters are never merged."""
        warnings.warn("Already unmerged. Nothing to do.")

    @staticmethod
    def _refuse_merge(adapter: Adapter) -> None:
        raise ValueError(f"{adapter.name} changes a layer's output, not its weight: it cannot be merged.")

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every adapter here is a change of a weight."""
        return all(adapter.update != "new_output" for adapter in self.adapters.values())


class AdaptedLinear(AdaptedLayer):
    """A linear layer with named adapters of any of the three forms."""

    def __init__(self, base_layer: nn.Module, prefix: str, **quantisation: Any):
        super().__init__(base_layer, prefix, **quantisation)
        self._unmerged_weight: Tensor | None = None
        self._unmerged_bias: Tensor | None = None
        self.out_features, self.in_features = linear_sizes(self.get_base_layer())

    def _adapted(self, x: Tensor, adapters: list[Adapter], *args: Any, **kwargs: Any) -> Tensor:
        def base(x: Tensor) -> Tensor:
            y = self.base_layer(x, *args, **kwargs)
            return y if self.quantization_backend is None else self.quantization_backend.maybe_clone_base_result(y)

        if len(adapters) == 1 and type(adapters[0]).linear is not Adapter.linear and self._has_plain_weight():
            weight = self.weight_out_in()
            return adapters[0].linear(x.to(weight.dtype), weight, self.base_layer.bias)  # type: ignore[arg-type]
        if any(adapter.update == "new_weight" for adapter in adapters):
            of_weight = [a for a in adapters if a.update != "new_output"]
            if self._prefers_tokens(x, of_weight):
                y = reduce(lambda layer, adapter: partial(adapter.through, layer=layer), of_weight, base)(x)
            else:
                y = self._with_new_weight(x, of_weight)
            adapters = [a for a in adapters if a.update == "new_output"]
        else:
            y = base(x)
        for adapter in adapters:
            if adapter.update == "delta_weight":
                y = y + adapter.delta_output(self._cast_input_dtype(x, adapter.dtype)).to(y.dtype)
            else:
                y = adapter.new_output(x, y, self.base_layer).to(y.dtype)
        return y

    def _prefers_tokens(self, x: Tensor, adapters: list[Adapter]) -> bool:
        """Whether tokens are to be changed and not the weight, where the adapters can do either."""
        if any(type(adapter).through is Adapter.through for adapter in adapters):
            return False
        if self.get_base_layer() is not self.base_layer:
            return True
        if self.quantization_backend is not None and not all(adapter.decides_when_packed for adapter in adapters):
            return True
        return all(adapter.prefers_tokens(x.shape[:-1].numel()) for adapter in adapters)

    def _has_plain_weight(self) -> bool:
        """Whether the layer's weight is there as numbers and no other adapter lies in between."""
        return self.quantization_backend is None and self.get_base_layer() is self.base_layer

    def _with_new_weight(self, x: Tensor, adapters: list[Adapter]) -> Tensor:
        def make() -> Tensor:
            return self._new_weight(adapters)

        base = self.get_base_layer()
        if base is not self.base_layer:
            raise TypeError(
                f"{adapters[0].name} rebuilds the weight of a layer that {type(self.base_layer).__name__} of another "
                "adapter already changes; put it first in the recipe or on other layers."
            )
        if self.quantization_backend is None:
            x = x.to(base.weight.dtype)  # type: ignore[arg-type]
        parameters: list[Tensor] = [p for adapter in adapters for p in adapter_parameters(adapter)]
        # the weight if it trains, or what it is made of
        parameters += [p for name, p in base.named_parameters() if p.requires_grad and name != "bias"]
        y = linear_with_rebuilt_weight(x, make, parameters)
        return y if base.bias is None else y + base.bias.to(y.dtype)  # type: ignore[operator]

    def _new_weight(self, adapters: list[Adapter]) -> Tensor:
        """The base weight after `adapters`, [out, in], in the wider of the dtypes of weight and adapters."""
        weight = self.weight_out_in()
        for adapter in adapters:
            weight = adapter.new_weight(weight.to(torch.promote_types(weight.dtype, adapter.dtype)))
        return weight

    def _new_bias(self, adapters: list[Adapter]) -> Tensor | None:
        """The base bias after `adapters`; None where it stays as it is.

        Raises ValueError if one of them adds to it and the layer has none.
        """
        if all(type(adapter).new_bias is Adapter.new_bias for adapter in adapters):
            return None
        old: Tensor | None = self.get_base_layer().bias  # type: ignore[assignment]
        bias = old
        for number, adapter in enumerate(adapters):
            weight = self._new_weight(adapters[:number])
            bias = adapter.new_bias(weight.to(torch.promote_types(weight.dtype, adapter.dtype)), bias)
        if old is None and bias is not None:
            raise ValueError(
                f"{adapters[0].name} adds to the bias of the layer it is merged into, and this "
                f"{type(self.get_base_layer()).__name__} of {self.in_features} -> {self.out_features} has none."
            )
        return bias

    @property
    def is_packable(self) -> bool:
        """Whether it has an adapter of a method that gives `packed`."""
        return any(type(a).packed is not Adapter.packed for a in self.adapters.values())  # type: ignore[attr-defined]

    def packed_layer(self) -> nn.Module:
        """The layer with packed integers that stands for this one.

        Raises ValueError if its adapter is out of effect or not the only one.
        """
        adapters = self.active()
        if len(adapters) != 1 or self.get_base_layer() is not self.base_layer:
            state = "merged" if self.merged else "disabled, not active or not alone"
            raise ValueError(f"To be packed, a layer must have one adapter in effect; here it is {state}.")
        return adapters[0].packed(self.weight_out_in(), self.base_layer.bias)  # type: ignore[arg-type]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapters' change into weight and bias; copies of both are kept so that unmerge is exact.

        A packed weight is packed again, both times, with a warning, since that rounds it.

        Raises ValueError if an adapter changes the output, or if safe_merge finds NaN or Inf.
        """
        names, bias = self.to_merge(adapter_names)
        if not names:
            return
        adapters: list[Adapter] = [self.adapters[name] for name in names]  # type: ignore[misc]
        before = self.get_base_weight()
        with torch.no_grad():
            after = self._new_weight(adapters).to(before.dtype)
            after = after.T if isinstance(self.get_base_layer(), Conv1D) else after
        if safe_merge and not all(torch.isfinite(new).all() for new in (after, bias) if new is not None):
            raise ValueError(f"NaNs detected: merging {names} gives NaN or Inf in the weight; nothing was changed.")
        if self.quantization_backend is not None:
            warnings.warn(
                "The weight is packed and rounded again in merging, so that outputs are not quite those before; "
                "`shoestring merge` tells how far they are apart, or merges in 16 bits."
            )
        if self._unmerged_weight is None:
            self._unmerged_weight = before.detach().clone()
        self.set_base_weight(after.contiguous())
        if bias is not None:
            held: Tensor = self.get_base_layer().bias  # type: ignore[assignment]
            if self._unmerged_bias is None:
                self._unmerged_bias = held.detach().clone()
            held.data = bias.to(held.dtype)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def to_merge(self, adapter_names: list[str] | None = None) -> tuple[list[str], Tensor | None]:
        """The adapters that `merge` would merge, and the new bias, None where it stays; nothing is changed.

        Raises ValueError where they cannot be merged.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters]
        if not names:
            return names, None
        adapters: list[Adapter] = [self.adapters[name] for name in names]  # type: ignore[misc]
        for adapter in adapters:
            if adapter.update == "new_output":
                self._refuse_merge(adapter)
        if self.get_base_layer() is not self.base_layer:
            raise ValueError("Adapters stacked on one layer cannot be merged one by one; remove the outer one first.")
        return names, self._new_bias(adapters)

    def unmerge(self) -> None:
        """Put the pretrained weight back.

        Raises ValueError if it was not kept, as on a merged layer that was copied without it.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        if self._unmerged_weight is None:
            raise ValueError(
                f"{', '.join(self.merged_adapters)} cannot be unmerged: the weight from before merging was not kept. "
                "Load the base model again."
            )
        self.set_base_weight(self._unmerged_weight.to(self.get_base_weight()))  # the model may have moved since
        if self._unmerged_bias is not None:
            held: Tensor = self.get_base_layer().bias  # type: ignore[assignment]
            held.data = self._unmerged_bias.to(held)
        self._unmerged_weight = self._unmerged_bias = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The change of the weight by one adapter, in the layer's own layout."""
        weight = self.weight_out_in()
        delta = self._new_weight([self.adapters[adapter_name]]) - weight  # type: ignore[list-item]
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta


def adapter_parameters(adapter: Adapter) -> list[Tensor]:
    """Every tensor of the adapter that may need a gradient, those it shares with other layers included."""
    return [*adapter.parameters(), *(p for module in adapter.shared_state for p in module.parameters())]


@contextmanager
def taps_kept(module: nn.Module) -> Iterator[None]:
    """Run `module` in the middle of a forward of it: what its adapters have tapped so far is theirs again after."""
    tapped = [(each, each.tapped) for each in module.modules() if isinstance(each, Adapter)]
    try:
        yield
    finally:
        for adapter, held in tapped:
            adapter.tapped = held


def adapters_reading_weights(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that adapters may read the weights of without calling them, each with the name of the method."""
    return {
        module.base_layer: adapter.name
        for module in model.modules()
        if isinstance(module, AdaptedLinear) and module.get_base_layer() is module.base_layer
        for adapter in module.adapters.values()
        if isinstance(adapter, Adapter) and adapter.reads_weight
    }


def linear_sizes(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, quantised ones and Conv1D included."""
    if isinstance(layer, Conv1D):
        rows, columns = layer.weight.shape
        return columns, rows
    return layer.out_features, layer.in_features  # type: ignore[return-value]


class AdapterTuner(BaseTuner):
    """Puts an `AdaptedLayer` over every targeted layer. One class serves all methods."""

    tuner_layer_cls = AdaptedLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """As in peft, with the state that all layers share made first. If it fails, the model is as it was."""
        config = self.peft_config[adapter_name]
        config.before_injection(model)
        trained = [(p, p.requires_grad) for shared in self._shared_states().values() for p in shared.parameters()]
        if (shared := config.method.shared(model, config)) is not None:
            if not hasattr(self, self._shared_name):
                setattr(self, self._shared_name, nn.ModuleDict())
            self._shared_states()[adapter_name] = shared
        self._placed: set[str] = set()
        follow = config.values_follow or not config.init_weights or kwargs.get("low_cpu_mem_usage", False)
        self._prepared = follow or not all(map(has_values, model.parameters()))
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self._take_out(adapter_name)
            raise
        for parameter, requires_grad in trained:  # one more adapter freezes no other, as in peft
            parameter.requires_grad_(requires_grad)

    def _prepare(self, config: AdapterConfig) -> None:
        """Call `config.prepare` once an adapter, now that peft has filled in what the targets are."""
        if self._prepared or type(config).prepare is AdapterConfig.prepare:
            return
        for key, layer in config.layers_in(self.model).items():
            base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
            check_layer(config.adapter_class, base, self.model.get_submodule(key.rpartition(".")[0]), key)
        config.prepare(self.model)
        self._prepared = True

    def _take_out(self, adapter_name: str) -> None:
        """Undo an injection that stopped halfway."""
        for key, layer in list(self.model.named_modules()):
            if not (isinstance(layer, AdaptedLayer) and self.prefix in layer.adapter_layer_names):
                continue
            if adapter_name in layer.adapters:
                remove_tap(layer.adapters[adapter_name])  # type: ignore[arg-type]
                del layer.adapters[adapter_name]
            if not layer.adapters:
                parent, _, name = key.rpartition(".")
                setattr(self.model.get_submodule(parent), name, layer.base_layer)
        if adapter_name in self._shared_states():
            del self._shared_states()[adapter_name]
        self.peft_config[adapter_name].after_removal(self.model)

    @property
    def _shared_name(self) -> str:
        return f"{self.prefix}shared"

    def _shared_states(self) -> nn.ModuleDict:
        return getattr(self, self._shared_name, nn.ModuleDict())

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        config = peft_config
        self._prepare(config)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_layer(config.adapter_class, base, parent, current_key)
        shared = self._shared_states()
        extra = (shared[adapter_name],) if adapter_name in shared else ()
        tap = config.tap(self.model, current_key)
        tapped = {} if tap is None else {"tap": self.model.get_submodule(tap)}
        try:
            own = config.of_layer(self.model, current_key)
            adapter = config.adapter_class(base, config, *extra, **tapped, **own)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{current_key}: {error}") from error
        if extra:
            adapter.shared_state = extra
        loading = any(p.is_meta for p in adapter.parameters()) or not config.init_weights or config.values_follow
        if isinstance(target, AdaptedLayer) and self.prefix in target.adapter_layer_names:
            layer = target
        else:
            wrapper = AdaptedLinear if has_linear_weight(base) else AdaptedLayer
            layer = wrapper(target, self.prefix, **get_quantization_kwargs(self.model))
            layer._active_adapter = adapter_name
        if extra:
            self._place_shared(extra[0], layer)
        layer.add(adapter_name, adapter, config.inference_mode, started=loading)
        for module in tapped.values():
            adapter.tap_hook = (module.register_forward_pre_hook(adapter.read_tap, with_kwargs=True),)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As in peft; a base layer goes back as it is, for it need not have a `weight`."""
        if isinstance(child, AdaptedLayer) and not isinstance(new_module, BaseTunerLayer):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _place_shared(self, shared: nn.Module, layer: AdaptedLayer) -> None:
        """Put the shared tensors that were made for this layer on its device and in its dtype."""
        device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        floating = dtype if dtype is not None and dtype.is_floating_point else None
        for name, tensor in named_tensors(shared):
            if name not in self._placed and device is not None and not tensor.is_meta:
                tensor.data = tensor.data.to(device, floating if tensor.is_floating_point() else None)
                self._placed.add(name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put loaded shared state where the layers are; peft calls this after loading through the meta device."""
        layers = [layer for layer in self._layers() if adapter_name in layer.adapters]
        if adapter_name not in self._shared_states() or not layers:
            return
        device = device or layers[0]._get_base_layer_device_and_dtype(layers[0].get_base_layer())[0]
        for _, tensor in named_tensors(self._shared_states()[adapter_name]):
            if device is not None and device.type != "meta" and not tensor.is_meta:
                tensor.data = tensor.data.to(device)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As in peft, for the shared state too."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if autocast_adapter_dtype and adapter_name in self._shared_states():
            for _, tensor in named_tensors(self._shared_states()[adapter_name]):
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    tensor.data = tensor.data.float()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in peft, for the shared state too."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._set_shared_requires_grad(adapter_name, not inference_mode, others=False)

    def set_requires_grad(self, adapter_names: Any, requires_grad: bool = True) -> None:
        """As in peft, for the shared state too."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._set_shared_requires_grad(adapter_names, requires_grad)

    def _set_shared_requires_grad(self, names: Any, requires_grad: bool, others: bool | None = None) -> None:
        chosen = {names} if isinstance(names, str) else set(names)
        for name, shared in self._shared_states().items():
            if name in chosen:
                shared.requires_grad_(requires_grad)
            elif others is not None:
                shared.requires_grad_(others)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in peft, with its taps and shared state."""
        adapters, active = self._adapters(adapter_name), adapter_name in self.active_adapters
        config = self.peft_config.get(adapter_name)
        super().delete_adapter(adapter_name)
        if isinstance(config, AdapterConfig):
            config.after_removal(self.model)
        for adapter in adapters:
            remove_tap(adapter)
        if adapter_name in self._shared_states():
            del self._shared_states()[adapter_name]
        if active:  # the one that peft activates in its place trains
            self._set_shared_requires_grad(self.active_adapters, True)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in peft, but all layers or none."""
        self._check_layers(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _check_layers(self, adapter_names: list[str] | None) -> None:
        """Raises ValueError before any layer is merged if one cannot be."""
        for layer in self._layers():
            if isinstance(layer, AdaptedLinear):
                with onload_layer(layer):
                    layer.to_merge(adapter_names)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        adapters = self._adapters()
        if merge:
            self._check_layers(kwargs.get("adapter_names"))
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        for adapter in adapters:
            remove_tap(adapter)
        for config in self.peft_config.values():
            if isinstance(config, AdapterConfig):
                config.after_removal(model)
        return model

    def _check_merge_allowed(self) -> None:
        """As in peft; a weight that another module holds too is refused, for that module would change with it.

        Raises ValueError.
        """
        holders = Counter(id(p) for module in self.model.modules() for p in module._parameters.values())
        for name, layer in self.model.named_modules():
            weight = getattr(layer.get_base_layer(), "weight", None) if isinstance(layer, AdaptedLinear) else None
            if weight is not None and holders[id(weight)] > 1:
                raise ValueError(
                    f"The weight of {name} is another module's too: merging would change both. Untie them first, or "
                    "leave the layer out of target_modules."
                )
        super()._check_merge_allowed()

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """Refused: a sum of these adapters is in general not one of them, as it is for LoRA."""
        raise ValueError(
            f"{self.prefix.removesuffix('_')} cannot add up adapters to a new one; activate several at once instead: "
            "model.base_model.set_adapter(['first', 'second'])."
        )

    def _layers(self) -> list[AdaptedLayer]:
        modules = self.model.modules()
        return [m for m in modules if isinstance(m, AdaptedLayer) and self.prefix in m.adapter_layer_names]

    def _adapters(self, adapter_name: str | None = None) -> list[Adapter]:
        layers = self._layers()
        return [a for layer in layers for name, a in layer.adapters.items() if adapter_name in (None, name)]  # type: ignore[misc]


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Its parameters and buffers."""
    return [*module.named_parameters(), *module.named_buffers()]


def remove_tap(adapter: Adapter) -> None:
    """Take the adapter's hook off the module it reads."""
    for hook in adapter.tap_hook:
        hook.remove()


def has_linear_weight(layer: nn.Module) -> bool:
    """Whether the layer is linear, quantised ones included."""
    return isinstance(layer, (nn.Linear, Conv1D)) or is_quantised(layer)


def is_quantised(layer: nn.Module) -> bool:
    """Whether its weight is packed by one of the packages that peft knows, whatever dtype it is stored in."""
    return resolve_quantization_backend(layer, get_apply_tensor_subclass=NotImplemented) is not None  # never called


def check_own_weight(model: nn.Module, key: str) -> None:
    """Refuse a layer whose weight is quantised or another module's too; for `AdapterConfig.of_layer`.

    Raises ValueError.
    """
    layer: Any = model.get_submodule(key)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if is_quantised(layer):
        raise ValueError(
            f"its weight, of type {type(layer).__name__}, is quantised already, and is needed as it was before: load "
            "the model without quantization."
        )
    if others := [name for name in holders(model, layer) if model.get_submodule(name) is not layer]:
        raise ValueError(
            f"its weight is that of {others[0]} too, which would not change with it: untie them, or list the layer in "
            "exclude_modules."
        )


def holders(model: nn.Module, layer: nn.Module) -> list[str]:
    """The names of the modules that hold the weight of `layer`, its own among them."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return []
    return [name for name, m in model.named_modules() if any(p is weight for p in m._parameters.values())]


def check_layer(method: type[Adapter], layer: nn.Module, parent: nn.Module, key: str) -> None:
    """Refuse a layer that the method cannot adapt, naming it.

    Raises TypeError.
    """
    if isinstance(parent, nn.MultiheadAttention):
        raise TypeError(
            f"{key} belongs to nn.MultiheadAttention, which reads its weight without calling it: an adapter there "
            "would have no effect. List it in exclude_modules."
        )
    if not method.can_adapt(layer):
        takes = " and ".join(t.__name__ for t in method.layer_types)
        raise TypeError(
            f"{method.name} adapts {takes} only, but target module {key} is of type {type(layer).__name__}, which is "
            "not supported; leave it out of target_modules or list it in exclude_modules."
        )


def register(config_cls: type[AdapterConfig]) -> type[AdapterConfig]:
    """Make a method known to peft under its name; a class decorator, the one registration line of a method file."""
    name = config_cls.method.name
    key, prefix = MethodName(name.upper()), f"{name}_"
    if key in PEFT_TYPE_TO_TUNER_MAPPING:
        raise ValueError(f"An adapter method named {name!r} is already registered.")
    shares = config_cls.method.shared.__func__ is not Adapter.shared.__func__  # type: ignore[attr-defined]
    settings = {"prefix": prefix, "uses_shared_state": shares, "__module__": config_cls.__module__}
    tuner = type(f"{config_cls.method.__name__}Tuner", (AdapterTuner,), settings)
    setattr(sys.modules[config_cls.__module__], tuner.__name__, tuner)  # where pickle looks for it
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = config_cls  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[key] = tuner  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = prefix  # type: ignore[index]
    return config_cls
