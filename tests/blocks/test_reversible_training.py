"""Reversible streams on the packaged encoder: their start, a run with its memory, resuming, and quality."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from shoestring import assets
from shoestring.blocks import Reversible
from shoestring.recipe import load
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train
from shoestring.training.report import Report

REVERSIBLE = {"reversible": {"dropout": 0.1}}


def settings(recipe: list, folder, **fields) -> RunSettings:
    data = {"train": "packaged:rotten-tomatoes", "max_length": 24, **fields.pop("data", {})}
    return RunSettings.from_dict(
        {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": data,
            "recipe": recipe,
            "train": {
                "per_device_train_batch_size": 8,
                "learning_rate": 3e-3,
                "logging_steps": 1,
                "eval_strategy": "no",
                "seed": 0,
                **fields,
            },
            "output_dir": str(folder),
        }
    )


def few(recipe: list, folder, **fields) -> Report:
    need("minilm", "rotten-tomatoes")
    return train(settings(recipe, folder, data={"max_train_rows": 16, "max_eval_rows": 8}, **fields))


def test_the_newest_stream_starts_nearer_to_the_pretrained_model_than_the_mean():
    need("minilm")
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder("minilm"))
    batch = tokenizer(["A film for the ages.", "The rain in Spain stays mainly in the plain."], padding=True)
    batch = {name: torch.tensor(value) for name, value in batch.items()}
    found = {}
    for output, shift in (("newest", 4), ("newest", 8), ("mean", 4)):
        technique = Reversible(output=output, shift=shift)
        model = AutoModel.from_pretrained(assets.model_folder("minilm"))
        with technique.attach(model):
            for parameter in technique.adapters.parameters():
                nn.init.zeros_(parameter)
            model.train()(**batch)
            (probe,) = technique.probes.values()
            found[output, shift] = probe.cosine
    assert found["newest", 8] > 0.999 > found["newest", 4] > 0.98 > 0.9 > found["mean", 4]


def test_a_run_learns_reviews_by_heart_and_has_the_losses_of_ordinary_autograd(tmp_path):
    fields = {"max_steps": 16, "learning_rate": 1e-2}
    reversed_run = few([REVERSIBLE], tmp_path / "reversed", **fields)
    ordinary = few([{"reversible": {"dropout": 0.1, "reversible_layers": 0}}], tmp_path / "ordinary", **fields)
    losses, wanted = ([loss for _, loss in report.losses] for report in (reversed_run, ordinary))
    assert losses[0] == wanted[0]
    assert losses == pytest.approx(wanted, abs=1e-3)
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4]), losses
    assert reversed_run.memory["saved_bytes"] < 0.1 * ordinary.memory["saved_bytes"]


class StopAfterSaving(TrainerCallback):
    def on_save(self, *_, **__) -> None:
        raise InterruptedError("stopped after a checkpoint")


@pytest.mark.slow
def test_a_resumed_run_ends_bit_for_bit_where_one_in_a_row_ends(tmp_path):
    need("minilm", "rotten-tomatoes")
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    rows = {"max_train_rows": 16, "max_eval_rows": 8}
    whole = train(settings([REVERSIBLE], tmp_path / "whole", data=dict(rows), **steps))
    with pytest.raises(InterruptedError):
        train(settings([REVERSIBLE], tmp_path / "parts", data=dict(rows), **steps), callbacks=[StopAfterSaving()])
    parts = train(settings([REVERSIBLE], tmp_path / "parts", data=dict(rows), **steps), resume=True)
    assert parts.losses == whole.losses
    assert parts.quality == whole.quality
    found, wanted = (load_file(f"{report.saved['weights']}/reversible.safetensors") for report in (parts, whole))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    base = AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm"), num_labels=2)
    model = load(base, parts.saved["weights"])
    assert torch.equal(model.reversible[0][2].plain.up, wanted["0.2.plain.up"])


@pytest.mark.slow
def test_reviews_are_told_apart_within_a_point_of_adapters_in_ordinary_autograd(tmp_path):
    need("minilm", "rotten-tomatoes")
    fields = {"max_steps": 160, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 64}
    rate = {"learning_rate": 1e-3, "lr_scheduler_type": "linear", "data": {"max_length": 40}}
    adapters = [{"bottleneck": {"form": "parallel", "r": 8}}]
    runs = {
        name: train(settings(recipe, tmp_path / name, **fields, **copy.deepcopy(rate)))
        for name, recipe in (("adapters", adapters), ("reversible", [{"reversible": {}}]))
    }
    accuracy = {name: report.quality["test"]["accuracy"] for name, report in runs.items()}
    assert accuracy["reversible"] >= accuracy["adapters"] - 0.01, accuracy
    kept = {name: report.memory["saved_bytes"] for name, report in runs.items()}
    assert kept["reversible"] < 0.05 * kept["adapters"]
