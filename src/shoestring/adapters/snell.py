r"""SNELL: sparse tuning with kernelised low-rank factors.

Source   Shen et al., NeurIPS 2024, arXiv:2411.01800
Update   W' = W + V gate(|V|), V the kernel of P and Q and gate of `sparse_kernel.py`, which zeroes a share of V
Shapes   W and V [out, in], P [2, in, r / 2], Q [2, out, r / 2]
Start    P and Q Kaiming, within 1 / sqrt(size * r / 2): near W, not W itself
Trains   r (in + out) numbers a layer
Costs    x is all that a layer keeps; delta is formed again in backward, a block at a time
Differs  sparsity 0 is the gate with theta = 0; the authors' code then takes V itself, here gate="none". The kernel's
         coefficients are fixed, as in the code. Dropout and drop path are off by default, for the time they cost
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .base import register
from .sparse_kernel import SparseKernelAdapter, SparseKernelConfig, num_zero


class SNELL(SparseKernelAdapter):
    """The factors P and Q of one adapter on one layer."""

    name = "snell"
    cannot: ClassVar = {
        "check_starts_as_the_pretrained_model": "its factors start small, not at zero, where they could not learn",
        "check_gradients_are_those_of_the_output": "what the gate lets through counts as constant in backward",
    }

    def __init__(self, base: nn.Module, config: "SNELLConfig"):
        super().__init__(base, config)
        self.share = config.sparsity
        out_features, in_features = self.size
        if self.num_zero() == out_features * in_features:
            raise ValueError(
                f"sparsity {self.share} of snell leaves none of the {out_features * in_features} numbers of a layer of "
                f"{in_features} -> {out_features}, which could not learn; lower it."
            )

    def num_zero(self) -> int:
        """The same at all times."""
        return num_zero(self.share, self.size[0] * self.size[1])


@register
@dataclass(kw_only=True)
class SNELLConfig(SparseKernelConfig):
    """SNELL: a sparse change of each weight, of any rank, from two low-rank factors and a kernel.

    sparsity: share of each weight's entries that stay as they are, 0 <= sparsity < 1. Depends on the task: the paper's
        are between 0.3 and 0.995.
    Further settings: see `SparseKernelConfig`.

    Raises ValueError for values out of range, and for a sparsity with gate="none".
    """

    method: ClassVar = SNELL
    sparsity: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_share("sparsity")
        if self.gate == "none" and self.sparsity:
            raise ValueError(f"gate 'none' of snell leaves every entry; set sparsity to 0, got {self.sparsity}.")
