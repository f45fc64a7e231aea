"""Whether a difference is larger than noise: a paired bootstrap over held-out rows, and Student's t over seeds."""

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
    ours: Mapping[int, Sequence[float]],
    theirs: Mapping[int, Sequence[float]],
    *,
    weights: Sequence[float] = (),
    draws: int = DRAWS,
) -> Difference | None:
    """The mean of our scores minus theirs, over the seeds that both have.

    ours, theirs: scores by seed, of the same rows in the same order; one score a seed where there is none for a row.
    weights: what each score counts, such as the rows of a batch, above 0; by default all alike.
    Rows are drawn anew with replacement, alike for all seeds and for both sides, so what is hard for both counts for
    neither. Seeds are few, and drawing from them would find too little noise: theirs is drawn from Student's t with the
    deviation of their means, and that of the rows is widened as the t for their number is. The same scores give the
    same result.

    Returns None where no seed has scores of as many rows on both sides, where there is one seed of one row, where a
    score is no finite number, or where there are not as many weights as scores.
    """
    common = [seed for seed in ours if seed in theirs and len(ours[seed]) == len(theirs[seed]) > 0]
    if not common or len({len(ours[seed]) for seed in common}) > 1:
        return None
    if not all(np.isfinite(scores[seed]).all() for scores in (ours, theirs) for seed in common):
        return None
    apart = np.array([np.subtract(ours[seed], theirs[seed]) for seed in common], dtype=np.float64)  # [seeds, rows]
    seeds, rows = apart.shape
    counts = np.asarray(weights or np.ones(rows), dtype=np.float64)
    if seeds == rows == 1 or len(counts) != rows:
        return None
    random = np.random.default_rng(0)
    of_seeds = apart @ counts / counts.sum()
    mean = of_seeds.mean()
    drawn = np.full(draws, mean)
    if rows > 1:
        drawn += _of_rows(apart.mean(0), counts, draws, random)
    if seeds > 1:
        drawn += of_seeds.std(ddof=1) / np.sqrt(seeds) * random.standard_t(seeds - 1, draws)
    low, high = np.quantile(drawn, [(1 - INSIDE) / 2, (1 + INSIDE) / 2])
    tail = min((drawn <= 0).sum(), (drawn >= 0).sum())
    p = min(1.0, 2 * (tail + 1) / (draws + 1))
    noise = " and ".join(name for name, count in (("rows", rows), ("seeds", seeds)) if count > 1)
    clear = bool(low > 0 or high < 0)
    return Difference(float(mean), float(low), float(high), float(p), clear=clear, noise=noise)


def _of_rows(apart: np.ndarray, weights: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """How far the mean of a bootstrap's draw of rows is from the mean of all, widened for few rows."""
    rows = len(apart)
    from_mean = weights * (apart - np.average(apart, weights=weights))
    found = []
    for begin in range(0, draws, AT_ONCE):
        counts = random.multinomial(rows, np.full(rows, 1 / rows), size=min(AT_ONCE, draws - begin))
        found.append(counts @ from_mean / (counts @ weights))
    return np.concatenate(found) * np.sqrt(rows / random.chisquare(rows - 1, draws))
