"""The command line: `shoestring COMMAND`. One file a command; how errors end a command stands here, once.

Exit codes: 0 done; 1 a run that failed, or an error nobody foresaw; 2 something for the user to change; 130 ctrl-C.
Commands import torch and transformers inside their functions, so that `--help` answers at once.
"""

import json
import sys
import traceback
from typing import Annotated

import typer
from typer.exceptions import TyperException

from shoestring import __version__
from shoestring.errors import RunFailed, SettingError
from shoestring.quiet import quiet_imports

from .assets import app as assets
from .compare import EXAMPLES as COMPARE_EXAMPLES
from .compare import compare
from .measure import EXAMPLES as MEASURE_EXAMPLES
from .measure import measure
from .merge import EXAMPLES as MERGE_EXAMPLES
from .merge import merge
from .methods import EXAMPLES as METHODS_EXAMPLES
from .methods import methods
from .plan import EXAMPLES as PLAN_EXAMPLES
from .plan import plan
from .train import EXAMPLES as TRAIN_EXAMPLES
from .train import train

app = typer.Typer(
    name="shoestring",
    help="Fine-tune Hugging Face Transformers in the memory you have.",
    epilog="Begin with [cyan]shoestring assets install minilm rotten-tomatoes[/] and [cyan]shoestring train "
    "examples/first.yaml[/]; examples/ is in the checkout. Help on a command: [cyan]shoestring COMMAND --help[/].",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(epilog=TRAIN_EXAMPLES)(train)
app.command(epilog=MEASURE_EXAMPLES)(measure)
app.command(epilog=PLAN_EXAMPLES)(plan)
app.command(epilog=COMPARE_EXAMPLES)(compare)
app.command(epilog=METHODS_EXAMPLES)(methods)
app.command(epilog=MERGE_EXAMPLES)(merge)
app.add_typer(assets, name="assets")

INTERRUPTED = 130  # 128 + SIGINT, as shells count
USER_ERRORS = (
    SettingError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shoestring {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _shoestring(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also after a command.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(arguments: list[str] | None = None) -> int:
    """Run one command and give its exit code; an error becomes one message, on stderr or with --json on stdout.

    arguments: what follows `shoestring`; by default those of the process.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, rest = arguments[:end], arguments[end:]
    debug, as_json = "--debug" in options, "--json" in options
    arguments = [option for option in options if option != "--debug"] + rest
    if not debug:
        quiet_imports()
    try:
        code = app(arguments, prog_name="shoestring", standalone_mode=False)
        if code == INTERRUPTED:  # typer has caught the KeyboardInterrupt
            _report("interrupted", "KeyboardInterrupt", as_json)
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        _report("interrupted", "KeyboardInterrupt", as_json)
        return INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = _verdict(error)
        _report(message, type(error).__name__, as_json)
        return code


def _verdict(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and what to tell the user."""
    if isinstance(error, TyperException):
        context = getattr(error, "ctx", None)
        hint = f" See {context.command_path} --help." if context else ""
        message = error.format_message() or "A command is missing"  # empty where typer has printed the help instead
        return error.exit_code, message + ("" if message.endswith((".", "?")) else ".") + hint
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename is not None else ""
        return (2 if isinstance(error, USER_ERRORS) else 1), f"{error.strerror}{named}"
    if isinstance(error, USER_ERRORS):
        return 2, str(error)
    if isinstance(error, RunFailed):
        return 1, str(error)
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    return 1, f"unexpected {type(error).__name__}: {first_line} (run again with --debug to see where)"


def _report(message: str, kind: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"error": message, "kind": kind}))
    else:
        typer.secho("error: ", fg="red", bold=True, err=True, nl=False)
        typer.echo(message, err=True)
