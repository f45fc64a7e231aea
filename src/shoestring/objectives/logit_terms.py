r"""Terms over logits: distance to another model's, entropy, covariance and singular values, to be added to a loss.

Source   the three regularisers of Chang, Chang, Wu 2024, arXiv:2408.04556; Halko et al. 2011, arXiv:0909.4061 (range
         finder)
Update   divergence = T^2 sum_rows KL(softmax(Z'/T) || softmax(Z/T)), or |z/|z| - z'/|z'||^2 by its mean;
         negative entropy = sum_rows sum p log p, p = softmax over all columns or the largest of them;
         covariance = (1 / columns) sum_{i != j} C_ij^2, C = (Z - mean)^T (Z - mean) / (rows - 1);
         leading singular values: d (sum_{i <= k} sigma_i) / dZ = U_k V_k^T, which needs no gaps between them
Shapes   Z, Z' [rows, columns]
Costs    `token_terms` keeps one gradient as large as the logits, in the place of the other model's logits where they
         are given; beside it a 32nd of the rows at a time, and 2 (iterations + 1) products of Z with some columns
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..precision import at_least_float32, wide_dtype
from .base import handed_on

CHUNKS = 32

RowTerm = Callable[[Tensor, Tensor | None], Tensor]
"""What some rows of Z add, given the same rows of Z' or None; a sum over rows."""


def divergence(
    z: Float[Tensor, "rows columns"], target: Float[Tensor, "rows columns"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 times the sum over rows of KL(softmax(target / T) || softmax(z / T))."""
    ours, wanted = ((x / temperature).log_softmax(1) for x in (z, target))
    return temperature**2 * F.kl_div(ours, wanted, reduction="sum", log_target=True)


def normalised_distance(z: Float[Tensor, "rows columns"], target: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """The sum over rows of the mean squared difference between both, each row scaled to length 1."""
    return (F.normalize(z, dim=1) - F.normalize(target, dim=1)).square().mean(1).sum()


def negative_entropy(z: Float[Tensor, "rows columns"], top: int | None = None) -> Float[Tensor, ""]:
    """Minus the sum over rows of the entropy of softmax(z), or of its `top` largest made a distribution again."""
    log_p = (z if top is None else z.topk(top, sorted=False).values).log_softmax(1)
    return (log_p.exp() * log_p).sum()


def off_diagonal_covariance(z: Float[Tensor, "rows columns"]) -> Float[Tensor, ""]:
    """The sum of the squares of the covariances between different columns, over the number of columns."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def singular_share(z: Float[Tensor, "rows columns"], k: int) -> Float[Tensor, ""]:
    """The sum of the k largest singular values over the sum of all; 0 where all are 0. A whole SVD, for small z."""
    with torch.no_grad():
        u, s, vh = torch.linalg.svd(z, full_matrices=False)
        u = u * (
            s > s.amax() * max(z.shape) * torch.finfo(s.dtype).eps
        )  # no direction of values that are only rounding
        leading, every = u[:, :k] @ vh[:k], u @ vh
    whole = (every * z).sum()  # <U V^T, Z> is the sum, and U V^T its gradient
    return (leading * z).sum() / whole.clamp(min=torch.finfo(z.dtype).tiny)


@dataclass(frozen=True)
class Spectrum:
    """How leading singular values are estimated: k of them, from k + oversampling random columns.

    iterations: products with Z and its transpose that sharpen the estimate.
    seed: of the columns; the same at each call.
    """

    k: int
    oversampling: int = 8
    iterations: int = 2
    seed: int = 0


def leading_singular(
    z: Float[Tensor, "all columns"], rows: Int[Tensor, " rows"], of: Spectrum, chunks: int = CHUNKS
) -> tuple[Float[Tensor, "rows k"], Float[Tensor, " k"], Float[Tensor, "columns k"]]:
    """U, s and V of the largest singular values of `z[rows]`, without a copy of it.

    k is cut to what that matrix has. Values are never above the true ones.
    """
    wide, columns = wide_dtype(z.dtype), z.shape[1]
    sketch = min(of.k + of.oversampling, len(rows), columns)
    drawn = torch.randn(columns, sketch, generator=torch.Generator().manual_seed(of.seed))
    right = drawn.to(z.device, wide)
    for index in range(of.iterations + 1):
        right = torch.linalg.qr(right).Q if index else right
        left = torch.cat([_in_reach(z[some]) @ right for some in rows.chunk(chunks)])
        left = torch.linalg.qr(left).Q
        right = torch.zeros_like(right)
        for some, part in zip(rows.chunk(chunks), left.chunk(chunks), strict=True):
            right.addmm_(_in_reach(z[some]).T, part)
    u, s, vh = torch.linalg.svd(right.T, full_matrices=False)
    return left @ u[:, : of.k], s[: of.k], vh[: of.k].T


def token_terms(
    logits: Float[Tensor, "all columns"],
    other: Float[Tensor, "all columns"] | None,
    rows: Int[Tensor, " rows"],
    row_term: RowTerm | None,
    spectrum: Spectrum | None = None,
    spectrum_weight: float = 0.0,
    chunks: int = CHUNKS,
) -> Float[Tensor, ""]:
    """The mean of `row_term` over `rows`, and weight times the sum of their leading singular values over their length.

    other: the other model's logits; they are overwritten by the gradient. None: the row term needs none.
    rows: which count; without any, the result is 0.
    chunks: at most as many parts the rows are taken in.
    spectrum: what of the singular values is taken; None: nothing. The length is the Frobenius norm.
    """
    plan = _Plan(row_term, spectrum, spectrum_weight, chunks)
    total: Tensor = _TokenTerms.apply(logits, other, rows, plan)
    return total


@dataclass(frozen=True)
class _Plan:
    """What of the terms is no tensor."""

    row_term: RowTerm | None
    spectrum: Spectrum | None
    spectrum_weight: float
    chunks: int


class _TokenTerms(torch.autograd.Function):
    """Computes the gradient in the forward, where the other model's logits were, and hands it on in the backward."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, other: Tensor | None, rows: Tensor, plan: _Plan) -> Tensor:
        total = logits.new_zeros((), dtype=wide_dtype(logits.dtype))
        # before it meets the scale of the loss, a gradient may be below what float16 can hold
        dtype = wide_dtype(logits.dtype) if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.zeros_like(logits, dtype=dtype) if other is None else other.to(dtype)
        if len(rows) and plan.row_term is not None:
            total = total + _of_row_term(logits, other, rows, plan, gradient)
        if len(rows) != len(logits):
            counted = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
            counted[rows] = True
            gradient.masked_fill_(~counted[:, None], 0)
        if len(rows) and plan.spectrum is not None:
            total = total + _of_spectrum(logits, rows, plan, gradient)
        ctx.gradients = [gradient]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *handed_on(ctx, upstream), None, None, None


def _of_row_term(logits: Tensor, other: Tensor | None, rows: Tensor, plan: _Plan, gradient: Tensor) -> Tensor:
    """The mean of the row term; its gradient is put into the rows of `gradient`, which may be those of `other`."""
    assert plan.row_term is not None
    wide, sums = wide_dtype(logits.dtype), []
    for some in rows.chunk(plan.chunks):
        theirs = None if other is None else other[some].to(wide)
        with torch.enable_grad():
            z = logits[some].to(wide).detach().requires_grad_()
            summed = plan.row_term(z, theirs)
        (of_z,) = torch.autograd.grad(summed, z)
        gradient[some] = (of_z / len(rows)).to(gradient.dtype)
        sums.append(summed.detach())
    return torch.stack(sums).sum() / len(rows)


def _of_spectrum(logits: Tensor, rows: Tensor, plan: _Plan, gradient: Tensor) -> Tensor:
    """Weight times sum of leading singular values over the length of Z; its gradient is added to `gradient`."""
    assert plan.spectrum is not None
    wide, weight = wide_dtype(logits.dtype), plan.spectrum_weight
    u, s, v = leading_singular(logits, rows, plan.spectrum, plan.chunks)
    squares = torch.stack([_in_reach(logits[some]).square().sum() for some in rows.chunk(plan.chunks)])
    length = squares.sum().sqrt().clamp(min=torch.finfo(wide).tiny)
    share = s.sum() / length
    for some, part in zip(rows.chunk(plan.chunks), u.chunk(plan.chunks), strict=True):
        of_z = (part @ v.T - _in_reach(logits[some]) * (share / length)) * (weight / length)
        gradient[some] += of_z.to(gradient.dtype)
    return weight * share


def _in_reach(z: Tensor) -> Tensor:
    """`z` in a wide dtype; words that a model rules out by the lowest of numbers count as 0 in its singular values."""
    return at_least_float32(z.masked_fill(z < torch.finfo(z.dtype).min / 4, 0))
