"""A comparison as tables and pages show it: recipes with mean and spread over seeds, beside a baseline."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .measures import Measure


@dataclass(frozen=True)
class Spread:
    """A measure over seeds. std: sample standard deviation, None of one seed."""

    mean: float
    std: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """The quality of a recipe less that of the baseline, with the noise of held-out rows and of seeds.

    mean, low, high: in the units of the scores; low to high holds 95 % of the draws. p: two-sided.
    clear: whether zero lies outside. noise: what the interval knows of, "rows and seeds", or one of them.
    """

    mean: float
    low: float
    high: float
    p: float
    clear: bool
    noise: str = "rows and seeds"


@dataclass(frozen=True)
class Compared:
    """One recipe of a comparison.

    recipe: YAML to copy into a run file. run_file: the whole of it, of the first seed. values: by measure; those that a
    recipe does not have are left out. memory: bytes at the peak of a step by part. losses: (step, loss) by seed.
    curve: (seconds of training, value) by seed, of the evaluations on the way.
    front: the measures that the recipe, together with the quality, is on the Pareto front of.
    """

    name: str
    recipe: str
    run_file: str
    seeds: tuple[int, ...]
    values: dict[str, Spread]
    memory: dict[str, int]
    losses: dict[int, list[tuple[int, float]]]
    curve: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    difference: Difference | None = None
    front: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A run that failed, with the reason."""

    name: str
    seed: int
    reason: str


@dataclass(frozen=True)
class Comparison:
    """All that is known of a suite, the best recipe first.

    task, model: as in the run file. quality: the name of the measure that recipes are ranked by, among `measures`,
    which are all that some recipe has, in the order in which they are shown. missing: runs to come. on_the_way: what
    `curve` of recipes is of, which the task is evaluated by during training.
    """

    name: str
    task: str
    model: str
    quality: str
    baseline: str | None
    measures: tuple[Measure, ...]
    recipes: tuple[Compared, ...]
    failures: tuple[Failure, ...] = ()
    missing: int = 0
    machine: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: str = ""
    made_at: str = ""
    on_the_way: Measure | None = None

    def measure(self, name: str) -> Measure:
        """The measure of that name."""
        return next(measure for measure in self.measures if measure.name == name)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)
