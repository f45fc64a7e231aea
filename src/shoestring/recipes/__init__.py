"""Recipes that come with the package, by name: `recipe: exact_small` in a run file, or `Recipe.named("exact_small")`.

Each is a file of this folder, a list of techniques as a run file's `recipe` has it; its first line says what it is for.
"""

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


def summary(name: str) -> str:
    """What a recipe is for: the first line of its file."""
    return path_of(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
