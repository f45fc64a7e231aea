"""Draw a comparison: quality against memory and time of a step, one point a recipe, those of the front by number.

    python benchmarks/suite_figure.py docs/results/encoder/comparison.json docs/results/encoder.svg

Reads what `shoestring compare` has left beside its report. Named are full tuning, the baseline, and the recipes on the
front of the quality and that cost.
"""

import argparse
import json
from pathlib import Path
from typing import Any

COSTS = {"peak_bytes": ("memory of a step, MiB", 2.0**-20), "step_seconds": ("median step, seconds", 1.0)}
FULL = "full tuning"


def drawn(axes: Any, comparison: dict[str, Any], cost: str) -> None:
    """One cost against the quality."""
    quality, (label, scale), baseline = comparison["quality"], COSTS[cost], comparison["baseline"]
    front: list[tuple[float, float, str]] = []
    for recipe in comparison["recipes"]:
        name, values = recipe["name"], recipe["values"]
        if quality not in values or cost not in values:
            continue
        x, y = scale * values[cost]["mean"], values[quality]["mean"]
        on_front = cost in recipe["front"]
        colour = "tab:blue" if on_front else "black" if name in (FULL, baseline) else "0.65"
        marker, over = "D" if on_front else "o", 3 if colour != "0.65" else 2
        axes.errorbar(x, y, values[quality]["std"] or 0.0, fmt=marker, color=colour, elinewidth=0.5, zorder=over)
        if on_front:
            front.append((x, y, name))
        if name in (FULL, baseline):
            axes.annotate(name, (x, y), (-5, -11), textcoords="offset points", fontsize=8, ha="right")
    front.sort()
    axes.plot([x for x, _, _ in front], [y for _, y, _ in front], color="tab:blue", linewidth=0.5)
    for number, (x, y, _) in enumerate(front, 1):
        axes.annotate(
            str(number), (x, y), (0, 7), textcoords="offset points", fontsize=8, color="tab:blue", ha="center"
        )
    names = "\n".join(f"{number}  {name}" for number, (_, _, name) in enumerate(front, 1))
    axes.text(
        0.97, 0.04, names, transform=axes.transAxes, fontsize=8, color="tab:blue", ha="right", multialignment="left"
    )
    axes.set_xlabel(label)


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("figure", type=Path)
    options = parser.parse_args()
    comparison = json.loads(options.comparison.read_text(encoding="utf-8"))
    plt.rcParams["svg.hashsalt"] = options.figure.stem  # the same drawing is the same file
    figure, both = plt.subplots(1, len(COSTS), figsize=(11, 4.5), layout="constrained", sharey=True)
    for axes, cost in zip(both, COSTS, strict=True):
        drawn(axes, comparison, cost)
    both[0].set_ylabel(comparison["quality"].replace("_", " "))
    figure.savefig(options.figure, metadata={"Date": None} if options.figure.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
