"""Stock blocks with only the selected rows of what they keep for backward: the same gradients on any attention.

Rows of tokens outside the selection have a gradient of zero everywhere but at keys and values, which is where it is
stopped; so what is stored of them does not matter, and a selected row takes their place: with zeros, a backward that
divides by what was saved would give NaN. What attention itself saves is kept whole, since all keys and values matter
there; what its layers save is cut where they are called with rows of tokens. Tensors of another form than
[batch, tokens, ...] or [batch * tokens, ...] are kept whole. Where weights have a size of batch * tokens, tensors of
the second form are taken for rows of tokens only as views of the first.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .stacks import attention_layers, attentions
from .token_selection import Selection


class TokenPlaces:
    """Where the tokens of one call of a block are in what the layers of its attention are called with.

    masks: the selected tokens, [batch, tokens]: those of the block, and of an encoder where it attends to one.
    tables: arguments of the block with rows for something else, such as relative positions; what layers make of them
        is added here.
    """

    def __init__(self, masks: list[Tensor], tables: list[Tensor]):
        self.masks, self.tables = masks, tables

    def of_table(self, x: Tensor) -> bool:
        """Whether `x` is one of the tables, or a view of one."""
        return _storage(x) in map(_storage, self.tables)

    def find(self, layer: nn.Module, x: Tensor | None) -> tuple[Tensor, int] | None:
        """The mask of the tokens in what a layer is called with, and the axis they are along; None: there are none.

        The axis is 0 in [batch * tokens, ...], 1 in [batch, tokens, ...] and 2 in [batch, heads, tokens, width]. What
        has heads and comes to a layer without weights, as dropout, may be probabilities: these count as no tokens.
        """
        if x is None or not x.is_floating_point() or self.of_table(x):
            return None
        for mask in self.masks:
            axis = _token_axis(x, *mask.shape)
            if axis is not None and ((x.dim() == 3 and axis == 1) or any(True for _ in layer.parameters())):
                return mask, axis
        return None


def _token_axis(x: Tensor, batch: int, tokens: int) -> int | None:
    if x.dim() == 4 and x.shape[0] == batch:  # where there are as many heads, memory tells: it has heads side by side
        return max((axis for axis in (1, 2) if x.shape[axis] == tokens), key=x.stride, default=None)
    if x.dim() == 3 and x.shape[:2] == (batch, tokens):
        return 1
    return 0 if x.dim() in (2, 3) and x.shape[0] == batch * tokens else None


@contextmanager
def kept_by_rows(block: nn.Module, selection: Selection, places: TokenPlaces) -> Iterator[None]:
    """Store only the selected rows of what is saved inside the context and has rows for tokens; weights stay whole.

    What was to happen with saved tensors before, such as recomputation, happens with these rows.
    """
    batch, tokens = selection.order.shape
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of nested hooks torch calls the last only
    pack_outer, unpack_outer = outer or (_same, _same)
    weights = {_storage(p) for p in block.parameters()}
    of_weights = {p.shape for p in block.parameters()}
    flat_is_clear = batch * tokens not in _sizes(block)
    starts = torch.arange(0, batch * tokens, tokens, device=selection.kept.device)
    rows = selection.kept + starts[:, None]
    rows = rows[selection.valid] if selection.filled_up else rows.view(-1)
    cuts = [len(rows) > 0]  # of the block, and of the parts of its attention that are running

    def has_tokens(x: Tensor) -> bool:
        return x.dim() > 2 and x.shape[:2] == (batch, tokens) and x.shape not in of_weights

    def pack(x: Tensor) -> tuple[Any, torch.Size | None]:
        base = x._base
        x = x.detach()  # an operation that keeps its result hands it over with itself behind it: a cycle
        fits = cuts[-1] and has_tokens(x)
        if cuts[-1] and not fits and x.dim() > 1 and x.shape[0] == batch * tokens:
            fits = flat_is_clear or (base is not None and base.numel() == x.numel() and has_tokens(base))
        if not fits or _storage(x) in weights:
            return pack_outer(x), None
        flat = x.reshape(batch * tokens, -1)
        return pack_outer(flat[rows]), x.shape

    def unpack(packed: tuple[Any, torch.Size | None]) -> Tensor:
        kept, shape = unpack_outer(packed[0]), packed[1]
        if shape is None:
            return kept
        stored_at = torch.arange(len(rows), device=rows.device)
        sources = stored_at.new_zeros(batch * tokens).index_copy_(0, rows, stored_at)
        return kept.index_select(0, sources.to(kept.device)).view(shape)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = None if module in inside else places.find(module, _first_tensor(args, kwargs))
        cuts.append(cuts[0] and found is not None and found[1] < 2)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cuts.pop()

    inside = set(attentions(block))
    with ExitStack() as undo:
        for module in (*inside, *attention_layers(block)):
            undo.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            undo.callback(module.register_forward_hook(leave).remove)
        undo.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, unpack))
        yield


def _sizes(block: nn.Module) -> set[int]:
    """The sizes that weights of a block have, and what is computed from weights: a dtype's copy, an adapter's W'."""
    sizes = {size for p in (*block.parameters(), *block.buffers()) for size in p.shape}
    return sizes | {getattr(m, name, 0) for m in block.modules() for name in ("in_features", "out_features")}


def _same(x: Tensor) -> Tensor:
    return x


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # unlike an address, fake tensors have it too


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)


@contextmanager
def gradient_stopped(block: nn.Module, places: TokenPlaces) -> Iterator[None]:
    """Stop gradients outside the selection at what the layers of a block's attention return."""
    with ExitStack() as undo:
        for layer in attention_layers(block):
            undo.callback(layer.register_forward_hook(partial(_stop, places), with_kwargs=True).remove)
        yield


def _stop(
    places: TokenPlaces, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Tensor | None:
    x = _first_tensor(args, kwargs)
    if x is None or not isinstance(output, Tensor):
        return None
    if places.of_table(x):
        places.tables.append(output)
        return None
    found = places.find(layer, x)
    return stopped_outside(output, *found) if found is not None and output.requires_grad else None


class _Stopped(torch.autograd.Function):
    """The identity, with a gradient of zero where the mask is False."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.mask = mask  # what is saved may be cut
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].masked_fill(~ctx.mask, 0), None


def stopped_outside(x: Tensor, mask: Tensor, axis: int = 1) -> Tensor:
    """`x` with a gradient of zero at tokens where `mask`, [batch, tokens], is False; for `axis` see `TokenPlaces`."""
    sizes = [1] * x.dim()
    sizes[0], sizes[axis] = mask.shape if axis else (mask.numel(), mask.numel())
    return _Stopped.apply(x, mask.view(sizes))
