"""The type checker that the import hook of jaxtyping uses in the tests: beartype, but not on settings."""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its arguments and result checked; config constructors as they are, for they check settings."""
    return function if function.__qualname__.endswith("Config.__init__") else beartype(function)
