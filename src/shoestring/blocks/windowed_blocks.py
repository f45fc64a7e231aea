"""Blocks run over one window of tokens after another, forward and backward, with the gradients of the whole sequence.

Forward keeps no graph. Each window writes its keys and values into a cache of all tokens and attends to the cache.
Backward takes the windows from the last to the first. It builds the graph of one window, whose attention reads the
cache through `_Joined`: its backward adds dK and dV of all tokens the window saw to sums in float32 and hands on what
has gathered for the window's own tokens. Tokens are seen by later windows only, so by then their sums are complete.
Where tokens see later ones too (encoders, masks by which a prefix sees all of itself), backward makes two rounds over a
block: one gathers dK and dV, and one takes them through the projections to keys and values.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten
from transformers.masking_utils import causal_mask_function

from ..errors import RunFailed, SettingError, out_of_memory
from ..fakes import has_values
from ..precision import autocast_now, autocast_off, wide_dtype
from .attention import TokenMask, additive, attend, handled_by
from .base import running_passes, within
from .stacks import BlockCall, Stack, hidden_in, token_axis
from .window_budget import PeakBytes

ROWS = 256  # of a mask that are looked at together
MANY = 2**20  # seeds of blocks are this far apart, more than windows in a sequence


@dataclass
class KeyCache:
    """Keys and values of all tokens of one block, and in backward the sums of their gradients.

    Both are pairs of [batch, heads, tokens, width], empty before the first window.
    """

    num_tokens: int
    tensors: list[Tensor] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)

    def write(self, start: int, own: Sequence[Tensor]) -> None:
        """Put the keys and values of one window in their place."""
        if not self.tensors:
            self.tensors = [x.new_empty(*x.shape[:2], self.num_tokens, x.shape[3]) for x in own]
        with torch.no_grad():
            for whole, x in zip(self.tensors, own, strict=True):
                whole[:, :, start : start + x.shape[2]] = x

    def start_sums(self) -> None:
        """Set the sums to zero, in float32 at least."""
        wide = [wide_dtype(x.dtype) for x in self.tensors]
        self.sums = [torch.zeros_like(x, dtype=dtype) for x, dtype in zip(self.tensors, wide, strict=True)]

    def clear(self) -> None:
        """Forget everything."""
        self.tensors, self.sums = [], []


class _Joined(torch.autograd.Function):
    """Cached keys or values of tokens [first, last), to which a window gives those of its own tokens [start, stop).

    Where `own` is an empty tensor, the window's own are treated as given.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, cache: KeyCache, which: int, seen: slice, start: int) -> Tensor:
        ctx.cache, ctx.which, ctx.seen = cache, which, seen
        ctx.own = slice(start, start + own.shape[2]) if own.dim() == 4 else None
        ctx.dtype = own.dtype
        return cache.tensors[which][:, :, seen]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        sums = ctx.cache.sums[ctx.which]
        sums[:, :, ctx.seen] += gradient
        own = None if ctx.own is None else sums[:, :, ctx.own].to(ctx.dtype, copy=True)
        return own, None, None, None, None


class Draws:
    """Random numbers of windows, which can be drawn again: window i of block b draws from a seed of its own.

    Where nothing is drawn, torch's generators stay as they were.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.used = False
        self._before = self._states()
        with unset_fake_temporarily():
            self._seed = int(torch.randint(2**40, ()))

    @contextmanager
    def of(self, block: int, window: int) -> Iterator[None]:
        """Draw for one window inside the context, and go on after as if nothing had been drawn."""
        outside = self._states()
        seed = self._seed + block * MANY + window
        torch.random.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            with torch.get_device_module(self.device).device(self.device):
                torch.get_device_module(self.device).manual_seed(seed)
        inside = self._states()
        try:
            yield
        finally:
            self.used |= _bytes(inside) != _bytes(self._states())
            self._restore(outside)

    def again(self, block: int, window: int) -> Any:
        """As `of`, after all was drawn once."""
        return self.of(block, window) if self.used else nullcontext()

    def finish(self) -> None:
        """All was drawn once: draw the next windows from other seeds, if any of these drew."""
        self._restore(self._before)
        self._before = []
        if self.used:
            with unset_fake_temporarily():
                torch.randint(2**40, ())

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Leave no trace of what is drawn inside the context."""
        self.used = True
        try:
            yield
        finally:
            self._restore(self._before)

    def _states(self) -> list[Tensor]:
        with unset_fake_temporarily():  # generators are real where tensors have no values
            states = [torch.get_rng_state()]
            if self.device.type != "cpu":
                states.append(torch.get_device_module(self.device).get_rng_state(self.device))
            return states

    def _restore(self, states: list[Tensor]) -> None:
        with unset_fake_temporarily():
            torch.set_rng_state(states[0])
            if len(states) > 1:
                torch.get_device_module(self.device).set_rng_state(states[1], self.device)


def _bytes(states: Iterable[Tensor]) -> list[bytes]:
    with unset_fake_temporarily():
        return [state.numpy().tobytes() for state in states]


class _KeysKnown(Exception):
    """Raised in attention to leave a block as soon as the keys and values of a window are there."""


class _Block:
    """One block: its call without the hidden states, its cache, and what of the call carries gradients.

    Tensors that the model computed and that carry gradients (what an encoder hands to a decoder, a position bias) are
    not kept here but appended to `others`, and given again by number.
    """

    def __init__(self, stack: Stack, call: BlockCall, num_tokens: int, others: list[Tensor]):
        self.stack = stack
        self.forward = call.forward
        self.index = call.index
        self.num_tokens = num_tokens
        self.causal = stack.causal and not sees_later(call)
        self.cache = KeyCache(num_tokens)
        self.own: list[Tensor] = []  # keys and values of the window that ran last
        self.first_keys: dict[int, int] = {}  # by window's start, the first key that it sees
        self.values: list[Any] = []
        self.axes: list[int | None] = []  # along which the window is cut out
        self.other: list[int | None] = []  # its place among `others`
        paths, self.structure = tree_flatten_with_path(call.named)
        for path, value in paths:
            name: Any = path[0]
            carries = isinstance(value, Tensor) and value.requires_grad
            self.other.append(_place(value, others) if carries else None)
            self.values.append(None if carries else value)
            self.axes.append(None if name.key.startswith("encoder_") else token_axis(value, num_tokens))

    def named(self, window: slice, others: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments of one window; `others` are cut already."""
        values = []
        for value, axis, other in zip(self.values, self.axes, self.other, strict=True):
            if other is not None:
                value = others[other]
            elif axis is not None:
                value = value.narrow(axis, window.start, window.stop - window.start)
            values.append(value)
        structure: TreeSpec = self.structure
        return tree_unflatten(values, structure)

    def __call__(
        self, hidden: Tensor, window: slice, others: Sequence[Tensor], *, only_keys: bool = False, anchor: Any = None
    ) -> Tensor:
        """The hidden states of one window after the block.

        only_keys: raise _KeysKnown when its keys and values are in the cache.
        anchor: in a stack that is not causal, an empty tensor by which backward finds the cache.
        """
        handler = partial(self._attend, window, only_keys, anchor)
        self.own = []
        try:
            with handled_by(handler):
                return hidden_in(self.forward(hidden, **self.named(window, others)))
        except RunFailed:
            raise
        except RuntimeError as error:
            if out_of_memory(error) or len(range(self.num_tokens)[window]) == self.num_tokens:
                raise
            raise self._refused(f"fails where it is given some of its tokens ({error})") from error

    def write_keys(self, hidden: Tensor, window: slice, others: Sequence[Tensor]) -> list[Tensor]:
        """Bring the keys and values of one window into the cache and return them, running no more than that needs."""
        try:
            self(hidden, window, others, only_keys=True)
        except _KeysKnown:
            pass
        else:
            raise self._refused("ran without calling attention through transformers' attention interface")
        own, self.own = self.own, []
        return own

    def _refused(self, why: str) -> SettingError:
        block = type(self.stack.blocks[self.index]).__name__
        return SettingError(
            f"{self.stack.name}.{self.index} of type {block} {why}, so it cannot be run in windows; use recompute "
            "instead."
        )

    def _attend(
        self,
        window: slice,
        only_keys: bool,
        anchor: Tensor | None,
        original: str,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **options: Any,
    ) -> Tensor:
        if module in self.stack.cross_attentions:
            visible = _rows(mask, window, slice(0, key.shape[2]))
            return attend(original, module, query, key, value, additive(visible, query), **options)
        if self.own:
            raise self._refused("attends more than once")
        self.own = [key, value]
        if only_keys or self.causal:
            self.cache.write(window.start, self.own)
        if only_keys:
            raise _KeysKnown
        seen, visible = self._seen(window, mask)
        joined = self.own if anchor is None else [anchor, anchor]
        if torch.is_grad_enabled():
            key, value = (_Joined.apply(x, self.cache, i, seen, window.start) for i, x in enumerate(joined))
        else:
            key, value = (x[:, :, seen] for x in self.cache.tensors)
        bias = options.get("position_bias")
        if bias is not None and bias.shape[3] == self.num_tokens:
            options["position_bias"] = bias[..., seen]
        return attend(original, module, query, key, value, additive(visible, query), **options)

    def _seen(self, window: slice, mask: Any) -> tuple[slice, Tensor | None]:
        """The keys from the first to the last that a window sees, and which of them each of its tokens sees."""
        if mask is None and self.stack.causal:
            tensor = self.cache.tensors[0]
            mask = TokenMask(tensor.shape[0], self.num_tokens, device=tensor.device)
        last = window.stop if self.causal else self.num_tokens
        if window.start not in self.first_keys:
            visible = _rows(mask, window, slice(0, last))
            self.first_keys[window.start] = 0 if visible is None else _first(visible)
        seen = slice(self.first_keys[window.start], last)
        return seen, _rows(mask, window, seen)


def _place(tensor: Tensor, among: list[Tensor]) -> int:
    for place, other in enumerate(among):
        if other is tensor:
            return place
    among.append(tensor)
    return len(among) - 1


def _rows(mask: Any, queries: slice, keys: slice) -> Tensor | None:
    """A mask for some queries and keys: of a `TokenMask`, or of a tensor whose queries were cut out already."""
    if isinstance(mask, TokenMask):
        return mask.part(queries, keys)
    return None if mask is None else mask[..., keys].expand(-1, -1, queries.stop - queries.start, -1)


def _first(visible: Tensor) -> int:
    """The first key that any query sees; 0 of a mask without values."""
    if not has_values(visible):
        return 0
    seen = _as_booleans(visible).flatten(0, -2).any(0)
    return int(seen.int().argmax())


def _as_booleans(visible: Tensor) -> Tensor:
    return visible if visible.dtype is torch.bool else visible > torch.finfo(visible.dtype).min / 2


def sees_later(call: BlockCall) -> bool:
    """Whether the mask of a block's call shows some token one after it; False of masks without values."""
    mask, num_tokens = call.named.get("attention_mask"), call.hidden.shape[1]
    if isinstance(mask, TokenMask):
        if mask.whole is None and mask.mask_function is causal_mask_function:
            return False
    elif not isinstance(mask, Tensor) or mask.dim() != 4:
        return False
    for start in range(0, num_tokens, ROWS):
        rows, keys = slice(start, min(start + ROWS, num_tokens)), slice(start, num_tokens)
        cut = mask[:, :, rows] if isinstance(mask, Tensor) and mask.shape[2] > 1 else mask
        visible = _rows(cut, rows, keys)
        if visible is None or not has_values(visible):
            return False
        if bool(_as_booleans(visible).triu(1).any()):
            return True
    return False


class WindowedBlocks:
    """Neighbouring blocks of a stack that run window by window.

    Each window goes through all of these blocks before the next one starts. With one block this is layer by layer, and
    its keys and values may be computed again in backward. With several the stack must be causal, and keys are kept.

    window_tokens: of each window; the last may be shorter.
    keep_keys: keep keys and values for backward.
    """

    def __init__(self, stack: Stack, calls: Sequence[BlockCall], window_tokens: int, keep_keys: bool = False):
        hidden = calls[0].hidden
        self.num_tokens = hidden.shape[1]
        starts = range(0, self.num_tokens, window_tokens)
        self.windows = [slice(start, min(start + window_tokens, self.num_tokens)) for start in starts]
        self.keep_keys = keep_keys or len(calls) > 1
        self.others: list[Tensor] = []
        self.blocks = [_Block(stack, call, self.num_tokens, self.others) for call in calls]
        self.causal = all(block.causal for block in self.blocks)
        self.other_axes = _axes_of_others(self.blocks, len(self.others))
        self.parameters: list[Tensor] = []
        self._passes = running_passes()
        self._autocast = autocast_now(hidden.device.type)
        self._hidden = hidden
        self._draws = Draws(hidden.device)

    def run(self) -> Float[Tensor, "batch tokens width"]:
        """The hidden states after the blocks."""
        hidden, others = self._hidden, self.others
        output = self._forward(hidden)
        inputs = [hidden, *others, *self.parameters]
        del self._hidden, self.others  # kept as autograd keeps them, or not at all
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in inputs):
            return output
        return _Windowed.apply(self, [output], len(others), *inputs)

    def kept_bytes(self, num_blocks: int) -> int:
        """Bytes that `num_blocks` blocks like these keep between forward and backward; known after `peak_of_window`."""
        keys = sum(x.nbytes for x in self.cached)
        inputs = self._hidden.nbytes
        if len(self.blocks) > 1:
            return inputs + keys
        return num_blocks * (inputs + (keys if self.keep_keys else 0))

    def backward_bytes(self) -> int:
        """Bytes that backward has beside the kept ones and those of a window; known after `peak_of_window`."""
        sums = sum(x.numel() * wide_dtype(x.dtype).itemsize for x in self.cached)
        keys = 0 if self.keep_keys else sum(x.nbytes for x in self.cached)
        return sums + keys + self._hidden.nbytes

    def peak_of_window(self, num_tokens: int) -> int:
        """Bytes that the last `num_tokens` tokens, as one window, have at their peak in backward; 0 if nothing trains.

        For blocks that do not `run` afterwards.
        """
        hidden, window = self._hidden, slice(self.num_tokens - num_tokens, self.num_tokens)
        self.windows, self.parameters = [window], []
        with self._draws.undone(), self._context(), PeakBytes() as counted:
            new = hidden[:, window].detach()
            others = self._cut(self.others, window)
            for block in self.blocks:
                if not self.causal:
                    self._write_all_keys(hidden, self.others, self._draws.of)
                new = self._find_parameters(block, new, window, others)
                block.own = []
                block.cache.start_sums()
                for x in block.cache.tensors:
                    x.zero_()
            needs = [x.requires_grad for x in (hidden, *self.others, *self.parameters)]
            if not any(needs):
                return 0
            gradient = torch.zeros_like(new)
            counted.restart()
            self._window_backward(0, _Sums(self, hidden, self.others, needs), gradient)
        return counted.peak

    @property
    def cached(self) -> list[Tensor]:
        """All keys and values, block by block."""
        return [x for block in self.blocks for x in block.cache.tensors]

    def forget(self) -> list[Tensor]:
        """Give the caches away."""
        cached = self.cached
        for block in self.blocks:
            block.cache.clear()
        return cached

    def remember(self, cached: Sequence[Tensor]) -> None:
        """Take back what `forget` gave away."""
        for number, block in enumerate(self.blocks):
            block.cache.tensors = list(cached[2 * number : 2 * number + 2])

    def _forward(self, hidden: Tensor) -> Tensor:
        output: Tensor | None = None
        with self._context():
            if not self.causal:
                self._write_all_keys(hidden, self.others, self._draws.of)
            for number, window in enumerate(self.windows):
                new = hidden[:, window].detach()
                others = self._cut(self.others, window)
                for block in self.blocks:
                    with self._draws.of(block.index, number):
                        if number == 0 and torch.is_grad_enabled():
                            new = self._find_parameters(block, new, window, others)
                        else:
                            with torch.no_grad():
                                new = block(new, window, others)
                    block.own = []
                if output is None:
                    output = new.new_empty(new.shape[0], self.num_tokens, *new.shape[2:])
                output[:, window] = new
        self._draws.finish()
        if not self.keep_keys:
            self.forget()
        assert output is not None
        return output

    def _find_parameters(self, block: _Block, hidden: Tensor, window: slice, others: list[Tensor]) -> Tensor:
        """Run one window with its graph, only to learn which weights the block depends on."""
        hidden = hidden.requires_grad_(self._hidden.requires_grad or bool(self.parameters))
        others = [x.detach().requires_grad_() for x in others]
        # what these hooks get would be stored away for nothing by the hooks that are active
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach):
            new = block(hidden, window, others)
        given = {id(hidden), *map(id, others)}
        leaves = [x for x in _leaves([new, *block.own]) if id(x) not in given]
        modules = block.stack.blocks[block.index]
        for parameter in (*(p for p in modules.parameters() if p.requires_grad), *leaves):
            _place(parameter, self.parameters)
        return new.detach()

    def _write_all_keys(self, hidden: Tensor, others: Sequence[Tensor], draws: Any) -> None:
        """Bring the keys and values of all tokens into the cache of the only block."""
        (block,) = self.blocks
        with torch.no_grad():
            for number, window in enumerate(self.windows):
                with draws(block.index, number):
                    block.write_keys(hidden[:, window], window, self._cut(others, window))

    def _cut(self, others: Sequence[Tensor], window: slice) -> list[Tensor]:
        return [
            x if axis is None else x.narrow(axis, window.start, window.stop - window.start)
            for x, axis in zip(others, self.other_axes, strict=True)
        ]

    @contextmanager
    def _context(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(within(self._passes))
            stack.enter_context(self._autocast())
            yield

    def backward(
        self, hidden: Tensor, others: Sequence[Tensor], gradient: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of the hidden states, the other inputs and the parameters, None where `needs` is False."""
        with self._context():
            if not self.keep_keys:
                self._write_all_keys(hidden, others, self._draws.again)
            for block in self.blocks:
                block.cache.start_sums()
            sums = _Sums(self, hidden, others, needs)
            for number in reversed(range(len(self.windows))):
                self._window_backward(number, sums, gradient[:, self.windows[number]])
            if not self.causal:
                for number in range(len(self.windows)):
                    self._keys_backward(number, sums)
        self.forget()
        return sums.result()

    def _window_backward(self, number: int, sums: "_Sums", gradient: Tensor) -> None:
        window = self.windows[number]
        x, cut = sums.leaves(window)
        anchor = None if self.causal else x.new_empty(0, requires_grad=True)
        with torch.enable_grad():
            new = x
            for block in self.blocks:
                with self._draws.again(block.index, number):
                    new = block(new, window, cut, anchor=anchor)
                block.own = []
        sums.add(window, [new], [gradient], x, cut, anchor)

    def _keys_backward(self, number: int, sums: "_Sums") -> None:
        window = self.windows[number]
        (block,) = self.blocks
        x, cut = sums.leaves(window)
        with torch.enable_grad(), self._draws.again(block.index, number):
            own = block.write_keys(x, window, cut)
        gathered = [total[:, :, window].to(x.dtype) for x, total in zip(own, block.cache.sums, strict=True)]
        pairs = [pair for pair in zip(own, gathered, strict=True) if pair[0].requires_grad]
        if pairs:
            sums.add(window, [x for x, _ in pairs], [g for _, g in pairs], x, cut)


class _Sums:
    """Gradients of what blocks depend on, gathered window by window."""

    def __init__(self, blocks: WindowedBlocks, hidden: Tensor, others: Sequence[Tensor], needs: Sequence[bool]):
        self.sources = [hidden, *others]
        self.axes = [1, *blocks.other_axes]
        self.needs = needs
        self.parameters = blocks.parameters
        self.given: list[Tensor | None] = [None] * len(self.sources)
        self.of_parameters: list[Tensor | None] = [None] * len(self.parameters)

    def leaves(self, window: slice) -> tuple[Tensor, list[Tensor]]:
        """The hidden states of one window and the other inputs it needs, cut out of the graph."""
        leaves = []
        for source, axis, needed in zip(self.sources, self.axes, self.needs, strict=False):
            part = source if axis is None else source.narrow(axis, window.start, window.stop - window.start)
            leaves.append(part.detach().requires_grad_(needed))
        return leaves[0], leaves[1:]

    def add(
        self,
        window: slice,
        outputs: list[Tensor],
        gradients: list[Tensor],
        hidden: Tensor,
        others: list[Tensor],
        anchor: Tensor | None = None,
    ) -> None:
        """Go backward from one window's outputs, and add what arrives."""
        leaves = [hidden, *others]
        trained = [i for i, needed in enumerate(self.needs[len(leaves) :]) if needed]
        asked = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        wanted = [*(leaves[i] for i in asked), *(self.parameters[i] for i in trained)]
        anchors = [] if anchor is None else [anchor]
        with _hooks_off(self.parameters), autocast_off(hidden):  # as backward runs without windows
            found = torch.autograd.grad(outputs, [*wanted, *anchors], gradients, allow_unused=True)
        for i, new in zip(asked, found, strict=False):
            if new is not None:
                self._add_to_input(i, window, new)
        for i, new in zip(trained, found[len(asked) :], strict=False):
            if new is not None:
                self.of_parameters[i] = _plus(self.of_parameters[i], new)

    def _add_to_input(self, i: int, window: slice, new: Tensor) -> None:
        axis = self.axes[i]
        if axis is None:
            self.given[i] = _plus(self.given[i], new)
            return
        total = self.given[i]
        if total is None:
            self.given[i] = total = torch.zeros_like(self.sources[i])
        total.narrow(axis, window.start, window.stop - window.start).add_(new)

    def result(self) -> list[Tensor | None]:
        """The gradients in the types of what they belong to."""
        totals = [*self.given, *self.of_parameters]
        owners = [*self.sources, *self.parameters]
        return [None if t is None else t.to(owner.dtype) for t, owner in zip(totals, owners, strict=True)]


@contextmanager
def _hooks_off(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep hooks of tensors from seeing the gradients of windows; they see the sum, which autograd gets."""
    hooks = [tensor._backward_hooks for tensor in tensors]
    try:
        for tensor in tensors:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, own in zip(tensors, hooks, strict=True):
            tensor._backward_hooks = own


def _plus(total: Tensor | None, new: Tensor) -> Tensor:
    """The sum, in float32 at least; in place, for `total` is ours."""
    if total is None:
        return new.to(wide_dtype(new.dtype), copy=True)
    return total.add_(new)


class _Windowed(torch.autograd.Function):
    """The output that was computed in windows, with a backward in windows."""

    @staticmethod
    def forward(ctx: Any, blocks: WindowedBlocks, output: list[Tensor], num_others: int, *inputs: Tensor) -> Tensor:
        ctx.blocks, ctx.num_others = blocks, num_others
        ctx.save_for_backward(*inputs[: 1 + num_others], *blocks.forget())
        return output.pop()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, *rest = ctx.saved_tensors
        ctx.blocks.remember(rest[ctx.num_others :])
        others = rest[: ctx.num_others]
        return None, None, None, *ctx.blocks.backward(hidden, others, gradient, ctx.needs_input_grad[3:])


def _axes_of_others(blocks: Iterable[_Block], count: int) -> list[int | None]:
    axes: list[int | None] = [None] * count
    for block in blocks:
        for axis, other in zip(block.axes, block.other, strict=True):
            if other is not None:
                axes[other] = axis
    return axes


def _leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of autograd's graph that the outputs depend on."""
    found, seen = [], set()
    stack: list[Any] = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        stack.extend(following for following, _ in node.next_functions)
    return found
