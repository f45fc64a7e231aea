"""Sharding: what one of several processes holds, by the rules of DDP, FSDP2 and ZeRO.

Rules    With n processes, weights W, gradients G, optimizer state S, blocks of a model the units that are gathered:
         ddp     W + 2 G + S: gradients are copied into buckets to be summed, which are there all the time
         zero1   W + G + S/n;   zero2   W + (G + S)/n
         zero3, fsdp2   (W + G + S)/n, and at the peak two blocks and what is outside of blocks, gathered
         Activations, logits and temporaries are those of the process's own micro-batch.
Source   Rajbhandari et al., ZeRO, arXiv:1910.02054; Zhao et al., PyTorch FSDP, arXiv:2304.11277
Leaves   Buffers of the communication library, and prefetching beyond one block. The peak is looked for where each phase
         of a step holds most, with and without gradients and states; a moment between them may hold more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import SettingError, did_you_mean

Kind = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Units:
    """Weights in bytes, adapters included: of the largest block, and of all that is in no block."""

    largest_block: int
    outside: int


@dataclass(frozen=True)
class Sharding:
    """A model over several processes.

    Raises SettingError if there is no such kind, or for fewer than 1 process.
    """

    kind: Kind
    processes: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SettingError(f"Unknown sharding {self.kind!r}. {did_you_mean(str(self.kind), get_args(Kind))}")
        if self.processes < 1:
            raise SettingError(f"sharding needs at least 1 process, got {self.processes}.")

    @property
    def text(self) -> str:
        """What is told about it."""
        return f"what each of {self.processes} processes holds under {self.kind}"

    def divided(self, parts: Mapping[str, int], units: Units, gradients: int) -> dict[str, int]:
        """The parts of one process, from those of a process that holds everything.

        parts: at one moment. gradients: bytes of all of them, which need not be there then.
        """
        new = dict(parts)
        if self.processes == 1:
            return new
        whole = self.kind in ("fsdp2", "zero3")
        for part in ("weights", "adapters"):
            new[part] = self._share(new[part], whole)
        new["gradients"] = self._share(new["gradients"], whole or self.kind == "zero2")
        new["optimizer_state"] = self.share_of_state(new["optimizer_state"])
        if whole:
            new["temporary"] += 2 * units.largest_block + units.outside
        elif self.kind == "ddp":
            new["temporary"] += gradients
        return new

    def share_of_state(self, size: int) -> int:
        """What one process holds of so many bytes of optimizer state."""
        return self._share(size, self.kind != "ddp")

    def _share(self, size: int, divided: bool) -> int:
        return -(-size // self.processes) if divided else size
