"""A comparison in words: values with their units and spread, differences, and which costs come first."""

from __future__ import annotations

import math

from ..units import binary_unit
from .comparison import Compared, Comparison, Difference, Spread
from .measures import Measure, Unit

FIRST_COSTS = ("peak_bytes", "step_seconds")
MAIN_COSTS = ("trained_parameters", "checkpoint_bytes", "peak_bytes", "step_seconds")  # of tables for a page's width
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
MINUS = "−"


def value_text(value: float, unit: Unit, std: float | None = None) -> str:
    """A value in its unit, with the spread where that does not round to zero.

    >>> value_text(0.8713, "share", 0.0042), value_text(149e6, "bytes"), value_text(0.01234, "seconds")
    ('87.1 ± 0.4 %', '142.1 MiB', '12.3 ms')
    """
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else "no number"
    scale, suffix = _scale(value, unit)
    decimals = _decimals(value / scale, unit, suffix)
    text = _fixed(value / scale, decimals)
    spread = _fixed(std / scale, decimals) if std is not None and math.isfinite(std) else "0"
    if float(spread.replace(",", "")):
        text += f" ± {spread}"
    return f"{text} {suffix}".rstrip()


def spread_text(spread: Spread | None, unit: Unit) -> str:
    """The mean over seeds with its spread; a dash for what a recipe does not have."""
    return "-" if spread is None else value_text(spread.mean, unit, spread.std)


def _scale(value: float, unit: Unit) -> tuple[float, str]:
    if unit == "bytes":
        return binary_unit(value)
    if unit == "share":
        return 0.01, "%"
    if unit == "seconds":
        times = ((7200.0, 3600.0, "h"), (600.0, 60.0, "min"), (1.0, 1.0, "s"), (1e-3, 1e-3, "ms"))
        return next(((scale, suffix) for least, scale, suffix in times if abs(value) >= least), (1e-6, "µs"))
    if unit == "numbers" and abs(value) >= 10_000:
        return next(((scale, suffix) for scale, suffix in PREFIXES if abs(value) >= scale), (1e3, "k"))
    return 1, ""


def _decimals(scaled: float, unit: Unit, suffix: str) -> int:
    """So many that the value shows three figures, a share or bytes at least one behind the point."""
    whole = scaled == int(scaled) and abs(scaled) < 10_000
    if suffix == "B" or (not suffix and unit in ("numbers", "bytes")):
        return 0 if whole else 1
    if whole and unit == "seconds":
        return 0
    first = math.floor(math.log10(abs(scaled))) if scaled else 0
    figures = 4 if unit == "" else 3
    if unit in ("bytes", "share"):
        return max(1, 1 - first) if first < 0 else 1
    return min(max(figures - 1 - first, 0), 6)


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def difference_text(difference: Difference, unit: Unit) -> str:
    """A difference with its 95 % interval; that of shares in percentage points.

    >>> difference_text(Difference(0.012, -0.003, 0.027, 0.1, False), "share")
    '+1.2 points (−0.3 to +2.7)'
    """
    scale, suffix = (0.01, " points") if unit == "share" else (1, "")
    numbers = [each / scale for each in (difference.mean, difference.low, difference.high)]
    widest = max(map(abs, numbers))
    decimals = 1 if suffix else min(max(2 - math.floor(math.log10(widest)), 0), 6) if widest else 1
    while difference.clear and decimals < 6 and any(each and not round(each, decimals) for each in numbers):
        decimals += 1  # an end that is not zero must not read as zero
    mean, low, high = (_signed(each, decimals) for each in numbers)
    return f"{mean}{suffix} ({low} to {high})"


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+,.{decimals}f}"
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text.replace("-", MINUS)


def verdict(difference: Difference, quality: Measure) -> str:
    """Whether a recipe is better than the baseline, or whether that is not known."""
    if not difference.clear:
        return "within noise"
    return "better" if (difference.mean > 0) == (quality.better != "lower") else "worse"


NOISE = {
    "rows and seeds": "of held-out rows and of seeds",
    "rows": "of held-out rows alone: one seed does not tell how much seeds differ",
    "seeds": "of seeds alone, as rows have no scores of this measure",
}


def about_differences(comparison: Comparison) -> str:
    """What differences to the baseline are told by, or why there are none; empty where none are asked for."""
    if comparison.baseline is None or not comparison.recipes:
        return ""
    if baseline_of(comparison) is None:
        return f"The baseline, {comparison.baseline}, has no result, so there are no differences to it."
    kinds = dict.fromkeys(recipe.difference.noise for recipe in comparison.recipes if recipe.difference)
    noise = " or ".join(NOISE[kind] for kind in kinds)
    return f"Differences have 95 % intervals by the noise {noise}." if noise else ""


def quality_of(comparison: Comparison) -> Measure:
    """What recipes are ranked by, also where no run has finished and no measure is known yet."""
    found = [measure for measure in comparison.measures if measure.name == comparison.quality]
    return found[0] if found else Measure(comparison.quality, comparison.quality.replace("_", " "), better="higher")


def costs(comparison: Comparison) -> list[Measure]:
    """All measures but the quality, the usual costs first, those without a direction last."""
    others = [measure for measure in comparison.measures if measure.name != comparison.quality]
    return sorted(others, key=lambda each: (each.better is None, _place(each.name, FIRST_COSTS)))


def main_costs(comparison: Comparison) -> list[Measure]:
    """The measures beside the quality that fit the width of a page."""
    return [measure for measure in comparison.measures if measure.name in MAIN_COSTS]


def _place(name: str, order: tuple[str, ...]) -> int:
    return order.index(name) if name in order else len(order)


def on_front(comparison: Comparison, cost: Measure) -> list[int]:
    """Places of the recipes on the front of the quality and this cost, the cheapest first."""
    sign = -1 if cost.better == "higher" else 1
    recipes = enumerate(comparison.recipes)
    places = [place for place, recipe in recipes if cost.name in recipe.front and cost.name in recipe.values]
    return sorted(places, key=lambda place: sign * comparison.recipes[place].values[cost.name].mean)


def baseline_of(comparison: Comparison) -> Compared | None:
    """The recipe that others are compared with, where it has finished."""
    return next((recipe for recipe in comparison.recipes if recipe.name == comparison.baseline), None)


def direction(measure: Measure) -> str:
    """Which way of a measure is better, in words."""
    return {"higher": "more is better", "lower": "less is better", None: "neither way is better"}[measure.better]


def state_of(comparison: Comparison) -> str:
    """How many recipes and runs there are, failed and to come."""
    runs = sum(len(recipe.seeds) for recipe in comparison.recipes)
    parts = [f"{_count(len(comparison.recipes), 'recipe')} in {_count(runs, 'run')}"]
    if comparison.failures:
        parts.append(f"{_count(len(comparison.failures), 'run')} failed")
    if comparison.missing:
        parts.append(f"{_count(comparison.missing, 'run')} to come")
    return ", ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def frugal(comparison: Comparison, cost: Measure) -> Compared | None:
    """The recipe that needs least of a cost among those not clearly worse than the baseline, which is one of them."""
    quality = quality_of(comparison)
    sign = -1 if cost.better == "higher" else 1
    good = [
        recipe
        for recipe in comparison.recipes
        if cost.name in recipe.values
        and (
            recipe.name == comparison.baseline
            or (recipe.difference is not None and verdict(recipe.difference, quality) != "worse")
        )
    ]
    return min(good, key=lambda recipe: sign * recipe.values[cost.name].mean, default=None)
