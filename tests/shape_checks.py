"""The type checker that the import hook of jaxtyping uses in the tests: beartype, but not on settings."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked.

    Left as they are: constructors of settings, which check for themselves, and functions without shapes that another
    one makes, since a checker would be written anew for each call of that one.
    """
    has_shapes = any("Tensor, " in str(annotation) for annotation in function.__annotations__.values())
    if "<locals>" in function.__qualname__ and not has_shapes:
        return function
    made_by_dataclass = function.__name__ == "__init__" and function.__code__.co_filename == "<string>"
    return function if made_by_dataclass or function.__qualname__.endswith("Config.__init__") else beartype(function)
