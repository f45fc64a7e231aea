"""What runs are compared by: the measures with their units, and those that combine quality with a cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower"]
Unit = Literal["", "bytes", "seconds", "share", "numbers", "tokens a second"]
BACKBONE_PARAMETERS = 1e7  # C of PPT


@dataclass(frozen=True)
class Measure:
    """One figure of a run.

    name: its key in results. label: for people. better: which way, None where neither is better.
    unit: "" for a figure without one; "share" for one in [0, 1]; "numbers" for counts.
    """

    name: str
    label: str
    unit: Unit = ""
    better: Better | None = "lower"


COSTS = (
    Measure("peak_bytes", "memory of a step", "bytes"),
    Measure("step_seconds", "median step", "seconds"),
    Measure("gpu_peak_bytes", "peak of the GPU", "bytes"),
    Measure("trained_parameters", "trained parameters", "numbers"),
    Measure("kept_bytes", "kept for backward", "bytes"),
    Measure("process_peak_bytes", "peak of the process", "bytes"),
    Measure("weights_bytes", "weights in memory", "bytes"),
    Measure("gradients_bytes", "gradients", "bytes"),
    Measure("optimizer_bytes", "optimizer state", "bytes"),
    Measure("checkpoint_bytes", "saved weights", "bytes"),
    Measure("last_step_bytes", "memory of the last step", "bytes"),
    Measure("trained_in_backbone", "trained parameters but for a new head", "numbers"),
    Measure("trained_share", "trained share of the parameters", "share"),
    Measure("step_seconds_p90", "90th percentile of steps", "seconds"),
    Measure("all_steps_seconds", "all steps, evaluations left out", "seconds"),
    Measure("train_seconds", "training, evaluations included", "seconds"),
    Measure("tokens_a_second", "tokens a second", "tokens a second", "higher"),
    Measure("seconds_to_target", "training until the target quality", "seconds"),
    Measure("latency_seconds", "a forward after merging", "seconds"),
    Measure("forgetting", "loss on other text, after minus before"),
    Measure("ppt", "PPT: quality less parameters", "", "higher"),
    Measure("ppe", "PPE: quality less share of parameters", "", "higher"),
    Measure("pme", "PME: quality less share of memory", "", "higher"),
)
"""Figures of every run that are no quality, those first that people ask for first."""


QUALITIES: dict[str, tuple[Better | None, Unit]] = {
    "accuracy": ("higher", "share"),
    "f1_macro": ("higher", "share"),
    "mean_token_accuracy": ("higher", "share"),
    "loss": ("lower", ""),
    "perplexity": ("lower", ""),
    "majority_class": (None, "share"),
    "exact_match": ("higher", "share"),
    "generation_f1": ("higher", "share"),
    "chrf": ("higher", "share"),
    "general_loss": ("lower", ""),
    "dino_similarity": ("higher", "share"),
    "drift": ("lower", ""),
}
"""Which way qualities are better, and their units; of others, such as those of techniques, neither way is known."""


def quality_measure(name: str) -> Measure:
    """The measure of a task or of a technique."""
    better, unit = QUALITIES.get(name, (None, ""))
    return Measure(name, name.replace("_", " "), unit, better)


def ppt(score: float, trained_parameters: float) -> float:
    """Performance-parameter trade-off of V-PETL Bench: score · exp(−log10(P / 10^7 + 1)).

    score: in [0, 1]. trained_parameters: of the backbone, a new head not counted.

    Raises ValueError for a score or a count out of range.

    >>> round(ppt(0.8566, 0.41e6), 2)
    0.84
    """
    return _discounted(score, trained_parameters / BACKBONE_PARAMETERS, "trained_parameters")


def ppe(score: float, trained_percent: float) -> float:
    """Performance against parameters, as in FPT: score · exp(−log10(r / 100 + 1)), r in percent of the model's.

    Raises ValueError for a score or a share out of range.
    """
    return _discounted(score, trained_percent / 100, "trained_percent")


def pme(score: float, memory: float, memory_of_full_tuning: float) -> float:
    """Performance against memory, as in FPT: score · exp(−log10(M / M_full + 1)).

    Raises ValueError for a score or memory out of range.
    """
    if memory_of_full_tuning <= 0:
        raise ValueError(f"memory_of_full_tuning must be above 0, got {memory_of_full_tuning}.")
    return _discounted(score, memory / memory_of_full_tuning, "memory")


def _discounted(score: float, cost: float, name: str) -> float:
    if not 0 <= score <= 1:
        raise ValueError(f"score must be in [0, 1], got {score}.")
    if not cost >= 0:
        raise ValueError(f"{name} must be at least 0, got {cost} of its scale.")
    return score * math.exp(-math.log10(cost + 1))


def front(points: Iterable[Mapping[str, float | None]], better: Mapping[str, Better]) -> list[bool]:
    """Which points no other one beats: at least as good in each measure of `better`, and better in one.

    A point that lacks one of them, or where it is no number, is on no front and beats none. Equal points stay together.
    """
    signs = {name: 1.0 if way == "higher" else -1.0 for name, way in better.items()}
    placed = [_placed(point, signs) for point in points]
    return [point is not None and not any(_beats(other, point) for other in placed if other) for point in placed]


def _placed(point: Mapping[str, float | None], signs: Mapping[str, float]) -> tuple[float, ...] | None:
    values = [point.get(name) for name in signs]
    if any(value is None or math.isnan(value) for value in values):
        return None
    return tuple(sign * value for sign, value in zip(signs.values(), values, strict=True) if value is not None)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(mine >= theirs for mine, theirs in pairs) and any(mine > theirs for mine, theirs in pairs)
