"""Adapters made smaller: sliced with their layer, with fewer ranks, or taken off; and how much each of them matters.

What can be sliced is peft's LoRA on plain linear layers, and every method of this package that declares its `axes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import SettingError
from ..modes import is_aside
from ..precision import wide_dtype
from ..real_tokens import learning_rows, real_tokens
from ..resizing import replace_data, resize
from .base import AdaptedLayer, AdaptedLinear, Adapter, linear_sizes, remove_tap

IN, OUT, RANK, READ = "in", "out", "rank", "read"


@dataclass
class SlicedAdapter:
    """One adapter on one layer.

    key: the name of its layer in the model, when no adapter was taken off. axes: as `Adapter.axes`, for `parameters`.
    branch: the module whose output, times `scaling`, the adapter adds; None where there is none.
    """

    key: str
    model: nn.Module
    wrapper: Any
    name: str
    parameters: dict[str, nn.Parameter]
    axes: Mapping[str, tuple[str, ...]]
    branch: nn.Module | None = None
    scaling: float = 1.0
    taken_off: bool = False
    _shapes: dict[str, torch.Size] = field(default_factory=dict)
    _ranks: int = 0
    _place: tuple[nn.Module, str] | None = None
    _taps: list[nn.Module] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._shapes = {name: p.shape for name, p in self.parameters.items()}
        self._ranks = self.num_ranks

    @property
    def layer(self) -> nn.Module:
        """The base layer, without any adapter."""
        base: nn.Module = self.wrapper.get_base_layer()
        return base

    @property
    def num_ranks(self) -> int:
        """How many inner units it has now."""
        return next(
            p.shape[axes.index(RANK)] for name, p in self.parameters.items() if RANK in (axes := self.axes[name])
        )

    def rank_scores(self) -> Float[Tensor, " ranks"]:
        """|mean of weight times gradient| of each inner unit, summed over its factors, in float32."""
        scores = None
        for name, parameter in self.parameters.items():
            axes = self.axes[name]
            if len(axes) != 2 or RANK not in axes or parameter.grad is None:
                continue
            products = parameter.detach().float() * parameter.grad.float()
            each = products.mean(1 - axes.index(RANK)).abs()
            scores = each if scores is None else scores + each
        if scores is None:
            return next(iter(self.parameters.values())).new_zeros(self._ranks, dtype=torch.float32)
        return scores

    @torch.no_grad()
    def slice(
        self,
        ranks: Tensor,
        outputs: Tensor | None = None,
        inputs: Tensor | None = None,
        input_factors: Tensor | None = None,
    ) -> list[nn.Parameter]:
        """Leave out inner units, outputs and inputs, in place; the parameters that have another shape now.

        ranks, outputs, inputs: places to keep, sorted; None keeps all. input_factors: by which what it reads shrinks.
        """
        kept = {RANK: ranks, OUT: outputs, IN: inputs}
        changed = []
        for name, parameter in self.parameters.items():
            value = parameter.detach()
            for dim, axis in enumerate(self.axes[name]):
                if (places := kept.get(axis)) is not None and len(places) < value.shape[dim]:
                    value = value.index_select(dim, places.to(value.device))
            if input_factors is not None and IN in self.axes[name]:
                wide = wide_dtype(value.dtype)
                value = (value.to(wide) * input_factors.to(value.device, wide)).to(value.dtype)
            if value.shape != parameter.shape:
                changed.append(parameter)
            if value is not parameter.data:
                replace_data(parameter, value)
        self._set_sizes()
        return changed

    def take_off(self) -> list[nn.Parameter]:
        """Put the layer in the adapter's place, and let go of its values; its parameters, which train no more."""
        parent, _, last = self.key.rpartition(".")
        self._place = (self.model.get_submodule(parent), last)
        if isinstance(adapter := self._own_adapter, Adapter):
            held = {hook.id for hook in adapter.tap_hook}
            self._taps = [m for m in self.model.modules() if held & set(m._forward_pre_hooks)]
            remove_tap(adapter)
        setattr(*self._place, self.wrapper.base_layer)
        for parameter in self.parameters.values():
            replace_data(parameter, parameter.detach().new_empty(0))
        self.taken_off = True
        return list(self.parameters.values())

    def put_back(self) -> None:
        """Have the shapes of the start again, with values that are to be loaded."""
        if self.taken_off and self._place is not None:
            self.wrapper.train(self._place[0].training)
            setattr(*self._place, self.wrapper)
            if isinstance(adapter := self._own_adapter, Adapter):
                adapter.tap_hook = tuple(
                    module.register_forward_pre_hook(adapter.read_tap, with_kwargs=True) for module in self._taps
                )
            self.taken_off = False
        for name, parameter in self.parameters.items():
            if parameter.shape != self._shapes[name]:
                replace_data(parameter, parameter.detach().new_zeros(self._shapes[name]))
        self._set_sizes()

    @property
    def _own_adapter(self) -> nn.Module | None:
        return self.wrapper.adapters[self.name] if isinstance(self.wrapper, AdaptedLayer) else None

    def _set_sizes(self) -> None:
        """Have the sizes that modules keep beside their weights agree with these."""
        if isinstance(self.wrapper, lora.Linear):
            a: Any = self.wrapper.lora_A[self.name]
            b: Any = self.wrapper.lora_B[self.name]
            self.wrapper.in_features, self.wrapper.out_features = a.weight.shape[1], b.weight.shape[0]
            self.wrapper.r[self.name] = a.weight.shape[0]
            for module in (a, b):
                resize(module)
        elif isinstance(self.wrapper, AdaptedLinear):
            self.wrapper.out_features, self.wrapper.in_features = linear_sizes(self.layer)


def sliceable_adapters(model: nn.Module, of: str) -> list[SlicedAdapter]:
    """Every adapter on the model's layers, inner ones of a stack first.

    of: the technique that asks, for the message.

    Raises SettingError naming a layer whose adapter cannot be sliced, with the reason.
    """
    wrappers = [(key, module) for key, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    found = [adapter for key, wrapper in wrappers for adapter in _adapters_on(model, key, wrapper, of)]
    return sorted(found, key=lambda adapter: -adapter.key.count(".base_layer"))


def _adapters_on(model: nn.Module, key: str, wrapper: Any, of: str) -> Iterator[SlicedAdapter]:
    names: Sequence[str] = [
        name
        for attribute in wrapper.adapter_layer_names
        if isinstance(held := getattr(wrapper, attribute), (nn.ModuleDict, nn.ParameterDict))
        for name in held
    ]
    if len(set(names)) != 1:
        raise SettingError(f"{of} slices layers with one adapter of a kind, but {key} has {len(set(names))}.")
    (name,) = set(names)
    if isinstance(wrapper, AdaptedLayer):
        adapter: Any = wrapper.adapters[name]
        if not adapter.axes or adapter.shared_state:
            why = "shares weights with other layers" if adapter.shared_state else "does not say how it is sliced here"
            raise _refusal(of, adapter.name, key, why)
        yield SlicedAdapter(key, model, wrapper, name, dict(adapter.named_parameters()), adapter.axes)
        return
    kind = type(wrapper).__module__.split(".")[-2]
    if type(wrapper) is not lora.Linear:
        raise _refusal(of, kind, key, f"{type(wrapper).__name__} is no plain linear layer with LoRA")
    if name in wrapper.lora_variant:
        variant = type(wrapper.lora_variant[name]).__name__.removesuffix("LinearVariant")
        raise _refusal(of, kind, key, f"its variant {variant} depends on whole weights")
    if wrapper.merged:
        raise _refusal(of, kind, key, "it is merged")
    a: Any = wrapper.lora_A[name]
    b: Any = wrapper.lora_B[name]
    parameters: dict[str, nn.Parameter] = {"A": a.weight, "B": b.weight}
    axes: dict[str, tuple[str, ...]] = {"A": (RANK, IN), "B": (OUT, RANK)}
    if b.bias is not None:
        parameters["bias"], axes["bias"] = b.bias, (OUT,)
    yield SlicedAdapter(key, model, wrapper, name, parameters, axes, b, wrapper.scaling[name])


def _refusal(of: str, kind: str, key: str, why: str) -> SettingError:
    return SettingError(
        f"{of} cannot slice the {kind} adapter on {key}: {why}. It goes with LoRA on linear layers and with adapters "
        "that declare their axes, such as bottleneck; change the adapter, or list the layer in its exclude_modules."
    )


class BranchRatio:
    """Of one adapter, the mean over tokens of the length of what it adds over that of the layer's output."""

    def __init__(self, adapter: SlicedAdapter, tokens: TokensSeen):
        self.adapter, self.tokens = adapter, tokens
        self.total: Tensor | None = None
        self.count: Tensor | None = None
        self._output: Tensor | None = None
        self._added: Tensor | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        """Watch the adapter's layer from now on."""
        yield self.adapter.wrapper.register_forward_pre_hook(self._begin)
        yield self.adapter.wrapper.base_layer.register_forward_hook(self._of_base)
        if self.adapter.branch is not None:
            yield self.adapter.branch.register_forward_hook(self._of_branch)
        yield self.adapter.wrapper.register_forward_hook(self._of_layer)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._output = self._added = None  # of a forward that was stopped early

    def _of_base(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.tokens.are_counted and self._output is None:  # some methods call the layer twice
            self._output = output.detach()

    def _of_branch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self.tokens.are_counted:
            self._added = output.detach() * self.adapter.scaling

    @torch.no_grad()
    def _of_layer(self, module: nn.Module, args: Any, output: Tensor) -> None:
        h, d = self._output, self._added
        self._output = self._added = None
        if h is None:
            return
        d = output.detach() - h if d is None else d
        ratios = d.float().norm(dim=-1) / h.float().norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        counted = self.tokens.counted(self.adapter.key, ratios)
        total, count = (ratios * counted).sum(), counted.sum()
        self.total = total if self.total is None else self.total + total
        self.count = count if self.count is None else self.count + count

    def take(self) -> Tensor | None:
        """The mean since it was last taken; None if nothing was seen."""
        total, count, self.total, self.count = self.total, self.count, None, None
        return None if total is None or count is None else total / count.clamp_min(1)


class TokensSeen:
    """Which tokens of the forward that runs are no padding, and whether they are counted at all."""

    def __init__(self) -> None:
        self.recording = False
        self._model: nn.Module | None = None
        self._batch: dict[str, Any] = {}

    @property
    def are_counted(self) -> bool:
        """In forwards of the loss that keep a graph only, so that what is run again in backward counts once."""
        return self.recording and torch.is_grad_enabled() and not is_aside()

    def look(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook on the model: remember its batch."""
        if self.recording:
            self._model, self._batch = model, kwargs

    def counted(self, layer: str, of_tokens: Tensor) -> Tensor:
        """1 for tokens, 0 for padding, as the layer of this name sees them now, in the shape of `of_tokens`."""
        real = None
        if self._model is not None:
            real = real_tokens(self._model, self._batch, f"{layer}.", of_tokens.shape, learning_rows())
        return torch.ones_like(of_tokens) if real is None else real.to(of_tokens).view_as(of_tokens)

    def forget(self) -> None:
        """Let go of the batch."""
        self._model, self._batch = None, {}
