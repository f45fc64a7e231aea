"""One stack of a stock model as two coupled streams: its adapters, how far each part goes, and what a probe shows."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..adapters.base import has_linear_weight
from ..adapters.bottleneck import Bottleneck, BottleneckConfig, widths
from ..adapters.placement import Layout, layout_of
from ..draws import undrawn
from ..errors import SettingError
from ..modes import in_eval_mode
from ..precision import at_least_float32, autocast_now, wide_dtype
from .block_halves import BlockHalves
from .reversible_stack import (
    Coupling,
    Rules,
    Streams,
    enter,
    leaves_of,
    parameters_at,
    run_ordinary,
    run_segment,
    trained_slots,
)
from .stacks import BlockCall, Stack

if TYPE_CHECKING:
    from .reversible import Reversible

logger = logging.getLogger(__name__)

ACTIVATION_SETTINGS = ("hidden_act", "activation_function", "hidden_activation", "dense_act_fn", "activation")


@dataclass(frozen=True)
class Probe:
    """What the first training forward showed of one stack, in evaluation mode.

    cosine, deviation: of the output to that of the stock blocks; |difference| / |stock|.
    reconstruction_error: |taken back - stored| / |stored|, the largest over segments; 0 in exact mode.
    kept_bytes: what reversed blocks keep for backward, random states aside.
    """

    cosine: float
    deviation: float
    reconstruction_error: float
    kept_bytes: int


class BlockAdapters(nn.Module):
    """The adapters of one block. Those that a variant or setting leaves out are None.

    plain: F or G by itself. feedforward: beside the feed-forward part. attention: on attention's projection.
    """

    plain: Bottleneck | None
    feedforward: Bottleneck | None
    attention: Bottleneck | None

    def __init__(self, **adapters: Bottleneck | None):
        super().__init__()
        for name in ("plain", "feedforward", "attention"):
            self.register_module(name, adapters.get(name))


class TwoStreams:
    """One stack as two streams: its adapters, its halves where the variant needs them, and how far each part goes."""

    def __init__(self, technique: "Reversible", model: nn.Module, stack: Stack):
        self.technique = technique
        self.stack = stack
        self.adapters_off = False
        count = len(stack)
        wanted = count if technique.reversible_layers is None else technique.reversible_layers
        self.num_stock = count - wanted if technique.placement == "frozen_bottom" else 0
        self.num_reversed = wanted - technique.ordinary_layers
        self.layouts: list[Layout] = [layout for block in stack.blocks if (layout := layout_of(block)) is not None]
        config = self._adapter_config(model)
        self.adapters = nn.ModuleList(self._make_adapters(config, index) for index in range(count))
        self.merge: nn.Linear | None = None
        if technique.output == "linear":
            self.merge = self._make_merge()
            self.adapters.append(self.merge)
        self.halves: list[BlockHalves] = []
        if technique.variant == 3:
            self.halves = [
                BlockHalves(f"{stack.name}.{index}", block, self.layouts[index])
                for index, block in enumerate(stack.blocks)
            ]

    def _adapter_config(self, model: nn.Module) -> BottleneckConfig:
        technique = self.technique
        activation = technique.activation or _activation_of(model, self.stack.name)
        return BottleneckConfig(r=technique.r, activation=activation, init="bert", dropout=technique.dropout)

    def _make_adapters(self, config: BottleneckConfig, index: int) -> BlockAdapters:
        if index < self.num_stock:
            return BlockAdapters()
        variant, last = self.technique.variant, index == len(self.stack) - 1
        block, layout = self.stack.blocks[index], self.layouts[index]
        base = _base_layer(block.get_submodule(layout.feedforward))
        device, dtype = _device_and_dtype(block)

        def made(config: BottleneckConfig) -> Bottleneck:
            adapter = Bottleneck(base, config, tap=block)  # it reads the stream, whatever the base layer reads
            there = (adapter.up.device, adapter.up.dtype) == (device, dtype)
            return adapter if there else adapter.to(device, dtype)  # fake tensors cannot be moved

        adapters: dict[str, Bottleneck] = {}
        # of the last block of variant 1, only y1 is the newest stream: an adapter in y2 would learn nothing
        if variant != 3 and not (variant == 1 and last and self.technique.output == "newest"):
            adapters["plain"] = made(replace(config, norm=self.technique.adapter_norm))
        if self.technique.block_adapter:
            adapters["feedforward"] = made(config)
            if variant == 3:
                adapters["attention"] = made(config)
        return BlockAdapters(**adapters)

    def _make_merge(self) -> nn.Linear:
        """Starts as the newest stream, of [older, newest]."""
        width, _ = widths(_base_layer(self.stack.blocks[-1].get_submodule(self.layouts[-1].feedforward)))
        device, dtype = _device_and_dtype(self.stack.blocks[-1])
        merge = nn.Linear(2 * width, width, bias=False, device=device, dtype=dtype)
        with torch.no_grad():
            merge.weight.copy_(torch.eye(width, 2 * width).roll(width, 1))
        return merge

    def _block_adapters(self) -> list[BlockAdapters]:
        return [adapters for adapters in self.adapters if isinstance(adapters, BlockAdapters)]

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let the adapters inside blocks act."""
        with ExitStack() as undo:
            for block, layout, adapters in zip(self.stack.blocks, self.layouts, self._block_adapters(), strict=True):
                if (beside := adapters.feedforward) is not None:
                    entry, part = block.get_submodule(layout.entry), block.get_submodule(layout.feedforward)
                    if has_linear_weight(_base_layer(entry)):
                        hook = entry.register_forward_pre_hook(partial(_tap_input, beside), with_kwargs=True)
                    else:
                        hook = entry.register_forward_hook(partial(_tap_output, beside))
                    undo.callback(hook.remove)
                    undo.callback(part.register_forward_hook(partial(self._add_beside, beside)).remove)
                if (after := adapters.attention) is not None:
                    part = block.get_submodule(layout.attention)
                    undo.callback(part.register_forward_hook(partial(self._add_after, after)).remove)
            yield

    def _add_beside(self, adapter: Bottleneck, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        tapped, adapter.tapped = adapter.tapped, None
        if self.adapters_off or tapped is None:
            return None
        return output + adapter.branch(tapped).to(output.dtype)

    def _add_after(self, adapter: Bottleneck, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return None if self.adapters_off else output + adapter.branch(output).to(output.dtype)

    def run(self, calls: list[BlockCall]) -> Tensor:
        """The hidden states after the stack."""
        hidden, calls = self._stock_bottom(calls)
        rules = self._rules(hidden)
        numbers, value = enter(rules, hidden)
        streams, values = (numbers, numbers), (value, value)
        num_reversed = self.num_reversed if torch.is_grad_enabled() else 0
        for segment in self._segments(calls[:num_reversed]):
            streams, values = self._run_segment(rules, segment, hidden.dtype, streams, values, segment[0] is calls[0])
        top = [self._coupling(call, hidden.dtype) for call in calls[num_reversed:]]
        streams, values = run_ordinary(rules, top, streams, values)
        rules.arithmetic.check(self.stack.name)
        return self._merged(values).to(hidden.dtype)

    def _run_segment(
        self,
        rules: Rules,
        calls: list[BlockCall],
        dtype: torch.dtype,
        streams: Streams,
        values: Streams,
        first: bool,
    ) -> tuple[Streams, Streams]:
        """Blocks that backward inverts; what they read beside streams and parameters gets leaves to stand for it."""
        leaves: dict[int, tuple[Tensor, Tensor]] = {}

        def leaf(tensor: Tensor) -> Tensor:
            if not tensor.requires_grad:
                return tensor
            return leaves.setdefault(id(tensor), (tensor, tensor.detach().requires_grad_()))[1]

        nothing = calls[0].hidden.new_empty(0)
        apart = [replace(call, hidden=nothing, named=_mapped(call.named, leaf)) for call in calls]
        couplings = [self._coupling(call, dtype) for call in apart]
        return run_segment(rules, couplings, streams, values, list(leaves.values()), equal_at_start=first)

    def _stock_bottom(self, calls: list[BlockCall]) -> tuple[Tensor, list[BlockCall]]:
        """The hidden states after the stock blocks, and the calls of those above."""
        hidden = calls[0].hidden
        for call in calls[: self.num_stock]:
            hidden = call(hidden)
        return hidden, calls[self.num_stock :]

    def _rules(self, hidden: Tensor) -> Rules:
        technique = self.technique
        dtype = wide_dtype(hidden.dtype)
        device = hidden.device
        swapped = technique.variant != 3
        return Rules(technique.arithmetic(), technique.factors(), swapped, dtype, device, autocast_now(device.type))

    def _segments(self, calls: list[BlockCall]) -> list[list[BlockCall]]:
        length = self.technique.segment_blocks or max(1, len(calls))
        return [calls[start : start + length] for start in range(0, len(calls), length)]

    def _coupling(self, call: BlockCall, dtype: torch.dtype) -> Coupling:
        """F and G of one block, with what the block was called with."""
        variant, block = self.technique.variant, self.stack.blocks[call.index]
        adapters = self._block_adapters()[call.index]
        slots = trained_slots((block, adapters))

        def whole(x: Tensor) -> Tensor:
            return call(x.to(dtype))

        if variant == 3:
            halves = self.halves[call.index]
            return Coupling(
                lambda x: halves.first(call, x.to(dtype)), lambda x: halves.second(call, x.to(dtype)), slots
            )
        plain = None if adapters.plain is None else partial(_branch, adapters.plain, dtype)
        if variant == 1:
            return Coupling(whole, plain, slots)
        assert plain is not None
        return Coupling(plain, whole, slots)

    def _merged(self, values: Streams) -> Tensor:
        older, newest = values[::-1] if self.technique.variant == 2 else values
        match self.technique.output:
            case "mean":
                return (older + newest) / 2
            case "sum":
                return newest + self.technique.output_scale * older
            case "linear":
                assert self.merge is not None
                return self.merge(torch.cat((older, newest), -1).to(self.merge.weight.dtype))
        return newest

    @torch.no_grad()
    def probe(self, calls: list[BlockCall]) -> Probe:
        """Run the stack once as stock blocks, once as streams and back again, in evaluation mode.

        Raises SettingError where streams in floating point cannot be taken back.
        """
        with _evaluating((self.stack.blocks, self.adapters), calls[0].hidden.device):
            bottom, upper = self._stock_bottom(calls)
            if self.halves:
                for call in upper:
                    self.halves[call.index].check(call, bottom)
            self._refuse_foreign_parameters(upper, bottom)
            self.adapters_off = True
            try:
                stock = bottom
                for call in upper:
                    stock = call(stock)
            finally:
                self.adapters_off = False
            rules = self._rules(bottom)
            error, kept, values = self._there_and_back(rules, upper, bottom)
            output = self._merged(values)
        stock = stock.to(output.dtype)
        cosine = nn.functional.cosine_similarity(output.flatten(0, -2), stock.flatten(0, -2), -1).mean().item()
        deviation = ((output - stock).norm() / stock.norm().clamp_min(1e-30)).item()
        probe = Probe(cosine, deviation, error, kept)
        logger.info("reversible on %s: %s", self.stack.name, probe)
        if not error <= 1e-2:
            raise SettingError(
                f"Streams of {self.stack.name} in floating point cannot be taken back: the error is {error:.1e} of "
                "their size, over the limit of 1e-2. Set mode to exact; or segment_blocks to a lower number, or "
                "reversible_layers to fewer blocks."
            )
        return probe

    def _there_and_back(
        self, rules: Rules, calls: list[BlockCall], hidden: Tensor
    ) -> tuple[float, int, tuple[Tensor, Tensor]]:
        """The largest error of a segment's streams taken back, bytes kept by all of them, and the last values."""
        arithmetic, (c1, c2), worst, kept_bytes = rules.arithmetic, rules.factors, 0.0, 0
        x1 = x2 = arithmetic.enter(hidden.to(rules.dtype))

        def said(part: Any, x: Tensor) -> Tensor | None:
            return None if part is None else part(arithmetic.value(x, rules.dtype))

        for segment in self._segments(calls[: self.num_reversed]):
            couplings, start, rests = [self._coupling(call, hidden.dtype) for call in segment], (x1, x2), []
            for coupling in couplings:
                x1, rest1 = arithmetic.add(x1, c1, said(coupling.f, x2))
                x2, rest2 = arithmetic.add(x2, c2, said(coupling.g, x1))
                rests.append((rest1, rest2))
                x1, x2 = (x2, x1) if rules.swapped else (x1, x2)
            kept_bytes += sum(_num_bytes(t) for t in (x1, x2, *(r for pair in rests for r in pair)) if t is not None)
            y1, y2 = x1, x2
            for coupling, (rest1, rest2) in zip(reversed(couplings), reversed(rests), strict=True):
                y1, y2 = (y2, y1) if rules.swapped else (y1, y2)
                y2 = arithmetic.take_back(y2, c2, said(coupling.g, y1), rest2)
                y1 = arithmetic.take_back(y1, c1, said(coupling.f, y2), rest1)
            for y, x in zip((y1, y2), start, strict=True):
                was, now = (arithmetic.value(numbers, torch.float64) for numbers in (x, y))
                worst = max(worst, ((now - was).norm() / was.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item())
        values = (arithmetic.value(x1, rules.dtype), arithmetic.value(x2, rules.dtype))
        top = [self._coupling(call, hidden.dtype) for call in calls[self.num_reversed :]]
        _, values = run_ordinary(rules, top, (x1, x2), values)
        arithmetic.check(self.stack.name)
        return worst, kept_bytes, values

    def _refuse_foreign_parameters(self, calls: list[BlockCall], hidden: Tensor) -> None:
        """Raise SettingError where a block reads trained parameters from outside of it: they would get no gradient."""
        for call in calls[: self.num_reversed]:
            coupling = self._coupling(replace(call, named=_mapped(call.named, Tensor.detach)), hidden.dtype)
            with torch.enable_grad():
                x = at_least_float32(hidden.detach()).requires_grad_()
                read = leaves_of(coupling.f(x)) + ([] if coupling.g is None else leaves_of(coupling.g(x)))
            known = {id(p) for p in parameters_at(coupling.slots)} | {id(x)}
            if foreign := [leaf for leaf in read if id(leaf) not in known]:
                raise SettingError(
                    f"{self.stack.name}.{call.index} reads a trained parameter of shape {tuple(foreign[0].shape)} that "
                    "stands outside of the block and of its adapters; reversible cannot train it."
                )


def _branch(adapter: Bottleneck, dtype: torch.dtype, x: Tensor) -> Tensor:
    return adapter.branch(x.to(dtype))


def _tap_input(adapter: Bottleneck, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    adapter.read_tap(module, args, kwargs)


def _tap_output(adapter: Bottleneck, module: nn.Module, args: Any, output: Tensor) -> None:
    adapter.tapped = output


def _base_layer(module: nn.Module) -> nn.Module:
    """The pretrained layer under a peft adapter."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _device_and_dtype(block: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a block's adapters stand, and their dtype: float32, or finer where the block is."""
    example = next(block.parameters())
    return example.device, torch.float64 if example.dtype == torch.float64 else torch.float32


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor in it changed."""
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    return change(value) if isinstance(value, Tensor) else value


def _activation_of(model: nn.Module, stack_name: str) -> str:
    """The activation of the model around a stack, by name; gelu where its config names none."""
    parts = stack_name.split(".")
    for length in range(len(parts) - 1, -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:length])), "config", None)
        for name in ACTIVATION_SETTINGS:
            if (activation := getattr(config, name, None)) in ACT2FN and isinstance(activation, str):
                return activation
    return "gelu"


@contextmanager
def _evaluating(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Modules in evaluation mode inside the context; what they draw at random does not count."""
    with undrawn([device]), ExitStack() as modes:
        for module in modules:
            modes.enter_context(in_eval_mode(module))
        yield
