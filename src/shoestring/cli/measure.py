"""`shoestring measure`: where the memory of one real training step goes."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .kept import needed_table, remedies_of_all_kinds, spare_table
from .tables import memory_table, size

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring measure examples/first.yaml[/]\n\n"
    "[cyan]shoestring measure run.yaml --by-module 5[/]   which modules keep what for backward\n\n"
    "[cyan]shoestring measure run.yaml --kept[/]   what is kept without need, and what removes it\n\n"
    "[cyan]shoestring measure run.yaml train.per_device_train_batch_size=8 --json[/]"
)


def measure(
    run: Annotated[Path, typer.Argument(help="Run file (YAML).", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over those of the file.")
    ] = None,
    by_module: Annotated[
        int | None,
        typer.Option("--by-module", metavar="DEPTH", min=1, help="Also by module, names cut after DEPTH parts."),
    ] = None,
    kept: Annotated[
        bool, typer.Option("--kept", help="Also why each tensor is kept for backward, and what would remove it.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Run two real training steps and count the memory of the second, by part; nothing is written."""
    from ..training.settings import RunSettings

    settings = RunSettings.load(run, overrides or [])
    console = Console(stderr=as_json)
    with console.status("Importing torch and transformers"):
        from ..quiet import quiet_libraries
        from ..training import run as training_run

        quiet_libraries()

    def say(text: str) -> None:
        console.print(text, style="dim", highlight=False, soft_wrap=True)

    explained = None
    if kept:
        report, explained = training_run.explain_memory(settings, module_depth=by_module, say=say)
    else:
        report = training_run.measure(settings, module_depth=by_module, say=say)
    if as_json:
        typer.echo(json.dumps(report.to_dict() | ({"kept": explained.to_dict()} if explained else {})))
        return
    console.print(memory_table(report.to_dict(), title="Memory of one training step"))
    console.print(
        f"weights that train {size(report.trainable_bytes)}, frozen {size(report.frozen_bytes)}; "
        f"kept for backward {size(report.saved_bytes)}",
        highlight=False,
    )
    if report.by_module:
        table = Table(title="Kept for backward, by module", title_justify="left")
        table.add_column("module", overflow="fold")
        table.add_column("bytes", justify="right")
        for name, count in sorted(report.by_module.items(), key=lambda item: -item[1]):
            table.add_row(name or "(outside the modules)", size(count))
        console.print(table)
    if explained:
        if explained.spare_bytes:
            console.print(spare_table(explained))
        else:
            console.print("All that is kept for backward is needed.")
        console.print(needed_table(explained))
        console.print(remedies_of_all_kinds(), highlight=False)
