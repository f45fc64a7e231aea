"""`shoestring compare`: several recipes on the same work, and which one was worth it."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import RunFailed, SettingError, did_you_mean
from ..units import size

if TYPE_CHECKING:
    from ..compare.comparison import Comparison
    from ..compare.runner import Event
    from ..compare.suite import Case, Suite

EXAMPLES = (
    "[bold]Examples[/]\n\n"
    "[cyan]shoestring compare examples/suite.yaml[/]   run what is not finished, then report\n\n"
    "[cyan]shoestring compare suite.yaml --dry-run[/]   load every recipe and tell all mistakes; run nothing\n\n"
    "[cyan]shoestring compare suite.yaml --list[/]   what is finished, has failed, and is to do\n\n"
    "[cyan]shoestring compare suite.yaml --jobs 2 seeds=\\[0] budget.steps=50[/]\n\n"
    "[cyan]shoestring compare peft/method_comparison/MetaMathQA/results --output report[/]   results of peft"
)
WIDTH = 100  # where there is no terminal to fill
HTML, MARKDOWN, CSV, JSON = "report.html", "report.md", "report.csv", "comparison.json"


def compare(
    suite: Annotated[
        Path,
        typer.Argument(
            help="Suite file (YAML), or a folder of results: a suite's output_dir, or peft's.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings put over those of the suite.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time; they share the machine.")] = 1,
    show: Annotated[bool, typer.Option("--list", help="Show what is finished and to do; run nothing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Load every recipe and tell all mistakes at once; run nothing.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Report what is finished; run nothing.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what has failed.")] = False,
    check: Annotated[
        bool, typer.Option(help="Before the first run, load every recipe, so that all mistakes are told at once.")
    ] = True,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside", help="Files or folders of other results to put into the same table.", show_default=False
        ),
    ] = None,
    quality: Annotated[
        str | None, typer.Option("--quality", help="Of a folder: the measure to rank by.", show_default=False)
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Of a folder: the recipe to compare the others with.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for the reports; by default the suite's output_dir.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON, and nothing else.")] = False,
) -> None:
    """Compare recipes by quality, memory and time, each run in a fresh process.

    What is finished is kept and used again, also after ctrl-C or a kill. Ends with a ranking, and a report as HTML,
    Markdown and CSV.
    """
    console = Console(stderr=as_json)
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    if suite.is_dir():
        if overrides or show or dry_run or retry_failed:
            raise SettingError(
                f"{suite} is a folder of results; settings, --dry-run, --list and --retry-failed are for suites."
            )
        found = _of_folder(suite, beside or [], quality, baseline)
        _finish(console, found, output, as_json)
        return
    for option, value in (("quality", quality), ("baseline", baseline)):
        if value is not None:
            raise SettingError(f"--{option} is for folders of results; of a suite set {option}=NAME.")
    with console.status("Importing torch and transformers"):
        from ..compare.runner import check_suite, comparison_of, run_suite
        from ..compare.suite import Suite
        from ..compare.summary import check_task
    made = Suite.load(suite, tuple(overrides or ()))
    if show:
        _list(console, made, as_json)
        return
    if dry_run:
        with console.status("checking") as status:

            def told(event: "Event") -> None:
                if event[0] == "note":
                    _note(console, event[1], event[2])
                else:
                    status.update(Text(f"checking {event[1].name}"))

            check_suite(made, jobs=jobs, on_event=told)
        count = "1 recipe" if len(made.names) == 1 else f"{len(made.names)} recipes"
        typer.echo(json.dumps({"checked": list(made.names)}) if as_json else f"Checked {count}: nothing is in the way.")
        return
    others = _results_in(beside or [])  # what is wrong with them, and with the folder, is told before hours of training
    check_task(made.task, others)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    if not report_only:
        with _Screen(console, made, jobs, retry_failed) as screen:
            run_suite(made, jobs=jobs, retry_failed=retry_failed, check=check, on_event=screen.told)
    command = " ".join(["shoestring compare", str(suite), *(overrides or ())])
    comparison = comparison_of(made, command, others=others)
    _finish(console, comparison, output or Path(made.output_dir), as_json)
    if comparison.failures:
        raise RunFailed(
            f"{len(comparison.failures)} of {len(made.cases)} runs failed; the report has the reasons. Run them again "
            "with --retry-failed."
        )


def _note(console: Console, case: "Case", text: str) -> None:
    _print(console, f"{case.name}: {text}", style="yellow")


def _print(console: Console, text: str, style: str | None = None) -> None:
    """A line as it is: names and reasons may hold brackets."""
    console.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _of_folder(folder: Path, beside: list[Path], quality: str | None, baseline: str | None) -> "Comparison":
    """The comparison of results in files alone."""
    from ..compare.measures import QUALITIES
    from ..compare.results import values_of_peft
    from ..compare.summary import Asked, compare_results

    results = _results_in([folder, *beside])
    if not results:
        raise SettingError(f"{folder} holds no results (*.json).")
    own = next((result.shoestring for result in results if result.shoestring), None)
    models = dict.fromkeys(str(result.run_info.train_config.get("model_id", "")) for result in results)
    from ..training.tasks import TASKS

    task = own.task if own else ""
    if task in TASKS:
        metric = TASKS[task].metric
    else:
        measured = {name for result in results for name in values_of_peft(result)}
        metric = next((name for name in QUALITIES if name in measured), "accuracy")
    asked = Asked(folder.name, task, " and ".join(filter(None, models)), (), quality or metric, baseline)
    comparison = compare_results(asked, results)
    names = [recipe.name for recipe in comparison.recipes]
    if baseline is not None and baseline not in names:
        raise SettingError(f"--baseline {baseline!r} is not among the recipes. {did_you_mean(baseline, names)}")
    return comparison


def _results_in(places: list[Path]) -> list[Any]:
    from ..compare.results import Result, read_all
    from ..compare.runner import RESULTS

    results: list[Any] = []
    for place in places:
        if not place.exists():
            raise SettingError(f"There is no {place}.")
        if (place / RESULTS).is_dir():  # a suite's output_dir
            place = place / RESULTS
        results += read_all(place) if place.is_dir() else [Result.read(place)]
    return results


def _list(console: Console, suite: "Suite", as_json: bool) -> None:
    from ..compare.runner import state_of

    state = state_of(suite)
    rows = []
    for case in suite.cases:
        done, failed = case.digest in state.results, case.digest in state.failures
        reason = state.failures[case.digest].run_info.error_msg if failed and not done else ""
        word = "finished" if done else "failed" if failed else "to do"
        rows.append({"recipe": case.name, "seed": case.seed, "state": word, "reason": reason})
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(title=Text(f"{suite.name}: {len(rows)} runs"), title_justify="left")
    for column in rows[0]:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row.values()))
    console.print(table)


def _finish(console: Console, comparison: "Comparison", output: Path | None, as_json: bool) -> None:
    """Write the reports and show the ranking."""
    from ..compare.export import csv_text, markdown
    from ..compare.page import page
    from ..whole_files import write_text
    from .compare_tables import terminal_table

    values = json.dumps(comparison.to_dict(), indent=1)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        made = {HTML: page(comparison), MARKDOWN: markdown(comparison), CSV: csv_text(comparison), JSON: values}
        for name, text in made.items():
            write_text(output / name, text)
    if as_json:
        typer.echo(values)
        return
    console.print(terminal_table(comparison, console.width))
    for failure in comparison.failures:
        _print(console, f"failed: {failure.name}, seed {failure.seed}: {failure.reason}", style="red")
    if output is not None:
        _print(console, f"Report: {output / HTML} (beside it {MARKDOWN}, {CSV}, {JSON})")


class _Screen:
    """A live table of runs on a terminal, a line for each elsewhere; with the time that is left."""

    def __init__(self, console: Console, suite: "Suite", jobs: int, retry_failed: bool = False):
        self.console, self.suite, self.jobs, self.retry_failed = console, suite, jobs, retry_failed
        self.running: dict[str, tuple[Case, str, float]] = {}
        self.took: list[float] = []
        self.ended = 0
        self.total = 0
        self.rows: dict[str, list[str]] = {name: [] for name in suite.names}
        self.live: Live | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
        )

    def __enter__(self) -> "_Screen":
        from ..compare.runner import state_of

        state = state_of(self.suite, retry_failed=self.retry_failed)
        self.total = len(state.to_do)
        for case in self.suite.cases:
            if (found := state.results.get(case.digest)) and found.shoestring:
                self.rows[case.name].append(self._of_values(found.shoestring.values))
            elif case.digest in state.failures and not self.retry_failed:
                self.rows[case.name].append(f"failed: {state.failures[case.digest].run_info.error_msg}")
        done = sum(map(len, self.rows.values()))
        if done:
            self.console.print(f"{done} of {len(self.suite.cases)} runs are there already.", style="dim")
        self.job = self.bar.add_task("runs", total=self.total, left="")
        if self.console.is_terminal and self.total:
            self.live = Live(self._drawn(), console=self.console, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def told(self, event: "Event") -> None:
        """Take up what happened."""
        kind, case, *rest = event
        if kind == "checking":
            self._say(f"checking {case.name}")
            self.bar.update(self.job, left=f"checking {case.name}")
        elif kind == "note":
            _note(self.console, case, rest[0])
        elif kind == "started":
            self.running[case.digest] = (case, "starting", time.monotonic())
        elif kind in ("step", "stage") and case.digest in self.running:
            text = f"step {rest[0]} of {rest[1]}" if kind == "step" else rest[0]
            self.running[case.digest] = (case, text, self.running[case.digest][2])
        elif kind in ("finished", "failed", "cancelled") and case.digest in self.running:
            seconds = time.monotonic() - self.running.pop(case.digest)[2]
            if kind == "finished":
                self.took.append(seconds)
            self.ended += 1
            text = self._of_values(rest[0]) if kind == "finished" else f"{kind}: {rest[0] if rest else ''}"
            self.rows[case.name].append(text)
            self.bar.update(self.job, completed=self.ended, left=self._left())
            self._say(
                f"[{self.ended}/{self.total}] {case.name}, seed {case.seed}: {text} ({seconds:.0f} s) {self._left()}"
            )
        if self.live is not None:
            self.live.update(self._drawn())

    def _say(self, text: str) -> None:
        if self.live is None:
            _print(self.console, text)

    def _of_values(self, values: dict[str, float]) -> str:
        quality = (
            f"{self.suite.quality} {values[self.suite.quality]:.4f}" if self.suite.quality in values else "finished"
        )
        memory = f", {size(values['peak_bytes'])}" if "peak_bytes" in values else ""
        step = f", {values['step_seconds']:.3g} s a step" if "step_seconds" in values else ""
        return quality + memory + step

    def _left(self) -> str:
        left = self.total - self.ended
        if not self.took or not left:
            return ""
        mean = sum(self.took) / len(self.took)
        gone = sum(min(time.monotonic() - began, mean) for _, _, began in self.running.values())
        seconds = max(0.0, left * mean - gone) / min(self.jobs, left)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def _drawn(self) -> Group:
        table = Table(box=None, pad_edge=False)
        for column in ("recipe", "seeds", "state"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        now = [(case.name, f"seed {case.seed}: {text}", "") for case, text, _ in self.running.values()]
        names = {name for name, _, _ in now}
        ended = [(name, texts[-1], "dim") for name, texts in self.rows.items() if texts and name not in names]
        for name, text, style in (*now, *ended):
            table.add_row(Text(name), f"{len(self.rows[name])} of {len(self.suite.seeds)}", Text(text), style=style)
        self.bar.update(self.job, left=self._left())
        return Group(self.bar, table)
