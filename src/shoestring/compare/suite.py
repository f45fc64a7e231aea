"""The suite file: one base run, recipes to compare on it, seeds, a budget, and what to measure.

    base: first.yaml                    # a run file, or its content; without recipe and output_dir
    recipes:
      full tuning: {recipe: [], train: {learning_rate: 1.0e-4}}
      lora: [{lora: {r: 8, target_modules: all-linear}}]
      lora by rank:
        recipe: [{lora: {target_modules: all-linear}}]
        grid: {recipe.lora.r: [2, 32], train.learning_rate: [1.0e-3, 4.0e-3]}
    seeds: [0, 1, 2]
    budget: {steps: 200}                # or seconds, or tokens; the same for all
    baseline: lora
    measure: [latency]                  # of a language model also {forgetting: {data: other.jsonl}}
    output_dir: comparisons/first

A recipe is what a run file's `recipe` holds, or a mapping with `recipe` and with sections of the run file that are put
over those of the base. All problems of all recipes are told at once.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..assets import CATALOGUE, ModelAsset
from ..errors import SettingError, did_you_mean
from ..recipe import Recipe
from ..technique import plain
from ..training.data import PACKAGED
from ..training.explained import Problem, Sections, explain, told
from ..training.marked_yaml import MarkedYaml, Place, dump_yaml, parse_marked_yaml, read_marked_yaml
from ..training.overrides import apply_override
from ..training.settings import RunSettings
from ..training.tasks import TASKS
from ..training.train_fields import shown
from .extras import EXTRAS, Extra
from .measures import quality_measure

SECTIONS = ("model", "data", "train")
OVER_BASE = (*SECTIONS, "early_stopping_patience")  # what a recipe may bring of a run file
LONGEST_NAME = 100  # characters of a recipe's name in those of files
LENGTHS = ("max_steps", "num_train_epochs")


class Budget(BaseModel):
    """How long each run trains: one of steps, seconds (of training, evaluations left out) and tokens."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)
    tokens: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"give one of steps, seconds and tokens; {len(given)} are given")
        return self


class _SuiteFile(BaseModel):
    """What stands in the file, before recipes are put over the base."""

    model_config = ConfigDict(extra="forbid", strict=True)

    base: str | dict[str, Any] = Field(description="a run file, or what it holds, without recipe and output_dir")
    recipes: dict[str, Any] = Field(min_length=1, description="recipes by name, as `recipe` of a run file has them")
    seeds: list[int] = Field(
        default_factory=lambda: [0, 1, 2], min_length=1, description="one run of each recipe a seed"
    )
    budget: Budget | None = Field(None, description="steps, seconds or tokens of each run; empty: as the base says")
    baseline: str | None = Field(None, description="the recipe to compare the others with; empty: the first one")
    quality: str | None = Field(None, description="measure to rank by; empty: what the task is chosen by")
    split: Literal["validation", "test"] | None = Field(
        None, description="rows to compare on; empty: test where there is such a split, or else validation"
    )
    target: float | None = Field(None, description="quality that the time to reach it is told for")
    measure: list[Any] = Field(default_factory=list, description="what else to measure, by name or {name: settings}")
    keep_weights: bool = Field(False, description="keep what each run has trained, and its checkpoints")
    output_dir: str = Field("", description="folder for results and reports")

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("seeds must be different whole numbers from 0")
        return seeds


@dataclass(frozen=True)
class Case:
    """One run of a suite.

    digest: of all that shapes its numbers, so that a finished one is known again. of_all_seeds: the same without the
    seed.
    """

    name: str
    seed: int
    settings: RunSettings
    digest: str
    of_all_seeds: str

    @property
    def file(self) -> str:
        """What its files are called, without an ending."""
        name = re.sub(r"[^A-Za-z0-9_.=-]+", "-", self.name)[:LONGEST_NAME].strip("-")
        return f"{name}--seed{self.seed}--{self.digest[:10]}"


@dataclass(frozen=True)
class Suite:
    """A suite, checked. Make one with `load` or `from_dict`."""

    name: str
    cases: tuple[Case, ...]
    seeds: tuple[int, ...]
    baseline: str
    quality: str
    output_dir: str
    budget: Budget | None = None
    split: str | None = None
    target: float | None = None
    extras: tuple[Extra, ...] = field(default_factory=tuple)
    keep_weights: bool = False

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> Self:
        """The suite in a file, with `key=value` put over its values; output_dir is comparisons/NAME for NAME.yaml.

        Raises SettingError with all problems of all recipes, each with file and line.
        """
        path = Path(path)
        marked = read_marked_yaml(path)
        if not isinstance(marked.values, dict):
            raise SettingError(f"{path} must hold keys with values; a suite has at least base and recipes.")
        for override in overrides:
            apply_override(marked, override)
        return cls._checked(marked, path.stem, path.parent)

    @classmethod
    def from_dict(cls, values: dict[str, Any], name: str = "suite") -> Self:
        """The suite in a mapping of the same form as the file.

        Raises SettingError with all problems of all recipes.
        """
        marked = parse_marked_yaml(dump_yaml(values), "suite", lines=False)
        if not isinstance(marked.values, dict):
            raise SettingError(f"A suite must be a dict with base and recipes, got {shown(marked.values)}.")
        return cls._checked(marked, name, Path())

    @classmethod
    def _checked(cls, marked: MarkedYaml, name: str, folder: Path) -> Self:
        try:
            file = _SuiteFile.model_validate(marked.values)
        except ValidationError as error:
            sections: Sections = {(): _SuiteFile, ("budget",): Budget}
            raise SettingError(
                told([explain(found, marked, sections) for found in error.errors()], marked.source)
            ) from None
        base = _base(marked, folder)
        problems: list[Problem] = []
        extras = _extras(marked, problems)
        if file.budget is not None:
            problems += _own_lengths(marked)
        runs: dict[str, RunSettings] = {}
        refused: dict[str, list[str]] = {}
        for recipe in file.recipes:
            for variant, values in _variants(marked, base, str(recipe), problems):
                if variant in runs:
                    problems.append((marked.place(("recipes", recipe)), f"Two recipes are called {variant!r}."))
                try:
                    runs[variant] = RunSettings.from_marked(_with_budget(values, file), folder)
                except SettingError as error:
                    refused.setdefault(str(error), []).append(variant)
        for text, variants in refused.items():  # one of the base is all recipes'
            line = marked.place(("recipes", *(variants if len(variants) == 1 else ()))).line
            problems.append((Place(", ".join(variants), line), text))  # the text says where
        tasks = {run.task for run in runs.values()}
        for run in runs.values() if not problems else ():
            problems += _fits(run, file, extras, marked)
        baseline = file.baseline if file.baseline is not None else next(iter(runs), "")
        if not problems and baseline not in runs:
            problems.append(
                (marked.place(("baseline",)), f"baseline {baseline!r} is none. {did_you_mean(baseline, runs)}")
            )
        if problems:
            raise SettingError(told(list(dict.fromkeys(problems)), marked.source))
        cases = [_case(name, run, seed, file, extras) for name, run in runs.items() for seed in file.seeds]
        return cls(
            name=name,
            cases=tuple(cases),
            seeds=tuple(file.seeds),
            baseline=baseline,
            quality=file.quality or TASKS[tasks.pop()].metric,
            output_dir=os.path.expanduser(file.output_dir or f"comparisons/{name}"),
            budget=file.budget,
            split=file.split,
            target=file.target,
            extras=tuple(extras),
            keep_weights=file.keep_weights,
        )

    @property
    def names(self) -> list[str]:
        """The recipes."""
        return list(dict.fromkeys(case.name for case in self.cases))

    @property
    def task(self) -> str:
        """The task of all runs."""
        return self.cases[0].settings.task


def _base(marked: MarkedYaml, folder: Path) -> MarkedYaml:
    """The base run; of a file where the suite names one, looked for beside the suite first."""
    base = marked.below("base")
    if isinstance(base.values, str):
        path = Path(base.values).expanduser()
        base = read_marked_yaml(folder / path if (folder / path).is_file() else path)
        if not isinstance(base.values, dict):
            raise SettingError(f"{base.source} must hold keys with values (model: ..., task: ..., data: ...).")
        for key in ("recipe", "output_dir"):  # of the run that it is by itself
            base.values.pop(key, None)
    for key in ("recipe", "output_dir"):
        if key in base.values:
            raise SettingError(f"{base.place((key,)).where}: the base run has {key}, which each recipe brings itself.")
    return base


def _extras(marked: MarkedYaml, problems: list[Problem]) -> list[Extra]:
    extras: list[Extra] = []
    for index, entry in enumerate(marked.values.get("measure") or ()):
        place = marked.place(("measure", index))
        name, settings = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
        if not isinstance(name, str) or name not in EXTRAS:
            hint = did_you_mean(str(name), EXTRAS)
            problems.append(
                (place, f"measure.{index} must be a name or {{name: settings}}, got {shown(entry)}. {hint}")
            )
            continue
        try:
            extras.append(EXTRAS[name].model_validate(settings or {}))
        except ValidationError as error:
            sections: Sections = {(): EXTRAS[name]}
            inner = MarkedYaml(marked.source, settings, {(): place})
            problems += [
                (where, f"measure.{name}: {text}")
                for where, text in (explain(found, inner, sections) for found in error.errors())
            ]
    if len({extra.name for extra in extras}) < len(extras):
        problems.append((marked.place(("measure",)), "measure names something twice."))
    return extras


def _variants(
    marked: MarkedYaml, base: MarkedYaml, recipe: str, problems: list[Problem]
) -> Iterator[tuple[str, MarkedYaml]]:
    """The run of a recipe, or one for each point of its grid, with names that tell them apart."""
    place = marked.place(("recipes", recipe))
    value = marked.values["recipes"][recipe]
    run = MarkedYaml(base.source, copy.deepcopy(base.values), dict(base.places))
    if not isinstance(value, dict):
        run.replace(("recipe",), marked.below("recipes", recipe))
        yield recipe, run
        return
    if unknown := [key for key in value if key not in ("recipe", "grid", *OVER_BASE)]:
        hint = did_you_mean(str(unknown[0]), ("recipe", "grid", *OVER_BASE))
        problems.append((place, f"recipes.{recipe} has an unknown key {unknown[0]!r}. {hint}"))
        return
    if "recipe" not in value:
        problems.append((place, f"recipes.{recipe} has no recipe; give one, [] for full fine-tuning."))
        return
    run.replace(("recipe",), marked.below("recipes", recipe, "recipe"))
    for section in OVER_BASE:
        if section not in value or (section in SECTIONS and value[section] is None):  # `train:` with nothing after it
            continue
        over = marked.below("recipes", recipe, section)
        if isinstance(over.values, dict) and isinstance(run.values.get(section), str):
            run.values[section] = {"name": run.values[section]}
        if isinstance(over.values, dict) and isinstance(run.values.get(section), dict):
            for key in over.values:
                run.replace((section, key), over.below(key))
        else:
            run.replace((section,), over)
    grid = value.get("grid")
    if grid is None:
        yield recipe, run
        return
    if not isinstance(grid, dict) or not all(isinstance(values, list) and values for values in grid.values()):
        problems.append((place, f"recipes.{recipe}.grid must be a mapping from settings to lists of values."))
        return
    for point in itertools.product(*grid.values()):
        variant = MarkedYaml(run.source, copy.deepcopy(run.values), dict(run.places))
        named = []
        for key, chosen in zip(grid, point, strict=True):
            try:
                apply_override(variant, f"{key}={json.dumps(chosen)}")
            except SettingError as error:
                problems.append((place, f"recipes.{recipe}.grid: {error}"))
                return
            named.append(
                f"{str(key).rsplit('.', 1)[-1]}={chosen:g}"
                if isinstance(chosen, float)
                else f"{str(key).rsplit('.', 1)[-1]}={chosen}"
            )
        yield f"{recipe}, {', '.join(named)}", variant


def _own_lengths(marked: MarkedYaml) -> Iterator[Problem]:
    """Lengths that recipes bring, where all have the budget of the suite."""
    for recipe, value in marked.values["recipes"].items():
        sections = [value.get(key) for key in ("train", "grid")] if isinstance(value, dict) else []
        keys = [str(key).removeprefix("train.") for section in sections if isinstance(section, dict) for key in section]
        for name in dict.fromkeys(key for key in keys if key in LENGTHS):
            yield marked.place(("recipes", recipe)), f"recipes.{recipe} sets train.{name}, which the budget decides."


def _with_budget(run: MarkedYaml, file: _SuiteFile) -> MarkedYaml:
    """The run with the suite's length in place of its own; seconds and tokens are known once it is ready."""
    run.values["output_dir"] = file.output_dir or "comparisons"
    if run.values.get("train") is None:
        run.values["train"] = {}
    if file.budget is None or not isinstance(run.values["train"], dict):
        return run
    for name in LENGTHS:
        run.values["train"].pop(name, None)
    if file.budget.steps is not None:
        run.values["train"]["max_steps"] = file.budget.steps
    return run


def _fits(run: RunSettings, file: _SuiteFile, extras: list[Extra], marked: MarkedYaml) -> Iterator[Problem]:
    """What of the suite does not go with the task of a run."""
    task = TASKS[run.task]
    refused = False
    for extra in extras:
        try:
            extra.check(run)
        except SettingError as error:
            refused = True
            yield marked.place(("measure",)), f"measure.{extra.name}: {error}"
    if file.quality is not None and not refused:
        measures = {name: quality_measure(name) for name in task.measures_of(run)}
        measures |= {measure.name: measure for extra in extras for measure in extra.measures}
        if file.quality not in measures:
            known = did_you_mean(file.quality, measures)
            yield marked.place(("quality",)), f"quality {file.quality!r} is no measure of {run.task}. {known}"
        elif measures[file.quality].better is None:
            yield (
                marked.place(("quality",)),
                f"quality {file.quality!r} ranks nothing: which way is better is unknown.",
            )
    if file.target is not None and run.train.get("eval_strategy", "epoch") == "no":
        yield marked.place(("target",)), "target needs evaluations on the way: set train.eval_strategy and eval_steps."
    if file.target is not None and file.quality not in (None, task.metric):
        yield (
            marked.place(("target",)),
            f"target is told for {task.metric}, which is evaluated on the way; leave quality out.",
        )
    if file.budget is not None and file.budget.tokens is not None and task.takes_images:
        yield marked.place(("budget",)), f"budget.tokens: {run.task} has no tokens; give steps or seconds."


def _case(name: str, run: RunSettings, seed: int, file: _SuiteFile, extras: list[Extra]) -> Case:
    settings = run.model_copy(update={"train": {**run.train, "seed": seed}})
    shaping = {
        "model": settings.model.model_dump(),
        "task": settings.task,
        "data": settings.data.model_dump(),
        "recipe": Recipe.from_list(settings.recipe).to_list(),
        "train": {key: plain(value) for key, value in settings.train.items() if key != "seed"},
        "early_stopping_patience": settings.early_stopping_patience,
        "budget": file.budget.model_dump(exclude_none=True) if file.budget else None,
        "split": file.split,
        "measure": {extra.name: extra.model_dump() for extra in extras},
        "sources": {source: _content(source) for source in _sources(settings, extras)},
    }
    return Case(name, seed, settings, _digest({**shaping, "seed": seed}), _digest(shaping))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _sources(settings: RunSettings, extras: list[Extra]) -> list[str]:
    data = settings.data
    named = (settings.model.name, data.train, data.validation, data.test, *(extra.source for extra in extras))
    fields = [value for value in settings.train.values() if isinstance(value, str) and os.path.isfile(value)]
    return [*(source for source in named if source is not None), *fields]  # such as a chat template


def _content(source: str) -> str:
    """What a local file, a model's folder or a packaged asset holds, in short; nothing of what is elsewhere."""
    if asset := CATALOGUE.get(source.removeprefix(PACKAGED)) if source.startswith(PACKAGED) else None:
        converter = asset.converter_version if isinstance(asset, ModelAsset) else 0
        return _digest([*(file.sha256 for file in asset.files), converter])
    path = Path(source).expanduser()
    if path.is_file():
        return _of_file(path, path.stat().st_mtime_ns)
    if path.is_dir():
        files = sorted(inner for inner in path.rglob("*") if inner.is_file())
        return _digest([(str(file.relative_to(path)), _of_file(file, file.stat().st_mtime_ns)) for file in files])
    return ""


@functools.cache
def _of_file(path: Path, changed: int) -> str:
    """Of what it holds; read once as long as it does not change."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
