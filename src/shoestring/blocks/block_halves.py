"""A stock block in two halves: from its input to the residual stream at the feed-forward part, and from there on.

First half   the block's own forward, left where it reaches the module whose input is that stream (`Layout.entry`)
Second half  the block's own forward on that stream, with its attention standing still: attention that is added to the
             stream gives 0 and norms before `entry` give their input, so that the sum before the feed-forward part is
             the stream itself; attention that is called with the stream and returns the new one returns its input
Which of the two an attention is, and which norms come before, is seen while the first half runs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..adapters.placement import Layout
from ..errors import SettingError
from ..forwards import forward_swapped
from .stacks import hidden_in

Forward = Callable[[Tensor], Tensor]


class _Reached(Exception):
    """Carries the residual stream out of a block."""

    def __init__(self, stream: Tensor):
        super().__init__()
        self.stream = stream


@dataclass(frozen=True)
class Seen:
    """What the first half showed of a block.

    attentions: those that ran, and of how many parts their output is; 0 for a bare tensor.
    carries: whether they return the stream itself rather than what is added to it. norms: direct children before entry.
    """

    attentions: tuple[tuple[nn.Module, int], ...]
    carries: bool
    norms: tuple[nn.Module, ...]


class BlockHalves:
    """The halves of one block of a known layout.

    Raises SettingError where attention and feed-forward part stand side by side, so that there is no stream between.
    """

    def __init__(self, name: str, block: nn.Module, layout: Layout):
        if layout.parallel:
            raise SettingError(
                f"{name} adds attention and feed-forward part to the stream together, so that it has no two halves; "
                "use variant 1 or 2."
            )
        self.name = name
        self.block = block
        self.entry = block.get_submodule(layout.entry)
        self.seen: Seen | None = None

    def first(self, forward: Forward, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """The residual stream after attention; `forward` is the whole block."""
        with ExitStack() as undo:
            undo.callback(self.entry.register_forward_pre_hook(_leave, with_kwargs=True, prepend=True).remove)
            watch = None if self.seen is not None else undo.enter_context(_watched(self.block))
            try:
                forward(x)
            except _Reached as reached:
                if watch is not None:
                    self.seen = watch(reached.stream)
                return reached.stream.view_as(x)
        raise SettingError(f"{self.name} did not reach its feed-forward part; use variant 1 or 2.")

    def second(self, forward: Forward, stream: Float[Tensor, "batch tokens width"]) -> Tensor:
        """The block's output from the stream that `first` gave; `first` must have run before."""
        if self.seen is None:
            raise RuntimeError(f"{self.name}: the first half must run before the second.")
        with ExitStack() as undo:
            for attention, num_parts in self.seen.attentions:
                undo.enter_context(forward_swapped(attention, _Still(num_parts, self.seen.carries)))
            for norm in self.seen.norms:
                undo.enter_context(forward_swapped(norm, _same))
            return forward(stream)

    def check(self, forward: Forward, x: Tensor) -> None:
        """Raise SettingError unless the halves together are the block; in evaluation mode."""
        with torch.no_grad():
            halves, whole = self.second(forward, self.first(forward, x)), forward(x)
        if not torch.allclose(halves, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())):
            raise SettingError(
                f"{self.name} of type {type(self.block).__name__} cannot be split into attention and feed-forward "
                "part; use variant 1 or 2."
            )


class _Still:
    """Stands in for an attention: its input, or zeros like it, and None for whatever else it returns."""

    def __init__(self, num_parts: int, carries: bool):
        self.num_parts = num_parts
        self.carries = carries

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        out = x if self.carries else torch.zeros_like(x)
        return (out, *(None,) * (self.num_parts - 1)) if self.num_parts else out


def _same(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else next(iter(kwargs.values())))


@contextmanager
def _watched(block: nn.Module) -> Iterator[Callable[[Tensor], Seen]]:
    """Notes which attentions and norms of a block run, in order; yields what makes `Seen` of the stream they led to."""
    outputs: dict[nn.Module, Any] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        outputs[module] = output

    def seen(stream: Tensor) -> Seen:
        attentions = [m for m in outputs if m in watched]
        carries = any(hidden_in(outputs[m]) is stream for m in attentions)
        parts = tuple((m, len(outputs[m]) if isinstance(outputs[m], tuple) else 0) for m in attentions)
        norms = tuple(m for m in outputs if m not in watched)
        return Seen(parts, carries, norms)

    watched = _outermost_attentions(block)
    with ExitStack() as undo:
        for module in (*watched, *(m for m in block.children() if "norm" in type(m).__name__.lower())):
            undo.callback(module.register_forward_hook(note).remove)
        yield seen


def _outermost_attentions(block: nn.Module) -> set[nn.Module]:
    named = [(n, m) for n, m in block.named_modules() if n and "attention" in type(m).__name__.lower()]
    return {m for n, m in named if not any(n.startswith(f"{outer}.") for outer, _ in named)}
