"""Benchmarks of trainings: what stands beside what, and how much worse it may be."""

import importlib
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_benchmark_finds_what_it_imports(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    importlib.import_module(name)


@pytest.fixture
def quality(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import quality

    return quality


@pytest.fixture
def in_place(monkeypatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_place

    monkeypatch.setattr(in_place, "equal_lora", lambda name, model: (8, [in_place.lora(8)]))
    return in_place


def trainings(quality: Any, losses: dict[str, float], seeds: int) -> dict[str, Any]:
    """Runs at the rates that are looked at, the lowest loss at 0.001."""
    return {
        f"{name}|{rate:g}|{seed}": {"quality": {"validation": {"loss": loss + abs(rate - 1e-3)}}}
        for name, loss in losses.items()
        for rate in (2.5e-4, 1e-3, 4e-3)
        for seed in range(seeds)
    }


@pytest.mark.parametrize(
    ("seeds", "goals"), [(3, {"plain": True, "start": False}), (2, {"plain": None, "start": None})]
)
def test_a_contestant_stands_beside_each_of_its_baselines(quality, seeds, goals):
    contestants = {
        "plain": quality.Contestant([]),
        "start": quality.Contestant([], "plain", goal=False),
        "ours": quality.Contestant([], ("plain", "start"), apart=0.0),
    }
    done = trainings(quality, {"plain": 1.0, "start": 0.9, "ours": 0.95}, seeds)
    rows = quality.compared("part", quality.WORD_PROBLEMS, contestants, done)
    holds = {row.name.partition(", ")[2]: row.holds for row in rows if row.name.endswith("seeds: loss")}
    expected = {f"ours beside {base}, {seeds} of 3 seeds: loss": held for base, held in goals.items()}
    assert holds == {f"start beside plain, {seeds} of 3 seeds: loss": None, **expected}


def test_rates_are_looked_for_around_the_best_of_the_first_and_of_others_to_try(quality):
    loss_of = {"0.001": 0.69, "0.004": 0.68, "0.00025": 0.5, "6.25e-05": 0.55, "0.016": 0.7}
    for also, wanted in (((), ["0.001", "0.004", "0.016"]), ((2.5e-4,), ["0.001", "0.004", "0.00025", "6.25e-05"])):
        done: dict[str, Any] = {}
        rate, found = quality.rate_to_use(done, "full", also)
        while not found:
            done[f"full|{rate:g}|0"] = {"quality": {"validation": {"loss": loss_of[f"{rate:g}"]}}}
            rate, found = quality.rate_to_use(done, "full", also)
        assert [key.split("|")[1] for key in done] == wanted
        assert f"{rate:g}" == min(wanted, key=lambda tried: loss_of[tried])


def test_how_much_worse_a_method_may_be_is_said_by_part(in_place):
    reviews, problems, rounded = (in_place.contestants(part, None) for part in ("classification", "decoder", "rounded"))
    assert (reviews["l4q"].apart, problems["l4q"].apart) == (0.01, None)
    assert problems["sketchtune"].apart == 0.0
    assert rounded["qwha"].baselines == ("LoRA r=8", "svd_start")
    assert rounded["qwha"].apart == 0.0
    assert not rounded["svd_start"].goal
    assert list(rounded) == ["LoRA r=8", "svd_start", "qwha"], "each after what it stands beside"


def test_in_bfloat16_methods_stand_beside_lora_in_it_too(in_place, monkeypatch):
    asked = []
    monkeypatch.setattr(in_place, "rows_of", lambda label, *_, half=False, **__: asked.append((label, half)) or [])
    for variant in ("in float32", "in bfloat16"):
        in_place.cost_of("l4q", variant, 1)
    plain, wide, half = asked
    assert plain == ("smollm2 in float32, l4q beside LoRA r=8", False)
    assert wide == ("smollm2 in bfloat16, l4q beside LoRA r=8", False)
    assert half == ("smollm2 in bfloat16, l4q beside LoRA r=8 with weights in bfloat16", True)
