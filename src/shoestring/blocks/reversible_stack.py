r"""Two coupled streams run forward without a graph, and backward by inverting block after block.

One block        y1 = c1 x1 + F(x2),  y2 = c2 x2 + G(y1);  the next block gets (y1, y2), or (y2, y1) where `swapped`
Its inverse      x2 = (y2 - G(y1)) / c2,  x1 = (y1 - F(x2)) / c1
Its gradients    du = dy2 G'(y1);  dz = dy1 + du;  dx2 = c2 dy2 + dz F'(x2);  dx1 = c1 dz
Kept             the last two streams, the bits that an inverse needs (see stream_arithmetic), and the random state
                 before each F and G that draws numbers
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..adapters.base import Adapter
from ..errors import RunFailed
from ..fakes import has_values
from ..precision import autocast_off
from .stream_arithmetic import Factor, StreamArithmetic

Part = Callable[[Tensor], Tensor]
Slot = tuple[nn.Module, str]


@dataclass(frozen=True)
class Coupling:
    """F and G of one block. G is None where it is 0. slots: where the trained parameters that they read stand."""

    f: Part
    g: Part | None
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Rules:
    """What all blocks of a stack share.

    factors: of the two streams, as the arithmetic has them. dtype: of the values that F and G are given, and of
    gradients. autocast: enters what was active, in backward too.
    """

    arithmetic: StreamArithmetic
    factors: tuple[Factor, Factor]
    swapped: bool
    dtype: torch.dtype
    device: torch.device
    autocast: Callable[[], AbstractContextManager[Any]]


Streams = tuple[Tensor, Tensor]


def trained_slots(modules: Iterable[nn.Module]) -> tuple[Slot, ...]:
    """Where the trained parameters under `modules` stand, those that adapters share with other layers included."""
    slots: dict[tuple[int, str], Slot] = {}
    for root in modules:
        for module in root.modules():
            shared = module.shared_state if isinstance(module, Adapter) else ()
            for holder in (module, *(inner for state in shared for inner in state.modules())):
                for name, parameter in holder._parameters.items():
                    if parameter is not None and parameter.requires_grad:
                        slots[id(holder), name] = holder, name
    return tuple(slots.values())


def parameters_at(slots: Iterable[Slot]) -> list[Tensor]:
    """The parameters that stand there, each once."""
    return list({id(p): p for module, name in slots if (p := module._parameters[name]) is not None}.values())


@contextmanager
def aliased(slots: Iterable[Slot]) -> Iterator[dict[int, Tensor]]:
    """Put new leaves on the same storage in the parameters' places, so that hooks on parameters run once, outside.

    Yields the leaf for each parameter's id.
    """
    own = [(module, name, module._parameters[name]) for module, name in slots]
    leaves = {id(p): p.detach().requires_grad_() for _, _, p in own if p is not None}
    try:
        for module, name, parameter in own:
            module._parameters[name] = leaves[id(parameter)]  # type: ignore[assignment]
        yield leaves
    finally:
        for module, name, parameter in own:
            module._parameters[name] = parameter


class _Random:
    """The random state of the CPU and of the device of the streams; none where the streams hold no numbers."""

    def __init__(self, numbers: Tensor):
        self.device = numbers.device if numbers.device.type != "cpu" else None
        self.draws = has_values(numbers)

    def get(self) -> tuple[Tensor, ...]:
        if not self.draws:
            return ()
        cpu = torch.get_rng_state()
        if self.device is None:
            return (cpu,)
        return cpu, torch.get_device_module(self.device).get_rng_state(self.device)

    def set(self, state: tuple[Tensor, ...]) -> None:
        torch.set_rng_state(state[0])
        if self.device is not None:
            torch.get_device_module(self.device).set_rng_state(state[1], self.device)

    @contextmanager
    def replayed(self, state: tuple[Tensor, ...] | None) -> Iterator[None]:
        """Run under `state`, and go on after as if nothing had been drawn; None: nothing will be drawn."""
        if state is None:
            yield
            return
        now = self.get()
        self.set(state)
        try:
            yield
        finally:
            self.set(now)


def run_segment(
    rules: Rules,
    couplings: Sequence[Coupling],
    streams: Streams,
    values: Streams,
    inputs: Sequence[tuple[Tensor, Tensor]],
    equal_at_start: bool,
) -> tuple[Streams, Streams]:
    """The streams after some blocks as numbers and as values; backward inverts the blocks.

    values: the streams as the graph before knows them. inputs: tensors of the graph that F and G read beside streams
    and parameters, each with the leaf that stands for it there.
    equal_at_start: both streams are the same where the segment begins, which backward then checks.
    """
    ends: list[Tensor] = []
    tensors, leaves = tuple(tensor for tensor, _ in inputs), tuple(leaf for _, leaf in inputs)
    parameters = parameters_at(slot for coupling in couplings for slot in coupling.slots)
    first, second = _Segment.apply(
        rules, couplings, streams, leaves, equal_at_start, ends, *values, *tensors, *parameters
    )
    return (ends[0], ends[1]), (first, second)


def run_ordinary(
    rules: Rules, couplings: Sequence[Coupling], streams: Streams, values: Streams
) -> tuple[Streams, Streams]:
    """As `run_segment`, with the same numbers, in ordinary autograd."""
    add, (c1, c2) = rules.arithmetic.add, rules.factors
    (x1, x2), (v1, v2) = streams, values
    for coupling in couplings:
        delta = coupling.f(v2)
        x1, _ = add(x1, c1, delta.detach())
        v1 = linked(rules, x1, v1, delta, c1)
        if coupling.g is not None:
            delta = coupling.g(v1)
            x2, _ = add(x2, c2, delta.detach())
            v2 = linked(rules, x2, v2, delta, c2)
        else:
            x2, _ = add(x2, c2, None)
            v2 = linked(rules, x2, v2, None, c2)
        if rules.swapped:
            x1, x2, v1, v2 = x2, x1, v2, v1
    return (x1, x2), (v1, v2)


def linked(rules: Rules, numbers: Tensor, x: Tensor, delta: Tensor | None, factor: Factor) -> Tensor:
    """The value of `numbers`, to the graph c x + delta."""
    gain = rules.arithmetic.gain(factor)
    return _Linked.apply(lambda: rules.arithmetic.value(numbers, rules.dtype), gain, x, delta)


def enter(rules: Rules, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Both streams begin as `hidden`: its numbers, and their value, to the graph `hidden` itself."""
    carrier = hidden.to(rules.dtype)
    numbers = rules.arithmetic.enter(carrier.detach())
    return numbers, _Linked.apply(lambda: rules.arithmetic.value(numbers, rules.dtype), 1.0, carrier, None)


class _Linked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], gain: float, x: Tensor, delta: Tensor | None) -> Tensor:
        ctx.gain, ctx.dtype = gain, None if delta is None else delta.dtype
        return make()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        d_delta = None if ctx.dtype is None else dy.to(ctx.dtype)
        return None, None, dy if ctx.gain == 1 else ctx.gain * dy, d_delta


@dataclass(frozen=True)
class _Kept:
    """What one block needs for its inverse beside its outputs: random states, and which packed rests are its own."""

    random: tuple[Any, Any]
    rests: tuple[int | None, int | None]


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rules: Rules,
        couplings: Sequence[Coupling],
        streams: Streams,
        leaves: tuple[Tensor, ...],
        equal_at_start: bool,
        ends: list[Tensor],
        *tensors: Tensor,
    ) -> Streams:
        x1, x2 = streams
        random = _Random(x1)
        rests: list[Tensor] = []
        kept: list[_Kept] = []

        def keep(rest: Tensor | None) -> int | None:
            if rest is not None:
                rests.append(rest)
            return None if rest is None else len(rests) - 1

        add, (c1, c2) = rules.arithmetic.add, rules.factors
        for coupling in couplings:
            delta, state_f = _run(rules, random, coupling.f, x2)
            x1, rest1 = add(x1, c1, delta)
            delta, state_g = _run(rules, random, coupling.g, x1)
            x2, rest2 = add(x2, c2, delta)
            kept.append(_Kept((state_f, state_g), (keep(rest1), keep(rest2))))
            if rules.swapped:
                x1, x2 = x2, x1
        ctx.rules, ctx.couplings, ctx.leaves, ctx.kept, ctx.equal_at_start = (
            rules,
            couplings,
            leaves,
            kept,
            equal_at_start,
        )
        ctx.stream_dtype = x1.dtype
        # as integers, which no technique rounds: going back makes of a small error a large one
        ctx.save_for_backward(_as_integers(x1), _as_integers(x2), *rests)
        ends += [x1.detach(), x2.detach()]
        return _own(rules, x1, streams), _own(rules, x2, streams)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, *rests = ctx.saved_tensors
        x1, x2 = x1.view(ctx.stream_dtype), x2.view(ctx.stream_dtype)
        ctx.maybe_clear_saved_tensors()  # unless the graph is to be kept: the last streams are not needed for long
        way_back = _WayBack(ctx.rules, [x1, x2], [d1, d2], rests, ctx.leaves)
        del x1, x2, d1, d2, rests
        for coupling, kept in zip(reversed(ctx.couplings), reversed(ctx.kept), strict=True):
            way_back.one_block(coupling, kept)
        if ctx.equal_at_start:
            _check_start(*way_back.numbers)
        parameters = parameters_at(slot for coupling in ctx.couplings for slot in coupling.slots)
        inputs = [*(way_back.of_leaves[id(leaf)] for leaf in ctx.leaves)]
        return *(None,) * 6, *way_back.gradients, *inputs, *(way_back.of_parameters.get(id(p)) for p in parameters)


def _as_integers(x: Tensor) -> Tensor:
    """The bits of a tensor, in the same storage."""
    return x.view(torch.int64 if x.itemsize == 8 else torch.int32)


def _own(rules: Rules, numbers: Tensor, streams: Streams) -> Tensor:
    """The value of a stream, in storage that no input of the function has."""
    value = rules.arithmetic.value(numbers, rules.dtype)
    return value.clone() if any(value is given for given in streams) else value


def _run(rules: Rules, random: _Random, part: Part | None, numbers: Tensor) -> tuple[Tensor | None, Any]:
    """What F or G says to a stream, and the random state before, if it drew numbers.

    It runs with a graph, which keeps nothing and is dropped at once, so that it takes the same kernels as in backward.
    """
    if part is None:
        return None, None
    before = random.get()
    with torch.enable_grad(), _nothing_kept(), rules.autocast():
        delta = part(rules.arithmetic.value(numbers, rules.dtype).detach().requires_grad_()).detach()
    drew = any(not torch.equal(a, b) for a, b in zip(before, random.get(), strict=True))
    return delta, before if drew else None


def _nothing_kept() -> Any:
    """Let a graph that no one will run backward keep no tensor, whatever saved-tensor hooks stand around the model."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _refuse_backward)


def _refuse_backward(packed: None) -> Tensor:
    raise RuntimeError("This graph was made without its tensors.")


class _WayBack:
    """The two streams on their way from the last block to the first, with their gradients.

    numbers, gradients: of both streams, where the way has got to. rests: packed bits, let go once used.
    of_leaves, of_parameters: gradients so far, by id.
    """

    def __init__(
        self,
        rules: Rules,
        numbers: list[Tensor],
        gradients: list[Tensor],
        rests: list[Tensor | None],
        leaves: tuple[Tensor, ...],
    ):
        self.rules = rules
        self.numbers = numbers
        self.gradients = gradients
        self.rests = rests
        self.leaves = leaves
        self.random = _Random(numbers[0])
        self.of_leaves: dict[int, Tensor | None] = {id(leaf): None for leaf in leaves}
        self.of_parameters: dict[int, Tensor] = {}

    def one_block(self, coupling: Coupling, kept: _Kept) -> None:
        """Go back over one block."""
        if self.rules.swapped:
            self.numbers.reverse()
            self.gradients.reverse()
        self._take_back(1, coupling.g, coupling.slots, kept)
        self._take_back(0, coupling.f, coupling.slots, kept)

    def _take_back(self, changed: int, part: Part | None, slots: tuple[Slot, ...], kept: _Kept) -> None:
        """Undo what a part made of one stream out of the other; its graph is gone when this returns."""
        factor, at, arithmetic = self.rules.factors[changed], kept.rests[changed], self.rules.arithmetic
        rest = None
        if at is not None:
            rest, self.rests[at] = self.rests[at], None
        dy, gain = self.gradients[changed], arithmetic.gain(factor)
        if part is None:
            self.numbers[changed] = arithmetic.take_back(self.numbers[changed], factor, None, rest)
        else:
            x = arithmetic.value(self.numbers[1 - changed], self.rules.dtype).detach().requires_grad_()
            with (
                torch.enable_grad(),
                self.random.replayed(kept.random[changed]),
                self.rules.autocast(),
                aliased(slots) as aliases,
            ):
                delta = part(x)
                # before the gradients, so that neither delta nor the old stream is there while they are computed
                self.numbers[changed] = arithmetic.take_back(self.numbers[changed], factor, delta.detach(), rest)
                edge, dy_of_part = get_gradient_edge(delta), dy.to(delta.dtype)
                del delta, rest
                wanted = [x, *self.leaves, *aliases.values()]
                with autocast_off(x):  # as backward runs without reversal
                    dx, *others = torch.autograd.grad(edge, wanted, dy_of_part, allow_unused=True)
            self._note(aliases, others)
            if dx is not None:
                self.gradients[1 - changed] = self.gradients[1 - changed] + dx
        self.gradients[changed] = dy if gain == 1 else gain * dy

    def _note(self, aliases: dict[int, Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Add up gradients of the leaves and then of the parameters."""
        for leaf, gradient in zip(self.leaves, gradients, strict=False):
            self.of_leaves[id(leaf)] = _sum(self.of_leaves[id(leaf)], gradient)
        for key, gradient in zip(aliases, gradients[len(self.leaves) :], strict=True):
            if (total := _sum(self.of_parameters.get(key), gradient)) is not None:
                self.of_parameters[key] = total


def _sum(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if total is None else total if more is None else total + more


def _check_start(x1: Tensor, x2: Tensor) -> None:
    """Both streams began as the same numbers: whatever went wrong in between shows here.

    Raises RunFailed where they differ in exact arithmetic, or far in floating point.
    """
    if not has_values(x1):
        return
    if not x1.is_floating_point():
        if not torch.equal(x1, x2):
            raise RunFailed(
                "Blocks did not compute in backward what they computed in forward: the streams that were taken back "
                "to the first block differ. A block keeps state, or draws numbers from a generator of its own, or its "
                "kernels do not give the same result twice; try torch.use_deterministic_algorithms(True)."
            )
        return
    error = ((x1 - x2).norm() / x1.norm().clamp_min(1e-30)).item()
    if not error < 0.1:
        raise RunFailed(
            f"Streams taken back to the first block differ by {error:.1e} of their size: gradients are no longer "
            "right. Set mode to exact, segment_blocks to a lower number or reversible_layers to fewer blocks."
        )


def leaves_of(output: Tensor) -> list[Tensor]:
    """The tensors that an output's graph ends in."""
    found, seen, waiting = [], set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found
