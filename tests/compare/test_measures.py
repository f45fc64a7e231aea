"""Combined measures against published cells, and the Pareto front against brute force."""

import math
import random

import pytest

from shoestring.compare.measures import COSTS, front, pme, ppe, ppt

# V-PETL Bench: mean score in percent, trained parameters in millions, PPT as printed
PUBLISHED = [
    ("linear probing, FGVC", 79.32, 0.0, 0.79),
    ("Adapter, FGVC", 85.66, 0.41, 0.84),
    ("AdaptFormer, FGVC", 88.48, 0.46, 0.87),
    ("BitFit, FGVC", 88.02, 0.10, 0.88),
    ("VPT-Deep, FGVC", 89.10, 0.85, 0.86),
    ("SSF, FGVC", 90.72, 0.39, 0.89),
    ("LoRA, FGVC", 84.78, 0.77, 0.82),
    ("Adapter, VTAB-1k", 71.44, 0.16, 0.71),
    ("LoRA, VTAB-1k", 72.25, 0.29, 0.71),
    ("LST, VTAB-1k", 71.70, 2.38, 0.65),
    ("Partial-1, COCO", 49.2, 12.6, 0.35),
    ("LoRA, COCO", 51.2, 3.03, 0.46),
    ("Mona, COCO", 53.4, 4.16, 0.46),
    ("Partial-1, VOC", 85.4, 28.34, 0.48),
]


@pytest.mark.parametrize(("name", "score", "millions", "printed"), PUBLISHED)
def test_ppt_is_as_published(name: str, score: float, millions: float, printed: float) -> None:
    assert round(ppt(score / 100, millions * 1e6), 2) == printed


def test_pme_is_as_published() -> None:
    """FPT+ and full tuning: mean AUC on eight medical sets, and MB of memory."""
    assert round(pme(0.8712, 736, 23_128), 3) == 0.859
    assert round(pme(0.8882, 23_128, 23_128), 3) == 0.657


def test_combined_measures_are_their_formulas() -> None:
    assert ppe(0.8, 2.5) == pytest.approx(0.8 * math.exp(-math.log10(1.025)))
    assert pme(0.8, 3e9, 12e9) == pytest.approx(0.8 * math.exp(-math.log10(1.25)))
    assert ppt(0.8, 0) == ppe(0.8, 0) == pme(0.8, 0, 1) == 0.8  # what costs nothing loses nothing


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ppt(85.66, 1e6), r"score must be in \[0, 1\], got 85.66"),
        (lambda: ppt(0.5, -1), "trained_parameters must be at least 0"),
        (lambda: ppe(0.5, math.nan), "trained_percent must be at least 0"),
        (lambda: pme(0.5, 1, 0), "memory_of_full_tuning must be above 0"),
    ],
)
def test_what_is_out_of_range_is_refused(call, said) -> None:
    with pytest.raises(ValueError, match=said):
        call()


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_that_of_brute_force(seed: int) -> None:
    draw = random.Random(seed)
    points = [
        {"quality": draw.choice([draw.randint(0, 6) / 6, math.nan]), "cost": float(draw.randint(0, 6))}
        for _ in range(40)
    ]
    points += [dict(points[0]), {"quality": 0.9}, {"quality": None, "cost": 1.0}]
    found = front(points, {"quality": "higher", "cost": "lower"})
    whole = [p for p in points if None not in (p.get("quality"), p.get("cost")) and not math.isnan(p["quality"])]
    for point, is_on in zip(points, found, strict=True):
        beaten = any(
            q["quality"] >= point["quality"]
            and q["cost"] <= point["cost"]
            and (q["quality"] > point["quality"] or q["cost"] < point["cost"])
            for q in whole
            if point in whole
        )
        assert is_on == (any(point is w for w in whole) and not beaten)
    assert found[0] == found[40]  # equal points stay together


def test_the_front_respects_both_directions() -> None:
    points = [{"loss": 1.0, "speed": 5.0}, {"loss": 0.5, "speed": 5.0}, {"loss": 0.5, "speed": 9.0}]
    assert front(points, {"loss": "lower", "speed": "higher"}) == [False, False, True]


def test_measures_have_one_name_each() -> None:
    assert len({measure.name for measure in COSTS}) == len(COSTS)
