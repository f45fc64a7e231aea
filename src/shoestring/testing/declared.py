"""Checks that a method declares it cannot pass."""

from collections.abc import Callable

import pytest


def must_fail(check: Callable[[], None], what: str, who: str, reason: str, by: tuple[type[Exception], ...]) -> None:
    """Run a check and mark the test as one that fails, if the check does so by one of these exceptions.

    what: name of the check. who: name of the method. by: what `reason` speaks of; all other exceptions pass on.

    Raises AssertionError if the check passes.
    """
    try:
        check()
    except by as error:
        pytest.xfail(f"{who} cannot: {reason} ({type(error).__name__})")
    raise AssertionError(f"{who} declares that it cannot pass {what}, but it does; take the entry out of cannot.")
