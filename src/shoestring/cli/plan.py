"""`shoestring plan`: what a run will take, before anything is loaded, and what makes it fit."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ..errors import SettingError
from . import plan_page, plan_tables
from .plan_cases import Case, Row, bytes_in, cases_of
from .tables import size

if TYPE_CHECKING:
    from ..memory.devices import Device
    from ..planning import Advice, Prediction, Sharding

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring plan examples/plan.yaml[/]   peak memory by part, and the time on each device\n\n"
    "[cyan]shoestring plan run.yaml --memory 24GiB --write smaller.yaml[/]   does it fit, and what makes it fit\n\n"
    "[cyan]shoestring plan run.yaml --device RTX-4090 --batch 4 --length 2048[/]\n\n"
    "[cyan]shoestring plan run.yaml --sweep length=1024,2048,4096 --recipes exact_small,few_tokens "
    "--html plan.html[/]\n\n"
    "[cyan]shoestring plan run.yaml model.name=known:llama-3.1-70b --sharding fsdp2 --processes 8[/]"
)


def plan(
    run: Annotated[Path, typer.Argument(help="Run file (YAML); its data need not be there.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over those of the file.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows of a micro-batch; by default those of the run.")
    ] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens of a row; by default data.max_length.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Whether it fits so much, as 24GiB, and what makes it fit.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="As --memory with that of a device, and only its time.")
    ] = None,
    sharding: Annotated[
        str | None, typer.Option(metavar="KIND", help="ddp, fsdp2, zero1, zero2 or zero3, with --processes.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes, one GPU each.")] = None,
    sweep: Annotated[
        list[str] | None, typer.Option(metavar="KEY=A,B,...", help="Each of several lengths, batches or settings.")
    ] = None,
    recipes: Annotated[
        str | None, typer.Option(metavar="A,B,...", help="Also with these recipes: names, recipe files or run files.")
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also as one HTML page.")] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the run with the first change that makes it fit.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Let --html and --write replace files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
) -> None:
    """Predict the peak memory of a training step, by part, from the model's configuration alone.

    Nothing is loaded and no data is read: a step of the run is rehearsed on tensors without values. Times are
    estimates. The model may be one that is known by name, such as known:llama-3.1-8b.
    """
    several = bool(sweep or recipes)
    limit = None if memory is None else bytes_in(memory)
    _check_options(several, memory or device, write, sharding, processes)
    for file in (html, write):
        _check_target(file, overwrite)
    cases = cases_of(run, overrides or [], sweep or (), recipes, batch=batch, length=length)
    console = Console(stderr=as_json)
    with console.status("Importing torch and transformers") as status:
        from ..memory.devices import DEVICES, device_named
        from ..planning import Sharding
        from ..quiet import quiet_libraries

        quiet_libraries()
        known = device_named(device) if device is not None else None
        if limit is None and known is not None:
            limit = known.usable_bytes
            if limit is None and write is not None:
                raise SettingError(f"{_no_memory_of(known)}, so nothing says what fits: give --memory with --write.")
        shards = Sharding(sharding, processes) if sharding is not None and processes is not None else None  # type: ignore[arg-type]
        devices = [known] if known is not None else list(DEVICES.values())
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            if several:
                rows = _predict_all(cases, shards, known is not None, status.update)
                found = _Found(rows, [known] if known else [], limit)
            else:
                found = _look_at(cases[0], shards, devices, limit, status.update)
        found.warnings = _of_techniques(heard, cases)
        if known is not None and limit is None:
            found.warnings.append(f"{_no_memory_of(known)}: to be told whether the run fits, give --memory.")
    if html is not None:
        _write(html, plan_page.page(found.rows, found.advice))
    suggested = _write_first_change(found.advice, write) if write is not None else None
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    (_show_all if several else _show_one)(console, found)
    for text in found.warnings:
        console.print(f"warning: {text}", style="yellow", highlight=False, soft_wrap=True)
    if suggested is not None:
        console.print(suggested, soft_wrap=True, highlight=False)
    if html is not None:
        console.print(f"Written as a page: {html}", soft_wrap=True, highlight=False)


def _no_memory_of(device: Device) -> str:
    return f"The table of devices has no memory for {device.name}, which depends on the machine"


class _Found:
    """All that is shown: rows, devices to estimate times on, and what fits."""

    def __init__(
        self, rows: list[Row], devices: list[Device], memory_bytes: int | None, advice: Advice | None = None
    ) -> None:
        self.rows, self.devices, self.memory_bytes, self.advice = rows, devices, memory_bytes, advice
        self.warnings: list[str] = []

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        return {
            "rows": [row.to_dict() | {"times": self._times(row.prediction)} for row in self.rows],
            "memory_bytes": self.memory_bytes,
            "advice": self.advice.to_dict() if self.advice else None,
            "warnings": self.warnings,
        }

    def _times(self, prediction: Prediction | None) -> list[dict[str, Any]]:
        return [prediction.time_on(device.name).to_dict() for device in self.devices] if prediction else []


def _of_techniques(heard: Iterable[warnings.WarningMessage], cases: list[Case]) -> list[str]:
    """What the techniques of the runs warn of, once each; not what libraries say of tensors without values."""
    names = {name for case in cases for entry in case.settings.recipe for name in entry}
    texts = dict.fromkeys(str(warning.message) for warning in heard)
    return [text for text in texts if text.partition(" ")[0] in names]


def _check_options(
    several: bool, limited: str | None, write: Path | None, sharding: str | None, processes: int | None
) -> None:
    if (sharding is None) != (processes is None):
        raise SettingError("--sharding and --processes go together: --sharding fsdp2 --processes 8.")
    if write is None:
        return
    if limited is None:
        raise SettingError("--write writes the run that fits: say in how much, with --memory 24GiB or --device NAME.")
    if several or sharding is not None:
        raise SettingError("--write is for one run on one process: leave out --sweep, --recipes and --sharding.")


def _check_target(file: Path | None, overwrite: bool) -> None:
    if file is None:
        return
    if file.is_dir():
        raise SettingError(f"{file} is a folder; name a file in it.")
    if not file.absolute().parent.is_dir():
        raise SettingError(f"There is no folder {file.parent} to write {file.name} into.")
    if file.exists() and not overwrite:
        raise SettingError(f"{file} is there already; choose another name, or replace it with --overwrite.")


def _look_at(
    case: Case, shards: Sharding | None, devices: list[Device], memory: int | None, say: Callable[[str], None]
) -> _Found:
    """One run, with advice where there is a limit and one process."""
    from ..planning import advise, predict

    if memory is not None and shards is None:
        advice = advise(case.settings, memory, batch=case.batch, length=case.length, say=say)
        return _Found([Row(case.label, advice.prediction)], devices, memory, advice)
    say("Rehearsing one training step")
    found = predict(case.settings, batch=case.batch, length=case.length, shards=shards, count_operations=True)
    if memory is not None:
        _check_above_weights(found, memory)
    return _Found([Row(case.label, found)], devices, memory)


def _check_above_weights(prediction: Prediction, memory: int) -> None:
    weights = prediction.parts["weights"] + prediction.parts["adapters"]
    if memory < weights:
        raise SettingError(
            f"--memory {size(memory)} is below the weights of {prediction.model} alone: {size(weights)} in one process."
        )


def _predict_all(
    cases: list[Case], shards: Sharding | None, count_operations: bool, say: Callable[[str], None]
) -> list[Row]:
    """A row for each case; one that is refused says why. If all are, the first reason is raised."""
    from ..planning import predict

    rows, errors = [], []
    for place, case in enumerate(cases, 1):
        say(f"Rehearsing {case.label} ({place} of {len(cases)})")
        try:
            found = predict(
                case.settings, batch=case.batch, length=case.length, shards=shards, count_operations=count_operations
            )
            rows.append(Row(case.label, found))
        except SettingError as error:
            errors.append(error)
            rows.append(Row(case.label, None, str(error)))
    if len(errors) == len(rows):
        raise errors[0]
    return rows


def _write(file: Path, text: str) -> None:
    from ..whole_files import write_text

    write_text(file, text)


def _write_first_change(advice: Advice | None, file: Path) -> str:
    """Write the run with the best change; what became of that."""
    assert advice is not None
    if advice.fits:
        return f"The run fits as it is: {file} was not written."
    if not advice.changes:
        raise SettingError(
            f"Nothing that was tried makes the run fit {size(advice.memory_bytes)}, so {file} was not written. The "
            f"smallest footprint is {size(advice.smallest.peak_bytes)}, with {advice.smallest_title}."
        )
    change = advice.changes[0]
    _write(file, change.settings.to_yaml())
    return f"Written, with {change.title}: {file}"


def _show_one(console: Console, found: _Found) -> None:
    prediction = found.rows[0].prediction
    assert prediction is not None
    console.print(f"[bold]Prediction[/] for {plan_tables.sizes_of(prediction)}", highlight=False)
    console.print(plan_tables.parts_table(prediction))
    for line in plan_tables.notes(prediction):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(plan_tables.operations_table(prediction))
    times = [(device, prediction.time_on(device.name)) for device in found.devices]
    console.print(plan_tables.times_table(prediction, times))
    if found.memory_bytes is not None:
        console.print(plan_tables.fit_line(prediction, found.memory_bytes), soft_wrap=True)
    if found.advice is not None:
        _show_advice(console, found.advice)


def _show_advice(console: Console, advice: Advice) -> None:
    console.print(plan_tables.largest_line(advice), highlight=False, soft_wrap=True)
    for skipped in advice.skipped:
        console.print(f"Skipped, {skipped}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if advice.changes:
        console.print(plan_tables.changes_table(advice))
    elif not advice.fits:
        console.print(
            f"Nothing that was tried makes it fit. The smallest footprint is {size(advice.smallest.peak_bytes)}, with "
            f"{advice.smallest_title}; {plan_tables.cuda_range(advice.smallest)}: {size(advice.missing_bytes)} too "
            "large at most.",
            highlight=False,
            soft_wrap=True,
        )


def _show_all(console: Console, found: _Found) -> None:
    device = found.devices[0].name if found.devices else None
    console.print(plan_tables.rows_table(found.rows))
    colored = console.color_system is not None
    console.print(plan_tables.chart(found.rows, colored=colored, device=device, memory=found.memory_bytes))
    if found.memory_bytes is not None:
        console.print(f"Fits: {size(found.memory_bytes)}, with the range on a GPU.", highlight=False)
    if device is not None:
        estimate = next(row.prediction for row in found.rows if row.prediction).time_on(device)
        console.print(estimate.assumed, highlight=False, soft_wrap=True)
    console.print(plan_tables.on_top(), highlight=False, soft_wrap=True)
    for reason in dict.fromkeys(row.refused for row in found.rows if row.prediction is None):
        labels = "; ".join(row.label for row in found.rows if row.refused == reason)
        console.print(f"Refused, {labels}: {reason}", style="yellow", highlight=False, soft_wrap=True)
    for rule in dict.fromkeys(rule for row in found.rows if row.prediction for rule in row.prediction.by_rule):
        console.print(f"by rule, not rehearsed: {rule}", highlight=False, soft_wrap=True)
