"""A comparison as one HTML page: what is worth it, all figures, memory, curves, recipes; nothing from the network."""

from __future__ import annotations

import base64
import hashlib
from html import escape
from importlib.resources import files

from .comparison import Comparison
from .page_data import embedded
from .page_front import front_section
from .page_markup import head, isolated, yaml
from .page_memory import memory_section
from .page_table import table_section
from .wording import direction, quality_of, spread_text, state_of


def page(comparison: Comparison) -> str:
    """The page. Table, memory and recipes are there without a script; the script adds charts, sorting and a filter."""
    script, style = _beside("page.js"), _beside("page.css")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(comparison.name)}: recipes compared</title><style>{style}</style></head>\n<body>",
            _heading(comparison),
            *(_finished(comparison) if comparison.recipes else ["<p>No run has finished yet.</p>"]),
            _failures(comparison),
            f'<script type="application/json" id="data">{embedded(comparison)}</script>',
            f"<script>{script}</script></body></html>\n",
        ]
    )


def _beside(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip()


def _policy(script: str) -> str:
    """What a browser may do for the page: run this script and nothing else, ask nobody for anything."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    run = f"script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    return f"default-src 'none'; {run}; base-uri 'none'; form-action 'none'"


def _heading(comparison: Comparison) -> str:
    quality = quality_of(comparison)
    state = escape(state_of(comparison))
    if comparison.failures:
        state += '; <a href="#failures">what failed, and why</a>'
    return (
        f"<header><h1>{escape(comparison.name)}</h1>\n"
        f"<p>{isolated(comparison.task)} with {isolated(comparison.model)}, ranked by <b>{escape(quality.label)}</b> "
        f"({direction(quality)}). {state}.</p>\n{_origin(comparison)}</header>"
    )


def _origin(comparison: Comparison) -> str:
    facts = {**comparison.machine, **comparison.versions}
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    command = yaml("Command", comparison.command) if comparison.command else ""
    summary = ", ".join(part for part in (*comparison.machine.values(), comparison.made_at) if part)
    return (
        f'<details><summary>Machine, versions, command <span class="note">{escape(summary)}</span></summary>'
        f"<dl>{listed}</dl>{command}</details>"
    )


def _finished(comparison: Comparison) -> list[str]:
    sections = (front_section, table_section, memory_section, _curves, _recipes)
    return [section(comparison) for section in sections]


def _curves(comparison: Comparison) -> str:
    """Room for the charts that there is something to draw in."""
    charts = []
    if any(points for recipe in comparison.recipes for points in recipe.losses.values()):
        charts.append('<div><h3>Loss by step</h3><div class="chart" id="loss-chart"></div></div>')
    way = comparison.on_the_way
    if way is not None and any(points for recipe in comparison.recipes for points in recipe.curve.values()):
        title = f"{way.label} by seconds of training"
        title = escape(title[:1].upper() + title[1:])
        charts.append(f'<div><h3>{title}</h3><div class="chart" id="time-chart"></div></div>')
    if not charts:
        return ""
    return (
        '<section class="needs-script" aria-labelledby="curves"><h2 id="curves">On the way</h2>\n'
        '<p class="note">Thick: mean over seeds; thin: each seed. '
        "Points of long trainings are means of a stretch of steps.</p>\n"
        f'<div class="halves">{"".join(charts)}</div>\n'
        '<fieldset id="lines"><legend>Recipes shown</legend></fieldset></section>'
    )


def _recipes(comparison: Comparison) -> str:
    quality, made = quality_of(comparison), []
    for place, recipe in enumerate(comparison.recipes):
        known = spread_text(recipe.values.get(quality.name), quality.unit)
        notes = "".join(f"<li>{escape(note)}</li>" for note in recipe.notes)
        made.append(
            f'<details id="recipe-{place}" data-recipe="{place}"><summary>{isolated(recipe.name)} '
            f'<span class="note">{escape(quality.label)} {known}</span></summary>'
            f"{f'<ul>{notes}</ul>' if notes else ''}{yaml('To copy into a run file', recipe.recipe)}"
            f"{yaml('The whole run file, of the first seed', recipe.run_file)}</details>"
        )
    listed = "\n".join(made)
    return (
        '<section aria-labelledby="recipes"><h2 id="recipes">Recipes</h2>\n'
        f'<div class="recipes">{listed}</div></section>'
    )


def _failures(comparison: Comparison) -> str:
    if not comparison.failures:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{isolated(each.name)}</th><td>{each.seed}</td>'
        f'<td class="text">{escape(each.reason)}</td></tr>'
        for each in comparison.failures
    )
    return (
        '<section aria-labelledby="failures"><h2 id="failures">Failed</h2>\n<div class="scroll">'
        f'<table class="failures">{head(["recipe", "seed", "reason"])}<tbody>{rows}</tbody></table></div></section>'
    )
