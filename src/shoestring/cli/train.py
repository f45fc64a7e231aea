"""`shoestring train`: the main job, with progress, checkpoints, resume and a final report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import SettingError
from .tables import memory_table, size

if TYPE_CHECKING:
    from ..training.report import Report
    from ..training.run import Ready

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring train examples/first.yaml[/]\n\n"
    "[cyan]shoestring train run.yaml train.learning_rate=3e-4 recipe.0.lora.r=16 output_dir=runs/second[/]\n\n"
    "[cyan]shoestring train run.yaml --resume[/]   go on after ctrl-C, a crash or a kill"
)
INTERRUPTED = 130


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
        from .progress import Progress, quiet
        from .progress import training_run as training

    quiet()
    progress = Progress(console)
    report = training.train(
        settings,
        resume=resume,
        overwrite=overwrite,
        callbacks=[progress],
        say=lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True),
        on_ready=lambda ready: _show_what_trains(console, ready),
    )
    if as_json:
        typer.echo(_json(report))
    else:
        _show(console, report)
    if report.status == "interrupted":
        console.print(
            f"Stopped after step {report.steps}, with a checkpoint. Go on with: shoestring train {run} --resume",
            style="yellow",
            soft_wrap=True,
        )
        raise SystemExit(INTERRUPTED)


def _json(report: "Report") -> str:
    import json

    return json.dumps(report.to_dict())


def _show_what_trains(console: Console, ready: "Ready") -> None:
    from ..training.report import trained_groups

    groups = trained_groups(ready.attached.model)
    if not groups:
        raise SettingError("Nothing is trainable with this recipe.")
    total = sum(p.numel() for p in ready.attached.model.parameters())
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
        ("peak of the process", size(report.process_peak_bytes)),
        *((f"saved {what}", where) for what, where in report.saved.items()),
    ]
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
