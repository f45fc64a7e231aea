"""The paired bootstrap: what it finds where the answer is known."""

import numpy as np
import pytest

from shoestring.compare.statistics import paired_difference, spread


def scores(seed: int, accuracy: float, rows: int = 400) -> list[float]:
    return (np.random.default_rng(seed).random(rows) < accuracy).astype(float).tolist()


def test_equal_scores_do_not_differ() -> None:
    same = {seed: scores(seed, 0.8) for seed in range(3)}
    found = paired_difference(same, same)
    assert found is not None
    assert (found.mean, found.low, found.high, found.p, found.clear) == (0, 0, 0, 1, False)


def test_a_large_difference_is_clear_and_its_interval_is_that_of_theory() -> None:
    ours, theirs = scores(0, 0.9, 2000), scores(1, 0.7, 2000)
    found = paired_difference({0: ours}, {0: theirs})
    assert found is not None
    apart = np.subtract(ours, theirs)
    error = apart.std() / np.sqrt(len(apart))
    assert found.mean == pytest.approx(apart.mean())
    assert found.low == pytest.approx(apart.mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(apart.mean() + 1.96 * error, abs=0.15 * error)
    assert found.clear
    assert found.p < 1e-3


def test_pairing_finds_what_is_hidden_in_the_rows() -> None:
    easy = np.random.default_rng(0).normal(size=300)  # rows differ a hundred times more than recipes
    better = {0: (easy + 0.01).tolist()}
    assert paired_difference(better, {0: easy.tolist()}).clear
    shuffled = np.random.default_rng(1).permutation(easy)
    assert not paired_difference(better, {0: shuffled.tolist()}).clear


def test_scores_of_batches_count_as_many_rows_as_these_have() -> None:
    random = np.random.default_rng(0)
    apart, weights = random.normal(0.3, 1, 400), random.integers(1, 9, 400)
    scores, zeros = {0: apart.tolist()}, {0: [0.0] * 400}
    found = paired_difference(scores, zeros, weights=weights.tolist())
    mean = np.average(apart, weights=weights)
    error = np.sqrt((weights**2 * (apart - mean) ** 2).sum()) / weights.sum()  # of a ratio
    assert found.mean == pytest.approx(mean)
    assert found.low == pytest.approx(mean - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(mean + 1.96 * error, abs=0.15 * error)
    alike, plain = paired_difference(scores, zeros, weights=[3] * 400), paired_difference(scores, zeros)
    assert (alike.mean, alike.low, alike.high) == pytest.approx((plain.mean, plain.low, plain.high))
    assert paired_difference(scores, zeros, weights=[3] * 399) is None


def test_seeds_that_disagree_widen_the_interval() -> None:
    base = {seed: [0.5] * 100 for seed in range(3)}
    agree = paired_difference({seed: [0.6] * 100 for seed in range(3)}, base)
    disagree = paired_difference({0: [0.9] * 100, 1: [0.5] * 100, 2: [0.4] * 100}, base)
    assert agree.clear
    assert not disagree.clear
    assert disagree.low < 0 < disagree.high


def test_noise_is_called_a_difference_no_more_often_than_it_should() -> None:
    pairs = [({0: scores(2 * k, 0.8)}, {0: scores(2 * k + 1, 0.8)}) for k in range(100)]
    assert sum(paired_difference(*pair, draws=400).clear for pair in pairs) <= 12


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seeds", "of_rows", "rows"), [(1.0, 0.0, 40), (1.0, 3.0, 40), (0.0, 1.0, 6)])
def test_few_seeds_or_rows_are_no_reason_to_find_a_difference(
    seeds: int, of_seeds: float, of_rows: float, rows: int
) -> None:
    random = np.random.default_rng(seeds)
    found = 0
    for _ in range(300):
        apart = of_seeds * random.normal(size=(seeds, 1)) + of_rows * random.normal(size=(seeds, rows))
        difference = paired_difference(
            {k: a.tolist() for k, a in enumerate(apart)}, dict.fromkeys(range(seeds), [0.0] * rows), draws=400
        )
        assert difference is not None
        found += difference.clear
    assert found <= 28  # 5 % of 300 and three deviations


def test_it_says_which_noise_the_interval_knows_of() -> None:
    rows, one = [0.5, 0.75, 0.25], [0.0]
    assert paired_difference({0: rows}, {0: rows[::-1]}).noise == "rows"
    assert paired_difference({0: rows, 1: rows}, {0: rows[::-1], 1: rows}).noise == "rows and seeds"
    of_seeds = paired_difference({0: [0.5], 1: [0.7]}, {0: one, 1: one})
    assert of_seeds.noise == "seeds"
    assert of_seeds.high - of_seeds.mean == pytest.approx(12.706 * 0.1, rel=0.2)  # t of one degree of freedom
    assert paired_difference({0: one}, {0: one}) is None


def test_scores_of_other_rows_are_not_compared() -> None:
    assert paired_difference({0: [1.0, 0.0]}, {0: [1.0]}) is None
    assert paired_difference({0: [1.0]}, {1: [1.0]}) is None
    assert paired_difference({0: []}, {0: []}) is None


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_give_no_difference(odd: float) -> None:
    assert paired_difference({0: [1.0, odd]}, {0: [1.0, 0.5]}) is None


def test_a_spread_of_one_has_no_deviation() -> None:
    assert spread([0.5]).std is None
    assert spread([0.25, 0.75]).std == pytest.approx(np.std([0.25, 0.75], ddof=1))
