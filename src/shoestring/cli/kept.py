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
            table.add_row(row.kind, size(row.num_bytes), str(row.num_tensors), row.module or "(outside)", remedies(row))
    return table


def needed_table(report: KeptReport) -> Table:
    """By kind: what is needed, for what, and which techniques still hold it in less."""
    table = _table(f"Kept and needed: {size(report.saved_bytes - report.spare_bytes)}", "needed for")
    for row in report.by_kind():
        if not row.spare:
            what = f"{row.kind} ({row.operation})" if row.operation else row.kind
            need = row.need if row.in_block else f"{row.need}, outside blocks"
            table.add_row(what, size(row.num_bytes), str(row.num_tensors), need, remedies(row))
    table.caption = "~ changes the gradients"
    table.caption_justify = "left"
    return table


def remedies(row: KeptRow) -> str:
    """Names of techniques, those that change gradients marked; else a setting; else a dash."""
    from ..memory.kept import KINDS

    names = [*row.removed_by, *(f"~{name}" for name in row.reduced_by)]
    return ", ".join(filter(None, [*names, KINDS[row.kind].setting])) or "-"


def _table(title: str, third: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("what", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("tensors", justify="right")
    table.add_column(third, overflow="fold")
    table.add_column("removed by", overflow="fold")
    return table
