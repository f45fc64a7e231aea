"""A linear layer of which some input columns, or some output rows, of the weight are trained in place.

Update   W' = W but for W'[:, columns] = W[:, columns] + s D, or W'[rows] = W[rows] + s D     y = x W'^T + b
         dD = s dY^T x[..., columns], or s dY[..., rows]^T x     dx = dY W'
Shapes   W [out, in], D [out, r] for r columns, [r, in] for r rows
Costs    columns: x[..., columns] is kept, x is not; rows: x is kept. W' is formed in W itself and never kept: the part
         is written in, the product taken, the part written back, once in forward and once in backward. That gives the
         bits of a merged weight and takes the same time for any number of tokens, so on a CPU a second small product
         on top of x W^T is cheaper below some thousand tokens. A slice is written ten times faster than columns apart
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..precision import autocast_dtype, autocast_off

Index = Int[Tensor, " r"] | slice
Weight = Float[Tensor, "out in"] | Callable[[], Tensor]

_WRITING = RLock()


@dataclass(frozen=True)
class Part:
    """Some columns (dim 1) or rows (dim 0) of a weight: their numbers, each once, or a slice without a step."""

    dim: int
    index: Tensor | slice

    def taken(self, tensor: Tensor, dim: int) -> Tensor:
        """A contiguous copy of the part of `tensor` along `dim`."""
        if isinstance(self.index, Tensor):
            return tensor.index_select(dim, self.index)
        return _narrow(tensor, dim, self.index).clone(memory_format=torch.contiguous_format)

    def put(self, weight: Tensor, values: Tensor) -> None:
        """Overwrite the part of `weight`."""
        if isinstance(self.index, Tensor):
            weight.index_copy_(self.dim, self.index, values)
        else:
            _narrow(weight, self.dim, self.index).copy_(values)

    def scattered(self, delta: Tensor, shape: tuple[int, int]) -> Float[Tensor, "out in"]:
        """delta at its place among zeros, [out, in]; with gradients."""
        index = self.index
        if isinstance(index, slice):
            index = torch.arange(*index.indices(shape[self.dim]), device=delta.device)
        return delta.new_zeros(shape).index_add(self.dim, index, delta)


def _narrow(tensor: Tensor, dim: int, index: slice) -> Tensor:
    start, stop, _ = index.indices(tensor.shape[dim])
    return tensor.narrow(dim, start, stop - start)


def _scaled(delta: Tensor, scale: float) -> Tensor:
    return delta if scale == 1 else delta * scale


@contextmanager
def changed_weight(weight: Weight, delta: Tensor, part: Part, scale: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """W' in `dtype` for the length of a `with` block, in W's own memory where that may be.

    Autograd does not see the writing, and one thread writes at a time, so that one weight may be used many times in a
    graph and in several threads that all come here. What reads the weight elsewhere meanwhile, in another thread or on
    another stream of a GPU, can meet W': there, give W as a function that clones it. Memory that other processes may
    see and tensors of inference mode are copied, not written to.
    """
    with _WRITING:
        held = weight if isinstance(weight, Tensor) else weight()
        old = part.taken(held, part.dim)
        wide = torch.promote_types(old.dtype, delta.dtype)
        new = (old.to(wide) + _scaled(delta, scale)).to(old.dtype)  # rounded once, as in a merge
        if held.dtype != dtype or (held is weight and not _may_be_written(held)):
            held, own = held.to(dtype, copy=True), True
        else:
            held, own = held.data, held is not weight  # .data has a version counter of its own
        try:
            part.put(held, new.to(dtype))
            yield held
        finally:
            if not own:
                part.put(held, old)


def _may_be_written(weight: Tensor) -> bool:
    """Not if other processes may see it, nor if torch guards it."""
    if weight.is_inference() and not torch.is_inference_mode_enabled():
        return False
    return weight.device.type != "cpu" or not weight.is_shared()


class _PartialLinear(torch.autograd.Function):
    """y = x W'^T + b. Kept: x[..., columns] or x, and D."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Any, bias: Tensor | None, delta: Tensor, part: Part, scale: float
    ) -> Tensor:
        is_tensor = isinstance(weight, Tensor)
        ctx.part, ctx.scale, ctx.make = part, scale, None if is_tensor else weight
        kept = None
        if ctx.needs_input_grad[3]:
            kept = part.taken(x, -1) if part.dim == 1 else x
        ctx.save_for_backward(kept, delta, weight if is_tensor else None)
        with changed_weight(weight, delta, part, scale, x.dtype) as changed:
            return F.linear(x, changed, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, delta, weight = ctx.saved_tensors
        part: Part = ctx.part
        rows = dy.reshape(-1, dy.shape[-1])
        dx = d_bias = d_delta = None
        if ctx.needs_input_grad[0]:
            with changed_weight(ctx.make or weight, delta, part, ctx.scale, dy.dtype) as changed:
                dx = (rows @ changed).view(*dy.shape[:-1], changed.shape[1])
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        if ctx.needs_input_grad[3]:
            kept = kept.reshape(-1, kept.shape[-1])
            # the thin matrix first: by a third faster on a CPU
            d_delta = (kept.T @ rows).T if part.dim == 1 else part.taken(rows, 1).T @ kept
            d_delta = _scaled(d_delta.to(delta.dtype), ctx.scale)
        return dx, None, d_bias, d_delta, None, None


def partial_linear(
    x: Float[Tensor, "*batch in"],
    weight: Weight,
    bias: Float[Tensor, " out"] | None,
    delta: Float[Tensor, "_ _"],
    *,
    columns: Index | None = None,
    rows: Index | None = None,
    scale: float = 1.0,
) -> Float[Tensor, "*batch out"]:
    """`x @ W'.T + bias` in x's dtype or autocast's, W' the weight with `scale * delta` added to some columns or rows.

    weight: the weight, which is the same bit by bit afterwards; or a function that gives it in memory that may be
        overwritten, called in forward and again in backward: a dequantisation, or a clone.
    delta: [out, r] with columns, [r, in] with rows.
    columns, rows: one of both; r numbers as int64, each once, or a slice without a step.

    A weight that needs a gradient itself is kept with x, as in a plain layer. Second derivatives are not available.
    Raises ValueError if not one of columns and rows is given, or delta is not of their number.
    """
    if (columns is None) == (rows is None):
        raise ValueError(f"partial_linear takes columns or rows, got {'neither' if rows is None else 'both'}.")
    part = Part(0, rows) if columns is None else Part(1, columns)  # type: ignore[arg-type]
    _check_size(part, delta, x.shape[-1])
    lower = autocast_dtype(x)
    with autocast_off(x):
        x = x.to(lower) if lower else x
        bias = None if bias is None else bias.to(x.dtype)
        if not torch.is_grad_enabled():
            with changed_weight(weight, delta, part, scale, x.dtype) as changed:
                return F.linear(x, changed, bias)
        if isinstance(weight, Tensor) and weight.requires_grad:
            whole = weight + part.scattered(_scaled(delta, scale), (weight.shape[0], weight.shape[1]))
            return F.linear(x, whole.to(x.dtype), bias)
        y: Tensor = _PartialLinear.apply(x, weight, bias, delta, part, scale)
        return y


def _check_size(part: Part, delta: Tensor, in_features: int) -> None:
    if isinstance(part.index, Tensor):
        size = len(part.index)
    elif part.index.step in (None, 1):
        size = len(range(*part.index.indices(in_features if part.dim else part.index.stop)))
    else:
        raise ValueError(f"partial_linear takes slices without a step, got {part.index}.")
    if delta.shape[part.dim] != size or (part.dim == 0 and delta.shape[1] != in_features):
        wanted = f"[out, {size}]" if part.dim else f"[{size}, {in_features}]"
        raise ValueError(
            f"delta of partial_linear must be {wanted} for {size} {('rows', 'columns')[part.dim]}, "
            f"got {list(delta.shape)}."
        )
