"""Draw a comparison: quality against memory and time of a step, one point a recipe, the best of each by name.

    python benchmarks/suite_figure.py docs/results/encoder/comparison.json docs/results/encoder.svg

Reads what `shoestring compare` has left beside its report. Named are full tuning, the baseline, and the recipes on the
front of the quality and that cost.
"""

import argparse
import json
from pathlib import Path
from typing import Any

COSTS = {"peak_bytes": ("memory of a step, MB", 1e-6), "step_seconds": ("median step, seconds", 1.0)}


def drawn(axes: Any, comparison: dict[str, Any], cost: str) -> None:
    """One cost against the quality."""
    quality, (label, scale) = comparison["quality"], COSTS[cost]
    front: list[tuple[float, float]] = []
    for recipe in comparison["recipes"]:
        values = recipe["values"]
        if quality not in values or cost not in values:
            continue
        x, y = scale * values[cost]["mean"], values[quality]["mean"]
        on_front, base = cost in recipe["front"], recipe["name"] == comparison["baseline"]
        colour = "tab:blue" if on_front else "black" if base else "0.65"
        axes.errorbar(x, y, values[quality]["std"] or 0.0, fmt="D" if on_front else "o", color=colour, elinewidth=0.5)
        front += [(x, y)] if on_front else []
        if on_front or base or recipe["name"] == "full tuning":
            axes.annotate(recipe["name"], (x, y), (4, 4), textcoords="offset points", fontsize=7, color=colour)
    axes.plot(*zip(*sorted(front), strict=True), color="tab:blue", linewidth=0.5)
    axes.set_xlabel(label)
    axes.set_ylabel(quality.replace("_", " "))


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
    figure.savefig(options.figure, metadata={"Date": None} if options.figure.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
