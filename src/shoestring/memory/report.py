"""What a ledger reports: the peak, its parts, and what was kept for backward."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

Phase = Literal["forward", "backward", "optimizer", "other"]
PARTS = (
    "weights",
    "gradients",
    "optimizer_state",
    "saved_for_backward",
    "logits_and_loss",
    "temporary",
    "inputs",
)


@dataclass(frozen=True)
class MemoryReport:
    """Where the memory of one ledger went; every quantity in bytes of storages on `device`.

    peak_bytes: the largest sum of live storages.
    peak_phase: what was running then.
    at_peak: the peak by part; the values sum to `peak_bytes`. Logits and what has their width are a part of their own,
        kept for backward or not.
    by_phase: the largest sum in each phase in which memory was taken.
    moments: of each of these phases the parts when their sum was largest, and when it was without gradients and states.
    saved_bytes: kept for backward when it began, without weights, inputs and outputs; the most over several forwards.
    largest: each part's own maximum over time, not all at the same moment.
    trainable_bytes, frozen_bytes: parameters that train; all other weights, with buffers and quantization constants.
    by_module: `saved_bytes` by the module in which a storage was born; "" is code outside the named modules.
    cuda_max_allocated_bytes: the CUDA allocator's own maximum over the same time; None elsewhere.
    """

    peak_bytes: int
    peak_phase: Phase
    at_peak: dict[str, int]
    by_phase: dict[Phase, int]
    moments: list[tuple[Phase, dict[str, int]]]
    saved_bytes: int
    largest: dict[str, int]
    trainable_bytes: int
    frozen_bytes: int
    by_module: dict[str, int]
    device: str
    cuda_max_allocated_bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def table(self) -> list[tuple[str, int, int]]:
        """Rows of part, bytes at the peak, bytes at the part's own maximum; the last row is the total at the peak."""
        rows = [(part, self.at_peak[part], self.largest[part]) for part in PARTS]
        return [*rows, ("total", self.peak_bytes, self.peak_bytes)]


@dataclass(frozen=True)
class Peak:
    """Bytes by part at the highest total, its phase, two moments of each phase, and each part's maximum."""

    parts: dict[str, int]
    phase: Phase
    moments: list[tuple[Phase, dict[str, int]]]
    largest: dict[str, int]

    @property
    def by_phase(self) -> dict[Phase, int]:
        """The largest sum in each phase."""
        found: dict[Phase, int] = {}
        for phase, parts in self.moments:
            found[phase] = max(found.get(phase, 0), sum(parts.values()))
        return found


def replay(existing: Iterable[tuple[str, int]], log: Iterable[tuple[str, int, Phase]]) -> Peak:
    """The peak of a log of (part, change in bytes, phase) that began with the existing (part, bytes).

    >>> replay([("weights", 8)], [("temporary", 4, "forward"), ("temporary", -4, "other")]).phase
    'forward'
    """
    now = dict.fromkeys(PARTS, 0)
    for part, size in existing:
        now[part] += size
    peak = total = sum(now.values())
    parts, largest = dict(now), dict(now)
    peak_phase: Phase = "other"
    highest: dict[tuple[Phase, bool], tuple[int, dict[str, int]]] = {}  # with all parts, and without some
    for part, change, phase in log:
        total += change
        now[part] += change
        largest[part] = max(largest[part], now[part])
        if change > 0:  # what is let go was taken in another phase
            for whole, size in ((True, total), (False, total - now["gradients"] - now["optimizer_state"])):
                if (phase, whole) not in highest or size > highest[phase, whole][0]:
                    highest[phase, whole] = size, dict(now)
        if total > peak:
            peak, parts, peak_phase = total, dict(now), phase
    return Peak(parts, peak_phase, [(phase, at) for (phase, _), (_, at) in highest.items()], largest)
