r"""Sparse kernel updates: two low-rank factors, merged by distances instead of products, of which large entries stay.

Update   K[o, i] = c |P_0[i] - Q_0[o]| - c |P_1[i] - Q_1[o]|, c = 0.1     V = K or a function of it
         theta = the n-th smallest |V| of the layer                      delta = V gate(|V|)
         soft: gate(v) = max(v - theta, 0); hard: v where v > theta, else 0; none: 1
Shapes   P [2, in, r / 2], Q [2, out, r / 2], K, V and delta [out, in], theta one number
Costs    x is all that is kept. Forward and backward form `BLOCK` entries of delta at a time; a layer that has more
         forms them three times in forward, since theta comes first. One product of tokens, in and out more than LoRA
Differs  gate is a constant in backward, as in the authors' code: with the soft gate that is not the derivative
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..fakes import has_values
from ..precision import autocast_dtype, autocast_off, wide_dtype
from .base import Adapter, AdapterConfig, linear_sizes

COEFFICIENT = 0.1
BLOCK = 1 << 22  # entries of delta that are formed at once

Gate = Literal["soft", "hard", "none"]


@dataclass(frozen=True)
class Sparsity:
    """Which entries stay: num_zero of them, or a few more where sizes are equal, become zero."""

    num_zero: int
    gate: Gate


def num_zero(sparsity: float, size: int) -> int:
    """sparsity * size, rounded up; a product that is whole but for rounding stays what it is."""
    return ceil(sparsity * size * (1 - 1e-12))


class Kernel:
    """The entries V of one layer by rows or columns, in float32 or wider.

    mix: a, g, e of V = K + a softmax(K / g, over out) + e; None: V = K.
    log_sums: log of the softmax's denominators, if they are known already.
    """

    def __init__(
        self,
        p: Float[Tensor, "2 in k"],
        q: Float[Tensor, "2 out k"],
        mix: Float[Tensor, "3"] | None,
        log_sums: Float[Tensor, " in"] | None = None,
    ):
        self.p, self.q = (t.detach().to(wide_dtype(t.dtype)) for t in (p, q))
        centre = self.q.mean(1, keepdim=True)  # no distance changes, and differences of products lose fewer digits
        self.p, self.q = self.p - centre, self.q - centre
        self.mix = None if mix is None else mix.detach().to(self.q.dtype)
        self.log_sums = self._log_sums() if self.mix is not None and log_sums is None else log_sums

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.q.shape[1], self.p.shape[1]

    def blocks(self, dim: int) -> Iterator[slice]:
        """Slices of the rows (0) or columns (1) that hold at most `BLOCK` entries, or one row or column."""
        size, other = self.shape[dim], self.shape[1 - dim]
        step = max(1, BLOCK // other)
        return (slice(start, min(start + step, size)) for start in range(0, size, step))

    def distances(self, rows: slice = slice(None), columns: slice = slice(None)) -> Float[Tensor, "2 rows columns"]:
        """Of each pair of rows of P and Q, for both parts."""
        # Products are 2 to 4 times faster on a CPU, and off by 1e-4 of the largest distance where two rows are equal;
        # GPUs may take them in 19 bits. Double precision is for those who want it exact.
        products = self.q.device.type == "cpu" and self.q.dtype == torch.float32
        mode = "use_mm_for_euclid_dist" if products else "donot_use_mm_for_euclid_dist"
        return torch.cdist(self.q[:, rows], self.p[:, columns], compute_mode=mode)

    def softmax(self, k: Float[Tensor, "rows columns"], columns: slice) -> Float[Tensor, "rows columns"]:
        """The entries of softmax(K / g, over out) for some of the rows."""
        assert self.mix is not None
        assert self.log_sums is not None
        return (k / self.mix[1]).sub_(self.log_sums[columns]).exp_()

    def entries(self, rows: slice = slice(None), columns: slice = slice(None)) -> Float[Tensor, "rows columns"]:
        """V of some rows or columns."""
        k = merge(self.distances(rows, columns))
        if self.mix is None:
            return k
        return self.softmax(k, columns).mul_(self.mix[0]).add_(k).add_(self.mix[2])

    def _log_sums(self) -> Float[Tensor, " in"]:
        assert self.mix is not None
        parts = [(merge(self.distances(columns=c)) / self.mix[1]).logsumexp(0) for c in self.blocks(1)]
        return torch.cat(parts)


def merge(distances: Float[Tensor, "2 out in"]) -> Float[Tensor, "out in"]:
    """K of the distances of both parts."""
    return (distances[0] - distances[1]).mul_(COEFFICIENT)


def gated(size: Float[Tensor, "out in"], theta: Float[Tensor, ""], gate: Gate) -> Float[Tensor, "out in"]:
    """gate(|V|), made in place of |V|."""
    if gate == "none":
        return size.fill_(1)
    return size.sub_(theta).clamp_min_(0) if gate == "soft" else size.mul_(size > theta)


def kth_smallest(values: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th smallest, 1 <= k <= n; `values` are left in another order."""
    if values.device.type == "cpu":  # in place, and some ten times faster than torch's own
        values.numpy().partition(k - 1)
        return values[k - 1].clone()
    return values.kthvalue(k).values


def threshold(blocks: Callable[[], Iterator[Tensor]], k: int) -> Float[Tensor, ""]:
    """The k-th smallest of the numbers, none below zero, of all blocks together; each is asked for twice.

    The bits of such numbers, read as integers, are in the same order. So the first round counts by their first 16
    bits, and the second collects those that share them with the k-th.
    """

    def first_bits(values: Tensor) -> Tensor:
        integers, shift = (torch.int64, 47) if values.dtype == torch.float64 else (torch.int32, 15)
        return values.view(integers) >> shift

    counts = sum(torch.bincount(first_bits(values).flatten(), minlength=1 << 16) for values in blocks())
    assert isinstance(counts, Tensor)
    up_to = counts.cumsum(0)
    bits = int(torch.searchsorted(up_to, k))
    near = torch.cat([values[first_bits(values) == bits] for values in blocks()])
    return kth_smallest(near, k - int(up_to[bits] - counts[bits]))


def find_threshold(kernel: Kernel, sparsity: Sparsity) -> tuple[Float[Tensor, ""], Float[Tensor, "out in"] | None]:
    """theta, and V if it is one block."""
    whole = kernel.entries() if kernel.shape[0] * kernel.shape[1] <= BLOCK else None
    if sparsity.gate == "none" or sparsity.num_zero == 0 or not has_values(kernel.q):
        return kernel.q.new_zeros(()), whole
    if whole is not None:
        return kth_smallest(whole.abs().flatten(), sparsity.num_zero), whole
    rows = list(kernel.blocks(0))
    return threshold(lambda: (kernel.entries(some).abs_() for some in rows), sparsity.num_zero), None


def rows_of_delta(
    kernel: Kernel, sparsity: Sparsity, whole: Tensor | None, theta: Tensor
) -> Iterator[tuple[slice, Float[Tensor, "rows in"]]]:
    """delta by blocks of rows."""
    for rows in kernel.blocks(0):
        v = kernel.entries(rows) if whole is None else whole
        yield rows, v.mul_(gated(v.abs(), theta, sparsity.gate))


class FactorGradients:
    """Sums up the gradients of P, Q and the mix from those of delta, a block of columns at a time."""

    def __init__(self, kernel: Kernel, sparsity: Sparsity, theta: Tensor):
        self.kernel, self.theta, self.gate = kernel, theta, sparsity.gate
        self.p, self.q = torch.empty_like(kernel.p), torch.zeros_like(kernel.q)
        self.mix = None if kernel.mix is None else torch.zeros_like(kernel.mix)
        self.p_and_one, self.q_and_one = (F.pad(t, (0, 1), value=1.0) for t in (kernel.p, kernel.q))

    def add(
        self,
        columns: slice,
        gradient: Callable[[], Float[Tensor, "out columns"]],
        see_delta: Callable[[Float[Tensor, "out columns"]], None] | None = None,
    ) -> None:
        """Take in a block. gradient: gives that of delta, to be overwritten; see_delta: is shown delta before."""
        distances = self.kernel.distances(columns=columns)
        k = v = merge(distances)
        softmax = None
        if self.kernel.mix is not None:
            softmax = self.kernel.softmax(k, columns)
            v = (softmax * self.kernel.mix[0]).add_(k).add_(self.kernel.mix[2])
        gate = gated(v.abs(), self.theta, self.gate)
        if see_delta is not None:
            see_delta(v.mul_(gate))
        del v
        if softmax is None:
            del k  # as large as the gradient
            dk = gradient().mul_(gate)
        else:
            dk = self._through_mix(gradient().mul_(gate), k, softmax)
        del gate
        self._add_distances(columns, distances, dk)

    def _through_mix(self, dv: Tensor, k: Tensor, softmax: Tensor) -> Tensor:
        """dK from dV, adding to the gradients of a, g and e."""
        assert self.mix is not None
        assert self.kernel.mix is not None
        a, g, _ = self.kernel.mix
        weighted = dv * softmax
        self.mix[0] += weighted.sum()
        self.mix[2] += dv.sum()
        scaled = weighted.sub_(softmax.mul_(weighted.sum(0))).mul_(a / g)  # the gradient of K / g, over g
        self.mix[1] -= (scaled * k).sum() / g
        return dv.add_(scaled)

    def _add_distances(self, columns: slice, distances: Tensor, dk: Tensor) -> None:
        """P_h[i] gets the sum over o of E[o, i] (P_h[i] - Q_h[o]), Q_h its counterpart; E_h = +-c dK / distance_h."""
        width = self.p.shape[-1]
        e = distances.reciprocal_().nan_to_num_(nan=torch.nan, posinf=0.0).mul_(dk)  # none at distance zero
        sign = e.new_tensor([COEFFICIENT, -COEFFICIENT])[:, None, None]
        by_q = (self.q_and_one.mT @ e).mT  # the thin matrix first: BLAS is several times slower the other way
        by_p = (self.p_and_one[:, columns].mT @ e.mT).mT
        self.p[:, columns] = sign * (by_q[..., width:] * self.kernel.p[:, columns] - by_q[..., :width])
        self.q += sign * (by_p[..., width:] * self.kernel.q - by_p[..., :width])

    def like(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """The sums in the dtypes of P, Q and the mix."""
        sums = (self.p, self.q, self.mix)
        return [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)]


class _Linear(torch.autograd.Function):
    """y = x (W + delta)^T, or x delta^T without a W. Kept: x, W, the factors, theta and a number for each input."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, p: Tensor, q: Tensor, mix: Tensor | None, sparsity: Sparsity
    ) -> Tensor:
        kernel = Kernel(p, q, mix)
        theta, whole = find_threshold(kernel, sparsity)
        ctx.sparsity = sparsity
        ctx.save_for_backward(x, weight, p, q, mix, theta, kernel.log_sums)
        y = x.new_empty(len(x), len(kernel.q[0]))
        for rows, delta in rows_of_delta(kernel, sparsity, whole, theta):
            if weight is not None:
                delta += weight[rows]
            torch.mm(x, delta.to(x.dtype).T, out=y[:, rows])
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, p, q, mix, theta, log_sums = ctx.saved_tensors
        kernel = Kernel(p, q, mix, log_sums)
        gradients = FactorGradients(kernel, ctx.sparsity, theta)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None

        with autocast_off(dy):  # as in forward: the same entries are zero
            for columns in kernel.blocks(1):

                def to_input(delta: Tensor, columns: slice = columns) -> None:
                    assert dx is not None
                    if weight is not None:
                        delta += weight[:, columns]
                    torch.mm(dy, delta.to(dy.dtype), out=dx[:, columns])

                def gradient(columns: slice = columns) -> Tensor:
                    d_delta = dy.T @ x[:, columns]
                    if d_weight is not None:
                        d_weight[:, columns] = d_delta
                    return d_delta.to(kernel.q.dtype)

                gradients.add(columns, gradient, None if dx is None else to_input)
        return dx, d_weight, *gradients.like(p, q, mix), None


class _Delta(torch.autograd.Function):
    """delta, [out, in], whole."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor, mix: Tensor | None, sparsity: Sparsity) -> Tensor:
        kernel = Kernel(p, q, mix)
        theta, whole = find_threshold(kernel, sparsity)
        ctx.sparsity = sparsity
        ctx.save_for_backward(p, q, mix, theta, kernel.log_sums)
        delta = kernel.q.new_empty(kernel.shape)
        for rows, part in rows_of_delta(kernel, sparsity, whole, theta):
            delta[rows] = part
        return delta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_delta: Tensor) -> tuple[Tensor | None, ...]:
        p, q, mix, theta, log_sums = ctx.saved_tensors
        kernel = Kernel(p, q, mix, log_sums)
        gradients = FactorGradients(kernel, ctx.sparsity, theta)
        with autocast_off(d_delta):
            for columns in kernel.blocks(1):
                gradients.add(columns, d_delta[:, columns].clone)
        return *gradients.like(p, q, mix), None


class SparseKernelAdapter(Adapter):
    """The factors P and Q of one adapter on one layer, and delta in all the ways a layer may ask for it."""

    mix: nn.Parameter | None

    def __init__(self, base: nn.Module, config: "SparseKernelConfig"):
        super().__init__()
        self.size = linear_sizes(base)
        out_features, in_features = self.size
        self.gate, self.dropout, self.drop_path = config.gate, config.dropout, config.drop_path
        self.p = nn.Parameter(torch.empty(2, in_features, config.r // 2))
        self.q = nn.Parameter(torch.empty(2, out_features, config.r // 2))
        self.mix = None
        for factor in (self.p, self.q):
            if config.init_weights:
                nn.init.kaiming_uniform_(factor, a=5**0.5)  # of three dimensions: within 1 / sqrt(size * r / 2)
            else:
                nn.init.normal_(factor)

    def num_zero(self) -> int:
        """How many entries of delta are zero now."""
        raise NotImplementedError(type(self).__name__)

    def sparsity(self) -> Sparsity:
        """Which entries stay now."""
        return Sparsity(self.num_zero() if has_values(self.p) else 0, self.gate)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """delta in float32 or wider."""
        return _Delta.apply(self.p, self.q, self.mix, self.sparsity())

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x delta^T by blocks, of the x that dropout and drop path leave."""
        return self._product(self._dropped(x), None)

    def linear(
        self, x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """In one product, where the branch sees the same x as the layer."""
        if self.training and (self.dropout or self.drop_path):
            y = F.linear(x, weight, bias)
            return y + self.delta_output(x).to(y.dtype)
        y = self._product(x, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def _product(self, x: Tensor, weight: Tensor | None) -> Tensor:
        lower = autocast_dtype(x)
        with autocast_off(x):
            rows = (x.to(lower) if lower else x).reshape(-1, x.shape[-1])
            y = _Linear.apply(rows, weight, self.p, self.q, self.mix, self.sparsity())
        return y.view(*x.shape[:-1], self.size[0])

    def _dropped(self, x: Tensor) -> Tensor:
        """delta is linear, so that to drop its output for a sample is to drop its input."""
        x = F.dropout(x, self.dropout, self.training)
        if not (self.training and self.drop_path):
            return x
        samples = x.new_ones(x.shape[0] if x.dim() > 1 else 1, *[1] * (x.dim() - 1))
        return x * F.dropout(samples, self.drop_path)


@dataclass(kw_only=True)
class SparseKernelConfig(AdapterConfig):
    """What methods with a sparse kernel have in common.

    r: numbers a row of both factors together, even since half of them are of each part, 2 <= r; 8 to 32 is usual.
    gate: "soft", as in the paper; "hard", as in the authors' code; "none": V itself, without sparsity.
    dropout: on the input of delta, 0 <= dropout < 1; drop_path: the share of samples that go without delta in training,
        0 <= drop_path < 1. The paper has 0.1 for both. Either makes one more product of every layer.

    Raises ValueError for values out of range and unknown words.
    """

    r: int = 8
    gate: Gate = "soft"
    dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 2 or self.r % 2:
            raise ValueError(
                f"r of {self.method.name} must be an even whole number of at least 2, since its kernel has two parts "
                f"of r / 2 each, got {self.r!r}."
            )
        if self.gate not in ("soft", "hard", "none"):
            raise ValueError(f"gate of {self.method.name} must be 'soft', 'hard' or 'none', got {self.gate!r}.")
        for name in ("dropout", "drop_path"):
            self.check_share(name)

    def check_share(self, name: str) -> None:
        """Refuse a setting that is not in [0, 1)."""
        if not 0 <= getattr(self, name) < 1:
            raise ValueError(f"{name} of {self.method.name} must be in [0, 1), got {getattr(self, name)}.")
