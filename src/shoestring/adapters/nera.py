r"""NeRA: the down-projection of LoRA as splines, one set of learned functions for each input.

Source   Deshmukh et al., WACV 2026, arXiv:2411.13901; equations after the authors' published module
Update   y' = y + a R z(x), z_j(x) = sum_ik hat(g_i x_i - t_ki) C_kij, hat(u) = max(0, 1 - |u|);
         centred, our default: y' = y + a R (z(x) - z(0))
Shapes   g [in], t [K, in], C [K, in, r], z [r], R [out, r], a [1]
Start    t_k evenly from -3 to 3, g = `gain`, C ~ N(0, 0.001); zero: R = 0, exactly the pretrained model; reference:
         R Kaiming, close to it while a is small
Trains   (K + K r + 1) in + r out + 1 numbers a layer: about (K + 1) / 2 times LoRA's of the same r
Costs    x and one [tokens, r] tensor kept at each layer. The basis, K numbers for each of x, is formed some tokens at a
         time, in forward and again in backward: K times the products of LoRA's down-projection. Cannot be merged
Differs  centred. Hats are never negative, and the first steps of an adaptive optimizer move all C of an output alike:
         z becomes a sum of hats, which hardly depends on x. z(0) takes that away. Parameters stay in float32 beside a
         base in 16 bits. With R = 0, a starts at 8, not at 0.001: C is small, and the gradient of R has the size of
         a C. Hats are splines of order 1, as published; the order that the paper's results used is not known. Linear
         layers only, as there
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..precision import autocast_off
from .base import AdaptedLayer, Adapter, AdapterConfig, linear_sizes, register

REACH = 3.0
"""Knots start evenly between -REACH and REACH."""


def hats(
    x: Float[Tensor, "tokens in"], gain: Float[Tensor, " in"], knots: Float[Tensor, "knots in"]
) -> tuple[Float[Tensor, "tokens knots in"], Float[Tensor, "tokens knots in"]]:
    """The basis hat(u), and u = g x - t."""
    distance = (gain * x)[:, None] - knots
    return distance.abs().neg_().add_(1).clamp_(min=0), distance


def tokens_at_once(x: Float[Tensor, "tokens in"], num_knots: int) -> int:
    """How many tokens have their basis formed together: as many as make a quarter of x's size, or 2^18 numbers."""
    return max(1, max(2**18, x.numel() // 4) // (x.shape[1] * num_knots))


class _Splines(torch.autograd.Function):
    """z = sum_k hat(g x - t_k) C_k; keeps x and forms the basis again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, knots: Tensor, coefficients: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain, knots, coefficients)
        ctx.chunk = tokens_at_once(x, len(knots))
        z = x.new_empty(len(x), coefficients.shape[-1], dtype=gain.dtype)
        for x_some, z_some in zip(x.split(ctx.chunk), z.split(ctx.chunk), strict=True):
            basis, _ = hats(x_some.to(gain.dtype), gain, knots)
            torch.mm(basis.flatten(1), coefficients.flatten(0, 1), out=z_some)
        return z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, knots, coefficients = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_gain, d_knots, d_coefficients = (torch.zeros_like(p) for p in (gain, knots, coefficients))
        with autocast_off(dz):
            for start in range(0, len(x), ctx.chunk):
                some = slice(start, start + ctx.chunk)
                x_some = x[some].to(gain.dtype)
                basis, distance = hats(x_some, gain, knots)
                d_coefficients.flatten(0, 1).addmm_(basis.flatten(1).T, dz[some])
                slope = distance.sign_().mul_(basis > 0)  # minus that of a hat; 0 at its tip and at its feet
                del basis
                slope.mul_((dz[some] @ coefficients.flatten(0, 1).T).view_as(slope))
                d_knots += slope.sum(0)
                d_scaled = slope.sum(1).neg_()
                d_gain += (x_some * d_scaled).sum(0)
                if dx is not None:
                    dx[some] = gain * d_scaled
        return dx, d_gain, d_knots, d_coefficients


class NeRA(Adapter):
    """The splines and the read-out of one adapter on one layer."""

    name = "nera"

    def __init__(self, base: nn.Module, config: "NeRAConfig"):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        places = torch.linspace(-REACH, REACH, config.num_knots)
        self.gain = nn.Parameter(torch.full((in_features,), float(config.gain)))
        self.knots = nn.Parameter(places[:, None].repeat(1, in_features))
        self.coefficients = nn.Parameter(torch.empty(config.num_knots, in_features, config.r))
        self.up = nn.Parameter(torch.zeros(out_features, config.r))
        self.centred = config.is_centred
        self.scale = nn.Parameter(torch.full((1,), config.start_scale))  # one number, but FSDP takes no scalars
        nn.init.normal_(self.coefficients, std=1e-3 if config.init_weights else 0.1)
        if config.init == "reference" or not config.init_weights:
            nn.init.kaiming_uniform_(self.up, a=5**0.5)

    def branch(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """a R z(x), or a R (z(x) - z(0)).

        The splines run in the adapter's precision under autocast too, since x less a knot needs it.
        """
        with autocast_off(x):
            rows = x.reshape(-1, x.shape[-1])
            z = self._splines(rows)
            if self.centred:
                z = z - self._splines(rows.new_zeros(1, rows.shape[-1]))
        return F.linear(z.view(*x.shape[:-1], z.shape[-1]), self.scale * self.up)

    def _splines(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens r"]:
        z: Tensor = _Splines.apply(x, self.gain, self.knots, self.coefficients)
        return z

    def new_output(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The adapted layer's output; `x` its input, `y` its own output."""
        return y + self.branch(x).to(y.dtype)


@register
@dataclass(kw_only=True)
class NeRAConfig(AdapterConfig):
    """NeRA: splines of each input in place of LoRA's down-projection.

    r: numbers that the splines give for each token, 1 <= r.
    num_knots: knots of each input, evenly from -3 to 3 at the start, 2 <= num_knots; with fewer than 4 there are gaps
        between them in which an input's size has no effect.
    alpha: start of the trained scale a, above 0, not divided by r; None: 8, or 0.001 with the start "reference".
    gain: start of every g, above 0. Inputs beyond 4 / g have all one effect and get no gradient; `fit_gain` sets g.
    init: "zero" starts as the pretrained model; "reference" has a read-out that is not zero.
    centred: whether the update of an input of zeros is 0; None: yes, or no with the start "reference", as published.

    Raises ValueError if r < 1, num_knots < 2, alpha <= 0, gain <= 0, or init is unknown.
    """

    method: ClassVar = NeRA
    r: int = 16
    num_knots: int = 8
    alpha: float | None = None
    gain: float = 1.0
    init: Literal["zero", "reference"] = "zero"
    centred: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r of nera must be at least 1, got {self.r}.")
        if self.num_knots < 2:
            raise ValueError(f"num_knots of nera must be at least 2, got {self.num_knots}.")
        if not self.gain > 0:
            raise ValueError(f"gain of nera must be above 0, got {self.gain}.")
        if self.init not in ("zero", "reference"):
            raise ValueError(f"init of nera must be 'zero' or 'reference', got {self.init!r}.")

    @property
    def start_scale(self) -> float:
        """What the trained scale a starts at."""
        if self.alpha is not None:
            return float(self.alpha)
        return 8.0 if self.init == "zero" else 1e-3

    @property
    def is_centred(self) -> bool:
        """Whether z(0) is taken off."""
        return self.init == "zero" if self.centred is None else self.centred


@torch.no_grad()
def fit_gain(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Set g of every NeRA adapter so that 99 % of each input lie within the knots: g = 3 / quantile of |x|.

    inputs: one batch, for one forward of the model; padding counts as any other token. For the beginning of training:
    hidden states of large models have inputs far beyond the knots, which would never learn. An input that is zero in
    99 % of the tokens keeps its g.

    Raises ValueError if the model has no NeRA adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, AdaptedLayer) and nera_adapters(m)]
    if not layers:
        raise ValueError(f"There is no nera adapter in this {type(model).__name__}.")
    reached: dict[AdaptedLayer, Tensor] = {}
    hooks = [layer.register_forward_pre_hook(partial(_note_reach, reached)) for layer in layers]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for layer, quantile in reached.items():
        for adapter in nera_adapters(layer):
            fitted = torch.where(quantile > 0, REACH / quantile, adapter.gain)
            adapter.gain.copy_(fitted)


def nera_adapters(layer: AdaptedLayer) -> list[NeRA]:
    """The NeRA adapters on a layer."""
    return [adapter for adapter in layer.adapters.values() if isinstance(adapter, NeRA)]


def _note_reach(found: dict[AdaptedLayer, Tensor], layer: AdaptedLayer, args: tuple[Tensor, ...]) -> None:
    """The quantile of each input: [in] numbers, and not the inputs of all layers, wait for the end of the forward."""
    sizes = args[0].reshape(-1, args[0].shape[-1]).abs().float()
    found[layer] = sizes.kthvalue(ceil(0.99 * len(sizes)), dim=0).values
