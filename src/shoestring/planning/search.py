"""Search: the largest batch and length that fit, from few rehearsals.

Method   Bytes grow nearly in proportion to rows and to tokens, so a few rehearsals say where the limit is. Deep models
         are guessed from two depths of their configuration, since blocks are equal, which is quick; only what is told
         is rehearsed in full, and looked for again where the guess was off.
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
EXACT = 64  # values are found to the last up to here, and to a share of as much beyond


@dataclass(frozen=True)
class Largest:
    """The largest value that was rehearsed and fits, and its prediction."""

    value: int
    prediction: Prediction


class Rehearsals:
    """Predictions of one run with other sizes, each made once.

    say: told of each that is made.
    """

    def __init__(self, settings: RunSettings, say: Callable[[str], None] = lambda text: None):
        self.settings = settings
        self._say = say
        self._made: dict[tuple[Any, ...], Prediction] = {}
        self._can_be_shallow = True

    def whole(self, batch: int | None = None, length: int | None = None) -> Prediction:
        """All blocks of the model."""
        return self._predict(batch, length, None)

    def guess(self, batch: int | None = None, length: int | None = None) -> Prediction:
        """From two depths where the model is deep and the run goes with them: near the whole, and quick."""
        config = models.configuration(self.settings.model.name, self.settings.model.revision)
        period, blocks = models.period(config), models.depth_of(config)
        few, more = 2 * period, 4 * period
        if blocks < max(DEEP, more + 1) or not self._can_be_shallow:
            return self.whole(batch, length)
        try:
            one, two = self._predict(batch, length, few), self._predict(batch, length, more)
        except ValueError:  # as of a recipe that names blocks beyond those
            self._can_be_shallow = False
            return self.whole(batch, length)
        times = (blocks - few) / (more - few)
        return _extrapolated(one, two, times)

    def _predict(self, batch: int | None, length: int | None, depth: int | None) -> Prediction:
        key = (batch, length, depth)
        if key not in self._made:
            self._say(f"Rehearsing {self._words(batch, length, depth)}")
            as_it_is = batch is None and length is None  # of others, only their bytes are asked for
            self._made[key] = predict(self.settings, batch=batch, length=length, depth=depth, count_operations=as_it_is)
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
    excess: Callable[[Prediction], int],
    most: int,
    step: int = 1,
) -> Largest | None:
    """The largest multiple of `step` up to `most` that fits; None if not even the first does.

    guess, whole: predictions of a value, the quick one and the one that counts.
    excess: bytes that a prediction needs above those there are; it fits at 0 and below.
    """
    tried: dict[int, Prediction] = {}
    error = 0
    while True:

        def guessed(n: int, error: int = error) -> int:
            return excess(guess(n * step)) + error

        value = max(1, _last_that_fits(guessed, most // step))
        if value in tried:
            break
        tried[value] = whole(value * step)
        error = excess(tried[value]) - excess(guess(value * step))
    fitting = [value for value, prediction in tried.items() if excess(prediction) <= 0]
    if not fitting:
        return None
    value = max(fitting)
    return Largest(value * step, tried[value])


def _last_that_fits(excess: Callable[[int], int], most: int) -> int:
    """The last of 1 ... most where a rising excess is not above 0, to a share of `EXACT`; 0 if there is none.

    By straight lines through what is known, at last those between two ends: the Illinois form of regula falsi, where an
    end that stays counts for half. Far values are slow to rehearse, so it begins with nearer ones.
    """
    low = 1
    below: float = excess(1)
    if below > 0:
        return 0
    high = math.isqrt(most - 1) + 1
    above: float
    while (above := excess(high)) <= 0:
        if high == most:
            return most
        rate = (above - below) / max(high - low, 1)
        low, below = high, above
        high = min(most, low + 1 + math.floor(-below / rate)) if rate > 0 else most
    side = 0
    while (width := high - low) > max(1, low // EXACT):
        line = low + math.floor(-below / (above - below) * width)
        value = min(max(line, low + 1), high - 1)
        between = excess(value)
        if between > 0:
            high, above = value, between
            below *= 0.5 if side == 1 else 1
            side = 1
        else:
            low, below = value, between
            above *= 0.5 if side == -1 else 1
            side = -1
    return low
