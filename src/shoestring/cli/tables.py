"""Tables that several commands print."""

from typing import Any

from rich.table import Table

from ..units import size


def share_bar(count: float, whole: float) -> str:
    """A bar for a share of the whole, with the share behind it.

    >>> share_bar(1, 5)
    '███              20%'
    """
    share = count / max(whole, 1)
    return f"{'█' * round(15 * share):<15} {share:4.0%}"


def memory_table(memory: dict[str, Any], title: str) -> Table:
    """A memory report (`MemoryReport.to_dict()`) by part, largest first, with a bar for each share of the peak."""
    table = Table(title=f"{title}: peak {size(memory['peak_bytes'])} in {memory['peak_phase']}", title_justify="left")
    table.add_column("part")
    table.add_column("at the peak", justify="right")
    table.add_column("share", min_width=20)
    table.add_column("at its most", justify="right")
    for part, count in sorted(memory["at_peak"].items(), key=lambda item: -item[1]):
        bar = share_bar(count, memory["peak_bytes"])
        table.add_row(part.replace("_", " "), size(count), bar, size(memory["largest"][part]))
    if memory["cuda_max_allocated_bytes"] is not None:
        table.caption = f"CUDA's own maximum of allocated memory: {size(memory['cuda_max_allocated_bytes'])}"
    return table
