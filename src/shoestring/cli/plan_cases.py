"""What `shoestring plan` is asked to predict: one run, or each of a sweep over settings and recipes."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .. import recipes
from ..errors import SettingError, did_you_mean

if TYPE_CHECKING:
    from ..planning import Prediction
    from ..training.settings import RunSettings

MOST_CASES = 100
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
SIZES = ("batch", "length")


@dataclass(frozen=True)
class Case:
    """One run to predict; `label` is how tables name it."""

    label: str
    settings: RunSettings
    batch: int | None
    length: int | None


@dataclass(frozen=True)
class Row:
    """What came of a case: its prediction, or why there is none."""

    label: str
    prediction: Prediction | None
    refused: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        if self.prediction is None:
            return {"label": self.label, "refused": self.refused}
        return {"label": self.label, "prediction": self.prediction.to_dict()}


def bytes_in(text: str) -> int:
    """The bytes that a size with a unit means.

    Raises SettingError without a unit, or if it is no size.

    >>> bytes_in("24GiB"), bytes_in("1.5 gb")
    (25769803776, 1500000000)
    """
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if read is None or not float(read[1]):
        raise SettingError(f"--memory must be a size with its unit, such as 24GiB, got {text!r}.")
    unit = read[2].upper()
    if unit not in UNITS:
        what = f"{read[2]} is no unit" if unit else "the unit is missing"
        raise SettingError(
            f"--memory {text.strip()}: {what}; write {read[1]}GiB (of 2^30 bytes) or {read[1]}GB (of 10^9 bytes)."
        )
    return int(float(read[1]) * UNITS[unit])


def cases_of(
    run: Path,
    overrides: Sequence[str],
    sweeps: Sequence[str] = (),
    recipe_names: str | None = None,
    *,
    batch: int | None = None,
    length: int | None = None,
) -> list[Case]:
    """The run as it is, and with each recipe; of each of them one for every combination of swept values.

    sweeps: `length=1024,2048`, `batch=1,2` or `KEY=VALUES` of the run file. recipe_names: names or files, with commas
    between.

    Raises SettingError as `RunSettings.load`, and where a sweep cannot be read or is too large.
    """
    from ..training.settings import RunSettings

    swept = _swept(sweeps, batch, length)
    loads: list[tuple[str, Callable[[list[str]], RunSettings]]] = [
        (run.stem if recipe_names else "", lambda own: RunSettings.load(run, [*overrides, *own]))
    ]
    loads += [_load_with(run, overrides, name.strip()) for name in _parts(recipe_names or "")]
    combinations = list(itertools.product(*([(key, value) for value in values] for key, values in swept.items())))
    if len(loads) * len(combinations) > MOST_CASES:
        raise SettingError(
            f"This makes {len(loads) * len(combinations)} predictions, and at most {MOST_CASES} go into one table; "
            "give fewer values."
        )
    made = []
    for name, load in loads:
        for chosen in combinations:
            sizes = {key: _count(key, value) for key, value in chosen if key in SIZES}
            settings = load([f"{key}={value}" for key, value in chosen if key not in SIZES])
            words = [name, *(f"{key}={value}" for key, value in chosen)]
            made.append(
                Case(
                    ", ".join(filter(None, words)) or run.stem,
                    settings,
                    sizes.get("batch", batch),
                    sizes.get("length", length),
                )
            )
    return made


def _swept(sweeps: Sequence[str], batch: int | None, length: int | None) -> dict[str, list[str]]:
    """The values of each key, in the order given."""
    swept: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        key, values = key.strip(), [value.strip() for value in _parts(text)]
        if not key or not values:
            raise SettingError(f"--sweep {sweep}: write a setting and its values, such as length=1024,2048,4096.")
        if key in swept:
            raise SettingError(f"--sweep names {key} twice; give all its values at once.")
        if key not in SIZES and "." not in key and key not in ("model", "recipe", "task"):
            raise SettingError(
                f"--sweep {sweep}: {key} is no setting to sweep. Give length, batch, or a key of the run file with its "
                "section, such as train.optim or recipe.lora.r."
            )
        if {"batch": batch, "length": length}.get(key) is not None:
            raise SettingError(f"--{key} and --sweep {key} are both given; leave one of them out.")
        swept[key] = values
    return swept


def _load_with(run: Path, overrides: Sequence[str], name: str) -> tuple[str, Callable[[list[str]], RunSettings]]:
    """A label, and what loads the run with another recipe; or another run."""
    from ..recipe import known_techniques
    from ..training.settings import RunSettings

    path = Path(name).expanduser()
    if not (path.suffix in (".yaml", ".yml") or path.is_file()):
        known = {*recipes.names(), *known_techniques()}
        if name not in known:
            near = did_you_mean(name, known)
            hint = near if near.startswith("Did") else f"Give {', '.join(recipes.names())}, a technique or a file."
            raise SettingError(f"--recipes: there is no recipe or technique {name!r}. {hint}")
        return name, lambda own: RunSettings.load(run, [*overrides, f"recipe={name}", *own])
    if not path.is_file() and (run.parent / path).is_file():
        path = run.parent / path
    if not path.is_file():
        raise SettingError(f"--recipes: there is no file {path}.")
    if _is_run(path):
        return path.stem, lambda own: RunSettings.load(path, [*overrides, *own])
    quoted = json.dumps(str(path.resolve()), ensure_ascii=False)
    return path.stem, lambda own: RunSettings.load(run, [*overrides, f"recipe={quoted}", *own])


def _is_run(path: Path) -> bool:
    """Whether a file is a run and not a recipe; what is wrong with it is for who loads it to say."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        return True
    return isinstance(values, dict) and values.keys() != {"recipe"}


def _parts(text: str) -> list[str]:
    """The text cut at commas that are in no brackets.

    >>> _parts("[a, b],c")
    ['[a, b]', 'c']
    """
    return [part for part in re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,\[{])+", text) if part.strip()]


def _count(key: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise SettingError(f"--sweep {key}: values must be whole numbers of at least 1, got {text!r}.")
    return int(text)
