"""The ranking of a comparison as a terminal shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..compare.comparison import Compared, Comparison
    from ..compare.measures import Measure

WIDTH = 100  # at most
SHORTEST_NAME = 8
LEFT_OUT = "checkpoint_bytes"  # a main cost that says the same as the trained parameters


def terminal_table(comparison: Comparison, width: int = WIDTH) -> Table:
    """Recipes, best first: quality, difference to the baseline, memory, time and trained parameters.

    ◆ marks the front of quality and the first cost, as on the page. width: columns of the terminal. Where they are too
    few, names are cut, and then the last costs left out.
    """
    from ..compare.wording import about_differences, costs, main_costs, on_front, quality_of, spread_text, state_of

    quality, first = quality_of(comparison), costs(comparison)[:1]
    front = {place for cost in first for place in on_front(comparison, cost)}
    columns = {quality.label: [spread_text(each.values.get(quality.name), quality.unit) for each in comparison.recipes]}
    if any(recipe.difference for recipe in comparison.recipes):
        label = "minus baseline" + ", points" * (quality.unit == "share")
        columns[label] = [_against(recipe, quality) for recipe in comparison.recipes]
    for cost in main_costs(comparison):
        if cost.name != LEFT_OUT:
            columns[cost.label] = [spread_text(each.values.get(cost.name), cost.unit) for each in comparison.recipes]
    title = _text(f"{comparison.name}: {state_of(comparison)}")
    width = min(width, WIDTH)
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), min_width=min(title.cell_len, width))
    table.title_justify = table.caption_justify = "left"
    table.add_column("#", justify="right", min_width=3)
    table.add_column("", min_width=1)
    widths = {label: max(_longest(texts), _longest(label.split())) for label, texts in columns.items()}
    while (rest := width - 3 - 1 - sum(widths.values()) - 2 * (len(widths) + 4)) < SHORTEST_NAME and len(widths) > 1:
        widths.popitem()
    table.add_column("recipe", overflow="ellipsis", no_wrap=True, max_width=max(rest, SHORTEST_NAME))
    for label, longest in widths.items():
        table.add_column(_text(label), justify="right", width=longest)
    for place, recipe in enumerate(comparison.recipes):
        cells = [
            str(place + 1),
            "◆" if place in front else "",
            recipe.name,
            *(columns[label][place] for label in widths),
        ]
        table.add_row(*map(_text, cells), style="bold" if place in front else "")
    if comparison.recipes:
        marked = [f"◆ on the front of {quality.label} and {cost.label}." for cost in first]
        known = any(recipe.difference for recipe in comparison.recipes)
        against = [f"Baseline: {comparison.baseline}; in parentheses: within noise."] if known else []
        table.caption = _text(" ".join([*marked, *against, about_differences(comparison)]))
    return table


def _longest(texts: list[str]) -> int:
    return max(map(len, texts), default=0)


def _text(cell: str) -> Text:
    """As it is: no markup, no control characters, and on one line."""
    return Text("".join(each if each.isprintable() else "�" for each in " ".join(cell.split())))


def _against(recipe: Compared, quality: Measure) -> str:
    """The difference without its interval, in parentheses where it may be noise."""
    from ..compare.wording import difference_text

    if recipe.difference is None:
        return "-"
    mean = difference_text(recipe.difference, quality.unit).split()[0]
    return mean if recipe.difference.clear else f"({mean})"
