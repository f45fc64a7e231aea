"""Rows of a benchmark: what was measured, beside what, and whether the goal holds; printed and written."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

PACKAGES = ("shoestring", "torch", "transformers", "peft", "accelerate", "trl")


@dataclass(frozen=True)
class Row:
    """One comparison. The name carries the unit of `ours` and `baseline`; `holds` is None where there is no goal."""

    name: str
    ours: float
    baseline: float
    goal: str = ""
    holds: bool | None = None

    @property
    def ratio(self) -> float | None:
        """Ours over the baseline; None where the baseline is 0."""
        return self.ours / self.baseline if self.baseline else None

    def to_dict(self) -> dict[str, Any]:
        measured = {"name": self.name, "ours": self.ours, "baseline": self.baseline, "ratio": self.ratio}
        return {**measured, "goal": self.goal, "holds": self.holds}


def at_most(name: str, ours: float, baseline: float, ratio: float) -> Row:
    """A row whose goal is that ours is at most `ratio` times the baseline."""
    return Row(name, ours, baseline, f"ratio <= {ratio:g}", ours <= ratio * baseline)


def at_least(name: str, ours: float, baseline: float, ratio: float) -> Row:
    """A row whose goal is that ours is at least `ratio` times the baseline."""
    return Row(name, ours, baseline, f"ratio >= {ratio:g}", ours >= ratio * baseline)


def machine() -> dict[str, Any]:
    """What the numbers depend on, without the names of hosts or users."""
    return {
        "system": platform.system(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on, those installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # a package of an extra
            continue
    return found


def write(
    rows: Sequence[Row],
    path: str | Path,
    seeds: Sequence[int] = (),
    runs: Mapping[str, Mapping[str, Any]] | None = None,
    **settings: Any,
) -> None:
    """Write the rows as JSON beside versions, seeds, machine and whatever else the benchmark was set to.

    runs: the outcome of each training the rows are made of, by part and name.
    """
    content = {
        "rows": [row.to_dict() for row in rows],
        **({} if runs is None else {"runs": runs}),
        "versions": versions(),
        "seeds": list(seeds),
        "machine": machine(),
        "settings": settings,
    }
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _read(path: str | Path | None, part: str) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8")).get(part) if path and Path(path).exists() else None


def read_rows(path: str | Path | None) -> list[Row]:
    """The rows of a file; none where there is no such file."""
    return [Row(*(row[k] for k in ("name", "ours", "baseline", "goal", "holds"))) for row in _read(path, "rows") or []]


def read_runs(path: str | Path | None) -> dict[str, dict[str, Any]]:
    """The runs of a file; none where there is no such file."""
    return _read(path, "runs") or {}


def rows_beside(rows: Sequence[Row], path: str | Path) -> list[Row]:
    """The rows of a file that are not among `rows`, measured anew."""
    measured = {row.name for row in rows}
    return [row for row in read_rows(path) if row.name not in measured]


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """Print the rows; a goal that does not hold is said in red."""
    table = Table(title=title or None)
    table.add_column("name")
    for column in ("ours", "baseline", "ratio"):
        table.add_column(column, justify="right")
    table.add_column("goal")
    table.add_column("holds")
    words = {True: "yes", False: "[red]no[/red]", None: ""}
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.name, f"{row.ours:,.6g}", f"{row.baseline:,.6g}", ratio, row.goal, words[row.holds])
    Console().print(table)
