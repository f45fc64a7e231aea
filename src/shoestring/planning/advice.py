"""Advice: the largest batch and length that fit, and the shortest lists of changes that make a run fit.

Method   Each change is tried alone, as far as two depths of the model tell (search.py). Those that make the run fit are
         rehearsed in full and told, the exact and cheap ones first. If none does, changes are put together in that
         order until the run fits, and those that turn out not to be needed are left out again.
Changes  Techniques propose themselves (`Technique.advised`); changes of other settings stand in `SETTINGS`.
Time     As the ratio of the estimates for one device (memory/devices.py); transfers to the host are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from ..technique import TECHNIQUES
from ..training.tasks import TASKS
from . import models, optimizers
from .prediction import Prediction
from .search import Rehearsals, largest

if TYPE_CHECKING:
    from ..training.settings import RunSettings

DEVICE = "A100-80GB"
PAYS_TIME, PAYS_EXACTNESS = 20, 60  # orders from which on
LENGTH_STEP = 64
TOLD = 5
MOST_TOKENS = 2**17  # of a micro-batch: no further is looked for a larger one


@dataclass(frozen=True)
class Change:
    """One or several changes that together make a run fit.

    title: what to change. why: what is saved and paid. exact: gradients stay those of the run as it was.
    slowdown: time of a step over that of the run as it is, by estimate. settings: the changed run.
    """

    title: str
    why: str
    exact: bool
    peak_bytes: int
    slowdown: float
    settings: RunSettings


@dataclass(frozen=True)
class Advice:
    """What to do so that a run fits in so many bytes.

    fits: whether it does as it is. prediction: of the run as it is.
    largest_batch, largest_length: that fit as the run is, the other left alone; None if none does. Lengths are looked
        for in steps of `LENGTH_STEP`, beside the run's own and the model's longest.
    changes: each makes the run fit by itself, the best first; empty where it fits, or where nothing helps.
    smallest: the least that was found, with `smallest_title` saying how.
    skipped: changes that the model could not be made with, each with the reason.
    """

    memory_bytes: int
    fits: bool
    prediction: Prediction
    largest_batch: int | None
    largest_length: int | None
    changes: list[Change]
    smallest: Prediction
    smallest_title: str
    skipped: tuple[str, ...] = ()

    @property
    def missing_bytes(self) -> int:
        """By how much the smallest footprint is too large; 0 if it fits."""
        return max(0, _needed(self.smallest) - self.memory_bytes)

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain JSON values."""
        changes = [
            {
                **{name: getattr(change, name) for name in ("title", "why", "exact", "peak_bytes", "slowdown")},
                "recipe": change.settings.recipe,
                "run": change.settings.to_yaml(),
            }
            for change in self.changes
        ]
        return {
            "memory_bytes": self.memory_bytes,
            "fits": self.fits,
            "prediction": self.prediction.to_dict(),
            "largest_batch": self.largest_batch,
            "largest_length": self.largest_length,
            "changes": changes,
            "smallest": self.smallest.to_dict(),
            "smallest_title": self.smallest_title,
            "missing_bytes": self.missing_bytes,
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class _Step:
    """One change that may be tried: a technique for the recipe, or settings."""

    title: str
    why: str
    exact: bool
    order: int
    apply: Callable[[RunSettings], RunSettings]


@dataclass
class _Tried:
    steps: tuple[_Step, ...]
    settings: RunSettings
    rehearsals: Rehearsals
    guess: Prediction = field(init=False)


def advise(
    settings: RunSettings,
    memory: int,
    *,
    batch: int | None = None,
    length: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Advice:
    """Whether a run fits in so many bytes of one GPU, context and slack of the allocator included; and what helps.

    batch, length: as for `predict`. say: told what is being rehearsed.

    Raises SettingError if the memory is below the weights alone, however small they can be made, or as `predict`.
    """
    settings = _with_sizes(settings, batch, length)
    as_it_is = Rehearsals(settings, say)
    now = as_it_is.whole()
    if memory <= _weights(now):
        smaller = _with_smaller_weights(settings, now, say)
        if smaller is None or memory <= _weights(smaller.guess):
            how = f"; {_weights(smaller.guess):,} bytes with {_title(smaller.steps)}" if smaller else ""
            raise SettingError(
                f"The memory, {memory:,} bytes, is below the weights of {settings.model.name} alone, "
                f"{_weights(now):,} bytes{how}."
            )

    def fits(prediction: Prediction) -> bool:
        return _needed(prediction) <= memory

    rows, tokens = _largest(as_it_is, now, memory)
    if fits(now):
        return Advice(memory, True, now, rows, tokens, [], now, "the run as it is")
    base = as_it_is.guess()
    skipped: list[str] = []
    alone = sorted(_alone(settings, now, say, skipped.append), key=lambda tried: _cost(tried.steps))
    helping = [tried for tried in alone if tried.guess.peak_bytes < base.peak_bytes]
    found = [tried for tried in helping if fits(tried.guess) and fits(tried.rehearsals.whole())][:TOLD]
    smallest = min([*found, *helping], key=lambda tried: tried.guess.peak_bytes, default=None)
    if not found:
        together = _together(settings, helping, fits, say, skipped.append)
        if together is not None:
            smallest = together
            found = [together] if fits(together.rehearsals.whole()) else []
    changes = [_change(tried, now) for tried in found]
    least = smallest.rehearsals.whole() if smallest is not None else now
    title = _title(smallest.steps) if smallest is not None else "the run as it is"
    return Advice(memory, False, now, rows, tokens, changes, least, title, tuple(skipped))


def _needed(prediction: Prediction) -> int:
    """Bytes that the device must have."""
    return prediction.cuda_bytes[1]


def _weights(prediction: Prediction) -> int:
    return prediction.parts["weights"] + prediction.parts["adapters"]


def _with_smaller_weights(settings: RunSettings, now: Prediction, say: Callable[[str], None]) -> _Tried | None:
    """The run with all changes of `OF_WEIGHTS` that make its weights smaller; None if none does."""
    smallest: _Tried | None = None
    for step in (step for make in OF_WEIGHTS if (step := make(settings, now)) is not None):
        tried = _try((*(smallest.steps if smallest else ()), step), settings, say, lambda reason: None)
        if tried is not None and _weights(tried.guess) < _weights(smallest.guess if smallest else now):
            smallest = tried
    return smallest


def _with_sizes(settings: RunSettings, batch: int | None, length: int | None) -> RunSettings:
    update: dict[str, Any] = {}
    if batch is not None:
        update["train"] = {**settings.train, "per_device_train_batch_size": batch}
    if length is not None:
        update["data"] = settings.data.model_copy(update={"max_length": length})
    return settings.model_copy(update=update)


def _largest(rehearsals: Rehearsals, now: Prediction, memory: int) -> tuple[int | None, int | None]:
    """Rows of a micro-batch at the length, and tokens of a sequence at the batch, that fit."""

    def excess(prediction: Prediction) -> int:
        return _needed(prediction) - memory

    most = max(now.batch, MOST_TOKENS // now.length)
    rows = largest(lambda n: rehearsals.guess(batch=n), lambda n: rehearsals.whole(batch=n), excess, most)
    batches, lengths = ([now.batch], [now.length]) if excess(now) <= 0 else ([], [])
    batches += [rows.value] if rows else []
    settings = rehearsals.settings
    if TASKS[settings.task].takes_images:
        return max(batches, default=None), None
    limit = max(now.length, MOST_TOKENS // now.batch)
    if longest := models.longest(models.configuration(settings.model.name, settings.model.revision)):
        limit = min(limit, longest)
    if limit >= LENGTH_STEP:
        tokens = largest(
            lambda n: rehearsals.guess(length=n), lambda n: rehearsals.whole(length=n), excess, limit, LENGTH_STEP
        )
        lengths += [tokens.value] if tokens else []
    between = 0 < limit - max(lengths, default=0) < LENGTH_STEP  # the last, which is no multiple of the step
    if between and excess(rehearsals.guess(length=limit)) <= 0 and excess(rehearsals.whole(length=limit)) <= 0:
        lengths.append(limit)
    return max(batches, default=None), max(lengths, default=None)


def _alone(
    settings: RunSettings, now: Prediction, say: Callable[[str], None], skip: Callable[[str], None]
) -> Iterator[_Tried]:
    for step in _steps(settings, now):
        tried = _try((step,), settings, say, skip)
        if tried is not None:
            yield tried


def _together(
    settings: RunSettings,
    helping: Sequence[_Tried],
    fits: Callable[[Prediction], bool],
    say: Callable[[str], None],
    skip: Callable[[str], None],
) -> _Tried | None:
    """Changes in order until the run fits, then without those it fits without; all that help if it never does."""
    best: _Tried | None = None
    for candidate in helping:
        tried = _try((*(best.steps if best else ()), *candidate.steps), settings, say, skip)
        if tried is None or (best is not None and tried.guess.peak_bytes >= best.guess.peak_bytes):
            continue
        best = tried
        if fits(tried.guess):
            break
    if best is None or not fits(best.guess):
        return best
    for step in best.steps[:-1]:
        fewer = _try(tuple(other for other in best.steps if other is not step), settings, say, skip)
        if fewer is not None and fits(fewer.guess):
            best = fewer
    return best


def _try(
    steps: tuple[_Step, ...], settings: RunSettings, say: Callable[[str], None], skip: Callable[[str], None]
) -> _Tried | None:
    """The run with the changes; None where they are refused together, or cannot be rehearsed.

    skip: told of changes that fail in a way that is no refusal.
    """
    try:
        for step in steps:
            settings = step.apply(settings)
        tried = _Tried(steps, settings, Rehearsals(settings, say))
        tried.guess = tried.rehearsals.guess()
    except (ValueError, NotImplementedError):  # SettingError is a ValueError: it does not go with the run
        return None
    except Exception as error:  # whatever it is, other changes may help
        reason = (str(error).splitlines() or ["no message"])[0]
        skip(f"{_title(steps)}: {type(error).__name__}: {reason}")
        return None
    return tried


def _change(tried: _Tried, now: Prediction) -> Change:
    found = tried.rehearsals.whole()
    ours, before = (p.time_on(DEVICE) for p in (found, now))
    slowdown = (ours.low_seconds + ours.high_seconds) / (before.low_seconds + before.high_seconds)
    return Change(
        title=_title(tried.steps),
        why="; ".join(step.why for step in tried.steps),
        exact=all(step.exact for step in tried.steps),
        peak_bytes=found.peak_bytes,
        slowdown=slowdown,
        settings=tried.settings,
    )


def _title(steps: Sequence[_Step]) -> str:
    return " + ".join(step.title for step in steps)


def _cost(steps: Sequence[_Step]) -> tuple[int, ...]:
    return tuple(sorted((step.order for step in steps), reverse=True))


def _steps(settings: RunSettings, now: Prediction) -> list[_Step]:
    """All that may be changed in this run, the best first."""
    present = {name for entry in settings.recipe for name in entry}
    steps = [
        _technique_step(name, advised.order, advised.why, dict(advised.settings), technique.exact)
        for name, technique in TECHNIQUES.items()
        for advised in technique.advised
        if name not in present
    ]
    steps += [step for make in SETTINGS if (step := make(settings, now)) is not None]
    return sorted(steps, key=lambda step: step.order)


def _technique_step(name: str, order: int, why: str, options: dict[str, Any], exact: bool) -> _Step:
    def apply(settings: RunSettings) -> RunSettings:
        changed = settings.model_copy(update={"recipe": [*settings.recipe, {name: options}]})
        changed.build_recipe()
        return changed

    words = ", ".join(f"{key} {value}" for key, value in options.items())
    return _Step(f"{name} ({words})" if words else name, why, exact and order < PAYS_EXACTNESS, order, apply)


def _smaller_batches(settings: RunSettings, now: Prediction) -> _Step | None:
    """One row at a time, the rest by accumulation, where the loss of rows is the sum of each one's."""
    if now.batch == 1 or any(technique.loss_over_batch for technique in settings.build_recipe().techniques):
        return None

    def apply(changed: RunSettings) -> RunSettings:
        train = {
            **changed.train,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": now.batch * now.accumulation,
        }
        return changed.model_copy(update={"train": train})

    title = f"train.per_device_train_batch_size=1 train.gradient_accumulation_steps={now.batch * now.accumulation}"
    why = "the same step from single rows: exact, slower as far as a row does not fill the device"
    return _Step(title, why, exact=True, order=15, apply=apply)


def _eight_bit_optimizer(settings: RunSettings, now: Prediction) -> _Step | None:
    in_use = optimizers.by_rule(settings.train.get("optim")) or settings.build_recipe().brings_optimizer
    if in_use or now.parts["optimizer_state"] < now.peak_bytes // 50:
        return None

    def apply(changed: RunSettings) -> RunSettings:
        return changed.model_copy(update={"train": {**changed.train, "optim": "adamw_8bit"}})

    return _Step("train.optim=adamw_8bit", "states of the optimizer in 8 bits; needs bitsandbytes", False, 61, apply)


def _sixteen_bit_weights(settings: RunSettings, now: Prediction) -> _Step | None:
    """Only where adapters train: updates are lost in 16-bit weights."""
    if now.parts["adapters"] == 0 or now.parts["weights"] < 3 * now.total_parameters:
        return None

    def apply(changed: RunSettings) -> RunSettings:
        return changed.model_copy(update={"model": changed.model.model_copy(update={"dtype": "bfloat16"})})

    return _Step("model.dtype=bfloat16", "frozen weights in 16 bits: rounded once, and faster", False, 62, apply)


def _four_bit_weights(settings: RunSettings, now: Prediction) -> _Step | None:
    """Only where adapters train, which quantised weights cannot."""
    if now.parts["adapters"] == 0 or settings.model.quantization is not None:
        return None

    def apply(changed: RunSettings) -> RunSettings:
        return changed.model_copy(update={"model": changed.model.model_copy(update={"quantization": "nf4"})})

    why = "frozen weights in 4 bits: a quarter of 16, the model slightly another, a step slower"
    return _Step("model.quantization=nf4", why, False, 64, apply)


OF_WEIGHTS = (_sixteen_bit_weights, _four_bit_weights)
SETTINGS: tuple[Callable[[RunSettings, Prediction], _Step | None], ...] = (
    _smaller_batches,
    _eight_bit_optimizer,
    *OF_WEIGHTS,
)
