"""Stock blocks with only the selected rows of what they keep for backward: the same gradients on any attention.

Rows of tokens outside the selection have a gradient of zero everywhere but at keys and values, which is where it is
stopped; so what is stored of them is never read, and zeros can take its place. Tensors of another form than
[batch, tokens, ...] or [batch * tokens, ...], such as heads-first queries and keys, are kept whole. Where weights
have a size of batch * tokens, tensors of the second form are taken for rows of tokens only as views of the first.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .token_selection import Selection


@contextmanager
def kept_by_rows(block: nn.Module, selection: Selection, batch: int, tokens: int) -> Iterator[None]:
    """Store only the selected rows of what is saved inside the context and has rows for tokens; weights stay whole.

    What was to happen with saved tensors before, such as recomputation, happens with these rows.
    """
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)  # of nested hooks torch calls the last only
    pack_outer, unpack_outer = outer or (_same, _same)
    weights = {_storage(p) for p in block.parameters()}
    of_weights = {p.shape for p in block.parameters()}
    flat_is_clear = batch * tokens not in _sizes(block)
    starts = torch.arange(0, batch * tokens, tokens, device=selection.kept.device)
    rows = selection.kept + starts[:, None]
    rows = rows[selection.valid] if selection.filled_up else rows.view(-1)

    def has_tokens(x: Tensor) -> bool:
        return x.dim() > 2 and x.shape[:2] == (batch, tokens) and x.shape not in of_weights

    def pack(x: Tensor) -> tuple[Any, torch.Size | None]:
        base = x._base
        x = x.detach()  # an operation that keeps its result hands it over with itself behind it: a cycle
        fits = has_tokens(x)
        if not fits and x.dim() > 1 and x.shape[0] == batch * tokens:
            fits = flat_is_clear or (base is not None and base.numel() == x.numel() and has_tokens(base))
        if not fits or _storage(x) in weights:
            return pack_outer(x), None
        flat = x.reshape(batch * tokens, -1)
        return pack_outer(flat[rows]), x.shape

    def unpack(packed: tuple[Any, torch.Size | None]) -> Tensor:
        kept, shape = unpack_outer(packed[0]), packed[1]
        if shape is None:
            return kept
        whole = kept.new_zeros(batch * tokens, kept.shape[1])
        return whole.index_copy_(0, rows.to(whole.device), kept).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _sizes(block: nn.Module) -> set[int]:
    """The sizes that weights of a block have, and what is computed from weights: a dtype's copy, an adapter's W'."""
    sizes = {size for p in (*block.parameters(), *block.buffers()) for size in p.shape}
    return sizes | {getattr(m, name, 0) for m in block.modules() for name in ("in_features", "out_features")}


def _same(x: Tensor) -> Tensor:
    return x


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata  # unlike an address, fake tensors have it too


@contextmanager
def gradient_stopped(modules: list[nn.Module], of_input: Any) -> Iterator[None]:
    """Stop gradients outside the selection at the outputs of `modules`.

    of_input: gives, for the tensor a module was called with, the mask [batch, tokens] of its selection, or None.
    """
    with ExitStack() as undo:
        for module in modules:
            undo.callback(module.register_forward_hook(partial(_stop, of_input)).remove)
        yield


def _stop(of_input: Any, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, Tensor) or not output.requires_grad or not args or not isinstance(args[0], Tensor):
        return None
    heads_first = args[0].dim() == 4  # a norm of queries or keys, [batch, heads, tokens, width]
    mask = of_input(args[0].transpose(1, 2) if heads_first else args[0])
    along = output.transpose(1, 2) if heads_first else output
    if mask is None or along.shape[:2] != mask.shape:
        return None
    stopped = stopped_outside(along, mask)
    return stopped.transpose(1, 2) if heads_first else stopped


class _Stopped(torch.autograd.Function):
    """The identity, with a gradient of zero where the mask is False."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,), (mask,) = gradients, ctx.saved_tensors
        return gradient * mask.view(*mask.shape, *(1 for _ in gradient.shape[2:])), None


def stopped_outside(x: Tensor, mask: Tensor) -> Tensor:
    """`x`, [batch, tokens, ...], with a gradient of zero where `mask`, [batch, tokens], is False."""
    return _Stopped.apply(x, mask)
