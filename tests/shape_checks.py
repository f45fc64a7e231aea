"""The type checker that the import hook of jaxtyping uses in the tests: beartype, but not on settings."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked.

    Left as they are: constructors of settings, which check for themselves, and functions made by another one, since the
    hook would have a checker written anew for each call of that one.
    """
    if "<locals>" in function.__qualname__:
        return function
    made_by_dataclass = function.__name__ == "__init__" and function.__code__.co_filename == "<string>"
    return function if made_by_dataclass or function.__qualname__.endswith("Config.__init__") else beartype(function)
