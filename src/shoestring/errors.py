"""Errors that a user can mend, and how names close to a wrong one are found."""

from collections.abc import Iterable
from difflib import get_close_matches


class SettingError(ValueError):
    """A setting, file or argument that the user must change; the command line ends with exit code 2."""


class RunFailed(RuntimeError):
    """A run that began and could not go on (a NaN loss, a full disk); the command line ends with exit code 1."""


def out_of_memory(error: Exception) -> bool:
    """Whether a tensor found no room, on an accelerator or in the machine, which torch tells in words alone."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


def did_you_mean(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence that offers the known names nearest to `name`, or all of them where few are known.

    >>> did_you_mean("hutt", ["hut", "lora", "s2_lora", "wara", "nera", "bone", "vera"])
    "Did you mean 'hut'?"
    >>> did_you_mean("zzz", ["hut", "lora"])
    'Known: hut, lora.'
    """
    known = sorted(known)
    near = get_close_matches(name, known, n=count, cutoff=0.6)
    if near:
        return f"Did you mean {' or '.join(repr(match) for match in near)}?"
    shown = known if len(known) <= 30 else [*known[:30], "..."]
    return f"Known: {', '.join(shown)}."
