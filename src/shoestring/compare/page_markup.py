"""Pieces of HTML that several parts of a page are made of; text goes out escaped, all but what is named html."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from .comparison import Compared, Comparison


def cells(html: Iterable[str], tag: str = "td") -> str:
    """Cells of a table's row."""
    return "".join(f"<{tag}>{each}</{tag}>" for each in html)


def head(labels: Iterable[str]) -> str:
    """The head of a table that is not sorted by a click."""
    return f"<thead><tr>{cells(map(escape, labels), 'th')}</tr></thead>"


def data_cell(html: str, value: float | None = None, tip: str = "") -> str:
    """A cell with the number that a column is sorted by."""
    number = f' data-v="{value!r}"' if value is not None and math.isfinite(value) else ""
    return f'<td{number} title="{escape(tip)}">{html}</td>' if tip else f"<td{number}>{html}</td>"


def isolated(text: str) -> str:
    """A name, so that a change of the direction of writing in it ends with it."""
    return f"<bdi>{escape(text)}</bdi>"


def link(comparison: Comparison, place: int) -> str:
    """The name of a recipe, leading to its YAML."""
    return f'<a href="#recipe-{place}">{isolated(comparison.recipes[place].name)}</a>'


def sign(mark: str, words: str) -> str:
    """A sign for eyes, and words for those who hear the page."""
    return f'<span aria-hidden="true">{mark}</span><span class="vh">{escape(words)}</span>'


def yaml(title: str, text: str) -> str:
    """Text to copy."""
    button = '<button type="button" class="copy needs-script">Copy</button>'
    return (
        f"<figure><figcaption>{escape(title)} {button}</figcaption>"
        f'<pre tabindex="0"><code>{escape(text)}</code></pre></figure>'
    )


def part_words(part: str) -> str:
    """A part of the memory as people read it."""
    return part.replace("_", " ")


def is_baseline(comparison: Comparison, recipe: Compared) -> bool:
    """Whether the others are compared with it."""
    return recipe.name == comparison.baseline
