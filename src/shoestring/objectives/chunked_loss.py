r"""Chunked loss: the output head and its cross-entropy, a few rows at a time, without the logits.

Source   Hsu et al. 2024, arXiv:2410.10989, section 3.2 (fused linear cross-entropy)
Update   for rows C of h: Z = h_C W^T + b, lse = log sum exp Z, loss = sum (lse - Z[y]), P = softmax(Z) - onehot(y);
         dh_C = P W, dW += P^T h_C, db += sum P, all in the forward; backward multiplies them by the upstream gradient
Shapes   h [rows, width], W [vocabulary, width], y [rows]
Trains   what trained before: h, W and b get the gradients they had
Costs    keeps dh, and dW where W trains; one chunk of logits at a time, two with soft-capping. Time as before, and less
         where labels are masked: rows without a label are left out
Differs  Chunks count labelled rows and hold at least 64. Gradients are scaled in place as backward hands them on; they
         are kept outside of saved-tensor hooks, so that no technique rounds them. dW is summed in float32 or wider.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import SettingError
from ..precision import wide_dtype
from ..real_tokens import NO_LABEL
from ..technique import Advised, register_technique
from .base import HeadLoss, LazyLogits, Step, handed_on, labelled_rows, linear_dtype

LEAST_ROWS = 64  # products of fewer rows are slow, and below 8 rows CPUs round them worse


@register_technique
@dataclass
class ChunkedLoss(HeadLoss):
    """The loss of a language model without its logits.

    chunk_rows: labelled tokens whose logits exist at a time, at least 1; None takes about as many as make the logits
        of a chunk as large as the head's input.

    Raises SettingError if chunk_rows < 1.
    """

    name: ClassVar[str] = "chunked_loss"
    advised = (Advised(10, "logits are never all there; nothing is paid"),)
    exact: ClassVar[bool] = True

    chunk_rows: int | None = None

    def __post_init__(self) -> None:
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise SettingError(f"chunk_rows of chunked_loss must be at least 1 or left out, got {self.chunk_rows}.")

    def summed_loss(self, logits: LazyLogits, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
        """The sum of the cross-entropies, computed in chunks."""
        assert logits.weight is not None
        return summed_cross_entropy(
            logits.hidden,
            logits.weight,
            labels,
            logits.bias,
            steps=logits.steps,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            chunk_rows=self.chunk_rows,
        )


def summed_cross_entropy(
    hidden: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    labels: Int[Tensor, " rows"],
    bias: Float[Tensor, " vocabulary"] | None = None,
    *,
    steps: tuple[Step, ...] = (),
    ignore_index: int = NO_LABEL,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """The sum over labelled rows of the cross-entropy of `hidden @ weight.T + bias`, in float32 or wider.

    steps: what happens to the logits before the softmax.
    ignore_index: the label of rows that do not count.
    chunk_rows: labelled rows at a time; None takes `rows_of_chunk`.
    """
    dtype = linear_dtype(hidden)
    bias = None if bias is None else bias.to(dtype)
    plan = _Plan(steps, ignore_index, label_smoothing, chunk_rows)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():
        return _in_chunks(hidden, weight, labels, bias, plan, (False, False, False))[0]
    loss: Tensor = _SummedCrossEntropy.apply(hidden, weight, labels, bias, plan)
    return loss


def rows_of_chunk(rows: int, vocabulary: int, width: int) -> int:
    """How many rows make logits about as large as all of the head's input, rounded up to a power of two; at least 64.

    >>> rows_of_chunk(8192, 8000, 256), rows_of_chunk(100, 8000, 256)
    (256, 64)
    """
    chunks = -(-vocabulary // width)
    return max(LEAST_ROWS, 1 << (-(-rows // chunks) - 1).bit_length())


@dataclass(frozen=True)
class _Plan:
    """What of a loss is not a tensor to differentiate."""

    steps: tuple[Step, ...]
    ignore_index: int
    label_smoothing: float
    chunk_rows: int | None


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward and hands them on, scaled, in the backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        of_hidden, of_weight, _, of_bias, _ = ctx.needs_input_grad
        loss, *ctx.gradients = _in_chunks(hidden, weight, labels, bias, plan, (of_hidden, of_weight, of_bias))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = handed_on(ctx, upstream)
        return of_hidden, of_weight, None, of_bias, None


def _in_chunks(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, plan: _Plan, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The summed loss and its gradients for hidden, weight and bias, where wanted."""
    wide = wide_dtype(hidden.dtype)
    rows = labelled_rows(labels, plan.ignore_index)
    of_hidden = torch.zeros_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    losses = []
    for some in rows.split(plan.chunk_rows or rows_of_chunk(len(rows), *weight.shape)):
        h = hidden[some]
        loss, gradient = _of_chunk(h, weight, labels[some], bias, plan, wide)
        losses.append(loss)
        if of_bias is not None:
            of_bias += gradient.sum(0)
        gradient = gradient.to(h.dtype)
        if of_hidden is not None:
            of_hidden[some] = gradient @ weight
        if of_weight is not None and of_weight.dtype == h.dtype:
            of_weight.addmm_(gradient.T, h)
        elif of_weight is not None:
            of_weight += gradient.T @ h
        del gradient, h  # before the next chunk comes
    if of_weight is not None and weight.dtype != torch.float16:  # whose range sums that are not yet scaled may leave
        of_weight = of_weight.to(weight.dtype)
    return torch.cat(losses).sum(), of_hidden, of_weight, of_bias


def _of_chunk(
    h: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, plan: _Plan, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Loss of each row and the gradient of their sum for what the linear layer gives, in one tensor after the other."""
    z, kept = F.linear(h, weight, bias), []
    for step in plan.steps:
        z, needed = step.forward(z)
        kept.append(needed)
    labels = labels[:, None]
    z = z.to(wide)
    z -= z.amax(1, keepdim=True)
    target = (1 - plan.label_smoothing) * z.gather(1, labels).squeeze(1)
    if plan.label_smoothing:
        target += plan.label_smoothing * z.mean(1)
    total = z.exp_().sum(1, keepdim=True)
    loss = total.log().squeeze(1) - target
    gradient = z.div_(total)
    if plan.label_smoothing:
        gradient -= plan.label_smoothing / z.shape[1]
    gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, plan.label_smoothing - 1))
    for step, needed in zip(reversed(plan.steps), reversed(kept), strict=True):
        gradient = step.backward(gradient, needed)  # type: ignore[arg-type]  # each gets what it kept
    return loss, gradient
