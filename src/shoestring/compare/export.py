"""A comparison as Markdown, to paste into a text, and as CSV, for other programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

from .comparison import Compared, Comparison
from .measures import Measure
from .wording import (
    about_differences,
    costs,
    difference_text,
    direction,
    main_costs,
    on_front,
    quality_of,
    spread_text,
    state_of,
    verdict,
)

FORMULA_STARTS = "=+-@\t\r\n＝＋－＠"  # what spreadsheets read as a formula, in full width too
MARKED = re.compile(r"([\\`*_\[\]<>|~&$])")


def markdown(comparison: Comparison) -> str:
    """The ranking with its front marked, failures, machine and versions."""
    quality, shown = quality_of(comparison), costs(comparison)[:1]
    lines = [
        f"# {_plain(comparison.name)}",
        "",
        f"{_plain(comparison.task)} with {_plain(comparison.model)}, ranked by {_plain(quality.label)} "
        f"({direction(quality)}). {state_of(comparison)}.",
    ]
    if comparison.recipes:
        lines += _ranking(comparison, quality, shown)
        lines += [f"◆ on the front of {_plain(quality.label)} and {_plain(cost.label)}. " for cost in shown]
        lines[-1] += "Mean ± standard deviation over seeds, where that does not round to zero. "
        lines[-1] = f"{lines[-1]}{_plain(about_differences(comparison))}".rstrip()
    if comparison.failures:
        lines += ["", "## Failed", ""]
        lines += [f"- {_plain(each.name)}, seed {each.seed}: {_plain(each.reason)}" for each in comparison.failures]
    lines += ["", "## Machine and versions", ""]
    lines += [
        f"- {_plain(name)}: {_plain(value)}" for name, value in {**comparison.machine, **comparison.versions}.items()
    ]
    lines += [f"- command: {_plain(comparison.command)}"] if comparison.command else []
    lines += [f"- made: {_plain(comparison.made_at)}"] if comparison.made_at else []
    return "\n".join(lines) + "\n"


def _ranking(comparison: Comparison, quality: Measure, shown: list[Measure]) -> list[str]:
    front = {place for cost in shown for place in on_front(comparison, cost)}
    others = main_costs(comparison)
    head = ["#", "", "recipe", quality.label, f"minus {comparison.baseline}", *(each.label for each in others)]
    sides = ["--:", ":-:", ":--"] + ["--:"] * (len(head) - 3)
    rows = []
    for place, recipe in enumerate(comparison.recipes):
        cells = [str(place + 1), "◆" if place in front else "", _plain(recipe.name)]
        cells += [spread_text(recipe.values.get(quality.name), quality.unit), _against(recipe, quality)]
        cells += [spread_text(recipe.values.get(each.name), each.unit) for each in others]
        rows.append(cells)
    kept = [k for k in range(len(head)) if comparison.baseline is not None or k != 4]
    lines = [[_plain(each) for each in head], sides, *rows]
    return ["", *("| " + " | ".join(line[k] for k in kept) + " |" for line in lines), ""]


def _against(recipe: Compared, quality: Measure) -> str:
    found = recipe.difference
    return "-" if found is None else f"{difference_text(found, quality.unit)}, {verdict(found, quality)}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return MARKED.sub(r"\\\1", " ".join(text.split()))


def csv_text(comparison: Comparison) -> str:
    """One row a recipe: rank, name, and mean and standard deviation of each measure as they were measured.

    A name that a spreadsheet would compute begins with an apostrophe.
    """
    measures = [quality_of(comparison), *costs(comparison)] if comparison.recipes else []
    columns = [f"{each.name}{end}" for each in measures for end in ("", "_std")]
    head = ["rank", "recipe", "seeds", "fronts", "difference", "difference_low", "difference_high", "p", *columns]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_neutral(name) for name in head])
    for place, recipe in enumerate(comparison.recipes, 1):
        fronts = " ".join(recipe.front)
        writer.writerow([place, _neutral(recipe.name), len(recipe.seeds), fronts, *_numbers(recipe, measures)])
    return text.getvalue()


def _numbers(recipe: Compared, measures: Iterable[Measure]) -> list[float | str]:
    found = recipe.difference
    numbers: list[float | None] = [None] * 4
    if found is not None:
        numbers = [found.mean, found.low, found.high, found.p]
    for each in measures:
        spread = recipe.values.get(each.name)
        numbers += [spread.mean, spread.std] if spread else [None, None]
    return ["" if number is None else number for number in numbers]


def _neutral(text: str) -> str:
    return "'" + text if text.lstrip(" ").startswith(tuple(FORMULA_STARTS)) else text
