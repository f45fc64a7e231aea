"""Every capability on a real pretrained model and real data: the packaged encoder and decoder learn."""

from pathlib import Path

import pytest
import torch

from shoestring.recipe import load
from shoestring.testing.assets import need
from shoestring.training import RunSettings, measure, train

EXAMPLES = Path(__file__).parents[2] / "examples"

# Learning rates: factors that multiply weights of size 0.05 need larger steps than those that add.
RECIPES = {
    "lora": ([{"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value", "dense"]}}], 2e-3),
    "hut": ([{"hut": {"r": 8, "target_modules": ["query", "value", "dense"]}}], 2e-2),
    "s2_lora": ([{"s2_lora": {"r": 32, "target_modules": ["query", "value", "dense"]}}], 3e-3),
    "houlsby": ([{"bottleneck": {"form": "houlsby", "r": 16}}], 3e-3),
    "pfeiffer": ([{"bottleneck": {"form": "pfeiffer", "r": 16}}], 3e-3),
    "parallel": ([{"bottleneck": {"form": "parallel", "r": 16}}], 3e-3),
    "two adapters": (
        [{"lora": {"r": 4, "target_modules": ["query", "value"]}}, {"bottleneck": {"form": "parallel", "r": 8}}],
        3e-3,
    ),
    "full": ([], 1e-4),
}


def reviews(recipe: list, rate: float, folder: Path, **train_fields) -> RunSettings:
    need("minilm", "rotten-tomatoes")
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": {
                "train": "packaged:rotten-tomatoes",
                "max_length": 32,
                "max_train_rows": 32,
                "max_eval_rows": 16,
            },
            "recipe": recipe,
            "train": {
                "max_steps": 24,
                "per_device_train_batch_size": 16,
                "learning_rate": rate,
                "logging_steps": 1,
                "eval_strategy": "no",
                "seed": 0,
                **train_fields,
            },
            "output_dir": str(folder / "run"),
        }
    )


SLOW = ("full", "pfeiffer", "parallel", "hut", "s2_lora", "two adapters")  # beside their like


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in RECIPES]
)
def test_the_encoder_learns_a_few_reviews_by_heart(name, tmp_path):
    recipe, rate = RECIPES[name]
    report = train(reviews(recipe, rate, tmp_path))
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-4:]) / 4 < 0.75 * sum(losses[:2]) / 2, losses
    assert report.status == "finished"
    assert report.memory["peak_bytes"] == sum(report.memory["at_peak"].values())
    if recipe:
        assert report.trained_parameters < 0.03 * report.total_parameters


def test_saved_weights_give_the_trained_model(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from shoestring import assets

    recipe, rate = RECIPES["two adapters"]
    report = train(reviews(recipe, rate, tmp_path))
    torch.manual_seed(5)  # another head than the run's: the saved one must take its place
    base = AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm"), num_labels=2)
    model = load(base, report.saved["weights"]).eval()
    test = assets.load_data("rotten-tomatoes")["test"].shuffle(seed=0).select(range(16))
    batch = AutoTokenizer.from_pretrained(report.saved["weights"])(
        list(test["text"]), padding=True, truncation=True, max_length=32, return_tensors="pt"
    )
    with torch.no_grad():
        right = (model(**batch).logits.argmax(-1) == torch.tensor(test["label"])).float().mean()
    assert float(right) == pytest.approx(report.quality["test"]["accuracy"])


def test_measure_says_what_lora_keeps_for_backward(tmp_path):
    full = measure(reviews([], 1e-4, tmp_path), say=lambda text: None)
    lora = measure(reviews(RECIPES["lora"][0], 1e-3, tmp_path), module_depth=8, say=lambda text: None)
    assert full.trainable_bytes > 60 * lora.trainable_bytes
    assert full.at_peak["optimizer_state"] == pytest.approx(2 * full.trainable_bytes, rel=1e-3)
    assert sum(lora.by_module.values()) == lora.saved_bytes
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_first_example_beats_the_majority_class_by_20_points(tmp_path):
    need("minilm", "rotten-tomatoes")
    report = train(RunSettings.load(EXAMPLES / "first.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert report.quality["test"]["accuracy"] >= report.quality["test"]["majority_class"] + 0.20
    assert report.trained_parameters < 0.03 * report.total_parameters


@pytest.mark.slow
def test_the_decoder_example_lowers_held_out_loss_by_a_quarter(tmp_path):
    need("smollm2", "gsm8k-test")
    report = train(RunSettings.load(EXAMPLES / "causal_lm.yaml", [f"output_dir={tmp_path / 'run'}"]))
    assert report.steps == 60
    assert report.quality["test"]["loss"] <= 0.75 * report.quality["test, before"]["loss"]
