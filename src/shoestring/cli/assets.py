"""`shoestring assets`: the packaged models and data there are, installing them, and where they lie."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from shoestring import assets
from shoestring.errors import SettingError

EXAMPLES = """[bold]Examples[/]

[cyan]shoestring assets list[/]   what there is, and what of it is installed

[cyan]shoestring assets install minilm rotten-tomatoes[/]   all that the first example needs

[cyan]shoestring assets where minilm[/]   its folder, for from_pretrained"""

app = typer.Typer(
    help="Models and data that ship inside ordinary packages: what there is, install, where it lies.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command("list")
def list_assets(
    as_json: Annotated[bool, typer.Option("--json", help="For other programs; sizes in bytes.")] = False,
) -> None:
    """Show every packaged model and data set: its carrier, size, licence, and whether it is installed."""
    if as_json:
        typer.echo(json.dumps([described(asset) for asset in assets.CATALOGUE.values()], indent=2))
        return
    table = Table(title="Packaged models and data", caption=f"Installed into {assets.cache_folder()}")
    table.add_column("name", no_wrap=True)
    table.add_column("kind")
    table.add_column("package", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("licence")
    table.add_column("installed")
    missing = [asset.name for asset in assets.CATALOGUE.values() if not assets.is_installed(asset.name)]
    for asset in assets.CATALOGUE.values():
        size, installed = f"{asset.size_bytes / 1e6:.1f} MB", "no" if asset.name in missing else "[green]yes[/]"
        table.add_row(asset.name, asset.kind, carrier_pin(asset), size, asset.licence, installed)
    console = Console()
    console.print(table)
    if missing:
        console.print(f"To install what is missing: shoestring assets install {' '.join(missing)}", soft_wrap=True)


@app.command()
def install(
    names: Annotated[list[str] | None, typer.Argument(help="Names from `shoestring assets list`.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All there are.")] = False,
) -> None:
    """Download carriers, check the files against the catalogue's hashes, and keep them in the cache folder."""
    if bool(names) == everything:
        raise SettingError("Name the assets to install, or say --all; `shoestring assets list` shows them.")
    chosen = list(dict.fromkeys(names or assets.CATALOGUE))
    for name in chosen:
        assets.get(name)  # a wrong name ends the command before the progress display begins
    columns = (SpinnerColumn(finished_text="[green]✓[/]"), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(f"{name}: waiting", total=1) for name in chosen}

        def show(name: str, doing: str) -> None:
            progress.update(tasks[name], description=f"{name}: {doing}", completed=int(doing == "installed"))

        assets.install(chosen, on_progress=show)


@app.command()
def where(name: Annotated[str, typer.Argument(help="A name from `shoestring assets list`.")]) -> None:
    """Print the asset's folder: a model's is ready for from_pretrained (converted now if it never was)."""
    typer.echo(assets.model_folder(name) if assets.get(name).kind == "model" else assets.data_files(name))


def described(asset: assets.Asset) -> dict[str, object]:
    return {
        "name": asset.name,
        "kind": asset.kind,
        "task": asset.task,
        "description": asset.description,
        "package": asset.package,
        "version": asset.version,
        "registry": asset.registry,
        "download_bytes": asset.carrier_bytes,
        "size_bytes": asset.size_bytes,
        "files": {file.path: file.sha256 for file in asset.files},
        "licence": asset.licence,
        "installed": assets.is_installed(asset.name),
        "install_command": asset.install_command,
    }


def carrier_pin(asset: assets.Asset) -> str:
    """The carrier in its registry's own notation."""
    return f"{asset.package}{'==' if asset.registry == 'pypi' else '='}{asset.version}"
