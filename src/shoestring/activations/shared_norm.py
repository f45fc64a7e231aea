r"""Shared norm: LayerNorm and RMSNorm that keep their result for backward, which the next layer keeps too.

Source   Yang et al. 2024, Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation,
         ICML 2024, arXiv:2406.16282
Update   y = gamma n + beta, n = (x - m) r; r = 1 / sqrt(var + eps) and m the mean, or m = 0 and the mean square (RMS).
         Backward, with n = (y - beta) / gamma and d = gamma dy:
         dx = r (d - mean(d) - n mean(d n)), without mean(d) for RMS; dgamma = sum dy n; dbeta = sum dy
Shapes   x, y [..., d]; r [..., 1]; gamma, beta [d]
Costs    y and one number a token in place of x; one more pass over x in forward, for r. y costs nothing where the
         next layer keeps it: a linear layer that trains, or one with a LoRA whose A trains and has the dtype of y.
         Before a frozen layer y takes the place of x: no gain in float32. Stock RMSNorms keep x in float32 whatever
         its dtype, so in 16 bits they gain anyway. A loss only where norms read one x and nothing keeps their results
Differs  gamma and beta stay where they are, so weights and checkpoints are the stock ones; the paper merges them into
         the layers that follow. Rounding of y puts n off by |y / gamma| / 2 units in the last place, which is as little
         as its own rounding unless |beta / gamma| is large. Norms where it is above `largest_shift` in some channel, or
         where gamma is zero, keep x as before. On packaged models gradients were as near to float64's as the stock
         ones, in float32 (1e-6) and in bfloat16 (2 %); the two differ by 0.3 to 1.7 % in bfloat16
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..errors import SettingError
from ..fakes import has_values
from ..precision import wide_dtype
from ..technique import Advised, Phase, Technique, register_technique
from .own_backward import training_forwards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NormForm:
    """What a norm module computes.

    eps: what is added to the variance or the mean square.
    centred: whether the mean is taken off first.
    weight_offset: gamma is the module's weight plus this; 1 in Gemma.
    """

    eps: float
    centred: bool
    weight_offset: float = 0.0

    def inverse_deviation(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows 1"]:
        """1 / sqrt(var + eps) of each row, in float32 or wider."""
        wide = wide_dtype(x.dtype)
        if self.centred:
            square = x.to(wide).var(-1, correction=0, keepdim=True)
        else:
            square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1])
        return square.add_(self.eps).rsqrt_()

    def gamma(self, weight: Float[Tensor, " d"], dtype: torch.dtype) -> Float[Tensor, " d"]:
        """The factor of each channel."""
        return weight.to(dtype) + self.weight_offset


class _FromOutput(torch.autograd.Function):
    """The norm by the module's own forward; keeps its result and `inverse_deviation`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        own: Callable[[Tensor], Tensor],
        form: NormForm,
    ) -> Tensor:
        ctx.form, ctx.dtype = form, x.dtype
        y = own(x)
        ctx.save_for_backward(y, form.inverse_deviation(x), weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (dy,) = gradients
        y, r, weight, bias = ctx.saved_tensors
        dy = dy.to(r.dtype)
        gamma = None if weight is None else ctx.form.gamma(weight, r.dtype)
        n = y.to(r.dtype) if bias is None else y.to(r.dtype) - bias.to(r.dtype)
        n = n if gamma is None else n / gamma

        dx = dweight = dbias = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * n).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.flatten(0, -2).sum(0).to(bias.dtype)
        if ctx.needs_input_grad[0]:
            d = dy if gamma is None else dy * gamma
            inner = d - n * (d * n).mean(-1, keepdim=True)
            if ctx.form.centred:
                inner -= d.mean(-1, keepdim=True)
            dx = inner.mul_(r).to(ctx.dtype)
        return dx, dweight, dbias, None, None


@register_technique
@dataclass
class SharedNorm(Technique):
    """LayerNorms and RMSNorms compute their backward from their result, which the next layer keeps anyway.

    Norms that are called with a gate too run as they are.

    largest_shift: norms with |beta / gamma| above it in some channel keep their input as before; at 16 the gradient in
        float32 is off by no more than 2e-6.

    Raises SettingError if largest_shift is not positive, or if the model has no norm this can act on.
    """

    name: ClassVar[str] = "shared_norm"
    advised = (Advised(12, "norms keep one tensor in place of two; exact"),)
    phase: ClassVar[Phase] = Phase.ACTIVATION
    exact: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"the norms of the blocks"})
    removes: ClassVar[frozenset[str]] = frozenset({"norm inputs beside outputs", "normalised inputs"})
    largest_shift: float = 16.0

    def __post_init__(self) -> None:
        if not self.largest_shift > 0:
            raise SettingError(f"largest_shift of shared_norm must be positive, got {self.largest_shift}.")

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Replace the backward of every norm whose input can be found from its result; says how many are left alone."""
        forms = {m: form for m in model.modules() if (form := norm_form(m)) is not None}
        if not forms:
            raise SettingError(
                f"shared_norm found no norm in {type(model).__name__}: it looks for nn.LayerNorm over the last "
                "axis and for modules that compute an RMS norm. Leave it out for this model."
            )
        safe = {m: form for m, form in forms.items() if self.is_safe(m, form)}
        if not safe:
            raise SettingError(
                f"shared_norm can act on none of the {len(forms)} norms of {type(model).__name__}: each has a channel "
                f"with gamma zero or |beta / gamma| above largest_shift, {self.largest_shift:g}. Leave it out."
            )
        if left := len(forms) - len(safe):
            logger.warning("shared_norm leaves %d of %d norms alone: gamma is too small there.", left, len(forms))
        with training_forwards({m: self._forward_of(form) for m, form in safe.items()}):
            yield model

    def is_safe(self, norm: nn.Module, form: NormForm) -> bool:
        """Whether n comes back from y without more than a small error; True for weights that are not there yet."""
        weight, bias = norm._parameters.get("weight"), norm._parameters.get("bias")
        if weight is None or not has_values(weight):
            return True
        gamma = form.gamma(weight.detach(), torch.float32).abs()
        shift = torch.zeros_like(gamma) if bias is None else bias.detach().abs()
        return bool((gamma >= torch.finfo(gamma.dtype).tiny).all() and (shift <= self.largest_shift * gamma).all())

    def _forward_of(self, form: NormForm) -> Callable[..., Tensor]:
        def forward(module: nn.Module, own: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
            if len(args) != 1 or named:  # more than x, such as a gate
                return own(*args, **named)
            (x,) = args
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            learned = [p for p in (weight, bias) if p is not None and p.requires_grad]
            if not (x.requires_grad or learned) or (learned and not self.is_safe(module, form)):
                return own(x)
            return _FromOutput.apply(x, weight, bias, own, form)

        return forward


def norm_form(module: nn.Module) -> NormForm | None:
    """What `module` computes if it is a LayerNorm over the last axis or an RMS norm of any class; None otherwise."""
    if isinstance(module, nn.LayerNorm):  # classes that inherit from it may compute something else
        is_plain = type(module).forward is nn.LayerNorm.forward and len(module.normalized_shape) == 1
        return NormForm(module.eps, centred=True) if is_plain else None
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or len(list(module.parameters())) != 1 or len(list(module.children())):
        return None
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    for offset in (0.0, 1.0):
        form = NormForm(torch.finfo(weight.dtype).eps if eps is None else eps, centred=False, weight_offset=offset)
        if isinstance(form.eps, float) and _computes(module, form, weight.shape[0]):
            return form
    return None


def _computes(module: nn.Module, form: NormForm, width: int) -> bool:
    """Whether the module gives the RMS norm `form` on random inputs, small ones included, where eps matters."""
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width, generator=generator)
        x = torch.randn(3, 5, width, generator=generator) * torch.tensor([1.0, 30.0, form.eps**0.5])[:, None, None]
        expected = x * form.inverse_deviation(x) * form.gamma(weight, x.dtype)
        try:
            y = torch.func.functional_call(module, {"weight": weight}, (x,))
        except Exception:  # a module of another kind may fail in any way on an input that is not its own
            return False
        return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
