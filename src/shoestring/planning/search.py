"""Search: the largest batch and length that fit, from few rehearsals.

Method   Bytes grow nearly in proportion to rows and to tokens, so two rehearsals say where the limit is; what is found
         there is rehearsed too, and taken down until it fits. Deep models are guessed from two depths of their
         configuration, since blocks are equal, which is quick; only what is told is rehearsed in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import models
from .prediction import Prediction, predict

if TYPE_CHECKING:
    from ..training.settings import RunSettings

DEEP = 12  # blocks from which on two depths are quicker than one whole model
EXACT = 16  # values are found to the last up to here, and to a share of as much beyond


@dataclass(frozen=True)
class Largest:
    """The largest value that was rehearsed and fits, and its prediction; whether it is the model's own limit."""

    value: int
    prediction: Prediction
    at_limit: bool


class Rehearsals:
    """Predictions of one run with other sizes, each made once.

    say: told of each that is made.
    """

    def __init__(self, settings: RunSettings, say: Callable[[str], None] = lambda text: None):
        self.settings = settings
        self._say = say
        self._made: dict[tuple[Any, ...], Prediction] = {}

    def whole(self, batch: int | None = None, length: int | None = None) -> Prediction:
        """All blocks of the model."""
        return self._predict(batch, length, None)

    def guess(self, batch: int | None = None, length: int | None = None) -> Prediction:
        """From two depths where the model is deep: near the whole, and quick."""
        config = models.configuration(self.settings.model.name, self.settings.model.revision)
        period, blocks = models.period(config), models.depth_of(config)
        few, more = 2 * period, 4 * period
        if blocks < max(DEEP, more + 1):
            return self.whole(batch, length)
        one, two = self._predict(batch, length, few), self._predict(batch, length, more)
        times = (blocks - few) / (more - few)
        return _extrapolated(one, two, times)

    def _predict(self, batch: int | None, length: int | None, depth: int | None) -> Prediction:
        key = (batch, length, depth)
        if key not in self._made:
            self._say(f"Rehearsing {self._words(batch, length, depth)}")
            self._made[key] = predict(self.settings, batch=batch, length=length, depth=depth, count_operations=True)
        return self._made[key]

    def _words(self, batch: int | None, length: int | None, depth: int | None) -> str:
        recipe = ", ".join(name for entry in self.settings.recipe for name in entry) or "all weights"
        sizes = [f"batch {batch}" * (batch is not None), f"length {length}" * (length is not None)]
        sizes.append(f"{depth} blocks" * (depth is not None))
        return ", ".join([recipe, *filter(None, sizes)])


def _extrapolated(one: Prediction, two: Prediction, times: float) -> Prediction:
    """`one` and `times` the difference that `two` makes."""

    def on(a: float, b: float) -> int:
        return round(a + times * (b - a))

    by_step = {step: on(one.by_step[step], two.by_step[step]) for step in one.by_step}
    parts = {part: on(one.parts[part], two.parts[part]) for part in one.parts}
    operations = None
    if one.operations is not None and two.operations is not None:
        operations = one.operations + times * (two.operations - one.operations)
    return replace(
        one,
        peak_bytes=max(by_step.values()),
        peak_step=max(by_step, key=by_step.__getitem__),
        parts=parts,
        by_step=by_step,
        trained_parameters=on(one.trained_parameters, two.trained_parameters),
        total_parameters=on(one.total_parameters, two.total_parameters),
        operations=operations,
    )


def largest(
    guess: Callable[[int], Prediction],
    whole: Callable[[int], Prediction],
    fits: Callable[[Prediction], bool],
    limit_bytes: int,
    most: int,
    step: int = 1,
) -> Largest | None:
    """The largest multiple of `step` up to `most` that fits; None if not even the first does.

    guess, whole: predictions of a value, the quick one and the one that counts.
    fits: whether a prediction does. limit_bytes: about where its peak may be, to know where to look.
    """
    found = whole(step)
    if not fits(found):
        return None
    low, high = 1, most // step + 1  # in steps: what fits, and what does not or may not be
    if high > 2:
        one, two = guess(step), guess(2 * step)
        slopes = {name: two.by_step[name] - one.by_step[name] for name in one.by_step}
        rooms = [(limit_bytes - one.by_step[name]) / slope for name, slope in slopes.items() if slope > 0]
        value = 1 + math.floor(min(rooms, default=float(high)))
        while high - low > max(1, low // EXACT):
            value = min(max(value, low + 1), high - 1)
            tried = whole(value * step)
            if fits(tried):
                low, found, value = value, tried, value + 1  # the next one rarely does
                near = not fits(whole(value * step)) if value < high else True
                high, value = (value if near else high), (low + high) // 2
            else:
                high, value = value, (low + value) // 2
    return Largest(low * step, found, at_limit=low == most // step)
