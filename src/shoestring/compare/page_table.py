"""The part of a page with all figures: one row a recipe, one column a measure, and the filter above."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .comparison import Compared, Comparison
from .measures import Better, Measure
from .page_markup import data_cell, is_baseline, link, sign
from .wording import about_differences, costs, difference_text, direction, quality_of, spread_text, verdict


def table_section(comparison: Comparison) -> str:
    """The table, best recipe first, as it is without a script."""
    measures = [quality_of(comparison), *costs(comparison)]
    compared = any(recipe.difference for recipe in comparison.recipes)
    best = {each.name: _best(comparison, each) for each in measures}
    rows = "".join(_row(comparison, place, measures, best, compared) for place in range(len(comparison.recipes)))
    return (
        f'<section aria-labelledby="figures"><h2 id="figures">All figures</h2>\n{_filter(measures)}'
        '<div class="scroll figures" tabindex="0" role="region" aria-labelledby="figures"><table id="table">'
        f"<thead><tr>{_heads(comparison, measures, compared)}</tr></thead><tbody>{rows}</tbody></table></div>\n"
        '<p class="note">Mean ± standard deviation over seeds, where that does not round to zero. '
        "★ best of its column, ◆ on the front of the chart above. "
        f"{escape(about_differences(comparison))}</p></section>"
    )


def _filter(measures: Sequence[Measure]) -> str:
    names = ", ".join(f"<code>{escape(each.name)}</code>" for each in measures)
    plain = 'type="search" autocomplete="off" autocapitalize="off" spellcheck="false"'
    return (
        f'<div class="filter needs-script"><label>Name has <input id="name" {plain}></label>'
        f'<label>Where <input id="where" {plain} placeholder="{escape(_example(measures))}" aria-describedby="wrong">'
        '</label><label><input id="only-front" type="checkbox"> only the front ◆</label>'
        '<output id="shown" role="status"></output><p id="wrong" role="alert"></p></div>\n'
        '<details class="needs-script"><summary>What can stand in “Where”</summary><p>Comparisons of a measure with a '
        "number (<code>&lt; &lt;= == != &gt;= &gt;</code>), <code>and</code>, <code>or</code>, <code>not</code>, "
        "parentheses. Numbers may be <code>1e6</code>, <code>80%</code> or <code>200MiB</code>; times are in seconds. "
        f"A comparison with what a recipe does not have is false. Measures: {names}.</p></details>\n"
    )


def _example(measures: Sequence[Measure]) -> str:
    """An expression for the filter, made of measures that are there."""
    texts = [f"{measures[0].name} {'<=' if measures[0].better == 'lower' else '>='} 0.8"]
    texts += [f"{each.name} < {'200MiB' if each.unit == 'bytes' else '1e6'}" for each in measures[1:2]]
    return " and ".join(texts)


def _heads(comparison: Comparison, measures: Sequence[Measure], compared: bool) -> str:
    heads = [_head("#", sort="ascending"), _head("recipe"), *map(_head_of, measures)]
    if compared:
        tip = "difference of the quality, with its 95 % interval"
        heads.insert(3, _head(f"minus {comparison.baseline}", tip, best_first=measures[0].better))
    heads += [_head("seeds"), _head("on fronts", "of the quality and these costs", best_first="higher")]
    return "".join(heads)


def _head_of(measure: Measure) -> str:
    return _head(measure.label, f"{measure.name}: {direction(measure)}", best_first=measure.better)


def _head(label: str, tip: str = "", *, sort: str = "none", best_first: Better | None = None) -> str:
    """A head to sort by; the first click puts the best on top."""
    first = "descending" if best_first == "higher" else "ascending"
    return (
        f'<th scope="col" aria-sort="{sort}" data-first="{first}" title="{escape(tip)}">'
        f'<button type="button">{escape(label)}</button></th>'
    )


def _best(comparison: Comparison, measure: Measure) -> float | None:
    """The best mean of a column; None where all are equal or neither way is better."""
    means = [recipe.values[measure.name].mean for recipe in comparison.recipes if measure.name in recipe.values]
    means = [mean for mean in means if math.isfinite(mean)]
    if measure.better is None or len(set(means)) < 2:
        return None
    return max(means) if measure.better == "higher" else min(means)


def _row(
    comparison: Comparison, place: int, measures: Sequence[Measure], best: dict[str, float | None], compared: bool
) -> str:
    recipe = comparison.recipes[place]
    fronts = [each.label for each in measures if each.name in recipe.front]
    cells = [_figure(recipe, each, best[each.name]) for each in measures]
    if compared:
        cells.insert(1, _difference(recipe, measures[0]))
    return (
        f'<tr data-recipe="{place}">{data_cell(str(place + 1), place + 1)}'
        f'<th scope="row">{_mark(recipe, measures)} {link(comparison, place)}{_remarks(comparison, place)}</th>'
        f"{''.join(cells)}{data_cell(str(len(recipe.seeds)), len(recipe.seeds))}"
        f"{data_cell(_listed(fronts), len(fronts), ', '.join(fronts))}</tr>"
    )


def _mark(recipe: Compared, measures: Sequence[Measure]) -> str:
    """Whether it is on the front of the chart; the script moves the mark with the chart's cost."""
    on = len(measures) > 1 and measures[1].name in recipe.front
    return f'<span class="mark"{"" if on else " hidden"}>{sign("◆", "on the front")}</span>'


def _remarks(comparison: Comparison, place: int) -> str:
    recipe = comparison.recipes[place]
    remarks = ' <span class="note">baseline</span>' if is_baseline(comparison, recipe) else ""
    if recipe.notes:
        remarks += f' <a class="note" href="#recipe-{place}" title="{escape("; ".join(recipe.notes))}">note</a>'
    return remarks


def _listed(fronts: Sequence[str]) -> str:
    text = ", ".join(fronts[:2]) + (f" and {len(fronts) - 2} more" if len(fronts) > 2 else "")
    return escape(text) or "-"


def _figure(recipe: Compared, measure: Measure, best: float | None) -> str:
    spread = recipe.values.get(measure.name)
    if spread is None:
        return data_cell("-")
    text = spread_text(spread, measure.unit)
    by_seed = ", ".join(f"{value:,.0f}" if measure.unit == "numbers" else f"{value:,.6g}" for value in spread.values)
    return data_cell(f"<b>{sign('★', 'best')} {text}</b>" if spread.mean == best else text, spread.mean, by_seed)


def _difference(recipe: Compared, quality: Measure) -> str:
    found = recipe.difference
    if found is None:
        return data_cell("-")
    text = f"{difference_text(found, quality.unit)}, <b>{verdict(found, quality)}</b>"
    return data_cell(text, found.mean, f"p = {found.p:.3g}")
