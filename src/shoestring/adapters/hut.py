r"""HUT: Hadamard updated transformation.

Source   Zhang, Zhou, Chen 2024, arXiv:2409.13501
Update   residual: W' = W * (1 + s A B); literal: W' = W * (A B); elementwise product, s = alpha / r
Shapes   W [out, in], A [out, r], B [r, in]
Start    residual: A Kaiming, B = 0; literal: A B = 1 by a first column and row of ones; both give W' = W
Trains   r (in + out) numbers a layer
Costs    W' is rebuilt in backward, so that x is all a layer keeps; one dense [out, in] tensor at a time, W' or its
         gradient, which LoRA never forms. Products beside the layer's own: r out in forward, (tokens + 3 r) out in back
Differs  the paper's start and scale are not public; the residual form and LoRA's Kaiming start are our reading
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .base import Adapter, AdapterConfig, linear_sizes, register


class HUT(Adapter):
    """The factors A and B of one adapter on one layer."""

    name = "hut"

    def __init__(self, base: nn.Module, config: "HUTConfig"):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        self.residual = config.form == "residual"
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r if self.residual else 1.0
        self.a = nn.Parameter(torch.empty(out_features, config.r))
        self.b = nn.Parameter(torch.zeros(config.r, in_features))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.b, a=5**0.5)
        elif not self.residual:
            with torch.no_grad():
                self.a[:, 0] = 1
                self.b[0] = 1

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W' in the dtype of `weight`; W + W * N, since 1 + N would round to 1 for small N in 16 bits."""
        modulated: Tensor = _Modulated.apply(weight, self.scale * self.a, self.b, self.residual)
        return modulated


class _Modulated(torch.autograd.Function):
    """W * (A B), and W more in the residual form. Backward forms no dense tensor: it goes by blocks of rows."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, a: Tensor, b: Tensor, residual: bool) -> Tensor:
        ctx.residual = residual
        ctx.save_for_backward(weight, a, b)
        modulated = (a @ b).to(weight.dtype).mul_(weight)
        return modulated.add_(weight) if residual else modulated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b = ctx.saved_tensors
        rows = max(-(-len(d) // 16), 2**16 // d.shape[1])
        da, db, dw = torch.empty_like(a), torch.zeros_like(b), torch.empty_like(d) if ctx.needs_input_grad[0] else None
        for start in range(0, len(d), rows):
            some = slice(start, start + rows)
            k = (d[some] * weight[some]).to(a.dtype)
            da[some] = k @ b.T
            db += a[some].T @ k
            if dw is not None:
                product = (a[some] @ b).to(d.dtype)
                dw[some] = d[some] * (product + 1 if ctx.residual else product)
        return dw, da, db, None


@register
@dataclass(kw_only=True)
class HUTConfig(AdapterConfig):
    """HUT: each pretrained weight times one plus a low-rank factor.

    r: inner size of A B, 1 <= r; 8 is the usual start.
    alpha: scale of the residual form is alpha / r; None: alpha = r.
    form: "residual" or "literal" (which reaches the same weights with one rank more).

    Raises ValueError if r < 1, form is unknown, or alpha is given with the literal form.
    """

    method: ClassVar = HUT
    r: int = 8
    alpha: float | None = None
    form: Literal["residual", "literal"] = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r of hut must be at least 1, got {self.r}.")
        if self.form not in ("residual", "literal"):
            raise ValueError(f"form of hut must be 'residual' or 'literal', got {self.form!r}.")
        if self.form == "literal" and self.alpha is not None:
            raise ValueError("alpha of hut scales the residual form only; leave it out with form='literal'.")
