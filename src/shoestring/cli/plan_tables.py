"""Tables of predictions: one by part, with its time on devices; or several beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from .tables import share_bar, size

if TYPE_CHECKING:
    from ..memory.devices import Device, TimeEstimate
    from ..planning import Advice, Prediction
    from .plan_cases import Row

COLORS = {
    "weights": "blue",
    "adapters": "cyan",
    "gradients": "magenta",
    "optimizer_state": "yellow",
    "saved_for_backward": "red",
    "logits_and_loss": "green",
    "temporary": "bright_black",
    "inputs": "bright_blue",
}
BAR = 28
SMALL = 0.01  # of the largest peak: parts that never reach it share a column


def words(part: str) -> str:
    """A part or step as people read it."""
    return part.replace("_", " ")


def number(count: float) -> str:
    """A large number in three digits and a decimal prefix.

    >>> number(32.94e12)
    '32.9 T'
    """
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(count) < 1000 or prefix == "P":
            break
        count /= 1000
    return f"{count:.3g} {prefix}".rstrip()


def sizes_of(prediction: Prediction) -> str:
    """What a prediction is for, in words."""
    parts = [f"{prediction.model}, batch {prediction.batch}, length {prediction.length:,}"]
    if prediction.accumulation > 1:
        parts.append(f"{prediction.accumulation} micro-batches a step")
    if prediction.processes > 1:
        parts.append(f"one of {prediction.processes} processes")
    return ", ".join(parts)


def cuda_range(prediction: Prediction) -> str:
    """The range on a GPU, in words."""
    low, high = map(size, prediction.cuda_bytes)
    return f"on a GPU {low} to {high}, with the CUDA context and what the allocator holds unused"


def on_top() -> str:
    """What of the range on a GPU is not in a peak."""
    from ..planning.prediction import ALLOCATOR_SLACK, CUDA_CONTEXT

    low, high = map(size, CUDA_CONTEXT)
    slack = f"up to {ALLOCATOR_SLACK[1]:.0%} that the allocator holds unused"
    return f"On a GPU its context ({low} to {high}) and {slack} come on top."


def parts_table(prediction: Prediction) -> Table:
    """The peak by part, largest first, with bars."""
    table = Table(
        title=f"Peak {size(prediction.peak_bytes)} in {prediction.peak_step}", title_justify="left", min_width=60
    )
    table.add_column("part")
    table.add_column("at the peak", justify="right")
    table.add_column("share", min_width=20)
    for part, count in sorted(prediction.parts.items(), key=lambda item: -item[1]):
        table.add_row(words(part), size(count), share_bar(count, prediction.peak_bytes))
    return table


def notes(prediction: Prediction) -> list[str]:
    """What belongs to a prediction beside its parts."""
    share = prediction.trained_parameters / max(prediction.total_parameters, 1)
    lines = [
        "at its most: " + ", ".join(f"{step} {size(count)}" for step, count in prediction.by_step.items()),
        cuda_range(prediction),
        f"trained parameters {prediction.trained_parameters:,} of {prediction.total_parameters:,} ({share:.2%})",
    ]
    if prediction.paged_bytes:
        lines.append(f"beside it {size(prediction.paged_bytes)} of paged optimizer state, which may leave the device")
    return lines + [f"by rule, not rehearsed: {rule}" for rule in prediction.by_rule]


def operations_table(prediction: Prediction) -> Table:
    """Floating point operations and bytes moved, by phase."""
    from ..memory.operations import OPERATION_PHASES

    counted = prediction.operations
    assert counted is not None
    table = Table(title=f"One step: {number(counted.total_flops)}FLOP", title_justify="left")
    table.add_column("phase")
    table.add_column("FLOP", justify="right")
    table.add_column("bytes moved", justify="right")
    for phase in OPERATION_PHASES:
        flops, moved = counted.flops_in(phase), counted.moved_bytes_in(phase)
        if flops or moved:
            table.add_row(phase, number(flops), size(moved))
    return table


def fit_in(prediction: Prediction, memory: int | None) -> str:
    """Whether a prediction fits the memory of a GPU: what is certain, and what hangs on context and allocator."""
    if memory is None:
        return "-"
    low, high = prediction.cuda_bytes
    return "yes" if high <= memory else "perhaps" if low <= memory else "no"


def times_table(prediction: Prediction, devices: Iterable[tuple[Device, TimeEstimate]]) -> Table:
    """Estimated seconds of a step on each device, with what was assumed."""
    table = Table(title="Time of a step: an estimate, no measurement", title_justify="left", caption_justify="left")
    for column, justify in (("device", "left"), ("time", "right"), ("memory", "right"), ("fits", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    assumed, slower = "", {}
    for device, estimate in devices:
        mark = ""
        if estimate.at_float32_peak:
            slower[" and ".join(estimate.at_float32_peak)] = mark = "*"
        memory = size(device.usable_bytes) if device.usable_bytes else "-"
        table.add_row(device.name + mark, time_range(estimate), memory, fit_in(prediction, device.usable_bytes))
        compute, bandwidth = (
            f"{low:.0%} to {high:.0%}" for low, high in (estimate.compute_efficiency, estimate.bandwidth_efficiency)
        )
        assumed = f"Assumed: {compute} of the peak FLOP/s, {bandwidth} of the memory bandwidth, no launch overhead"
    if prediction.processes > 1:
        assumed += ", no communication between processes"
    table.caption = (
        assumed + "." + "".join(f" {mark} {kinds} at the peak of float32." for kinds, mark in slower.items())
    )
    return table


def time_range(estimate: TimeEstimate) -> str:
    """The range in the unit of its lower end.

    >>> class Estimate: low_seconds, high_seconds = 0.0123, 0.456
    >>> time_range(Estimate)
    '12 to 456 ms'
    """
    unit, each = next(
        ((unit, each) for unit, each in (("s", 1.0), ("ms", 1e-3)) if estimate.low_seconds >= each), ("µs", 1e-6)
    )
    low, high = (
        f"{value:.0f}" if value >= 10 else f"{value:.2g}"
        for value in (estimate.low_seconds / each, estimate.high_seconds / each)
    )
    return f"{low} to {high} {unit}"


def rows_table(rows: Sequence[Row]) -> Table:
    """Each case by part, in one unit; parts that are small everywhere in one column."""
    made = [row.prediction for row in rows if row.prediction is not None]
    most = max(p.peak_bytes for p in made)
    unit, divisor = next((u, d) for u, d in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1)) if most >= d)
    shown = [part for part in made[0].parts if any(p.parts[part] >= SMALL * most for p in made)]
    table = Table(title=f"Peak memory of one training step, in {unit}", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("in")
    for part in shown:
        table.add_column(words(part), justify="right")
    table.add_column("rest", justify="right")
    for row in rows:
        found = row.prediction
        if found is None:
            table.add_row(row.label, "refused")
            continue
        parts = [found.parts[part] for part in shown]
        numbers = [f"{count / divisor:.2f}" for count in (*parts, found.peak_bytes - sum(parts))]
        table.add_row(row.label, f"{found.peak_bytes / divisor:.2f}", found.peak_step, *numbers)
    return table


def chart(rows: Sequence[Row], *, colored: bool, device: str | None = None, memory: int | None = None) -> Table:
    """A bar for each case, made of its parts; in letters where there are no colours.

    device: also the time on it. memory: also whether a case fits it.
    """
    most = max(row.prediction.peak_bytes for row in rows if row.prediction is not None)
    table = Table(box=None, padding=(0, 1), title="By part", title_justify="left", caption_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    if memory is not None:
        table.add_column("fits")
    if device is not None:
        table.add_column("time", justify="right", no_wrap=True)
    used: set[str] = set()
    for row in rows:
        found = row.prediction
        if found is None:
            table.add_row(row.label, Text("refused", style="dim"))
            continue
        bar, done, filled = Text(), 0, 0
        for part, count in found.parts.items():
            done += count
            width = round(BAR * done / most) - filled
            filled += width
            bar.append(_mark(part, colored) * width, style=COLORS[part])
            used |= {part} if width else set()
        fits = [fit_in(found, memory)] if memory is not None else []
        times = [time_range(found.time_on(device))] if device is not None else []
        table.add_row(row.label, bar, size(found.peak_bytes), *fits, *times)
    table.caption = Text()
    for part in (part for part in COLORS if part in used):
        table.caption.append(_mark(part, colored), style=COLORS[part])
        table.caption.append(f" {words(part)}  ")
    return table


def _mark(part: str, colored: bool) -> str:
    return "█" if colored else part[0].upper()


def fit_line(prediction: Prediction, memory: int) -> Text:
    """Whether the peak fits, alone and with what CUDA takes beside it."""
    low, high = prediction.cuda_bytes
    alone, limit = size(prediction.peak_bytes), size(memory)
    if high <= memory:
        return Text(f"It fits {limit}: peak {alone}; {cuda_range(prediction)}.", "green")
    if prediction.peak_bytes > memory:
        over = size(prediction.peak_bytes - memory)
        return Text(f"It does not fit {limit}: the peak of its tensors alone, {alone}, is {over} too large.", "red")
    verb, color = ("does", "red") if low > memory else ("may", "yellow")
    return Text(f"It {verb} not fit {limit}: its tensors do, {alone}, but {cuda_range(prediction)}.", color)


def changes_table(advice: Advice) -> Table:
    """What makes the run fit, best first."""
    table = Table(
        title=f"Each of these makes it fit {size(advice.memory_bytes)}", title_justify="left", show_lines=True
    )
    table.add_column("", justify="right")
    table.add_column("change", overflow="fold")
    table.add_column("why", overflow="fold")
    table.add_column("gradients")
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("time (estimate)", justify="right")
    for place, change in enumerate(advice.changes, 1):
        table.add_row(
            str(place),
            change.title,
            change.why,
            "exact" if change.exact else "changed",
            size(change.peak_bytes),
            f"x {change.slowdown:.2f}",
        )
    return table


def largest_line(advice: Advice) -> str:
    """The largest batch and length that fit as the run is."""
    found, batch, length = advice.prediction, advice.largest_batch, advice.largest_length
    rows = f"batch {batch:,} fits" if batch is not None else "no batch fits"
    line = f"At most {rows} at length {found.length:,}"
    if length is not None:
        line += f", and length {length:,} at batch {found.batch}"
    return line + "."
