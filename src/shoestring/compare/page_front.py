"""The part of a page that says which recipes are worth it: quality against a cost, and their front in words."""

from __future__ import annotations

import math
from html import escape

from .comparison import Compared, Comparison
from .measures import Measure
from .page_markup import cells, head, isolated, link
from .wording import baseline_of, costs, difference_text, frugal, on_front, quality_of, spread_text


def front_section(comparison: Comparison) -> str:
    """The chart, which the script draws, and beside it the front of each cost, one of which is shown."""
    choices = list(enumerate(costs(comparison), 1))
    if not choices:
        return ""
    options = "".join(f'<option value="{place}">{escape(cost.label)}</option>' for place, cost in choices)
    fronts = "".join(_front(comparison, cost, place) for place, cost in choices)
    return (
        '<section aria-labelledby="worth"><h2 id="worth">What is worth it</h2>\n'
        f'<p class="needs-script"><label>{escape(quality_of(comparison).label)} against '
        f'<select id="cost">{options}</select></label></p>\n'
        '<div class="beside"><div><div class="chart needs-script" id="front-chart"></div>'
        '<p class="note needs-script" id="front-note"></p>'
        '<p class="note no-script">The charts, sorting and the filter need JavaScript.</p></div>\n'
        f"<div>{fronts}</div></div></section>"
    )


def _front(comparison: Comparison, cost: Measure, place: int) -> str:
    opened = f'<div class="front" data-cost="{place}"{"" if place == 1 else " hidden"}>'
    if cost.better is None:
        return f"{opened}<p>Neither way of {escape(cost.label)} is better, so there is no front.</p></div>"
    quality, baseline = quality_of(comparison), baseline_of(comparison)
    found = on_front(comparison, cost)
    marked = [(str(number), index) for number, index in enumerate(found, 1)]
    if baseline and cost.name in baseline.values and comparison.recipes.index(baseline) not in found:
        marked.append(("□", comparison.recipes.index(baseline)))
    rows = "".join(_row(comparison, index, cost, mark) for mark, index in marked)
    compared = baseline and any(_times(comparison.recipes[index], baseline, cost) for index in found)
    times = f" ×: compared with {isolated(baseline.name)}." if baseline and compared else ""
    return (
        f"{opened}{_advice(comparison, cost)}"
        f"<p>On the front ◆: no other recipe is better in one of the two and as good in the other.{times}</p>"
        f'<div class="scroll"><table>{head(["", "recipe", quality.label, cost.label])}<tbody>{rows}</tbody></table>'
        "</div></div>"
    )


def _row(comparison: Comparison, index: int, cost: Measure, mark: str) -> str:
    recipe, quality, baseline = comparison.recipes[index], quality_of(comparison), baseline_of(comparison)
    name = link(comparison, index) + (" (baseline)" if recipe is baseline else "")
    known = spread_text(recipe.values.get(quality.name), quality.unit)
    paid = spread_text(recipe.values.get(cost.name), cost.unit) + _times(recipe, baseline, cost)
    return f'<tr data-recipe="{index}">{cells([f"<b>{mark}</b>", name, known, paid])}</tr>'


def _times(recipe: Compared, baseline: Compared | None, cost: Measure) -> str:
    """A cost as a multiple of the baseline's, where that says something."""
    if baseline is None or recipe is baseline or cost.unit in ("", "share"):
        return ""
    mine, theirs = recipe.values.get(cost.name), baseline.values.get(cost.name)
    if not mine or not theirs or not theirs.mean > 0 or not math.isfinite(mine.mean / theirs.mean):
        return ""
    ratio = mine.mean / theirs.mean
    text = f"{ratio:.2g}" if ratio >= 0.01 or not ratio else f"1/{float(f'{1 / ratio:.2g}'):,.0f}"
    return f' <span class="note">{text} ×</span>'


def _advice(comparison: Comparison, cost: Measure) -> str:
    found, baseline, quality = frugal(comparison, cost), baseline_of(comparison), quality_of(comparison)
    if found is None or baseline is None or not any(recipe.difference for recipe in comparison.recipes):
        return ""
    name, times = isolated(baseline.name), _times(found, baseline, cost)
    if found.difference is None:
        less = "gives more" if cost.better == "higher" else "takes less"
        nothing = f"Nothing that is not clearly worse than <b>{name}</b> {less}: {escape(cost.label)}."
        return f'<p class="advice">{nothing}</p>'
    return (
        f'<p class="advice">{"Most" if cost.better == "higher" else "Least"} {escape(cost.label)} of those not clearly '
        f"worse than <b>{name}</b>: <b>{link(comparison, comparison.recipes.index(found))}</b>, "
        f"{spread_text(found.values[cost.name], cost.unit)}{f',{times} that of {name}' if times else ''}; "
        f"{escape(quality.label)} {difference_text(found.difference, quality.unit)}.</p>"
    )
