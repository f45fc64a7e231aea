"""Whether a difference is larger than noise: a paired bootstrap over seeds and held-out rows."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from .comparison import Difference, Spread

DRAWS, AT_ONCE = 4000, 250  # draws whose weights stand in memory at a time
INSIDE = 0.95


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))


def paired_difference(
    ours: Mapping[int, Sequence[float]], theirs: Mapping[int, Sequence[float]], *, draws: int = DRAWS
) -> Difference | None:
    """The mean of our scores less theirs, over the seeds that both have.

    ours, theirs: scores by seed, of the same rows in the same order. Seeds and rows are drawn anew with replacement,
    the rows alike for all seeds of a draw and for both sides, so what is hard for both counts for neither. The same
    scores give the same result.

    Returns None where no seed has scores of as many rows on both sides, or one of them is no finite number.
    """
    common = [seed for seed in ours if seed in theirs and len(ours[seed]) == len(theirs[seed]) > 0]
    if not common or len({len(ours[seed]) for seed in common}) > 1:
        return None
    if not all(np.isfinite(scores[seed]).all() for scores in (ours, theirs) for seed in common):
        return None
    apart = np.array([np.subtract(ours[seed], theirs[seed]) for seed in common], dtype=np.float64)  # [seeds, rows]
    seeds, rows = apart.shape
    random = np.random.default_rng(0)
    means = []
    for begin in range(0, draws, AT_ONCE):
        count = min(AT_ONCE, draws - begin)
        of_seeds = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        of_rows = random.multinomial(rows, np.full(rows, 1 / rows), size=count)
        means.append(((of_seeds @ apart) * of_rows).sum(1) / (seeds * rows))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    return Difference(float(apart.mean()), float(low), float(high), float(p), clear=bool(low > 0 or high < 0))
