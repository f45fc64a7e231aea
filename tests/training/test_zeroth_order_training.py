"""Zeroth-order steps in runs from run files, for both tasks and their trainers, and on packaged models and data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shoestring.memory import Ledger
from shoestring.optimizers.step_log import FILE, StepLog
from shoestring.testing.assets import need
from shoestring.training import RunSettings, measure, train
from shoestring.training.run import prepare

LORA = {"lora": {"r": 8, "target_modules": ["query", "value"]}}
LORA_OF_DECODER = {"lora": {"r": 2, "target_modules": ["q_proj"]}}
BILEVEL = {"bilevel_zofo": {"inner_steps": 1, "backbone_lr": 1e-4}}


UNDER_TRL = {
    "zeroth_order": ["zeroth_order"],
    "bilevel_zofo": [LORA_OF_DECODER, BILEVEL],
    "ba_lora": [LORA_OF_DECODER, {"ba_lora": {"top_words": 9}}, "zeroth_order"],
    "chunked_loss": [LORA_OF_DECODER, "chunked_loss", "zeroth_order"],
}


@pytest.mark.parametrize("recipe", UNDER_TRL.values(), ids=UNDER_TRL)
def test_completions_train_under_trl(recipe, tiny_decoder_folder: Path, prompt_jsonl: Path, tmp_path: Path):
    settings = RunSettings.from_dict(
        {
            "model": str(tiny_decoder_folder),
            "task": "causal-lm",
            "data": {"train": str(prompt_jsonl), "validation": str(prompt_jsonl), "prompt": "prompt"},
            "recipe": recipe,
            "train": {
                "max_steps": 4,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "gradient_accumulation_steps": 2,
                "eval_strategy": "no",
            },
            "output_dir": str(tmp_path / "run"),
        }
    )
    report = train(settings)
    assert report.status == "finished"
    assert all(0 < loss < 10 for _, loss in report.losses)
    (record,) = (tmp_path / "run" / "final").glob(f"**/{FILE}")
    assert len(StepLog.load(record.parent).seeds) == (2 if BILEVEL in recipe else 4)


def reviews(recipe: list[Any], rate: float, folder: Path, **train_fields: Any) -> RunSettings:
    need("minilm", "rotten-tomatoes")
    fields = {"per_device_train_batch_size": 16, "learning_rate": rate, "lr_scheduler_type": "constant", "seed": 0}
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": {"train": "packaged:rotten-tomatoes", "max_length": 24, "max_train_rows": 256, "max_eval_rows": 64},
            "recipe": recipe,
            "train": {"logging_steps": 1, "eval_strategy": "no", **fields, **train_fields},
            "output_dir": str(folder / "run"),
        }
    )


@pytest.mark.slow
def test_a_step_of_a_packaged_model_takes_the_memory_of_inference(tmp_path):
    settings = reviews(["zeroth_order"], 1e-5, tmp_path)
    ready = prepare(settings)
    ready.attached.model.eval()
    peaks = []
    for batch in ready.trainer.get_train_dataloader():
        with torch.no_grad(), Ledger(ready.attached.model) as ledger:
            ready.attached.model(**batch)
        peaks.append(ledger.report().peak_bytes)
    assert measure(settings, say=lambda text: None).peak_bytes <= 1.05 * max(peaks)


@pytest.mark.slow
def test_bilevel_needs_less_than_half_the_work_of_zeroth_order_for_its_loss_on_held_out_rows(tmp_path):
    """minilm on rotten-tomatoes, with the best rates of a few tried, one seed.

    12 steps are 63 forwards, a backward counted as two: 9 inner ones of 3, and 3 outer ones of 2 * 3 + 6. 64 steps of
    zeroth_order are 128. Of the held-out rows bilevel_zofo has trained on some: this shows how fast it optimises. On
    test rows neither is better than the shares of the classes after so few steps, 0.69 and 0.72 when it was written.
    """
    slow = train(reviews(["zeroth_order"], 5e-4, tmp_path / "mezo", max_steps=64))
    settings = {"inner_steps": 3, "backbone_lr": 1e-5, "outer_lr": 1e-2, "penalty": 1.0}
    fast = train(reviews([LORA, {"bilevel_zofo": settings}], 2e-3, tmp_path / "bilevel", max_steps=12))
    assert slow.quality["validation"]["loss"] < 0.70
    assert fast.quality["validation"]["loss"] < slow.quality["validation"]["loss"]
    moved = load_file(tmp_path / "bilevel" / "run" / "final" / "trained.safetensors")
    assert "bert.embeddings.word_embeddings.weight" in moved


@pytest.mark.slow
def test_parameter_groups_train_a_packaged_model(tmp_path):
    groups = [{"names": ["lora_B"], "lr_factor": 16}, {"kind": "head", "lr": 2e-3, "weight_decay": 0.0}]
    recipe = [LORA, {"parameter_groups": {"groups": groups}}]
    report = train(reviews(recipe, 2e-4, tmp_path, max_steps=20))
    first, last = (sum(loss for _, loss in losses) / 5 for losses in (report.losses[:5], report.losses[-5:]))
    assert last < first
