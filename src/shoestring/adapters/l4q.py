r"""L4Q: low-rank factors and a grid of few bits learned together, the weight merged first and rounded after.

Source   Jeon, Kim, Kim 2024, arXiv:2402.04902 (ACL 2025)
Update   W_c = W + s B A    w = (W_c - b) / t    n = round(clamp(w, Q_N, Q_P))    W' = t n + b
         t = exp(u) the step, b = t z the offset of a group of g weights along in; Q_N = -2^(bits - 1), Q_P = -Q_N - 1
         straight through the rounding, with D = dL/dW' = dY^T X and I = 1 where Q_N <= w <= Q_P, else 0:
         dB = s (D I) A^T, dA = s B^T (D I), dt = sum over the group of D (n - w I), db = that of D (1 - I), dX = dY W'
Shapes   W, w, n, D, I [out, in], A [r, in], B [out, r], u and z [out, in / g]
Start    A Kaiming, B = 0, z = 0, t the smallest step that clips no weight: W rounded to nearest, not W itself
Trains   r (in + out) + 2 out in / g numbers a layer, or r (in + out) + out in / g without an offset
Costs    x is all that is kept. W' is made in forward and in backward, by blocks of rows: what is there of a layer at
         once is W' in x's dtype and a block of W_c, w, n and D. One product of tokens, in and out more than LoRA
Differs  t and z are learned through u = log t and in units of t: no step can become zero or negative, whatever the
         optimizer does, and one learning rate fits the factors and weights of any size. In a group without positive
         weights the first step is bound by the smallest weight alone. Groups of zeros start with the layer's mean step.
         s = alpha / r, as in LoRA, for the paper's plain alpha
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..fakes import has_values
from ..precision import autocast_dtype, autocast_off, wide_dtype
from ..quantisation.groups import bounds, check_groups, dequantise, grid_of, to_groups
from ..quantisation.packed_linear import PackedLinear
from ..technique import Moment
from .base import Adapter, AdapterConfig, check_own_weight, linear_sizes, register

BITS = range(2, 9)
LIMIT = 20.0  # of u either way: t stays between 2e-9 and 5e8, and a loss through several layers within 32 bits
MARGIN = 16 * torch.finfo(torch.float32).eps  # what log, exp and division may lose of the largest weight of a group


@dataclass(frozen=True)
class Grid:
    """How weights are rounded, and how that is learned.

    scale: of B A.
    learns: whether steps and offsets get gradients; else these are zero.
    lsq_scale: whether these gradients are such that a plain gradient step on u and z is, to first order, the one that
        LSQ makes on t and b with their gradients over sqrt(group_size Q_P).
    """

    bits: int
    group_size: int
    scale: float
    learns: bool = True
    lsq_scale: bool = False


@dataclass(frozen=True)
class Rows:
    """Some rows of a layer on their grid, in float32 or wider.

    positions, codes: w and n, [rows, in / g, g]. step, offset: t and b, [rows, in / g]; no offset: zero.
    """

    rows: slice
    positions: Tensor
    codes: Tensor
    step: Tensor
    offset: Tensor | None

    def weight(self) -> Float[Tensor, "rows in"]:
        """W'."""
        return dequantise(self.codes.flatten(1), self.step, self.offset)


class Factors:
    """What a layer's W' is made of: weight, A, B, u and z, which may be missing."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor, log_step: Tensor, offset: Tensor | None, grid: Grid):
        self.weight, self.b, self.log_step, self.offset, self.grid = weight, b, log_step, offset, grid
        self.wide = wide_dtype(torch.promote_types(weight.dtype, a.dtype))
        self.a = a.to(self.wide)

    def blocks(self) -> Iterator[Rows]:
        """All rows, some at a time."""
        low, high = bounds(self.grid.bits)
        num_rows, width = self.weight.shape
        at_once = max(-(-num_rows // 16), 2**16 // width)
        for start in range(0, num_rows, at_once):
            rows = slice(start, start + at_once)
            merged = torch.addmm(self.weight[rows].to(self.wide), self.of(self.b, rows), self.a, alpha=self.grid.scale)
            step = self.of(self.log_step, rows).clamp(-LIMIT, LIMIT).exp()
            offset = None if self.offset is None else step * self.of(self.offset, rows)
            positions = to_groups(merged, self.grid.group_size)
            if offset is not None:
                positions = positions - offset[..., None]
            positions = positions / step[..., None]
            yield Rows(rows, positions, positions.clamp(low, high).round_(), step, offset)

    def of(self, tensor: Tensor, rows: slice) -> Tensor:
        """Some rows of it, wide."""
        return tensor[rows].to(self.wide)

    def quantised(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W', whole."""
        whole = torch.empty(self.weight.shape, dtype=dtype, device=self.weight.device)
        for block in self.blocks():
            whole[block.rows] = block.weight()
        return whole


class _Linear(torch.autograd.Function):
    """y = x W'^T + bias. Kept: x and what W' is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        a: Tensor,
        b: Tensor,
        log_step: Tensor,
        offset: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(x, weight, a, b, log_step, offset)
        made = Factors(weight, a, b, log_step, offset, grid).quantised(x.dtype)
        return F.linear(x, made, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        with autocast_off(dy):  # as in forward: codes and what is clipped must be the same
            return _Linear._backward(ctx, dy)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, log_step, offset = ctx.saved_tensors
        factors = Factors(weight, a, b, log_step, offset, ctx.grid)
        of_x, of_bias, *of_factors = ctx.needs_input_grad[:-1]
        x, dy_rows = x.flatten(0, -2), dy.flatten(0, -2)
        made = torch.empty(weight.shape, dtype=dy.dtype, device=dy.device) if of_x else None
        gradients = Gradients(factors, d_weight=of_factors[0]) if any(of_factors) else None
        for block in factors.blocks():
            if made is not None:
                made[block.rows] = block.weight()
            if gradients is not None:
                gradients.add(block, (dy_rows[:, block.rows].T @ x).to(factors.wide))
        dx = None if made is None else dy @ made
        d_bias = dy_rows.sum(0) if of_bias else None
        given = (None,) * 5 if gradients is None else gradients.given(weight, a, b, log_step, offset)
        return dx, d_bias, *given, None


class Gradients:
    """Collects those of the factors from those of W', a block of rows at a time."""

    def __init__(self, factors: Factors, d_weight: bool):
        self.factors = factors

        def zeros(tensor: Tensor) -> Tensor:
            return torch.zeros_like(tensor, dtype=factors.wide)

        self.a, self.b, self.log_step = zeros(factors.a), zeros(factors.b), zeros(factors.log_step)
        self.offset = None if factors.offset is None else zeros(factors.offset)
        self.weight = torch.zeros_like(factors.weight) if d_weight else None

    def add(self, block: Rows, d: Float[Tensor, "rows in"]) -> None:
        """Take in a block. d: dL/dW' of its rows."""
        grid, rows = self.factors.grid, block.rows
        low, high = bounds(grid.bits)
        inside = (block.positions >= low) & (block.positions <= high)
        masked = d * inside.flatten(1)
        self.b[rows] = grid.scale * (masked @ self.factors.a.T)
        self.a += grid.scale * (self.factors.of(self.factors.b, rows).T @ masked)
        if self.weight is not None:
            self.weight[rows] = masked.to(self.weight.dtype)
        if grid.learns:
            self._add_grid(block, to_groups(d, grid.group_size), to_groups(masked, grid.group_size))

    def _add_grid(self, block: Rows, d: Tensor, masked: Tensor) -> None:
        """dt and db, taken on to u and z: t = exp(u) and b = t z."""
        d_step = (d * block.codes).sum(-1) - (masked * block.positions).sum(-1)
        d_offset = (d - masked).sum(-1)
        factor = block.step
        if self.factors.grid.lsq_scale:
            highest = bounds(self.factors.grid.bits)[1]
            factor = 1 / (block.step * (self.factors.grid.group_size * highest) ** 0.5)
        self.log_step[block.rows] = factor * d_step
        if self.offset is not None and self.factors.offset is not None:
            self.log_step[block.rows] += factor * d_offset * self.factors.of(self.factors.offset, block.rows)
            self.offset[block.rows] = factor * d_offset

    def given(self, *inputs: Tensor | None) -> list[Tensor | None]:
        """Those of weight, A, B, u and z in the dtypes of these."""
        sums = (self.weight, self.a, self.b, self.log_step, self.offset)
        return [None if s is None or t is None else s.to(t.dtype) for s, t in zip(sums, inputs, strict=True)]


class L4Q(Adapter):
    """The factors and the grid of one adapter on one layer."""

    name = "l4q"
    alone = True
    cannot = MappingProxyType(
        {
            "check_starts_as_the_pretrained_model": "it starts as the pretrained weight rounded to nearest",
            "check_gradients_are_those_of_the_output": "rounding has no derivative; gradients go straight through it",
            "check_weights_of_the_layers_train_too": "their gradients go straight through rounding, too",
            "check_four_bit_base": "it rounds the weight itself, and a quantised one is rounded already",
        }
    )

    def __init__(self, base: nn.Module, config: "L4QConfig"):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        check_groups(in_features, config.group_size)
        self.bits, self.group_size = config.bits, config.group_size
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.learns_grid, self.lsq_scale = True, bool(config.lsq_scale)
        groups = (out_features, in_features // config.group_size)
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, config.r))
        self.log_step = nn.Parameter(torch.zeros(groups))
        self.offset = nn.Parameter(torch.zeros(groups)) if config.learn_offset else None
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        if not config.init_weights:
            self._start_at_random(in_features)

    def _start_at_random(self, in_features: int) -> None:
        """Some weights of a layer that torch made are clipped."""
        nn.init.kaiming_uniform_(self.b, a=5**0.5)
        typical = in_features**-0.5 / -bounds(self.bits)[0]
        with torch.no_grad():
            self.log_step.uniform_(0.5, 1.0).mul_(typical).log_()
            if self.offset is not None:
                self.offset.uniform_(-0.5, 0.5)

    def start(self, weight: Float[Tensor, "out in"]) -> None:
        """Steps with which no weight is clipped."""
        step, _ = grid_of(weight, self.bits, self.group_size, symmetric=True)
        filled = to_groups(weight != 0, self.group_size).any(-1)
        mean = (step * filled).sum() / filled.sum().clamp(min=1)
        step = torch.where(filled, step, torch.where(mean > 0, mean, 1.0))
        self.log_step.copy_((step * (1 + MARGIN)).log())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "L4Q":
        """As in torch; parameters stay in at least 32 bits, for rounding them would move weights by whole steps."""
        values = [(p, p.detach()) for p in self.parameters()]
        super()._apply(fn, recurse)
        for parameter, before in values:
            if parameter.itemsize < 4 <= before.itemsize:
                parameter.data = before.to(parameter.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in torch; refuses steps that are not positive numbers.

        Raises ValueError.
        """
        loaded = state_dict.get(f"{prefix}log_step")
        if loaded is not None and has_values(loaded) and not bool(torch.isfinite(loaded).all()):
            raise ValueError(
                f"{prefix}log_step holds steps that are zero or no number: the saved adapter is damaged. Each must be "
                "the logarithm of a positive number."
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @property
    def grid(self) -> Grid:
        """How it rounds now."""
        return Grid(self.bits, self.group_size, self.scale, self.learns_grid, self.lsq_scale)

    def _factors(self, weight: Tensor) -> Factors:
        return Factors(weight, self.a, self.b, self.log_step, self.offset, self.grid)

    @torch.no_grad()
    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W' in the dtype of `weight`; without gradients, which `linear` has."""
        return self._factors(weight).quantised(weight.dtype)

    def linear(
        self, x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """x W'^T + bias in x's dtype or autocast's."""
        lower = autocast_dtype(x)
        with autocast_off(x):
            x = x.to(lower) if lower else x
            rows = x[None] if x.dim() == 1 else x
            y: Tensor = _Linear.apply(rows, bias, weight, self.a, self.b, self.log_step, self.offset, self.grid)
            return y[0] if x.dim() == 1 else y

    @torch.no_grad()
    def packed(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> PackedLinear:
        """A layer with the codes, steps and offsets of W'. It gives what `linear` gives, bit for bit."""
        blocks = list(self._factors(weight).blocks())
        codes = torch.cat([block.codes.flatten(1).to(torch.int8) for block in blocks])
        step = torch.cat([block.step for block in blocks])
        offset = None if self.offset is None else torch.cat([b.offset for b in blocks if b.offset is not None])
        return PackedLinear.of(codes, step, offset, self.bits, bias, weight.dtype)


@register
@dataclass(kw_only=True)
class L4QConfig(AdapterConfig):
    """L4Q: the pretrained weight plus a low-rank change, rounded to few bits; what is trained is the rounded model.

    bits: of a weight, 2 to 8; 4 or 3 in the paper.
    group_size: weights along the inputs that share step and offset; must divide the inputs of every layer.
    r: inner size of B A, 1 <= r.
    alpha: B A is scaled by alpha / r; None: alpha = r.
    learn_offset: whether groups have an offset beside the step. It learns from weights that are clipped.
    warmup_steps: optimizer steps before steps and offsets begin to learn. Counted by a recipe; without one, 0.
    lsq_scale: whether gradients of the grid are scaled as in LSQ; None: where a recipe is trained with plain SGD.
        Adam and its like divide any scale out again.
    target_modules: None: all linear layers but the head.

    Raises ValueError for values out of range.
    """

    method: ClassVar = L4Q
    bits: int = 4
    group_size: int = 128
    r: int = 4
    alpha: float | None = None
    learn_offset: bool = True
    warmup_steps: int = 10
    lsq_scale: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise ValueError(
                f"bits of l4q must be a whole number from {BITS.start} to {BITS.stop - 1}, got {self.bits}."
            )
        for name, least in (("r", 1), ("group_size", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} of l4q must be at least {least}, got {getattr(self, name)}.")

    def default_targets(self, model: nn.Module) -> str:
        """All linear layers, for what is left out stays in 16 bits."""
        return "all-linear"

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """Nothing, but weights that are quantised or tied are refused here.

        Raises ValueError.
        """
        check_own_weight(model, key)
        return {}

    def on_step_begin(self, moment: Moment) -> None:
        """Let the grids learn from the step after the warm-up on."""
        plain = isinstance(moment.optimizer, torch.optim.SGD)
        for adapter in adapters_in(moment.model).values():
            adapter.learns_grid = moment.step >= self.warmup_steps
            adapter.lsq_scale = plain if self.lsq_scale is None else self.lsq_scale

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Steps and offsets without weight decay, which would draw all steps towards 1."""
        adapters = adapters_in(model).values()
        grids = [p for adapter in adapters for p in (adapter.log_step, adapter.offset) if p is not None]
        learned = [p for p in grids if p.requires_grad]
        return [{"params": learned, "weight_decay": 0.0}] if learned else []

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """Offsets, which learn only where a weight is clipped; steps too, if there is a warm-up."""
        waiting = ("offset", "log_step") if self.warmup_steps else ("offset",)
        return {f"{name}.{part}" for name in adapters_in(model) for part in waiting}


def adapters_in(model: nn.Module) -> dict[str, L4Q]:
    """Every adapter of the method, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, L4Q)}
