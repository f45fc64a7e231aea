"""Runs of a suite, each in a fresh process: what is finished is kept and used again, what fails is written down.

Process  A server process imports torch and transformers once; every run is forked from it, so that it starts at once
         and its memory is its own. Where there is no fork, each run imports them anew.
Folder   results/ one file a finished run, failed/ and cancelled/ those that came to nothing, with the reason and all
         that was printed; files are named by recipe, seed and a digest of the run. .at_work/ what is being trained,
         gone after; with keep_weights it is runs/, and stays.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import SettingError
from ..training.marked_yaml import dump_yaml
from ..training.output import held
from .comparison import Comparison, Failure
from .results import SCHEMA_VERSION, MetaInfo, Own, Result, RunInfo, Status, TrainInfo, read_all
from .suite import Case, Suite
from .summary import Asked, compare_results

RESULTS, FAILED, CANCELLED, AT_WORK, KEPT = "results", "failed", "cancelled", ".at_work", "runs"
PATIENCE = 10.0  # seconds a run gets to end when asked
REFUSED_BY_NONE = ("seed", "learning_rate", "weight_decay")  # of train; what is prepared is the same whatever they are

Event = tuple[Any, ...]
"""A word for what happened, the case, and more: ("checking"|"started"|"finished"|"failed"|"cancelled", case, ...),
("step", case, number, of), ("stage", case, text) or ("note", case, text), each text once.
"""


class Store:
    """The folder of a suite. Reading it checks every file.

    runs: where runs are made.
    """

    def __init__(self, suite: Suite):
        self.folder = Path(suite.output_dir)
        self.runs = self.folder / (KEPT if suite.keep_weights else AT_WORK)

    def results(self) -> dict[str, Result]:
        """Finished runs by digest.

        Raises SettingError for a file that is no result, or not any more.
        """
        return _by_digest(read_all(self.folder / RESULTS))

    def failures(self) -> dict[str, Result]:
        """Runs that failed, by digest; the last of each."""
        return _by_digest(read_all(self.folder / FAILED))

    def clear(self) -> None:
        """Remove what runs have left that are not to be kept, of a comparison that was killed as well."""
        shutil.rmtree(self.folder / AT_WORK, ignore_errors=True)

    def keep(self, case: Case, result: Result) -> None:
        """Write a finished run."""
        result.write(self.folder / RESULTS / f"{case.file}.json")

    def keep_failure(self, case: Case, reason: str, status: Status) -> None:
        """Write down what came to nothing, beside what did so before."""
        folder = self.folder / (FAILED if status == "failed" else CANCELLED)
        place, count = folder / f"{case.file}.json", 1
        while place.exists():
            count += 1
            place = folder / f"{case.file}--{count}.json"
        log = self.runs / f"{case.file}.log"
        if log.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, place.with_suffix(".log"))
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        settings = case.settings
        Result(
            run_info=RunInfo(
                created_at=now, total_time=0.0, experiment_name=f"{case.name}/seed{case.seed}", error_msg=reason
            ),
            train_info=TrainInfo(status=status),
            meta_info=MetaInfo(model_info={"name": settings.model.name}),
            shoestring=Own(
                schema_version=SCHEMA_VERSION,
                task=settings.task,
                name=case.name,
                seed=case.seed,
                digest=case.digest,
                of_all_seeds=case.of_all_seeds,
                run_file=settings.to_yaml(),
                recipe=dump_yaml(settings.recipe),
            ),
        ).write(place)


def _by_digest(results: Sequence[Result]) -> dict[str, Result]:
    """The newest of each."""
    results = sorted(results, key=lambda result: result.run_info.created_at)
    return {result.shoestring.digest: result for result in results if result.shoestring is not None}


@dataclass
class _Running:
    """A process at work, and what was heard of it."""

    cases: list[Case]
    process: Any
    connection: Connection
    ended: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class State:
    """What of a suite is there: results and failures by digest, and cases that are still to run."""

    results: dict[str, Result]
    failures: dict[str, Result]
    to_do: tuple[Case, ...]


def state_of(suite: Suite, *, retry_failed: bool = False) -> State:
    """What is finished, has failed, and is to do: what failed only if asked, what stands under two names once."""
    store = Store(suite)
    results, failures = store.results(), store.failures()
    known = results.keys() | (set() if retry_failed else failures.keys())
    to_do = {case.digest: case for case in reversed(suite.cases) if case.digest not in known}
    return State(results, failures, tuple(case for case in suite.cases if to_do.get(case.digest) is case))


def run_suite(
    suite: Suite,
    *,
    jobs: int = 1,
    retry_failed: bool = False,
    check: bool = True,
    on_event: Callable[[Event], None] = lambda event: None,
) -> None:
    """Run what is not finished, `jobs` at a time; results are written as they come.

    check: first load data and model of every recipe and attach it, so that all that cannot work is told before the
    first run. on_event: told of all that happens.

    Raises SettingError with all such problems at once; KeyboardInterrupt once running processes have ended.
    """
    if jobs < 1:
        raise SettingError(f"jobs must be at least 1, got {jobs}.")
    store = Store(suite)
    with held(store.folder, "comparison"):
        state = state_of(suite, retry_failed=retry_failed)
        store.clear()
        if not state.to_do:
            return
        context = _context()
        if check:
            _check(suite, store, state.to_do, jobs, context, on_event)
        _run_all(suite, store, list(state.to_do), jobs, context, on_event)


def check_suite(suite: Suite, *, jobs: int = 1, on_event: Callable[[Event], None] = lambda event: None) -> None:
    """Load data and model of every recipe and attach it, whether it is finished or not, `jobs` at a time; nothing is
    trained.

    Raises SettingError with all that cannot work at once.
    """
    store = Store(suite)
    with held(store.folder, "comparison"):
        try:
            _check(suite, store, suite.cases, jobs, _context(), on_event)
        finally:
            store.clear()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preloaded"])
    return context


def _start(
    suite: Suite,
    store: Store,
    cases: list[Case],
    context: Any,
    *,
    jobs: int = 1,
    fits_only: bool = False,
) -> _Running:
    from .worker import Order, work

    ours, theirs = context.Pipe(duplex=False)
    order = Order(
        cases=tuple(cases),
        budget=suite.budget,
        extras=suite.extras,
        folder=str(store.runs.absolute()),
        split=suite.split,
        quality=suite.quality,
        target=suite.target,
        keep_weights=suite.keep_weights,
        threads=_threads(jobs),
        jobs=jobs,
        fits_only=fits_only,
    )
    process = context.Process(target=work, args=(order, theirs))
    process.start()
    theirs.close()
    return _Running(cases, process, ours)


def _heard(running: _Running) -> tuple[Any, ...] | None:
    """The next message; None once the process has nothing more to say."""
    try:
        message: tuple[Any, ...] = running.connection.recv()
    except (EOFError, OSError):  # the latter where it was ended in the middle of a word
        running.process.join(PATIENCE)
        return None
    return message


def _end(running: _Running) -> None:
    """End a process of ours."""
    running.process.terminate()
    running.process.join(PATIENCE)
    if running.process.is_alive():
        running.process.kill()
        running.process.join()


def _died(code: int | None) -> str:
    """What to say of a process that ended without a word."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        why = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"The process was ended by {name}{why}."
    return f"The process ended with exit code {code} and no message."


def _check(
    suite: Suite, store: Store, cases: Sequence[Case], jobs: int, context: Any, on_event: Callable[[Event], None]
) -> None:
    """Prepare one of all cases that are prepared alike, `jobs` at a time, and tell what is wrong with any."""
    alike: dict[str, list[Case]] = {}
    for case in cases:
        alike.setdefault(_prepared_as(case), []).append(case)
    left = [same[0] for same in alike.values()]
    shares = [left[start::jobs] for start in range(min(jobs, len(left)))]
    problems: dict[str, str] = {}
    told: set[str] = set()
    running: dict[Connection, _Running] = {}

    def start(share: list[Case]) -> None:
        started = _start(suite, store, share, context, jobs=jobs, fits_only=True)
        running[started.connection] = started
        on_event(("checking", share[0]))

    try:
        for share in shares:
            start(share)
        while running:
            for connection in wait(list(running)):
                one = running[connection]  # type: ignore[index]
                message = _heard(one)
                case, *share = one.cases
                if message is None or message[0] == "failed":
                    reason = message[2] if message else _died(one.process.exitcode)
                    problems |= {same.name: reason for same in alike[_prepared_as(case)]}
                else:
                    for note in message[2]:
                        if note not in told:
                            told.add(note)
                            on_event(("note", case, note))
                one.cases = share
                if share and message is not None:
                    on_event(("checking", share[0]))
                    continue
                del running[connection]  # type: ignore[arg-type]
                one.process.join(PATIENCE)  # by itself, or what it holds of the system is left behind
                _end(one)
                if share:
                    start(share)
    finally:
        for one in running.values():
            _end(one)
    if problems:
        names = dict.fromkeys(case.name for case in cases)
        lines = "\n".join(f"  {name}: {problems[name]}" for name in names if name in problems)
        raise SettingError(f"{len(problems)} of {len(names)} recipes cannot run; nothing was started:\n{lines}")


def _prepared_as(case: Case) -> str:
    """Of its settings those that data, model, recipe or trainer could refuse."""
    train = {key: value for key, value in case.settings.train.items() if key not in REFUSED_BY_NONE}
    return case.settings.model_copy(update={"train": train}).to_yaml()


def _threads(jobs: int) -> int | None:
    """Of each process, where several share the machine."""
    return max(1, len(os.sched_getaffinity(0)) // jobs) if jobs > 1 and hasattr(os, "sched_getaffinity") else None


def _run_all(
    suite: Suite,
    store: Store,
    to_do: list[Case],
    jobs: int,
    context: Any,
    on_event: Callable[[Event], None],
) -> None:
    running: dict[Connection, _Running] = {}
    try:
        while to_do or running:
            while to_do and len(running) < jobs:
                started = _start(suite, store, [to_do.pop(0)], context, jobs=jobs)
                running[started.connection] = started
                on_event(("started", started.cases[0]))
            for connection in wait(list(running)):
                one = running[connection]  # type: ignore[index]
                case = one.cases[0]
                message = _heard(one)
                if message is None:
                    del running[connection]  # type: ignore[arg-type]
                    if case.digest not in one.ended:
                        reason = _died(one.process.exitcode)
                        store.keep_failure(case, reason, "failed")
                        on_event(("failed", case, reason))
                elif message[0] == "done":
                    one.ended.add(case.digest)
                    store.keep(case, Result.model_validate(message[2]))
                    on_event(("finished", case, message[2]["shoestring"]["values"]))
                elif message[0] == "failed":
                    one.ended.add(case.digest)
                    store.keep_failure(case, message[2], "failed")
                    on_event(("failed", case, message[2]))
                else:
                    on_event((message[0], case, *message[1:]))
    finally:
        for one in running.values():
            _end(one)
            if one.cases[0].digest not in one.ended:
                store.keep_failure(one.cases[0], "Interrupted.", "cancelled")
                on_event(("cancelled", one.cases[0]))
        store.clear()


def comparison_of(suite: Suite, command: str = "", others: Sequence[Result] = ()) -> Comparison:
    """What the results that are there come to. others: results of other suites or of peft to put beside them."""
    state = state_of(suite)
    found, failures = [], []
    for case in suite.cases:
        if case.digest in state.results:
            found.append(_renamed(state.results[case.digest], case))
        elif case.digest in state.failures:
            failures.append(Failure(case.name, case.seed, state.failures[case.digest].run_info.error_msg))
    first = suite.cases[0].settings
    asked = Asked(
        name=suite.name,
        task=suite.task,
        model=first.model.name,
        names=tuple(suite.names),
        quality=suite.quality,
        baseline=suite.baseline,
        target=suite.target,
        extras=tuple(measure for extra in suite.extras for measure in extra.measures),
        command=command,
    )
    return compare_results(asked, [*found, *others], failures, missing=len(suite.cases) - len(found) - len(failures))


def _renamed(result: Result, case: Case) -> Result:
    """A result under the name that its recipe has now."""
    assert result.shoestring is not None
    return result.model_copy(update={"shoestring": result.shoestring.model_copy(update={"name": case.name})})
