"""The part of a page with the memory of each recipe by part, as bars and in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ..units import size
from .comparison import Comparison
from .page_markup import cells, head, is_baseline, isolated, part_words
from .wording import costs

FEW = 30  # bars that are shown at once; of more recipes, only those that stand out
COLORS = 8  # that the style sheet has for parts


def memory_section(comparison: Comparison) -> str:
    """Bars, least memory first; nothing where no recipe has parts."""
    places = [place for place, recipe in enumerate(comparison.recipes) if recipe.memory]
    if not places:
        return ""
    places.sort(key=lambda place: sum(comparison.recipes[place].memory.values()))
    parts = list(dict.fromkeys(part for recipe in comparison.recipes for part in recipe.memory))
    first = places if len(places) <= FEW else [place for place in places if _stands_out(comparison, place)]
    rest = [place for place in places if place not in first]
    largest = max(sum(comparison.recipes[places[-1]].memory.values()), 1)
    bars, more = ("".join(_bar(comparison, place, largest, parts) for place in each) for each in (first, rest))
    if rest:
        bars += f"<details><summary>The other {len(rest)} recipes</summary>{more}</details>"
    which = (
        "The baseline, and recipes on the front of quality and memory or time; least first." if rest else "Least first."
    )
    legend = "".join(
        f'<li><i class="part-{k % COLORS}"></i>{escape(part_words(part))}</li>' for k, part in enumerate(parts)
    )
    return (
        '<section aria-labelledby="memory"><h2 id="memory">Memory at the peak of a step</h2>\n'
        f'<p class="note">By part, in the order of the legend. {which}</p><ul class="legend">{legend}</ul>\n'
        f'<div class="bars">{bars}</div>{_numbers(comparison, places, parts)}</section>'
    )


def _stands_out(comparison: Comparison, place: int) -> bool:
    recipe = comparison.recipes[place]
    return is_baseline(comparison, recipe) or any(cost.name in recipe.front for cost in costs(comparison)[:2])


def _bar(comparison: Comparison, place: int, largest: int, parts: Sequence[str]) -> str:
    recipe = comparison.recipes[place]
    pieces = "".join(
        f'<span class="part-{k % COLORS}" style="width:{100 * recipe.memory[part] / largest:.2f}%" '
        f'title="{escape(part_words(part))}: {size(recipe.memory[part])}"><i>{escape(part_words(part))}</i></span>'
        for k, part in enumerate(parts)
        if recipe.memory.get(part)
    )
    return (
        f'<div class="bar" data-recipe="{place}"><span class="name" title="{escape(recipe.name)}">'
        f'{isolated(recipe.name)}</span><span class="track">{pieces}</span>'
        f'<span class="total">{size(sum(recipe.memory.values()))}</span></div>'
    )


def _numbers(comparison: Comparison, places: Sequence[int], parts: Sequence[str]) -> str:
    rows = []
    for place in places:
        recipe = comparison.recipes[place]
        sizes = [sum(recipe.memory.values()), *(recipe.memory.get(part, 0) for part in parts)]
        rows.append(f'<tr><th scope="row">{isolated(recipe.name)}</th>{cells(map(size, sizes))}</tr>')
    return (
        '<details><summary>Memory in numbers</summary><div class="scroll"><table>'
        f"{head(['recipe', 'all', *map(part_words, parts)])}<tbody>{''.join(rows)}</tbody></table></div></details>"
    )
