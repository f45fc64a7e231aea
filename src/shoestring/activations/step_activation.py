r"""Step activation: ReGELU2 and ReSiLU2, activation functions whose backward needs two bits an element.

Source   Yang et al. 2024, Reducing Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation,
         ICML 2024, arXiv:2406.16282
Update   y = f(x), to the bit; in backward dx = s(x) dy, s(x) = 0, a0, a0 + a1 or 1 between the thresholds c0 < c1 < c2
Shapes   x [..., ff]; code = [x > c0] + [x > c1] + [x > c2], four to a byte
Costs    ceil(n ff / 4) bytes in place of x; largest error of the derivative 0.55 (GELU), 0.54 (SiLU), both near 0.
         ReLU takes one bit, ceil(n ff / 8) bytes, and is exact; stock it keeps its result, which a linear layer that
         trains keeps too: a gain only before a frozen one. In a gated block, f(g) * u, the product still keeps f(g)
         and u, and only g goes: `lean_mlp` saves more, exactly
Differs  f may be any GELU, tanh forms included, with the same constants; QuickGELU, x sigmoid(k x) = SiLU(k x) / k,
         takes SiLU's thresholds divided by k. Functions that a model does not hold as modules stay as they are
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import activations as hf

from ..errors import SettingError
from ..technique import Advised, Phase, Technique, register_technique
from .own_backward import training_forwards


@dataclass(frozen=True)
class StepDerivative:
    """A derivative that is constant between thresholds: `levels[i]` for x above exactly i of them."""

    thresholds: tuple[float, ...]
    levels: tuple[float, ...]

    @property
    def codes_per_byte(self) -> int:
        return 8 if len(self.levels) == 2 else 4

    def stretched(self, factor: float) -> "StepDerivative":
        """The derivative of f(factor x) / factor, where this one is that of f."""
        return StepDerivative(tuple(c / factor for c in self.thresholds), self.levels)

    def pack(self, x: Float[Tensor, "*any"]) -> UInt8[Tensor, " bytes"]:
        """In which step each element lies, `codes_per_byte` of them to a byte, the first in the lowest bits."""
        codes = (x > self.thresholds[0]).to(torch.uint8)
        for threshold in self.thresholds[1:]:
            codes += x > threshold
        columns = nn.functional.pad(codes.flatten(), (0, -x.numel() % self.codes_per_byte)).view(
            -1, self.codes_per_byte
        )
        packed = columns[:, 0].clone()
        for place in range(1, self.codes_per_byte):
            packed |= columns[:, place] << (place * 8 // self.codes_per_byte)
        return packed

    def unpack(self, packed: UInt8[Tensor, " bytes"], like: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The derivative of every element, in the shape and dtype of `like`."""
        bits = 8 // self.codes_per_byte
        shifts = torch.arange(0, 8, bits, device=packed.device)
        codes = (torch.arange(256, device=packed.device)[:, None] >> shifts) & (2**bits - 1)
        levels = torch.tensor(self.levels, dtype=like.dtype).to(packed.device, non_blocking=True)
        # every byte stands for one row of derivatives
        return nn.functional.embedding(packed.int(), levels[codes]).view(-1)[: like.numel()].view_as(like)


def _three_steps(a: tuple[float, ...], c: tuple[float, ...]) -> StepDerivative:
    return StepDerivative(c, (0.0, *list(accumulate(a))[:-1], 1.0))


REGELU2 = _three_steps((-0.04922261, 1.09796321, -0.04874060), (-3.18588100, -0.00117882, 3.19083261))
RESILU2 = _three_steps((-0.04060357, 1.08092543, -0.04032186), (-6.30504610, -0.00086849, 6.32581524))
RELU = StepDerivative((0.0,), (0.0, 1.0))

STEP_DERIVATIVES: dict[type[nn.Module], StepDerivative] = {
    nn.GELU: REGELU2,
    hf.GELUActivation: REGELU2,
    hf.GELUTanh: REGELU2,
    hf.NewGELUActivation: REGELU2,
    hf.FastGELUActivation: REGELU2,
    hf.AccurateGELUActivation: REGELU2,
    hf.QuickGELUActivation: RESILU2.stretched(1.702),
    nn.SiLU: RESILU2,
    hf.SiLUActivation: RESILU2,
    nn.ReLU: RELU,
}


class _WithStepDerivative(torch.autograd.Function):
    """f(x) by the module's own forward; keeps the packed step each element lies in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Callable[[Tensor], Tensor], step: StepDerivative) -> Tensor:
        ctx.step = step
        ctx.save_for_backward(step.pack(x))
        return own(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        (packed,) = ctx.saved_tensors
        return ctx.step.unpack(packed, like=dy).mul_(dy), None, None


@register_technique
@dataclass
class StepActivation(Technique):
    """Activation functions keep two bits an element for backward, and their derivative is a step function.

    Acts on the GELU, SiLU, QuickGELU and ReLU modules of the model while it trains. Raises SettingError if there are
    none, or if one of them works in place.
    """

    name: ClassVar[str] = "step_activation"
    advised = (Advised(65, "activation functions keep 2 bits: gradients are no longer exact"),)
    phase: ClassVar[Phase] = Phase.ACTIVATION
    claims: ClassVar[frozenset[str]] = frozenset({"the activation functions of the blocks"})
    removes: ClassVar[frozenset[str]] = frozenset({"activation inputs"})

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Replace the backward of every activation module of a known class."""
        found = {name: m for name, m in model.named_modules() if type(m) in STEP_DERIVATIVES}
        if not found:
            known = ", ".join(sorted(cls.__name__ for cls in STEP_DERIVATIVES))
            raise SettingError(
                f"step_activation found no activation function in {type(model).__name__}: it looks for modules of the "
                f"classes {known}. Leave it out for this model."
            )
        if in_place := [name for name, module in found.items() if getattr(module, "inplace", False)]:
            raise SettingError(
                f"step_activation needs activation functions that leave their input as it is, but {in_place[0]} works "
                f"in place: set its `inplace` to False."
            )
        with training_forwards(dict.fromkeys(found.values(), _forward)):
            yield model


def _forward(module: nn.Module, own: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _WithStepDerivative.apply(x, own, STEP_DERIVATIVES[type(module)]) if x.requires_grad else own(x)
