"""How well methods train beside a baseline at equal steps: runs that can be stopped and resumed, and rows made of them.

Everything is at its default but the learning rate, in mixed precision (bfloat16) with linear decay. The learning rate
is looked for at the first seed, for all in the same way: of 0.001 and 0.004 the one of less validation loss, then on in
steps of 4 as long as that falls. The other seeds are trained with the best one. Where a part has a longer training,
all seeds are repeated in it at half of that rate, and at twice that rate where asked for; that of least validation loss
counts. Rows say what the last quarter still took off the held-out loss: little is left of the learning rate there, so
that it tells whether these steps were used up, and not what more of them would do. Keys of runs are name|rate|seed.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from result import Row, print_table, read_rows, read_runs, rows_beside, write
from runs import Outcome, finish, run, word_problems
from shoestring import assets

FIRST_RATES, FURTHER, LEAST_RATE, MOST_RATE = (1e-3, 4e-3), 4, 1e-5, 0.3
SEEDS = [0, 1, 2]
LONGER = " longer"


@dataclass(frozen=True)
class Part:
    """A training that methods are compared on.

    split, measure: what rows show. apart: how much worse than the baseline's a mean may be, in points of accuracy or as
    a share of the loss. longer: over `train` in the longer training; there is none where it is empty.
    """

    model: str
    task: str
    data: Callable[[], dict[str, Any]]
    train: dict[str, Any]
    split: str
    measure: str
    apart: float
    longer: Mapping[str, Any] = field(default_factory=dict)


REVIEWS = Part(
    "minilm",
    "text-classification",
    lambda: {"train": "packaged:rotten-tomatoes", "max_length": 40},
    {"max_steps": 100, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64},
    "test",
    "accuracy",
    0.015,
)
WORD_PROBLEMS = Part(
    "smollm2",
    "causal-lm",
    lambda: {**word_problems(), "chat": True, "max_length": 128, "max_eval_rows": 64},
    {"max_steps": 40, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 8},
    "validation",
    "loss",
    0.03,
)


@dataclass(frozen=True)
class Contestant:
    """A recipe, and the name of the contestant that it stands beside, or the names of several.

    beside: empty for one that is a baseline only. model: as in a run file; None for that of the part. apart: as in the
    part; None for the part's own. train: over the settings of the part. goal: False where rows only tell.
    also: rates to try beside the first ones, for those that these make diverge.
    """

    recipe: list[Any]
    beside: str | tuple[str, ...] = ""
    model: Callable[[], Any] | None = None
    apart: float | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    goal: bool = True
    also: tuple[float, ...] = ()

    @property
    def baselines(self) -> tuple[str, ...]:
        """The names in `beside`."""
        return tuple(filter(None, (self.beside,) if isinstance(self.beside, str) else self.beside))


def settings_of(
    part: Part, contestant: Contestant, learning_rate: float, seed: int, longer: bool = False
) -> dict[str, Any]:
    """The run file of one training."""
    train = {**part.train, "learning_rate": learning_rate, "bf16": True, "eval_strategy": "no", "seed": seed}
    train |= {**contestant.train, **(part.longer if longer else {})}
    if longer:
        quarter = train["max_steps"] // 4
        train |= {"eval_strategy": "steps", "eval_steps": quarter, "eval_delay": 3 * quarter}
    model = f"packaged:{part.model}" if contestant.model is None else contestant.model()
    return {"model": model, "task": part.task, "data": part.data(), "recipe": contestant.recipe, "train": train}


def measured(settings: dict[str, Any]) -> Outcome:
    outcome = run(settings)
    kept = {key: outcome[key] for key in ("quality", "trained_parameters", "step_seconds")}
    return kept | ({"curve": outcome["curve"]} if outcome["curve"] else {})


def rate_to_use(done: Mapping[str, Outcome], name: str, also: Sequence[float] = ()) -> tuple[float, bool]:
    """The learning rate to try next at the first seed; or the best one, and True, once its neighbours were tried.

    also: to try beside the first ones.
    """
    losses: dict[str, float] = {}
    for key, outcome in done.items():
        trained, tried, seed = key.split("|")
        if trained == name and int(seed) == SEEDS[0]:
            losses[tried] = _validation_loss(outcome)
    for rate in (*FIRST_RATES, *also):
        if f"{rate:g}" not in losses:
            return rate, False
    best = float(min(losses, key=lambda tried: losses[tried]))
    for rate in (best / FURTHER, best * FURTHER):
        if f"{rate:g}" not in losses and LEAST_RATE < rate < MOST_RATE:
            return rate, False
    return best, True


def _validation_loss(outcome: Outcome) -> float:
    loss = float(outcome["quality"]["validation"]["loss"])
    return math.inf if math.isnan(loss) else loss


def _planned(
    part: Part,
    contestants: Mapping[str, Contestant],
    done: Mapping[str, Outcome],
    seed: int,
    twice: Collection[str],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The runs of one seed; further ones by what the last have come to."""
    for name, contestant in contestants.items():
        rate, found = rate_to_use(done, name, contestant.also)
        while seed == SEEDS[0] and not found:
            yield f"{name}|{rate:g}|{seed}", settings_of(part, contestant, rate, seed)
            rate, found = rate_to_use(done, name, contestant.also)
        if found and seed != SEEDS[0]:
            yield f"{name}|{rate:g}|{seed}", settings_of(part, contestant, rate, seed)
    for name, contestant in contestants.items() if part.longer else ():
        best, found = rate_to_use(done, name)
        for rate in (best / 2, *([2 * best] if name in twice else [])) if found else ():
            yield f"{name}{LONGER}|{rate:g}|{seed}", settings_of(part, contestant, rate, seed, longer=True)


def outcomes_of(done: Mapping[str, Outcome], name: str, longer: bool = False) -> tuple[float, dict[int, Outcome]]:
    """The learning rate to compare at, and the finished seeds at it.

    longer: of the rates with most seeds the one of least validation loss in the mean.
    """
    by_rate: dict[float, dict[int, Outcome]] = {}
    for key, outcome in done.items():
        trained, tried, seed = key.split("|")
        if trained == (f"{name}{LONGER}" if longer else name):
            by_rate.setdefault(float(tried), {})[int(seed)] = outcome
    if not longer:
        rate, found = rate_to_use(done, name)
        return rate, by_rate[rate] if found else {}

    def rank(rate: float) -> tuple[int, float]:
        losses = [_validation_loss(outcome) for outcome in by_rate[rate].values()]
        return -len(losses), statistics.mean(losses)

    best = min(by_rate, key=rank, default=0.0)
    return best, by_rate.get(best, {})


def result(part: Part, outcome: Outcome) -> float:
    """What a training came to, in the part's measure."""
    return float(outcome["quality"][part.split][part.measure])


def compared(title: str, part: Part, contestants: Mapping[str, Contestant], done: Mapping[str, Outcome]) -> list[Row]:
    """Mean and spread of each that has finished seeds in common with a baseline; goals where all are finished."""
    rows = []
    for name, contestant in contestants.items():
        for base in contestant.baselines:
            for longer in (False, True) if part.longer else (False,):
                rows += _compared(title, part, contestant, name, base, done, longer)
    return rows


def _compared(
    title: str, part: Part, contestant: Contestant, name: str, base: str, done: Mapping[str, Outcome], longer: bool
) -> list[Row]:
    rates, both = zip(*(outcomes_of(done, one, longer) for one in (name, base)), strict=True)
    if not (common := [seed for seed in SEEDS if all(seed in some for some in both)]):
        return []
    values = [[result(part, some[seed]) for seed in common] for some in both]
    means = [statistics.mean(some) for some in values]
    label = f"{title}{', longer' if longer else ''}, {name} beside {base}, {len(common)} of {len(SEEDS)} seeds"
    wanted = contestant.goal and len(common) == len(SEEDS)
    goal, holds = _goal(part, contestant, *means) if wanted else ("", None)
    rows = [Row(f"{label}: {part.measure}", *means, goal, holds)]
    if len(common) > 1:
        rows.append(Row(f"{label}: standard deviation of {part.measure}", *(statistics.stdev(some) for some in values)))
    if longer:
        taken = (statistics.mean(_last_quarter(some[seed]["curve"]) for seed in common) for some in both)
        rows.append(Row(f"{label}: share of the held-out loss that the last quarter took", *taken))
    return [*rows, Row(f"{label}: learning rate", *rates)]


def _last_quarter(curve: list[list[float]]) -> float:
    """What the last evaluation is below that a quarter of the steps before, as a share of it."""
    (_, before), (_, after) = curve[-2:]
    return 1 - after / before


def _goal(part: Part, contestant: Contestant, mean: float, base: float) -> tuple[str, bool]:
    apart = part.apart if contestant.apart is None else contestant.apart
    if part.measure == "loss":
        return f"ratio <= {1 + apart:g}", mean <= (1 + apart) * base
    return f"at most {apart} lower", mean >= base - apart


@dataclass
class Trainings:
    """The trainings of a benchmark, and the JSON file that they are kept in with all rows.

    contestants: those of a part, all or with these names, each after what it stands beside. settings: for the file.
    """

    parts: Mapping[str, Part]
    contestants: Callable[[str, Collection[str] | None], Mapping[str, Contestant]]
    file: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.runs: dict[str, dict[str, Outcome]] = read_runs(self.file)

    def rows(self) -> list[Row]:
        """Those of finished trainings."""
        return [
            row
            for part, done in self.runs.items()
            for row in compared(part, self.parts[part], self.contestants(part, None), done)
        ]

    def keep(self, rows: Sequence[Row] = ()) -> None:
        """Write the file: these rows in place of others of their names, and those of trainings, made again."""
        kept = [row for row in rows_beside(rows, self.file) if not row.name.startswith(tuple(self.parts))]
        settings = {"first_learning_rates": FIRST_RATES, **self.settings}
        write([*kept, *rows, *self.rows()], self.file, SEEDS, self.runs, **settings)

    def take(self, files: Sequence[str]) -> None:
        """Take the runs of other files of this benchmark that are not in its own, as when several machines train."""
        for part, taken in ((part, done) for file in files for part, done in read_runs(file).items()):
            self.runs[part] = taken | self.runs.get(part, {})
        self.keep()

    def finish(
        self, parts: Collection[str], names: Collection[str], seeds: Sequence[int], twice: Collection[str] = ()
    ) -> None:
        """Train what is not there yet; the file is written after each run.

        twice: contestants whose longer training is also made at twice the learning rate found.
        """
        for seed in seeds:
            for part in (part for part in self.parts if part in parts):
                done = self.runs.setdefault(part, {})
                planned = _planned(self.parts[part], self.contestants(part, names), done, seed, twice)
                finish(planned, done, measured, self.keep)


def command(description: str, parts: Collection[str], names: Collection[str], file: str) -> argparse.ArgumentParser:
    """The options that these benchmarks share.

    parts, names: what `--only` and `--methods` may name. file: where `--json` is not given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), metavar="PART")
    parser.add_argument("--methods", nargs="+", choices=names, default=list(names), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the runs to do now")
    parser.add_argument("--threads", type=int, default=1)
    take = "take the trainings of other files of this benchmark into its own, and do nothing else"
    parser.add_argument("--take", nargs="+", metavar="FILE", default=[], help=take)
    parser.add_argument("--json", metavar="FILE", default=file)
    return parser


def do(
    parser: argparse.ArgumentParser,
    packages: Sequence[str],
    of_options: Callable[[argparse.Namespace], Trainings],
    costs: Callable[[argparse.Namespace, Trainings], None],
) -> None:
    """A benchmark from its options to the table: `costs` first, then the trainings that are not there yet."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install(packages)
    trainings = of_options(options)
    if options.take:
        trainings.take(options.take)
    else:
        costs(options, trainings)
        trainings.finish(options.only, options.methods, options.seeds, getattr(options, "twice", ()))
    print_table(read_rows(options.json), parser.prog)
