"""Optimizers whose state no rehearsal can make: its bytes, by the rule of how bitsandbytes and torchao lay it out.

Source   Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv:2110.02861
Rule     Blocks of 256 numbers share one float32 scale; tensors below 4,096 numbers have float32
         states. bitsandbytes has one table of levels for all tensors, which is left out; torchao one for each state.
         Paged states of tensors with 100,000 numbers and more may leave the GPU; smaller ones stay on it.
         transformers' Trainer has bitsandbytes keep those of every nn.Embedding, and of heads tied to it, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..recipe import Recipe
from ..training.low_bit_optimizers import SMALLEST_QUANTISED, package_of

SMALLEST_PAGED = 100_000
BLOCK_OF_TORCHAO = 256  # as transformers asks for it, in 4 bits too
STATES = {"adam": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}  # tensors of a parameter's size


@dataclass(frozen=True)
class StateRule:
    """State of one optimizer: `states` tensors a parameter, in 4, 8 or 32 bit, paged or not.

    block: numbers that share a scale. own_tables: whether each state holds its own table of levels, and where blocks do
    not divide a tensor, is in float32.
    """

    name: str
    states: int
    bits: int
    paged: bool
    block: int = 256
    own_tables: bool = False

    @property
    def text(self) -> str:
        """What is told about it."""
        where = "paged: that of large parameters may leave the device" if self.paged else "on the device"
        of_embeddings = "" if self.of_embeddings == self else f", of embeddings of {self.of_embeddings.bits} bit"
        kept = f"{self.states} of {self.bits} bit a trained parameter{of_embeddings}"
        return f"optimizer state of {self.name}: {kept}, {where}"

    @property
    def of_embeddings(self) -> StateRule:
        """The rule for weights of nn.Embedding."""
        return self if self.own_tables else replace(self, bits=32)

    def bytes_of(self, numbers: int) -> int:
        """The state of a parameter with so many numbers.

        >>> StateRule("adamw_8bit", 2, 8, False).bytes_of(4096)
        8320
        """
        whole = self.own_tables and numbers % self.block != 0
        if self.bits == 32 or numbers < SMALLEST_QUANTISED or whole:
            return self.states * 4 * numbers
        table = 4 * 2**self.bits if self.own_tables else 0
        return self.states * (numbers * self.bits // 8 + 4 * -(-numbers // self.block) + table)

    def paged_bytes_of(self, numbers: int) -> int:
        """What of that state may leave the device."""
        return self.bytes_of(numbers) if self.paged and numbers >= SMALLEST_PAGED else 0


def rule_of_run(train: Mapping[str, Any], recipe: Recipe) -> StateRule | None:
    """The rule for the state of a run's optimizer; None where it is rehearsed, as is one that a technique brings.

    train: fields of TrainingArguments.
    """
    if recipe.brings_optimizer:
        return None
    return by_rule(train.get("optim"), on_cpu=bool(train.get("use_cpu")))


def by_rule(optim: object, *, on_cpu: bool = False) -> StateRule | None:
    """The rule for an optimizer of TrainingArguments, or None for those that can be rehearsed.

    on_cpu: whether the run is one on a CPU, where nothing is paged.
    """
    name = str(getattr(optim, "value", optim))
    package = package_of(optim)
    if package is None:
        return None
    if package == "torchao":
        bits = 4 if "4bit" in name else 8
        return StateRule(name, STATES["adam"], bits, False, block=BLOCK_OF_TORCHAO, own_tables=True)
    family = next((family for family in ("ademamix", "adam", "lion", "rmsprop") if family in name), None)
    if family is None:
        return None
    return StateRule(name, STATES[family], 8 if "8bit" in name else 32, "paged" in name and not on_cpu)
