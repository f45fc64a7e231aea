"""What the script of a page draws from: figures, fronts and thinned curves, as JSON that no text can break out of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .comparison import Compared, Comparison
from .wording import costs, on_front, quality_of, spread_text

POINTS = 80  # of a drawn curve: about one for every ten pixels
Curve = Mapping[int, Sequence[tuple[float, float]]]


def embedded(comparison: Comparison) -> str:
    """The data as JSON for a script element: no `<`, `>` or `&` stands in it, and no line end that scripts know."""
    text = json.dumps(page_data(comparison), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def page_data(comparison: Comparison) -> dict[str, Any]:
    """Measures, figures by recipe and measure with their texts, fronts by cost, and curves."""
    measures = [quality_of(comparison), *costs(comparison)]
    return {
        "measures": [asdict(each) for each in measures],
        "onTheWay": asdict(comparison.on_the_way) if comparison.on_the_way else None,
        "recipes": [_recipe(recipe, [each.name for each in measures]) for recipe in comparison.recipes],
        "texts": [
            [spread_text(recipe.values.get(each.name), each.unit) for each in measures] for recipe in comparison.recipes
        ],
        "fronts": [on_front(comparison, cost) for cost in measures],
        "baseline": next(
            (k for k, recipe in enumerate(comparison.recipes) if recipe.name == comparison.baseline), None
        ),
    }


def _recipe(recipe: Compared, measures: Sequence[str]) -> dict[str, Any]:
    spreads = [recipe.values.get(name) for name in measures]
    return {
        "name": recipe.name,
        "means": [_number(spread.mean) if spread else None for spread in spreads],
        "stds": [_short(spread.std) if spread and spread.std is not None else 0 for spread in spreads],
        "seeds": list(recipe.losses or recipe.curve),
        "losses": on_one_grid(recipe.losses),
        "curve": [[[_short(x), _short(y)] for x, y in points] for points in recipe.curve.values()],
    }


def on_one_grid(losses: Curve) -> dict[str, list[Any]]:
    """Curves at the same steps, `x`, and their values by seed, `y`; None where a seed has none.

    Of long curves each point is the mean of a stretch of steps.
    """
    steps = sorted({step for points in losses.values() for step, _ in points})
    if not steps:
        return {"x": [], "y": []}
    first, length = steps[0], steps[-1] - steps[0] + 1
    stretches: dict[int, list[float]] = {}
    for k, step in enumerate(steps):
        stretches.setdefault(k if len(steps) <= POINTS else int((step - first) * POINTS // length), []).append(step)
    places = {step: place for place, stretch in enumerate(stretches.values()) for step in stretch}
    values = []
    for points in losses.values():
        found: list[list[float]] = [[] for _ in stretches]
        for step, value in points:
            found[places[step]].append(value)
        values.append([_short(math.fsum(each) / len(each)) if each and _all_finite(each) else None for each in found])
    return {"x": [_short(math.fsum(stretch) / len(stretch)) for stretch in stretches.values()], "y": values}


def _all_finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _short(value: float) -> float | None:
    """The number in five figures, which no chart shows more of."""
    if not math.isfinite(value):
        return None
    short = float(f"{value:.5g}")
    return int(short) if short == int(short) else short
