"""measure: the step it counts is the step that train takes."""

import gc
import json
import platform
import weakref

import pytest
import torch
from transformers import Trainer

from shoestring.cli import main
from shoestring.training import RunSettings, measure, run, train
from shoestring.training.run import prepare


@pytest.mark.parametrize("task", [pytest.param("text-classification", marks=pytest.mark.slow), "causal-lm"])
def test_checkpointing_and_bf16_show_in_what_is_kept(task, run_file):
    def saved(**train_fields) -> int:
        settings = RunSettings.load(run_file("run", task=task, train={"max_steps": 9, **train_fields}))
        return measure(settings, say=lambda text: None).saved_bytes

    plain = saved()
    assert saved(gradient_checkpointing=True) < 0.8 * plain
    assert saved(bf16=True) != plain


@pytest.mark.parametrize(
    ("changes", "capability", "way"),
    [
        (["train.bf16=true"], "AVX2", "leave out train.bf16"),
        (["model.dtype=bfloat16"], "DEFAULT", "set model.dtype to float32"),
        (["train.bf16=true"], "AVX512", None),
        ([], "AVX2", None),
    ],
)
def test_a_processor_without_bfloat16_is_told_of(run_file, monkeypatch, changes, capability, way):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    said = []
    prepare(RunSettings.load(run_file("run"), changes), say=said.append)
    notes = [text for text in said if "AVX-512" in text]
    assert [way in note for note in notes] == ([] if way is None else [True])


def test_it_says_the_same_as_the_report_of_the_run(run_file, capsys):
    path = run_file("run")
    assert main(["measure", str(path), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert not path.with_suffix("").exists()
    assert main(["train", str(path), "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)["memory"]
    assert measured["at_peak"] == trained["at_peak"]
    assert measured["saved_bytes"] == trained["saved_bytes"]


@pytest.mark.parametrize("use", [measure, train])
def test_the_model_is_freed_afterwards(run_file, monkeypatch, use):
    made = []

    def prepared(*args, **options):
        ready = prepare(*args, **options)
        made.append(weakref.ref(ready.attached.model))
        return ready

    monkeypatch.setattr(run, "prepare", prepared)
    use(RunSettings.load(run_file("run")), say=lambda text: None)
    gc.collect()
    assert [model() for model in made] == [None]


def test_no_hub_repository_is_made(run_file, monkeypatch):
    def make(self, *args, **options):
        raise AssertionError("a repository")

    monkeypatch.setattr(Trainer, "init_hf_repo", make)
    settings = RunSettings.load(run_file("run", train={"push_to_hub": True, "hub_model_id": "me/mine"}))
    assert measure(settings, say=lambda text: None).peak_bytes > 0


def test_modules_sum_to_what_is_kept(run_file, capsys):
    assert main(["measure", str(run_file("run")), "--json", "--by-module", "5"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert sum(measured["by_module"].values()) == measured["saved_bytes"]


def test_why_tensors_are_kept_sums_to_what_is_kept(run_file, capsys):
    path = str(run_file("run"))
    assert main(["measure", path, "--json", "--kept"]) == 0
    measured = json.loads(capsys.readouterr().out)
    kept = measured["kept"]
    assert sum(row["num_bytes"] for row in kept["rows"]) == kept["saved_bytes"] == measured["saved_bytes"]
    assert kept["spare_bytes"] == sum(row["num_bytes"] for row in kept["rows"] if row["spare"])
    assert main(["measure", path, "--kept"]) == 0
    shown = capsys.readouterr().out
    assert "Kept though no trained weight needs it" in shown
    assert "Kept and needed" in shown


def test_a_schedule_that_goes_by_evaluations_is_none_of_two_steps(run_file, review_csv):
    train = {"max_steps": 9, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 3}
    path = run_file("run", data={"train": str(review_csv), "validation_share": 0.25}, train=train)
    assert measure(RunSettings.load(path), say=lambda text: None).peak_bytes > 0
