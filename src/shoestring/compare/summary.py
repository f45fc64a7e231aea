"""From results of runs to a comparison: mean and spread over seeds, ranks, fronts, and differences to the baseline."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import SettingError
from ..training.tasks import TASKS
from .comparison import Compared, Comparison, Failure
from .measures import COSTS, QUALITIES, Better, Measure, front, pme, ppe, ppt, quality_measure
from .results import Own, Result, values_of_peft
from .statistics import paired_difference, spread

FULL = "[]\n"  # the recipe of full tuning, as YAML


@dataclass(frozen=True)
class Asked:
    """What is to be compared. names: recipes in the order of the suite. extras: measures beside those of every run."""

    name: str
    task: str
    model: str
    names: tuple[str, ...]
    quality: str
    baseline: str | None
    target: float | None = None
    extras: tuple[Measure, ...] = ()
    command: str = ""


def compare_results(
    asked: Asked, results: Sequence[Result], failures: Sequence[Failure] = (), missing: int = 0
) -> Comparison:
    """The comparison of results, the best recipe first; those without the quality to rank by last.

    A result that is there twice counts once. Results of one name are its seeds, unless other settings than the seed
    differ: then each setting is a recipe, in the order in which they come.

    Raises SettingError if no result has that quality and no suite asks for it, neither way of it is better, or a result
    is of another task.
    """
    failed = [result for result in results if result.train_info.status != "success"]
    failures = [*failures, *(Failure(r.name, _seed(r), r.run_info.error_msg) for r in failed)]
    results = [result for result in results if result not in failed]
    check_task(asked.task, results)
    by_name: dict[str, list[Result]] = {name: [] for name in asked.names}
    named = list(_named_apart(results))
    for name, result in named:
        by_name.setdefault(name, []).append(result)
    results = [result for _, result in named]
    better = _measure(asked, asked.quality).better
    memory_of_full: dict[str, float] = {}
    for result in results:
        peak = _values(result, asked).get("peak_bytes") if _recipe(result) == FULL else None
        if peak:
            memory_of_full[_model(result)] = max(peak, memory_of_full.get(_model(result), 0.0))
    first = next(iter(by_name.get(asked.baseline or "", [])), next(iter(results), None))
    recipes = [_compared(asked, name, runs, memory_of_full, first) for name, runs in by_name.items() if runs]
    recipes = [_with_failures(recipe, failures) for recipe in recipes]
    if recipes and not asked.names and not any(asked.quality in recipe.values for recipe in recipes):
        known = sorted({name for recipe in recipes for name in recipe.values})
        raise SettingError(f"No result has the measure {asked.quality!r} to rank by. They have {', '.join(known)}.")
    if recipes and better is None:
        raise SettingError(f"Which way of {asked.quality!r} is better is not known here, so nothing is ranked by it.")
    recipes = _with_differences(asked, recipes, by_name, better)
    measures = _measures(asked, recipes)
    recipes = _with_fronts(asked.quality, better, recipes, measures)
    sign = -1 if better == "higher" else 1
    recipes.sort(key=lambda r: sign * r.values[asked.quality].mean if asked.quality in r.values else math.inf)
    return Comparison(
        name=asked.name,
        task=asked.task,
        model=asked.model,
        quality=asked.quality,
        baseline=asked.baseline,
        measures=measures,
        recipes=tuple(recipes),
        failures=tuple(failures),
        missing=missing,
        machine=_all_of(result.meta_info.system_info for result in results),
        versions=_all_of(_versions(result) for result in results),
        command=asked.command,
        on_the_way=quality_measure(TASKS[asked.task].metric) if asked.task in TASKS else None,
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def check_task(task: str, results: Sequence[Result]) -> None:
    """Raises SettingError if a result is of another task; those of peft do not say theirs."""
    if foreign := {result.shoestring.task for result in results if result.shoestring} - {task}:
        raise SettingError(f"Results of {foreign.pop()} cannot stand in one table with those of {task}.")


def _named_apart(results: Sequence[Result]) -> Iterator[tuple[str, Result]]:
    """Each result once, under its name, or under one with a number where that has other settings already."""
    settings: dict[str, list[str]] = {}
    seen: set[tuple[str, str]] = set()
    for result in results:
        of_all_seeds, digest = _identity(result)
        if (result.name, digest) in seen:
            continue
        seen.add((result.name, digest))
        known = settings.setdefault(result.name, [])
        if of_all_seeds not in known:
            known.append(of_all_seeds)
        number = known.index(of_all_seeds) + 1
        yield result.name if number == 1 else f"{result.name} ({number})", result


def _identity(result: Result) -> tuple[str, str]:
    """What shaped the numbers of a run in short, without its seed and whole."""
    if result.shoestring is not None:
        return result.shoestring.of_all_seeds, result.shoestring.digest
    info = result.run_info
    config = {key: value for key, value in info.train_config.items() if key != "seed"}
    return json.dumps([config, info.peft_config], sort_keys=True, default=str), result.model_dump_json()


def _measure(asked: Asked, name: str) -> Measure:
    return next((each for each in (*asked.extras, *COSTS) if each.name == name), None) or quality_measure(name)


def _recipe(result: Result) -> str:
    return result.shoestring.recipe if result.shoestring else ""


def _seed(result: Result) -> int:
    return result.shoestring.seed if result.shoestring else int(result.run_info.train_config.get("seed") or 0)


def _model(result: Result) -> str:
    return str(result.run_info.train_config.get("model_id", ""))


def _versions(result: Result) -> dict[str, str]:
    info = result.meta_info.package_info
    found = {key.removesuffix("-version"): value for key, value in info.items() if key.endswith("-version")}
    return {key: str(value) for key, value in found.items() if value}


def _all_of(found: Iterable[Mapping[str, object]]) -> dict[str, str]:
    """What all runs say, or all that they say where they differ."""
    said: dict[str, list[str]] = {}
    for one in found:
        for key, value in one.items():
            if str(value) not in said.setdefault(key, []):
                said[key].append(str(value))
    return {key: " and ".join(values) for key, values in said.items()}


def _values(result: Result, asked: Asked) -> dict[str, float]:
    """The figures of one run, with those that need the suite."""
    own = result.shoestring
    if own is None:
        return values_of_peft(result)
    values = dict(own.values)
    if asked.target is not None:
        higher = TASKS[own.task].higher_is_better
        reached = [s for _, s, value in own.curve if (value >= asked.target if higher else value <= asked.target)]
        if reached:
            values["seconds_to_target"] = reached[0]
    return values


def _compared(
    asked: Asked, name: str, runs: list[Result], memory_of_full: Mapping[str, float], first_of_all: Result | None
) -> Compared:
    """The runs of one recipe. memory_of_full: by model. first_of_all: a run of the baseline, or of the first recipe."""
    runs = sorted(runs, key=_seed)
    found = [_values(result, asked) for result in runs]
    if QUALITIES.get(asked.quality, ("", ""))[1] == "share":
        for values, result in zip(found, runs, strict=True):
            values |= _discounted(values, asked.quality, memory_of_full.get(_model(result)))
    everything = dict.fromkeys(key for values in found for key in values)
    own = {_seed(result): result.shoestring for result in runs if result.shoestring is not None}
    first = next(iter(own.values()), None)
    notes = dict.fromkeys(note for one in own.values() for note in one.notes)
    late = sum("seconds_to_target" not in values for values in found)
    without = sum(asked.quality not in values for values in found)
    if without:
        notes[f"{without} of {len(found)} seeds came to no finite {asked.quality} and are not in its mean"] = None
    others = {_model(result) for result in runs} - {_model(first_of_all)} if first_of_all else set()
    if others:
        notes[f"its model is {' and '.join(sorted(others))}, not {_model(first_of_all)}"] = None  # type: ignore[arg-type]
    if asked.target is not None and late:
        notes[f"the target was not reached by {late} of {len(found)} seeds"] = None
    return Compared(
        name=name,
        recipe=first.recipe if first else "",
        run_file=first.run_file if first else "",
        seeds=tuple(_seed(result) for result in runs),
        values={key: spread([values[key] for values in found if key in values]) for key in everything},
        memory=first.memory if first else {},
        losses={seed: list(one.losses) for seed, one in own.items()},
        curve={seed: [(seconds, value) for _, seconds, value in one.curve] for seed, one in own.items()},
        notes=tuple(notes),
    )


def _discounted(values: Mapping[str, float], quality: str, memory_of_full: float | None) -> dict[str, float]:
    """What combines the quality with a cost, as far as that is there."""
    found: dict[str, float] = {}
    if (score := values.get(quality)) is None:
        return found
    if "trained_in_backbone" in values:
        found["ppt"] = ppt(score, values["trained_in_backbone"])
    if "trained_share" in values:
        found["ppe"] = ppe(score, 100 * values["trained_share"])
    if memory_of_full and "peak_bytes" in values:
        found["pme"] = pme(score, values["peak_bytes"], memory_of_full)
    return found


def _with_failures(recipe: Compared, failures: Sequence[Failure]) -> Compared:
    failed = sum(failure.name == recipe.name for failure in failures)
    if not failed:
        return recipe
    return replace(recipe, notes=(*recipe.notes, f"{failed} of {failed + len(recipe.seeds)} seeds failed"))


def _with_differences(
    asked: Asked, recipes: list[Compared], by_name: Mapping[str, list[Result]], better: Better | None
) -> list[Compared]:
    """Each recipe with its difference to the baseline, in the units of the quality.

    By the scores of held-out rows where the quality has them, else by those of whole runs; of the same rows only.
    """
    scored = TASKS[asked.task].metric if asked.task in TASKS else None
    baseline = asked.baseline
    if baseline is None or not by_name.get(baseline):
        return recipes
    of_rows = asked.quality == scored
    sign = -1 if better == "lower" and of_rows else 1

    def by_seed(name: str) -> dict[int, Own]:
        return {result.shoestring.seed: result.shoestring for result in by_name[name] if result.shoestring is not None}

    def scores(one: Own) -> list[float]:
        return one.scores if of_rows else [one.values.get(asked.quality, math.nan)]

    def alike(one: Own, other: Own) -> bool:
        same_batches = one.batches == other.batches or not (one.batches and other.batches)  # older results name none
        return one.rows == other.rows and (same_batches or not of_rows)

    theirs = by_seed(baseline)

    def compared(recipe: Compared) -> Compared:
        ours = by_seed(recipe.name)
        both = [seed for seed in ours if seed in theirs]
        same = [seed for seed in both if alike(ours[seed], theirs[seed])]
        if recipe.name == baseline or not both:
            return recipe
        notes = recipe.notes
        if len(same) < len(both):
            odd = f"{len(both) - len(same)} of {len(ours)} seeds"
            notes += (f"held-out rows of {odd}, or their batches, are not those of {baseline}",)
        found = same and paired_difference(
            {seed: scores(ours[seed]) for seed in same},
            {seed: scores(theirs[seed]) for seed in same},
            weights=ours[same[0]].weights if of_rows else (),
        )
        if not found:
            return replace(recipe, notes=notes)
        if sign < 0:
            found = replace(found, mean=-found.mean, low=-found.high, high=-found.low)
        if len(both) < len(ours):
            notes += (f"its difference is of {len(same)} of {len(ours)} seeds, those that {baseline} has as well",)
        return replace(recipe, difference=found, notes=notes)

    return [compared(recipe) for recipe in recipes]


def _measures(asked: Asked, recipes: Sequence[Compared]) -> tuple[Measure, ...]:
    """All that some recipe has: the quality first, then others of the task, of techniques, of extras, then costs."""
    has = dict.fromkeys(name for recipe in recipes for name in recipe.values)
    costs, extras = ([measure.name for measure in each] for each in (COSTS, asked.extras))
    task = [name for name in has if name not in costs and name not in extras and name != asked.quality]
    first = [_measure(asked, asked.quality)] if asked.quality in has else []
    rest = [_measure(asked, name) for name in dict.fromkeys((*extras, *costs)) if name in has and name != asked.quality]
    return (*first, *(quality_measure(name) for name in task), *rest)


def _with_fronts(
    quality: str, better: Better | None, recipes: list[Compared], measures: Sequence[Measure]
) -> list[Compared]:
    """Each recipe with the costs for which no other is as good at less."""
    fronts: dict[str, list[str]] = {recipe.name: [] for recipe in recipes}
    for measure in measures:
        if measure.name == quality or measure.better is None or better is None:
            continue
        points = [
            {name: recipe.values[name].mean for name in (quality, measure.name) if name in recipe.values}
            for recipe in recipes
        ]
        on = front(points, {quality: better, measure.name: measure.better})
        for recipe, is_on in zip(recipes, on, strict=True):
            if is_on:
                fronts[recipe.name].append(measure.name)
    return [replace(recipe, front=tuple(fronts[recipe.name])) for recipe in recipes]
