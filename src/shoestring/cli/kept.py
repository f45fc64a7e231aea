"""Tables of what is kept for backward: what no trained weight needs, and the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from .tables import size

if TYPE_CHECKING:
    from ..memory import KeptReport, KeptRow


def spare_table(report: KeptReport) -> Table:
    """By module, blocks of a stack together: what no trained weight needs in this form, and what removes it."""
    share = report.spare_bytes / max(report.saved_bytes, 1)
    title = f"Kept though no trained weight needs it: {size(report.spare_bytes)}, {share:.0%} of what is kept"
    table = _table(title, "module")
    for row in report.by_module():
        if row.spare:
            module = row.module.removeprefix("base_model.model.") or "(outside the modules)"
            table.add_row(row.kind, size(row.num_bytes), str(row.num_tensors), module, remedies(row))
    return table


def needed_table(report: KeptReport) -> Table:
    """By kind: what is needed, for what, and which techniques still hold it in less."""
    table = _table(f"Kept and needed: {size(report.saved_bytes - report.spare_bytes)}", "needed for")
    for row in report.by_kind():
        if not row.spare:
            what = f"{row.kind} ({row.operation})" if row.operation else row.kind
            need = row.need if row.in_block else f"{row.need}, outside blocks"
            table.add_row(what, size(row.num_bytes), str(row.num_tensors), need, remedies(row))
    return table


def remedies(row: KeptRow) -> str:
    """Techniques that name this kind, and the setting that removes it; a dash if there is neither."""
    from ..memory.kept import KINDS, techniques_against

    return _listed(techniques_against({row.kind}), KINDS[row.kind].setting)


def remedies_of_all_kinds() -> str:
    """Techniques that act on whatever is kept, for a line below the tables."""
    from ..memory.kept import BLOCKS, EVERYTHING, techniques_against

    inside, everywhere = _listed(techniques_against({BLOCKS})), _listed(techniques_against({EVERYTHING}))
    return f"Of all kinds, inside blocks: {inside}; everywhere: {everywhere}. ~ changes the gradients"


def _listed(techniques: tuple[tuple[str, ...], tuple[str, ...]], setting: str = "") -> str:
    exact, others = techniques
    return ", ".join(filter(None, [*exact, *(f"~{name}" for name in others), setting])) or "-"


def _table(title: str, third: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right")
    table.add_column(third, overflow="fold")
    table.add_column("removed by", overflow="fold")
    return table
