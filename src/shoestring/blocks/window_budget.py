"""How many tokens a window may have, so that blocks in windows stay within a number of bytes.

Update   bytes(w) = fixed + a + b w. fixed is known from shapes: what all blocks keep, and the keys and values of blocks
         in backward with their gradients. a + b w is what a window of w tokens that sees all keys has at its peak
         in full; a and b are fitted to windows that are run, twice as large each time, until the budget is met
Costs    these windows of each block, once for each shape of batch; together they have up to twice the chosen tokens
"""

import functools
import re
import weakref
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import SettingError
from ..memory.storages import operands, storages_of

UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
PROBES = (16, 64)  # tokens of the two windows that are measured
EVEN = 16  # larger windows are a multiple of this


def bytes_of(setting: int | str, name: str) -> int:
    """A number of bytes from a number or from text such as "2GiB" or "500 MB".

    Raises SettingError naming the setting if it is neither, or below 1.

    >>> bytes_of("1.5 KiB", "memory_budget")
    1536
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(setting).lower())
    unit = UNITS.get(match[2]) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise SettingError(
            f'{name} must be a number of bytes of at least 1, or text such as "2GiB" or "500MB", got {setting!r}.'
        )
    return int(float(match[1]) * unit)


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside this context have at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def restart(self) -> None:
        """Count from here on, tensors made so far as nothing."""
        self.peak = self._now = 0
        self._alive = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(s) for x in operands((*args, *(kwargs or {}).values())) for s in storages_of(x)}
        result = func(*args, **(kwargs or {}))
        for storage in (s for x in operands((result,)) for s in storages_of(x)):
            if id(storage) not in before and id(storage) not in self._alive:
                died = functools.partial(self._died, id(storage), storage.nbytes())
                self._alive[id(storage)] = weakref.ref(storage, died)
                self._now += storage.nbytes()
        self.peak = max(self.peak, self._now)
        return result

    def _died(self, key: int, size: int, reference: Any) -> None:
        if self._alive.get(key) is reference:
            del self._alive[key]
            self._now -= size


def tokens_within(budget: int, num_tokens: int, bytes_of_window: Callable[[int], int]) -> int:
    """The most tokens of a window that stay within `budget` bytes, or a few less.

    bytes_of_window: what windows of so many tokens take, all in all; it is asked for small ones first.

    Raises SettingError if one token is too many.
    """
    small, large = (min(tokens, num_tokens) for tokens in PROBES)
    low, high = (small, bytes_of_window(small)), (large, bytes_of_window(large))
    while high[1] < budget and high[0] < num_tokens:
        reach = min(_on_line(low, high, budget), 2 * high[0], num_tokens)
        if reach - high[0] < EVEN:
            break
        low, high = high, (reach, bytes_of_window(reach))
    # bytes are the greater of lines, one for each moment that may be the peak: between two points they lie below a line
    tokens = high[0] if high[1] <= budget else _on_line(low, high, budget)
    if tokens < 1:
        raise SettingError(
            f"memory_budget of token_windows is {budget:,} bytes, but blocks take {low[1]:,} for this batch with "
            f"windows of {low[0]} tokens; raise it, or give shorter or fewer sequences at a time."
        )
    return tokens if tokens in (num_tokens, high[0]) or tokens < EVEN else tokens - tokens % EVEN


def _on_line(low: tuple[int, int], high: tuple[int, int], budget: int) -> int:
    """Where the line through two points of (tokens, bytes) meets the budget."""
    slope = (high[1] - low[1]) / (high[0] - low[0]) if high[0] > low[0] else low[1] / low[0]
    return int(low[0] + (budget - low[1]) // max(slope, 1))
