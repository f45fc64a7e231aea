"""What a run comes to: quality, trained parameters, memory by part, time, and what was saved where."""

from __future__ import annotations

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..whole_files import write_text


@dataclass(frozen=True)
class Report:
    """The end of a run, as report.json holds it.

    status: "finished" or "interrupted". quality: measures by split, and by "SPLIT, before" if evaluated first.
    trained_parameters, total_parameters: numbers, not bytes. memory: a MemoryReport of one step, or None; that of the
    last step, where it is another one, is memory_at_end.
    measured_batch: the largest micro-batch of that step, a StepShape. predicted: what was predicted for it, if asked.
    process_peak_bytes: the largest resident size of the process. step_seconds: the median step, evaluation left out.
    tokens_a_second: over the same steps. saved: folder by what it holds. settings: the run file, resolved.
    classes: their names, in the order of a classifier's outputs.
    """

    status: str
    steps: int
    quality: dict[str, dict[str, float]]
    trained_parameters: int
    total_parameters: int
    memory: dict[str, Any] | None
    process_peak_bytes: int
    step_seconds: float | None
    train_seconds: float
    tokens_a_second: float | None
    saved: dict[str, str]
    settings: str
    versions: dict[str, str]
    losses: list[tuple[int, float]] = field(default_factory=list)
    measured_batch: dict[str, Any] | None = None
    predicted: dict[str, Any] | None = None
    classes: list[str] | None = None
    memory_at_end: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)

    def write(self, path: Path) -> None:
        """Write as JSON, beside the place first."""
        write_text(path, json.dumps(self.to_dict(), indent=1))


@dataclass(frozen=True)
class TrainedGroup:
    """Trainable parameters of one kind over all blocks; `*` in the name stands for a block's number."""

    name: str
    tensors: int
    parameters: int
    dtype: str


def trained_groups(model: nn.Module) -> list[TrainedGroup]:
    """What trains, parameters of equal names but for numbers together, the largest group first; peft's prefixes cut."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            short = re.sub(r"(\.default)?(\.weight)?$", "", re.sub(r"^(base_model\.model\.)+", "", name))
            key = re.sub(r"\.\d+(?=\.)", ".*", short), str(parameter.dtype).removeprefix("torch.")
            groups.setdefault(key, []).append(parameter.numel())
    rows = [TrainedGroup(name, len(sizes), sum(sizes), dtype) for (name, dtype), sizes in groups.items()]
    return sorted(rows, key=lambda row: -row.parameters)


def median(values: list[float]) -> float | None:
    """The median, None of nothing."""
    return statistics.median(values) if values else None
