"""Feed-forward parts of blocks: which modules are activation functions, and which blocks multiply with their results.

Found by running a block on stand-ins for its layers, not by names: models call these parts differently.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations as hf

ACTIVATIONS = {entry[0] if isinstance(entry, tuple) else entry for entry in hf.ACT2CLS.values()} | {nn.GELU}


class GatedProduct(NamedTuple):
    """The activation function of a gated block, and the module that reads the product with its result first."""

    activation: nn.Module
    reader: nn.Module


def is_elementwise(module: nn.Module) -> bool:
    """Whether it is an activation function without weights that leaves its input as it is."""
    return type(module) in ACTIVATIONS and not list(module.parameters()) and not getattr(module, "inplace", False)


def gated_product(block: nn.Module) -> GatedProduct | None:
    """The product in `block` of an activation function's result with another tensor; None if there is none."""
    inside = [child for child in block.children() if is_elementwise(child)]
    if len(inside) != 1 or any(True for _ in block.parameters(recurse=False)):
        return None
    seen = _Seen(inside[0])
    trial = copy.copy(block)
    trial.__dict__["_modules"] = {name: _StandIn(child, seen) for name, child in block.named_children()}
    try:
        with torch.enable_grad():
            type(block).forward(trial, torch.ones(1, 2, 4, requires_grad=True))
    except Exception:  # a block that takes other inputs may fail in any way
        return None
    return GatedProduct(inside[0], seen.reader) if seen.reader is not None else None


def experts_activation(block: nn.Module) -> nn.Module | None:
    """The activation function of a mixture whose experts' weights stand in `block` itself, [experts, ...]; else None.

    What is done with its result cannot be tried on stand-ins.
    """
    inside = [child for child in block.children() if is_elementwise(child)]
    stacked = any(weight.dim() == 3 for weight in block.parameters(recurse=False))
    return inside[0] if stacked and len(inside) == 1 else None


class _Seen:
    """What one trial has shown so far."""

    def __init__(self, activation: nn.Module):
        self.activation = activation
        self.result: Tensor | None = None
        self.reader: nn.Module | None = None

    def is_product(self, x: Tensor) -> bool:
        """Whether the activation function's result was multiplied on the way to `x`, which is not that result."""
        if self.result is None or x is self.result:
            return False
        to_look_at = [x.grad_fn]
        while to_look_at:
            node = to_look_at.pop()
            before = [each for each, _ in node.next_functions] if node is not None else []
            if node is not None and node.name() == "MulBackward0" and self.result.grad_fn in before:
                return True
            to_look_at += before
        return False


class _StandIn(nn.Module):
    """Gives back what it is given, and notes what that is; stands for one layer of the block."""

    stands_for: nn.Module

    def __init__(self, stands_for: nn.Module, seen: _Seen):
        super().__init__()
        self.__dict__["stands_for"] = stands_for  # no child: the trial has no weights
        self.seen = seen
        self.weight = None  # T5 looks at its dtype

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        if self.stands_for is self.seen.activation:
            self.seen.result = x * 1
            return self.seen.result
        if self.seen.reader is None and self.seen.is_product(x):
            self.seen.reader = self.stands_for
        return x
