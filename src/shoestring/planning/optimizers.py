"""Optimizers that only run on their own device: the bytes of their state, by the rule of how it is laid out.

Source   Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv:2110.02861; bitsandbytes
Rule     Blocks of 256 numbers share one float32 scale; tensors below 4,096 numbers keep float32 states; paged states
         may leave the GPU
"""

import re
from dataclasses import dataclass

BLOCK = 256
SMALLEST_QUANTISED = 4096
STATES = {"adam": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}  # tensors of a parameter's size


@dataclass(frozen=True)
class StateRule:
    """State of one optimizer: `states` tensors a parameter, in 8 or 32 bit, paged or not."""

    name: str
    states: int
    bits: int
    paged: bool

    @property
    def text(self) -> str:
        """What is told about it."""
        where = "paged: it may leave the device" if self.paged else "on the device"
        return f"optimizer state of {self.name}: {self.states} of {self.bits} bit a trained parameter, {where}"

    def bytes_of(self, numbers: int) -> int:
        """The state of a parameter with so many numbers.

        >>> StateRule("adamw_8bit", 2, 8, False).bytes_of(4096)
        8320
        """
        if self.bits == 32 or numbers < SMALLEST_QUANTISED:
            return self.states * 4 * numbers
        return self.states * (numbers + 4 * -(-numbers // BLOCK))


def by_rule(optim: object) -> StateRule | None:
    """The rule for an optimizer of TrainingArguments, or None for those that can be rehearsed."""
    name = str(getattr(optim, "value", optim))
    if not re.search(r"bnb|8bit|32bit|paged", name):
        return None
    family = next((family for family in ("ademamix", "adam", "lion", "rmsprop") if family in name), None)
    if family is None:
        return None
    eight = "8bit" in name
    return StateRule(name, STATES[family], 8 if eight else 32, "paged" in name)
