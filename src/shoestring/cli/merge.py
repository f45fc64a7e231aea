"""`shoestring merge`: what a run learned, put into the weights of its base and written as a model of its own."""

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..training.merging import Merged

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring merge runs/first --output merged[/]\n\n"
    "[cyan]shoestring merge runs/qlora --output merged-4bit --requantise[/]   packed again, as the run's base was\n\n"
    "[cyan]shoestring merge runs/first data.train=here.csv --output merged[/]   the run's data is elsewhere now"
)
SHOWN = 5


def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over those of the run.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder to write; it must be new.")] = ...,  # type: ignore[assignment]
    requantise: Annotated[
        bool, typer.Option("--requantise", help="Pack the merged model as the run packed its base.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; that of the run's base if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else.")] = False,
) -> None:
    """Merge a run's adapter into its base and write a model that transformers loads, with the error of doing so.

    A base that was packed is unpacked first. With --requantise it is packed again after, which rounds it once more.
    """
    console = Console(stderr=as_json)
    with console.status("Importing torch and transformers"):
        from ..quiet import quiet_libraries
        from ..training import merging

        quiet_libraries()
    report = merging.merge(
        run,
        output,
        requantise=requantise,
        dtype=dtype,
        overrides=tuple(overrides or ()),
        say=lambda text: console.print(text, style="dim", highlight=False, soft_wrap=True),
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        _show(console, report)


def _show(console: Console, report: "Merged") -> None:
    form = f"packed as {report.quantization}" if report.quantization else f"in {report.dtype}"
    if report.layers:
        worst = sorted(report.layers, key=lambda layer: -layer.error)[:SHOWN]
        table = Table(title=f"Weights {form}, against the merged ones in float32", title_justify="left")
        table.add_column("layer", overflow="fold")
        table.add_column("change by the adapter", justify="right")
        table.add_column("error", justify="right")
        for layer in worst:
            table.add_row(layer.name, f"{layer.change:.2e}", f"{layer.error:.2e}")
        change, error = (statistics.median(getattr(x, name) for x in report.layers) for name in ("change", "error"))
        table.add_row(f"median of {len(report.layers)}", f"{change:.2e}", f"{error:.2e}")
        console.print(table)
        if error > change / 2:
            remedy = "keep the adapter beside the base" if report.quantization else "write them with --dtype float32"
            console.print(f"Rounding takes much of what the adapter learned: {remedy}.", style="yellow", soft_wrap=True)
    console.print(
        f"Logits differ from the trained model's by {report.logits_error:.2e} of their norm, where training changed "
        f"them by {report.logits_change:.2e}; the largest is the same at {report.agreement:.1%} of positions.",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Written to {report.folder}, {form}.", soft_wrap=True, highlight=False)
