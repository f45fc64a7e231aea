"""The task image-pretraining: a run file on a folder of pictures, resumed, merged, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, Dinov2Model, ViTConfig, ViTImageProcessor

from shoestring.cli import main
from shoestring.errors import SettingError
from shoestring.planning import predict
from shoestring.recipe import attached_to
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train
from shoestring.training.merging import merge
from shoestring.training.run import prepare

EXPLORA = [
    {"lora": {"r": 2, "target_modules": r".*\.(q_proj|v_proj)"}},
    {"unfreeze": {"norms": True}},
    {"masked_autoencoder": {"mask_ratio": 0.6, "decoder_width": 16, "decoder_blocks": 1, "decoder_heads": 2}},
]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 and 6 pictures of noise on a gradient, as files in a folder a split."""
    folder = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 6)):
        (folder / split).mkdir()
        for index in range(count):
            noise = numbers.integers(0, 60, (9, 13, 3)) + np.linspace(0, 190, 13)[None, :, None]
            Image.fromarray(noise.astype(np.uint8)).save(folder / split / f"{index}.png")
    return folder


@pytest.fixture
def image_run(pictures, image_encoder_folder, tmp_path):
    """Writes a run file and gives its path."""

    def written(name: str = "run", **rest) -> Path:
        run = {
            "model": str(image_encoder_folder),
            "task": "image-pretraining",
            "recipe": EXPLORA,
            "output_dir": str(tmp_path / name),
        }
        fields = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_strategy": "steps"}
        fields |= {"eval_steps": 3, "save_steps": 3, "logging_steps": 1, "use_cpu": True, **rest.pop("train", {})}
        data = {"train": str(pictures), **rest.pop("data", {})}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**run, "train": fields, "data": data, **rest}))
        return path

    return written


def test_a_run_learns_from_a_folder_of_pictures(image_run):
    path = image_run(train={"max_steps": 30, "eval_steps": 30, "save_steps": 30, "eval_on_start": True})
    report = train(RunSettings.load(path))
    assert report.status == "finished"
    assert report.quality["validation"]["loss"] < report.quality["validation, before"]["loss"]
    assert report.measured_batch == {"rows": 4, "tokens": None, "padding_fraction": None}


@pytest.mark.parametrize("recipe", [EXPLORA, EXPLORA[2:]], ids=["explora", "full"])
def test_checkpointing_of_transformers_trains_the_same(image_run, recipe):
    losses = []
    for again in (False, True):
        path = image_run(f"run-{again}", recipe=recipe, train={"gradient_checkpointing": again})
        prepared = []
        losses.append([loss for _, loss in train(RunSettings.load(path), on_ready=prepared.append).losses])
        assert prepared[0].attached.base_model.is_gradient_checkpointing is again
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_resumed_run_is_the_one_that_was_not_stopped(image_run, tmp_path):
    whole = train(RunSettings.load(image_run("whole")))
    path = image_run("stopped")
    train(RunSettings.load(path))
    keep_the_first_checkpoint(tmp_path / "stopped")
    resumed = train(RunSettings.load(path), resume=True)
    assert resumed.quality == whole.quality
    assert resumed.losses == whole.losses
    for file in sorted((tmp_path / "whole" / "final").rglob("*.safetensors")):
        other = load_file(tmp_path / "stopped" / "final" / file.relative_to(tmp_path / "whole" / "final"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


def keep_the_first_checkpoint(run: Path) -> None:
    """Leave only the first checkpoint, as a run that was stopped in its second half has it."""
    newest = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    shutil.rmtree(newest)
    shutil.rmtree(run / "final")
    (run / "report.json").unlink()


@pytest.mark.parametrize("recipe", [EXPLORA, EXPLORA[1:], EXPLORA[2:]], ids=["explora", "unfreeze", "full"])
def test_merged_the_run_is_an_ordinary_encoder(recipe, image_run, image_encoder_folder, tmp_path):
    train(RunSettings.load(image_run(recipe=recipe, data={"image_size": 20})))
    report = merge(tmp_path / "run", tmp_path / "merged")
    source, merged = (load_file(folder / "model.safetensors") for folder in (image_encoder_folder, tmp_path / "merged"))
    assert {name: value.shape for name, value in merged.items()} == {n: value.shape for n, value in source.items()}
    assert report.logits_error < 1e-5 < report.logits_change
    assert type(AutoModel.from_pretrained(tmp_path / "merged")) is Dinov2Model
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 20
    assert not list((tmp_path / "merged").glob("decoder*"))


def test_pictures_are_brought_to_the_size_asked_for(image_run):
    ready = prepare(RunSettings.load(image_run(data={"image_size": 25})))
    batch = next(iter(ready.trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 25, 25)
    assert attached_to(ready.trainer.model).base_model.config.image_size == 15


def test_a_recipe_without_an_objective_is_refused(image_run):
    with pytest.raises(SettingError, match="the recipe needs an objective that learns without, such as masked_auto"):
        prepare(RunSettings.load(image_run(recipe=EXPLORA[:2])))


def test_a_column_without_pictures_is_refused(image_run, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"image": "a.png"}) + "\n")
    with pytest.raises(SettingError, match=r"data.image 'image' of train must hold pictures, but it holds"):
        prepare(
            RunSettings.load(image_run(data={"train": str(tmp_path / "rows.jsonl")}, train={"eval_strategy": "no"}))
        )


def test_a_model_of_other_channels_is_refused(image_run, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    AutoModel.from_config(ViTConfig(**sizes, num_channels=4)).save_pretrained(tmp_path / "four")
    ViTImageProcessor().save_pretrained(tmp_path / "four")
    with pytest.raises(SettingError, match="takes 4 channels, but image-pretraining reads pictures as three"):
        prepare(RunSettings.load(image_run(model=str(tmp_path / "four"))))


def test_the_command_line_trains_by_the_named_recipe(image_run, tmp_path):
    path = image_run(recipe="explora", train={"max_steps": 2, "eval_steps": 2, "save_steps": 2})
    assert main(["train", str(path)]) == 0
    assert main(["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")]) == 0


@pytest.mark.slow
def test_the_packaged_encoder_learns_the_packaged_pictures_and_then_their_labels(tmp_path):
    need("dinov2-small", "fashion-mnist")
    fields = {"max_steps": 12, "per_device_train_batch_size": 8, "learning_rate": 3e-4, "use_cpu": True, "seed": 0}
    settings = {
        "model": "packaged:dinov2-small",
        "task": "image-pretraining",
        "data": {"train": "packaged:fashion-mnist", "image_size": 56, "max_train_rows": 96, "max_eval_rows": 16},
        "recipe": "explora",
        "train": {**fields, "eval_on_start": True},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    report = train(RunSettings.load(tmp_path / "run.yaml"))
    assert report.quality["test"]["loss"] < report.quality["test, before"]["loss"]
    assert merge(tmp_path / "run", tmp_path / "merged").logits_error < 1e-4

    settings |= {
        "model": str(tmp_path / "merged"),
        "task": "image-classification",
        "recipe": [{"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}],
        "train": {**fields, "max_steps": 24, "learning_rate": 2e-3, "eval_on_start": True},
        "output_dir": str(tmp_path / "labels"),
    }
    settings["data"] |= {"max_train_rows": 192, "max_eval_rows": 100}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(settings))
    report = train(RunSettings.load(tmp_path / "labels.yaml"))
    before, after = (report.quality[split]["accuracy"] for split in ("test, before", "test"))
    assert after > max(before, 0.2), "ten classes of equal share, an untrained head before"


def test_planning_needs_the_size_of_images_and_counts_what_is_trained(image_run):
    settings = RunSettings.load(image_run(data={"image_size": 20}))
    predicted = predict(settings)
    with pytest.raises(SettingError, match=r"depends on the size of the images; set data.image_size"):
        predict(RunSettings.load(image_run("unsaid")))
    ready = prepare(settings)
    assert predicted.trained_parameters == sum(p.numel() for p in ready.trainer.model.parameters() if p.requires_grad)
    report = train(settings, predict=lambda s, shape: predict(s, batch=shape.rows).to_dict())
    assert report.predicted["peak_bytes"] == pytest.approx(report.memory["peak_bytes"], rel=0.05)
    smaller = predict(RunSettings.load(image_run("smaller", data={"image_size": 10})))
    assert smaller.parts["saved_for_backward"] < predicted.parts["saved_for_backward"]
