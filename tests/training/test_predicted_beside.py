"""What `shoestring train` says of the prediction beside the measured step, and the batch that was measured."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from shoestring import planning
from shoestring.cli import main
from shoestring.errors import SettingError
from shoestring.training import run as training
from shoestring.training.observe import StepMemory, StepShape, shape_of
from shoestring.training.settings import RunSettings


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_the_prediction_is_the_measurement_within_five_percent(run_file, capsys, task):
    assert main(["train", str(run_file("run", task=task))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    report = json.loads((Path(run_file("run", task=task)).parent / "run" / "report.json").read_text())
    batch, predicted = report["measured_batch"], report["predicted"]
    assert (predicted["batch"], predicted["length"]) == (batch["rows"], batch["tokens"])
    peak = max(size for step, size in predicted["by_step"].items() if step != "load")
    assert peak == pytest.approx(report["memory"]["peak_bytes"], rel=0.05)
    assert "predicted peak of a step" in text
    assert f"{batch['padding_fraction']:.0%} of" in text
    assert "part by" not in text


@pytest.fixture
def even_rows(tmp_path) -> Path:
    """Texts of one length."""
    rows = [
        {"text": "the film is a lovely story", "label": "good"},
        {"text": "the film is a dull story", "label": "bad"},
    ]
    data = tmp_path / "even.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 8))
    return data


def with_a_prediction(file: Path) -> training.Report:
    """What a run says of itself, with the prediction of its step."""
    return training.train(
        RunSettings.load(file),
        predict=lambda s, shape: planning.predict(s, batch=shape.rows, length=shape.tokens).to_dict(),
    )


def test_a_batch_without_padding_is_predicted_to_the_byte(run_file, even_rows):
    report = with_a_prediction(run_file(data={"train": str(even_rows)}))
    assert report.measured_batch == {"rows": 4, "tokens": 8, "padding_fraction": 0.0}
    assert report.predicted["peak_bytes"] == report.memory["peak_bytes"]


LORA = {"lora": {"r": 2, "target_modules": ["query", "key", "value", "dense"]}}
OF_DATA = {"calibration_rows": 8}
EVERYWHERE = {"density": 0.3, "target_modules": ["value", "dense"]}  # no weight is left without chosen numbers
RECIPES = {
    "bitfit": ["bitfit"],
    "norm_tuning": ["norm_tuning"],
    "unfreeze": ["unfreeze"],
    "speft": [{"speft": {**EVERYWHERE, **OF_DATA}}],
    "sparse_grad": [{"sparse_grad": {"density": 0.5, **OF_DATA}}],
    "spt": [{"spt": {"budget": 0.3, "r": 2, **OF_DATA}}],
    "id3": [{"id3": {**EVERYWHERE, "steps": 1}}],  # the prediction is for a step after the last choice
    "ist": [LORA, {"ist": {"active_layers": 1, "importance": False, "seed": 2}}],  # for a step of the lowest blocks
    "light_peft": [LORA, {"light_peft": {"channel_multiple": 4}}],  # for the steps before pruning
    "density_loss": [{"density_loss": {"epsilon": 0.1}}],
    "metric_learning": [LORA, "metric_learning"],
}


@pytest.mark.filterwarnings("ignore:light_peft prunes nothing in this run")
@pytest.mark.parametrize("name", RECIPES)
def test_what_chooses_weights_or_adds_to_the_loss_is_predicted_within_five_percent(run_file, even_rows, name):
    report = with_a_prediction(run_file(recipe=RECIPES[name], data={"train": str(even_rows)}))
    assert report.predicted["peak_bytes"] == pytest.approx(report.memory["peak_bytes"], rel=0.05)


@pytest.mark.parametrize(
    "recipe",
    [
        [{"speft": {"density": 0.05, **OF_DATA}}],
        [{"sparse_grad": {"density": 0.05, **OF_DATA}}],
        [{"id3": {"density": 0.05, "steps": 1}}],
        [LORA, {"ist": {"active_layers": 1, "importance": False, "seed": 1}}],
    ],
    ids=["speft", "sparse_grad", "id3", "ist"],
)
def test_choices_that_hang_on_values_or_draws_are_predicted_at_their_most(run_file, even_rows, recipe):
    """Weights without a chosen number, and blocks that rest, keep less."""
    report = with_a_prediction(run_file(recipe=recipe, data={"train": str(even_rows)}))
    assert 1 < report.predicted["peak_bytes"] / report.memory["peak_bytes"] < 1.5


def test_a_prediction_far_off_is_warned_of(run_file, capsys, monkeypatch):
    predict = planning.predict

    def twice(*args, **options):
        found = predict(*args, **options)
        return type(found)(**{**vars(found), "by_step": {step: 2 * size for step, size in found.by_step.items()}})

    monkeypatch.setattr(planning, "predict", twice)
    assert main(["train", str(run_file())]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Predicted and measured memory part by" in text
    assert "the prediction is for a batch without padding" in text


@pytest.mark.parametrize(
    "error", [SettingError("bert cannot be predicted.\nmore"), ZeroDivisionError("bert cannot be predicted.")]
)
def test_a_prediction_that_is_refused_is_one_line_and_the_run_ends_well(run_file, error):
    def refuse(settings, shape):
        raise error

    said = []
    report = training.train(RunSettings.load(run_file()), predict=refuse, say=said.append)
    assert report.status == "finished"
    assert report.predicted is None
    assert said[-1] == "No prediction beside the measured memory: bert cannot be predicted."


def test_without_a_prediction_the_report_has_the_batch_alone(run_file):
    report = training.train(RunSettings.load(run_file()))
    assert report.predicted is None
    assert report.measured_batch["rows"] == 4


class Called(nn.Module):
    """A model that takes anything."""

    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        return self.weight


def test_the_largest_micro_batch_of_the_step_is_noted(tmp_path):
    model, memory = Called(), StepMemory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(max_steps=3)
    for lengths in ((9, 9), (5, 7, 6), (8,)):
        memory.on_step_begin(arguments, state, TrainerControl(), model=model, optimizer=optimizer)
        for length in lengths:
            mask = torch.ones(2, length, dtype=torch.long)
            mask[1, 4:] = 0
            model(input_ids=torch.zeros(2, length, dtype=torch.long), attention_mask=mask)
        memory.on_step_end(arguments, state, TrainerControl())
    assert memory.shape == StepShape(2, 7, pytest.approx(3 / 14))


class Growing(nn.Module):
    """Keeps more for backward with every forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.calls = 0

    def forward(self) -> torch.Tensor:
        self.calls += 1
        return (torch.randn(100 * self.calls).square() * self.weight).sum()


@pytest.mark.parametrize(("steps", "watched"), [(1, [1]), (2, [2]), (5, [2, 5])])
def test_the_second_step_is_counted_and_the_last(tmp_path, steps, watched):
    model, memory, seen = Growing(), StepMemory(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    arguments, state = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerState(max_steps=steps)
    for step in range(steps):
        state.global_step = step
        memory.on_step_begin(arguments, state, TrainerControl(), model=model, optimizer=optimizer)
        seen += [step + 1] if memory.watching else []
        model().backward()
        memory.on_step_end(arguments, state, TrainerControl())
    assert seen == watched
    assert memory.report is not None
    assert memory.report.saved_bytes >= 400 * watched[0]
    assert (memory.at_end is not None) == (len(watched) > 1)
    if memory.at_end is not None:
        assert memory.at_end.saved_bytes - memory.report.saved_bytes == 400 * (watched[1] - watched[0])


def test_images_have_rows_and_no_tokens_and_recordings_the_tokens_of_their_labels():
    model = Called()
    model.main_input_name = "pixel_values"
    images = {"pixel_values": torch.zeros(3, 3, 8, 8), "labels": torch.zeros(3, dtype=torch.long)}
    assert shape_of(model, images) == StepShape(3, None, None)
    model.main_input_name = "input_features"
    sounds = {"input_features": torch.zeros(3, 8, 20), "labels": torch.zeros(3, 5, dtype=torch.long)}
    assert shape_of(model, sounds) == StepShape(3, 5, None)
    assert shape_of(model, {}) is None
