"""Recipes that come with the package, by name: `recipe: exact_small` in a run file, or `Recipe.named("exact_small")`.

Each is a file of this folder: a comment that says what it is for, in short in its first line, and a list of techniques
as a run file's `recipe` has it.
"""

from itertools import takewhile
from pathlib import Path

from ..errors import SettingError, did_you_mean

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def path_of(name: str) -> Path:
    """The file of a recipe.

    Raises SettingError if there is none of that name.
    """
    if name not in names():
        raise SettingError(f"Unknown recipe {name!r}. {did_you_mean(name, names())}")
    return FOLDER / f"{name}.yaml"


def parts(name: str) -> tuple[str, str]:
    """What a recipe is for, the comment its file begins with; and its techniques, as YAML.

    Raises SettingError as `path_of` does.
    """
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    comment = list(takewhile(lambda line: line.startswith("#"), lines))
    return "\n".join(line.removeprefix("#").strip() for line in comment), "\n".join(lines[len(comment) :])


def summary(name: str) -> str:
    """What a recipe is for, in one line."""
    return parts(name)[0].splitlines()[0]
