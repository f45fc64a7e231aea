"""`shoestring train`: the main job, with progress, checkpoints, resume and a final report."""

import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SettingError
from .tables import memory_table, size

if TYPE_CHECKING:
    from ..training.observe import StepShape
    from ..training.report import Report
    from ..training.run import Ready
    from ..training.settings import RunSettings

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring train examples/first.yaml[/]\n\n"
    "[cyan]shoestring train run.yaml train.learning_rate=3e-4 recipe.0.lora.r=16 output_dir=runs/second[/]\n\n"
    "[cyan]shoestring train run.yaml --resume[/]   go on after ctrl-C, a crash or a kill"
)
INTERRUPTED = 130
FAR = 0.05  # between prediction and measurement


def train(
    run: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over those of the file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away the run in output_dir.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Train a model as a run file says.

    Prints what trains, shows progress, and ends with quality, memory by part, time and what was saved where.
    Ctrl-C ends after the current step with a checkpoint; --resume goes on from there.
    """
    from ..training.settings import RunSettings

    settings = RunSettings.load(run, overrides or [])
    console = Console(stderr=as_json)
    with console.status("Importing torch and transformers"):
        from ..quiet import quiet_libraries
        from ..training import run as training
        from .progress import Progress

        quiet_libraries()
    progress = Progress(console)
    report = training.train(
        settings,
        resume=resume,
        overwrite=overwrite,
        callbacks=[progress],
        say=lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True),
        on_ready=lambda ready: _show_what_trains(console, ready),
        predict=_predict,
    )
    if as_json:
        typer.echo(_json(report))
    else:
        _show(console, report)
    if report.status == "interrupted":
        again = shlex.join(["shoestring", "train", str(run), *(overrides or ()), "--resume"])
        console.print(
            f"Stopped after step {report.steps}, with a checkpoint. Go on with: {again}",
            style="yellow",
            soft_wrap=True,
        )
        raise SystemExit(INTERRUPTED)


def _predict(settings: "RunSettings", shape: "StepShape") -> dict[str, Any]:
    """What the planner says of the step that was measured; what there is to warn of, the run has said."""
    from ..planning import predict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return predict(settings, batch=shape.rows, length=shape.tokens).to_dict()


def _beside_the_prediction(report: "Report") -> tuple[str, str | None]:
    """Predicted beside measured peak of a step, and a warning if they are far apart."""
    predicted, measured, batch = report.predicted, report.memory, report.measured_batch
    assert predicted is not None
    assert measured is not None
    assert batch is not None
    # a step begins with the model loaded
    peak = max(count for step, count in predicted["by_step"].items() if step != "load")
    off = peak / measured["peak_bytes"] - 1
    padding = batch["padding_fraction"] or 0
    of_batch = f"batch {batch['rows']}" + (f", length {batch['tokens']}" if batch["tokens"] else "")
    padded = f", {padding:.0%} of it padding" if padding else ""
    line = f"{size(peak)}, measured {size(measured['peak_bytes'])} ({off:+.1%}; {of_batch}{padded})"
    if abs(off) <= FAR:
        return line, None
    reason = (
        "the prediction is for a batch without padding, which needs no mask"
        if padding
        else "please report the run file"
    )
    return line, f"Predicted and measured memory part by {abs(off):.0%}: {reason}."


def _json(report: "Report") -> str:
    import json

    return json.dumps(report.to_dict())


def _show_what_trains(console: Console, ready: "Ready") -> None:
    from ..training.quantised import numbers_in
    from ..training.report import trained_groups

    groups = trained_groups(ready.attached.model)
    if not groups:
        raise SettingError("Nothing is trainable with this recipe.")
    total = sum(map(numbers_in, ready.attached.model.parameters()))
    trained = sum(group.parameters for group in groups)
    table = Table(
        title=f"What trains: {trained:,} of {total:,} parameters ({trained / total:.2%})", title_justify="left"
    )
    for column, justify in (("parameters", "left"), ("tensors", "right"), ("numbers", "right"), ("dtype", "left")):
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for group in groups[:10]:
        table.add_row(group.name, str(group.tensors), f"{group.parameters:,}", group.dtype)
    if len(groups) > 10:
        rest = groups[10:]
        table.add_row(
            f"and {len(rest)} more", str(sum(g.tensors for g in rest)), f"{sum(g.parameters for g in rest):,}", ""
        )
    console.print(table)


def _show(console: Console, report: "Report") -> None:
    for split, measures in report.quality.items():
        table = Table(title=f"Quality on {split} training" if "before" in split else f"Quality on {split}")
        table.title_justify = "left"
        for name in measures:
            table.add_column(name, justify="right")
        table.add_row(*(f"{value:.4f}" for value in measures.values()))
        console.print(table)
    if report.memory is not None:
        console.print(memory_table(report.memory, title="Memory of one training step"))
    table = Table(title="The run", title_justify="left", show_header=False)
    rows: list[tuple[str, Any]] = [
        (
            "trained parameters",
            f"{report.trained_parameters:,} ({report.trained_parameters / report.total_parameters:.2%})",
        ),
        ("steps", str(report.steps)),
        ("seconds a step (median)", f"{report.step_seconds:.3f}" if report.step_seconds else "-"),
        ("tokens a second", f"{report.tokens_a_second:,.0f}" if report.tokens_a_second else "-"),
        ("training time", f"{report.train_seconds:.0f} s"),
        *((("predicted peak of a step", _beside_the_prediction(report)[0]),) if report.predicted else ()),
        ("peak of the process", size(report.process_peak_bytes)),
        *((f"saved {what}", where) for what, where in report.saved.items()),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    warning = _beside_the_prediction(report)[1] if report.predicted else None
    if warning is not None:
        console.print(warning, style="yellow", soft_wrap=True)
