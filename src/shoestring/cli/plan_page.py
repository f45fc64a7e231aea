"""Predictions as one HTML page: bars by part and the numbers, in light and dark, with nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .plan_tables import COLORS, cuda_range, notes, on_top, sizes_of, words
from .tables import size

if TYPE_CHECKING:
    from ..planning import Advice
    from .plan_cases import Row

# One colour a part, told apart by all kinds of sight, on light and on dark
FILLS = ("#0072b2", "#56b4e9", "#cc79a7", "#e69f00", "#d55e00", "#009e73", "#8a8a8a", "#b5a300")
STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #d6d6d6 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #3c3c3c } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: auto } svg text { fill: var(--ink); font-size: 12px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child, .text { text-align: left }
.legend span { display: inline-block; margin-right: 1rem } .legend i { display: inline-block; width: .8em; height: .8em;
  margin-right: .3em }
"""
WIDTH, LABELS, NUMBERS, BAR, GAP = 960, 240, 90, 20, 10


def page(rows: Sequence[Row], advice: Advice | None = None) -> str:
    """The page; rows that were refused say why."""
    made = [row for row in rows if row.prediction is not None]
    heading = escape(sizes_of(made[0].prediction)) if len(made) == len(rows) == 1 else "peak memory by part"  # type: ignore[arg-type]
    return "".join(
        [
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Memory of a training step</title><style>{STYLE}</style></head><body>\n",
            f"<h1>Memory of one training step</h1>\n<p>Predicted, not measured: {heading}.</p>\n",
            _chart(made),
            _table(rows),
            _notes(made),
            _advice(advice) if advice is not None else "",
            "</body></html>\n",
        ]
    )


def _chart(rows: Sequence[Row]) -> str:
    predictions = [row.prediction for row in rows if row.prediction is not None]
    scale = (WIDTH - LABELS - NUMBERS) / max(p.peak_bytes for p in predictions)
    fills = dict(zip(COLORS, FILLS, strict=True))
    height = len(rows) * (BAR + GAP)
    drawn = []
    for place, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        x, y = float(LABELS), place * (BAR + GAP)
        drawn.append(f'<text x="0" y="{y + 14}">{escape(_short(row.label))}<title>{escape(row.label)}</title></text>')
        for part, count in prediction.parts.items():
            if count:
                drawn.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{count * scale:.1f}" height="{BAR}" fill="{fills[part]}">'
                    f"<title>{words(part)}: {size(count)}</title></rect>"
                )
                x += count * scale
        drawn.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{size(prediction.peak_bytes)}</text>')
    used = [part for part in fills if any(p.parts[part] for p in predictions)]
    legend = "".join(f'<span><i style="background:{fills[part]}"></i>{words(part)}</span>' for part in used)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Peak memory by part">{"".join(drawn)}</svg>\n'
        f'<p class="legend">{legend}</p>\n'
    )


def _short(label: str) -> str:
    return label if len(label) <= 38 else label[:37] + "…"


def _table(rows: Sequence[Row]) -> str:
    head = ["run", "peak", "in", "on a GPU", "trained", *map(words, COLORS)]
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for row in rows:
        found = row.prediction
        if found is None:
            lines.append(
                f'<tr><td>{escape(row.label)}</td><td class="text" colspan="{len(head) - 1}">refused: '
                f"{escape(row.refused)}</td></tr>"
            )
            continue
        low, high = map(size, found.cuda_bytes)
        cells = [size(found.peak_bytes), found.peak_step, f"{low} to {high}", f"{found.trained_parameters:,}"]
        cells += [size(found.parts[part]) for part in COLORS]
        lines.append(f"<tr><td>{escape(row.label)}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>\n'


def _notes(rows: Sequence[Row]) -> str:
    if len(rows) == 1 and rows[0].prediction is not None:
        lines = notes(rows[0].prediction)
    else:
        rules = (rule for row in rows if row.prediction for rule in row.prediction.by_rule)
        lines = [on_top(), *dict.fromkeys(f"by rule, not rehearsed: {rule}" for rule in rules)]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>\n"


def _advice(advice: Advice) -> str:
    limit = size(advice.memory_bytes)
    if advice.fits:
        return f"<p>It fits {limit}.</p>\n"
    skipped = "".join(f"<p>Skipped, {escape(text)}</p>\n" for text in advice.skipped)
    if not advice.changes:
        least = f"{size(advice.smallest.peak_bytes)}, with {advice.smallest_title}; {cuda_range(advice.smallest)}"
        text = f"It does not fit {limit}, and nothing that was tried makes it fit: at least {escape(least)}."
        return f"<p>{text}</p>\n{skipped}"
    items = "".join(
        f"<li>{escape(change.title)}: {size(change.peak_bytes)}; {escape(change.why)}</li>" for change in advice.changes
    )
    return f"<p>It does not fit {limit}. Each of these makes it fit:</p><ol>{items}</ol>\n{skipped}"
