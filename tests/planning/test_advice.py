"""Advice: what is told to fit does fit, the best comes first, and limits are where they are said to be."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shoestring.errors import SettingError
from shoestring.memory.operations import Operations
from shoestring.planning import Prediction, advise, predict, search
from shoestring.planning import advice as advice_module
from shoestring.planning.prediction import ALLOCATOR_SLACK, CUDA_CONTEXT
from shoestring.planning.search import Rehearsals, largest
from shoestring.recipe import TECHNIQUES
from shoestring.training.settings import RunSettings

LENGTH = 96


def run(folder: Path, blocks: int, recipe: list[Any], **config: Any) -> RunSettings:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 320}
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": blocks,
        **sizes,
        **config,
    }
    file = folder / "config.json"
    file.write_text(json.dumps({"max_position_embeddings": 512, "dtype": "float32", **values}))
    return RunSettings.from_dict(
        {
            "model": str(file),
            "task": "causal-lm",
            "data": {"train": "nothing.jsonl", "max_length": LENGTH},
            "recipe": recipe,
            "train": {"per_device_train_batch_size": 4},
        }
    )


LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}


# With predictions made up: what is decided on them

FACTORS = {"recompute": 0.3, "lean_mlp": 0.9, "token_tune": 0.25, "offload": 1.0}  # of what is kept for backward
WEIGHTS, ROW = 10**9, 10**6  # bytes; a row of one token


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RunSettings:
    def predicted(
        settings: RunSettings, batch: int | None = None, length: int | None = None, **other: Any
    ) -> Prediction:
        settings.build_recipe()
        batch = batch or settings.train["per_device_train_batch_size"]
        length = length or settings.data.max_length
        kept = batch * length * ROW
        for entry in settings.recipe:
            kept = int(kept * FACTORS.get(next(iter(entry)), 1.0))
        parts = {"weights": WEIGHTS - 1000, "adapters": 1000, "saved_for_backward": kept, "optimizer_state": 0}
        peak = WEIGHTS + kept
        steps = {"load": WEIGHTS, "backward": peak}
        operations = Operations({"forward": {"float32": 1e12}}, {"forward": {"float32": 1e9}})
        sizes = (batch, length, 1, 1, peak, "backward", parts, steps, 0, 1000, WEIGHTS // 2, (), operations)
        return Prediction("made up", settings.recipe, *sizes)

    monkeypatch.setattr(search, "predict", predicted)
    monkeypatch.setattr(advice_module, "TECHNIQUES", {name: TECHNIQUES[name] for name in FACTORS})
    return run(tmp_path, 2, [LORA])


def memory_for(kept: float) -> int:
    return int((WEIGHTS + kept) * (1 + ALLOCATOR_SLACK[1])) + CUDA_CONTEXT[1]


KEPT = 4 * LENGTH * ROW


def test_a_run_that_fits_is_left_alone_and_its_limits_are_told(made_up: RunSettings):
    advice = advise(made_up, memory_for(KEPT * 2.3))
    assert advice.fits
    assert advice.changes == []
    assert advice.largest_batch == 9
    assert advice.largest_length == 192  # in steps of 64


@pytest.mark.parametrize(
    ("length", "fits_until", "expected"),
    [(100, 110, 100), (100, 130, 128), (32, 40, 32), (32, 70, 64), (80, 70, 64), (80, 40, None), (96, 10**4, 500)],
)
def test_the_largest_length_is_no_less_than_the_runs_own_and_the_models(
    made_up: RunSettings, tmp_path: Path, length: int, fits_until: int, expected: int | None
):
    settings = run(tmp_path, 2, [LORA], max_position_embeddings=500)
    assert advise(settings, memory_for(4 * fits_until * ROW), length=length).largest_length == expected


def test_models_that_state_no_longest_length_have_one_that_fits(made_up: RunSettings):
    settings = made_up.model_copy(update={"model": made_up.model.model_copy(update={"name": "known:t5-small"})})
    assert advise(settings, memory_for(4 * 1000 * ROW)).largest_length == 960
    assert advise(settings, memory_for(10**6 * ROW)).largest_length == advice_module.MOST_TOKENS // 4


def test_changes_that_help_alone_are_told_with_the_exact_ones_first(made_up: RunSettings):
    advice = advise(made_up, memory_for(KEPT * 0.35))
    assert not advice.fits
    assert [change.title.split(" ")[0] for change in advice.changes] == [
        "train.per_device_train_batch_size=1",
        "recompute",
        "token_tune",
        "token_tune",
    ]
    assert [change.exact for change in advice.changes] == [True, True, False, False]
    assert advice.changes[0].settings.train["gradient_accumulation_steps"] == 4
    assert json.loads(json.dumps(advice.to_dict()))["changes"][1]["title"] == "recompute"


def test_single_rows_are_no_way_out_where_the_loss_is_of_all_of_a_batch(made_up: RunSettings):
    pairs = made_up.model_copy(update={"recipe": [LORA, {"metric_learning": {"uniformity": 0.0}}]})
    titles = [[change.title for change in advise(each, memory_for(KEPT * 0.35)).changes] for each in (made_up, pairs)]
    assert ["train.per_device_train_batch_size" in " ".join(each) for each in titles] == [True, False]


def test_changes_are_put_together_where_none_is_enough_and_none_is_spare(made_up: RunSettings):
    (change,) = advise(made_up, memory_for(KEPT * 0.08)).changes
    assert change.title == "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=4 + recompute"
    assert change.exact


def test_where_nothing_fits_the_smallest_footprint_and_what_is_missing_are_told(made_up: RunSettings):
    memory = memory_for(KEPT * 0.001)
    advice = advise(made_up, memory)
    assert advice.changes == []
    assert advice.largest_batch is None
    assert advice.missing_bytes == advice.smallest.cuda_bytes[1] - memory > 0
    assert advice.smallest.parts["saved_for_backward"] < KEPT * 0.08
    assert "recompute" in advice.smallest_title


def test_memory_below_the_weights_is_refused(made_up: RunSettings):
    with pytest.raises(SettingError, match=r"below the weights of .* alone, 1,000,000,000 bytes"):
        advise(made_up, WEIGHTS)


def with_lighter_weights(settings: RunSettings, prediction: Prediction) -> Prediction:
    """The same in the dtype and the quantisation of the settings; float32 has 4 bytes a number."""
    model = settings.model
    share = 0.25 if model.quantization else 0.5 if model.dtype == "bfloat16" else 1.0
    light = {"weights": int(share * prediction.parts["weights"])}
    peak = prediction.peak_bytes - prediction.parts["weights"] + light["weights"]
    parts = {**prediction.parts, **light}
    if settings.recipe == []:
        parts["adapters"] = 0
    steps = {**prediction.by_step, "backward": peak}
    return replace(prediction, parts=parts, peak_bytes=peak, by_step=steps, total_parameters=WEIGHTS // 4)


def test_memory_below_the_weights_is_refused_only_where_they_cannot_be_made_smaller(
    made_up: RunSettings, monkeypatch: pytest.MonkeyPatch
):
    predict_all = search.predict
    monkeypatch.setattr(search, "predict", lambda s, **given: with_lighter_weights(s, predict_all(s, **given)))
    monkeypatch.setattr(advice_module, "TECHNIQUES", {})
    monkeypatch.setattr("shoestring.planning.prediction.CUDA_CONTEXT", (0, 0))
    advice = advise(made_up, int(0.95 * WEIGHTS), batch=1, length=64)
    assert [change.title for change in advice.changes] == ["model.dtype=bfloat16", "model.quantization=nf4"]
    smaller = r"bytes; 250,000,\d+ bytes with model.dtype=bfloat16 \+ model.quantization=nf4\.$"
    with pytest.raises(SettingError, match=smaller):
        advise(made_up, int(0.2 * WEIGHTS), batch=1, length=64)
    whole = made_up.model_copy(update={"recipe": []})  # all weights train
    with pytest.raises(SettingError, match=r"alone, 999,999,000 bytes\.$"):
        advise(whole, int(0.95 * WEIGHTS), batch=1, length=64)


def test_a_change_the_model_cannot_be_made_with_is_skipped_and_named(
    made_up: RunSettings, monkeypatch: pytest.MonkeyPatch
):
    predict_all = search.predict

    def predicted(settings: RunSettings, **options: Any) -> Prediction:
        if any("recompute" in entry for entry in settings.recipe):
            raise AttributeError("no blocks.\nmore")
        return predict_all(settings, **options)

    monkeypatch.setattr(search, "predict", predicted)
    advice = advise(made_up, memory_for(KEPT * 0.35))
    assert advice.skipped == ("recompute: AttributeError: no blocks.",)
    assert advice.to_dict()["skipped"] == ["recompute: AttributeError: no blocks."]
    assert [change.title.split(" ")[0] for change in advice.changes] == [
        "train.per_device_train_batch_size=1",
        "token_tune",
        "token_tune",
    ]


# With real ones


def test_what_is_told_to_fit_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(advice_module, "TECHNIQUES", {"recompute": TECHNIQUES["recompute"]})
    monkeypatch.setattr(advice_module, "_largest", lambda *any: (None, None))
    settings = run(tmp_path, 2, [LORA])
    now = predict(settings)
    memory = int((now.peak_bytes - 300_000) * (1 + ALLOCATOR_SLACK[1])) + CUDA_CONTEXT[1]
    advice = advise(settings, memory)
    assert [change.title.split("=")[0] for change in advice.changes[:2]] == [
        "train.per_device_train_batch_size",
        "recompute",
    ]
    for change in advice.changes:
        assert predict(change.settings).peak_bytes == change.peak_bytes < now.peak_bytes
        assert change.slowdown > 0
    assert advice.changes[1].slowdown > 1


@pytest.mark.slow
def test_two_depths_in_whole_periods_tell_what_a_deep_model_takes(tmp_path: Path):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 6 + ["sliding_attention"]}
    names = {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}
    sizes = {"head_dim": 8, "num_key_value_heads": 2, "sliding_window": 16}
    rehearsals = Rehearsals(run(tmp_path, 13, [LORA], **kinds, **names, **sizes))
    guess, whole = rehearsals.guess(), rehearsals.whole()
    assert guess.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.01)
    assert guess.operations.total_flops == pytest.approx(whole.operations.total_flops, rel=1e-3)
    assert (guess.trained_parameters, guess.total_parameters) == (whole.trained_parameters, whole.total_parameters)


@pytest.mark.parametrize(
    "recipe",
    [
        [{"lora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [11, 12]}}],
        [{"lora": {"r": 4, "target_modules": r".*layers\.1[12]\..*q_proj"}}],
        [LORA, {"reversible": {"reversible_layers": 8}}],
    ],
    ids=["layers", "regex", "reversible"],
)
def test_a_recipe_that_names_deep_blocks_is_guessed_from_the_whole_model(tmp_path: Path, recipe: list[Any]):
    said: list[str] = []
    rehearsals = Rehearsals(run(tmp_path, 13, recipe), said.append)
    assert rehearsals.guess(batch=1) is rehearsals.whole(batch=1)
    shallow = [text for text in said if text.endswith("blocks")]
    assert rehearsals.guess(batch=2) is rehearsals.whole(batch=2)
    assert [text for text in said if text.endswith("blocks")] == shallow  # not tried again


@pytest.mark.parametrize("off", [0, 3, -3, 200])
@pytest.mark.parametrize("flat", [0, 40])
@pytest.mark.parametrize("power", [1, 1.5, 2])
@pytest.mark.parametrize("limit", [9, 10, 57, 1000, 12345])
def test_search_finds_the_largest_that_fits(power: float, limit: int, flat: int, off: int):
    guesses: list[int] = []
    wholes: list[int] = []

    def size(value: int) -> float:
        return max(5 + flat, 5 + 3 * value**power)

    def guess(value: int) -> Any:
        guesses.append(value)
        return SimpleNamespace(peak_bytes=size(value) + off)

    def whole(value: int) -> Any:
        wholes.append(value)
        return SimpleNamespace(peak_bytes=size(value))

    found = largest(guess, whole, lambda p: p.peak_bytes - limit, most=2000)
    best = max((n for n in range(1, 2001) if size(n) <= limit), default=0)
    assert (found.value if found else 0) == pytest.approx(best, rel=1 / 64)
    assert found is None or found.prediction.peak_bytes == size(found.value) <= limit
    assert len(set(guesses)) < 20
    assert len(wholes) <= 3
