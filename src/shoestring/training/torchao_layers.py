"""Linear layers whose frozen weight torchao holds in packed form, with a backward that keeps nothing.

Code     torchao's tensor classes, through transformers' TorchAoConfig
Update   y = x W^T + b by torchao's own product; dx = dy W with W unpacked once more
Costs    In forward and in backward, one layer's weight unpacked for the length of its product.
Differs  torchao builds its product of plain operations, for which autograd keeps the unpacked weight until backward:
         over all layers that is the whole model in its own dtype, which packing was to save.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def is_packed(weight: Any) -> bool:
    """Whether torchao holds this weight in packed form."""
    torchao = sys.modules.get("torchao.utils")  # without it, nothing of its making is there
    return torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor)


class PackedLinear(nn.Linear):
    """A linear layer with a weight of torchao's that does not train; made of a layer that is there, by its class."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchao computes it, with or without gradients."""
        return _PackedProduct.apply(x, self.weight, self.bias)


class _PackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # an attribute: it is neither kept by the graph alone, nor to be stored in another way
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx = dy @ ctx.weight.dequantize().to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, None, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
