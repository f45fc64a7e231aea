"""The task image-classification: what it learns, that a new head trains with every kind, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, Value
from peft import PeftModel
from PIL import Image as Picture
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessor,
    CLIPConfig,
    Dinov2ForImageClassification,
    ResNetConfig,
    ViTConfig,
    ViTImageProcessor,
)

from shoestring import load
from shoestring.cli import main
from shoestring.errors import RunFailed, SettingError
from shoestring.planning import predict
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train
from shoestring.training.merging import merge
from shoestring.training.run import prepare

LORA = {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]}}
ALL_LINEAR = {"lora": {"r": 2, "target_modules": "all-linear"}}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise on two gradients, "down" and "up": 24 and 8 pictures as files, in a folder a class."""
    folder = tmp_path_factory.mktemp("kinds")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 24), ("validation", 8)):
        for index in range(count):
            kind = ("down", "up")[index % 2]
            slope = np.linspace(0, 190, 13)[:: 1 if kind == "up" else -1]
            noise = numbers.integers(0, 60, (9, 13, 3)) + slope[None, :, None]
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            Picture.fromarray(noise.astype(np.uint8)).save(folder / split / kind / f"{index}.png")
    return folder


@pytest.fixture
def image_run(kinds, image_encoder_folder, tmp_path):
    """Writes a run file and gives its path."""

    def written(name: str = "run", **rest: Any) -> Path:
        run = {
            "model": str(image_encoder_folder),
            "task": "image-classification",
            "recipe": [LORA],
            "output_dir": str(tmp_path / name),
        }
        fields = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "eval_strategy": "no"}
        fields |= {"save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "use_cpu": True, "seed": 0}
        data = {"train": str(kinds), **rest.pop("data", {})}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**run, "train": {**fields, **rest.pop("train", {})}, "data": data, **rest}))
        return path

    return written


def ready(path: Path, *overrides: str) -> Any:
    return prepare(RunSettings.load(path, overrides))


def fresh(folder: Path) -> Any:
    """The encoder with a new head, other than any run's."""
    torch.manual_seed(5)
    return AutoModelForImageClassification.from_pretrained(folder, num_labels=2)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    pixels = torch.randn(3, 3, 15, 15, generator=torch.Generator().manual_seed(3))
    return model.eval()(pixel_values=pixels).logits


# What is learned


def test_a_run_tells_the_classes_of_a_folder_of_pictures_apart(image_run):
    report = train(RunSettings.load(image_run(train={"max_steps": 40, "eval_on_start": True})))
    assert set(report.quality["validation"]) == {"loss", "accuracy", "f1_macro", "majority_class"}
    assert report.quality["validation"]["majority_class"] == 0.5
    assert report.quality["validation"]["accuracy"] == report.quality["validation"]["f1_macro"] == 1.0
    assert report.quality["validation"]["loss"] < 0.5 * report.quality["validation, before"]["loss"]
    assert report.measured_batch == {"rows": 4, "tokens": None, "padding_fraction": None}


@pytest.mark.parametrize("labels", [["down", "up"], [0, 1], ["1", "0"]], ids=str)
def test_labels_may_be_names_or_numbers(labels, image_run, kinds, tmp_path):
    names = sorted(labels, key=str)
    made = ready(image_run(data={"train": str(parquet(tmp_path, kinds, labels)), "label": "kind"}))
    batch = next(iter(made.trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 15, 15)
    assert made.attached.model.config.id2label == {0: str(names[0]), 1: str(names[1])}
    by_row = [made.data["train"][row]["labels"] for row in range(4)]
    assert by_row == [names.index(labels[row % 2]) for row in range(4)]


def parquet(folder: Path, kinds: Path, labels: list[Any], pictures: bool = True) -> Path:
    """The training pictures in turn, with labels under "kind"; a column of texts in their place where not wanted."""
    paths = sorted((kinds / "train").rglob("*.png"), key=lambda path: int(path.stem))
    rows = {"image": [str(path) for path in paths], "kind": [labels[i % len(labels)] for i in range(len(paths))]}
    of_labels = Value({int: "int64", float: "float64"}.get(type(labels[0]), "string"))
    features = Features(image=Image() if pictures else Value("string"), kind=of_labels)
    Dataset.from_dict(rows, features=features).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def test_a_resumed_run_is_the_one_that_was_not_stopped(image_run, tmp_path):
    whole = train(RunSettings.load(image_run("whole")))
    path = image_run("stopped")
    train(RunSettings.load(path))
    shutil.rmtree(tmp_path / "stopped" / "checkpoint-4")
    shutil.rmtree(tmp_path / "stopped" / "final")
    (tmp_path / "stopped" / "report.json").unlink()
    resumed = train(RunSettings.load(path), resume=True)
    assert (resumed.quality, resumed.losses) == (whole.quality, whole.losses)
    for file in sorted((tmp_path / "whole" / "final").rglob("*.safetensors")):
        other = load_file(tmp_path / "stopped" / "final" / file.relative_to(tmp_path / "whole" / "final"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(file).items())


# The new head


RECIPES = {
    "lora": [LORA],
    "lora on all linear layers": [ALL_LINEAR],
    "hut": [{"hut": {"r": 2, "target_modules": ["q_proj"]}}],
    "two adapters": [LORA, {"bottleneck": {"form": "parallel", "r": 2}}],
    "norm_tuning": ["norm_tuning"],
    "bitfit": ["bitfit"],
    "lora and norm_tuning": [LORA, "norm_tuning"],
    "speft": [{"speft": {"score": "magnitude", "density": 0.05}}],
    "reversible": ["reversible"],
    "lora, blocks and activations": [LORA, "recompute", "lean_mlp", "low_bit_activations"],
    "lora, an objective": [LORA, "metric_learning"],
    "lora without gradients": [LORA, "zeroth_order"],
    "full": [],
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_new_head_trains_is_saved_and_loads(recipe, image_run, image_encoder_folder, tmp_path):
    made = ready(image_run(recipe=recipe))
    head = [p for n, p in made.attached.model.named_parameters() if p.requires_grad and "classifier" in n]
    start = [p.detach().clone() for p in head]
    assert sorted(p.numel() for p in head) == [2, 2 * 2 * 24]
    made.trainer.train()
    assert not any(torch.equal(p, before) for p, before in zip(head, start, strict=True))
    made.trainer.save_model(str(tmp_path / "saved"))
    if recipe:
        loaded = load(fresh(image_encoder_folder), tmp_path / "saved")
    else:
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(made.attached.model), rtol=1e-5, atol=1e-6)


def test_no_adapter_is_on_the_head_that_trains_whole(image_run):
    model = ready(image_run(recipe=[ALL_LINEAR])).attached.model
    adapted = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 3 * 6
    assert not any("classifier" in name for name in adapted)


def test_what_was_saved_loads_in_peft_alone(image_run, image_encoder_folder, tmp_path):
    made = ready(image_run())
    made.trainer.train()
    made.trainer.save_model(str(tmp_path / "saved"))
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier"])
    loaded = PeftModel.from_pretrained(fresh(image_encoder_folder), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(made.attached.model))


def test_other_modules_to_save_are_kept(image_run):
    lora = {"lora": {**LORA["lora"], "modules_to_save": ["layernorm"]}}
    model = ready(image_run(recipe=[lora])).attached.model
    whole = {name for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name}
    assert {name.split(".modules_to_save")[0].split(".")[-1] for name in whole} == {"layernorm", "classifier"}


@pytest.fixture
def clip(tmp_path) -> Path:
    """A CLIP, whose classifier of images does not read its last norm."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = CLIPConfig(vision_config={**sizes, "image_size": 15, "patch_size": 5}, text_config=sizes)
    AutoModel.from_config(config).save_pretrained(tmp_path / "clip")
    ViTImageProcessor(size={"height": 15, "width": 15}).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("recipe", [[LORA], ["norm_tuning"], ["bitfit"], []], ids=str)
def test_clip_does_not_name_its_pretrained_part_nor_read_its_last_norm_and_trains(recipe, clip, image_run, caplog):
    path = image_run(model=str(clip), recipe=recipe, train={"max_steps": 2})
    trained = ready(path).attached.model.named_parameters()
    assert any(name.endswith("classifier.weight") or "classifier.modules" in name for name, _ in trained)
    assert train(RunSettings.load(path)).status == "finished"
    told = [record.getMessage() for record in caplog.records if "does not depend on it" in record.getMessage()]
    assert len(told) == (recipe != [LORA])
    assert all("post_layernorm" in message and "CLIPForImageClassification" in message for message in told)


def test_weights_that_only_this_run_keeps_gradients_from_still_stop_it(clip, image_run):
    def broken(made: Any) -> None:
        block = made.attached.base_model.vision_model.encoder.layers[0]
        block.register_forward_hook(lambda module, args, states: states.detach())

    with pytest.raises(RunFailed, match=r"pre_layrnorm\.weight \(and \d+ more\) got no gradient"):
        train(RunSettings.load(image_run(model=str(clip), recipe=["norm_tuning"])), on_ready=broken)


def test_convolutions_are_no_obstacle(image_run, tmp_path):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    AutoModel.from_config(ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    path = image_run(model=str(tmp_path / "resnet"), recipe=["norm_tuning"], data={"image_size": 33})
    assert train(RunSettings.load(path)).status == "finished"


# Sizes


@pytest.fixture
def vit(tmp_path) -> Path:
    """A ViT for 15 x 15 pixels, whose positions are interpolated only when it is told to."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    AutoModel.from_config(ViTConfig(**sizes, image_size=15, patch_size=5)).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 15, "width": 15}).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_vit_takes_images_of_another_size(image_run, vit, tmp_path):
    path = image_run(model=str(vit), data={"image_size": 25})
    batch = next(iter(ready(path).trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 25, 25)
    assert batch["interpolate_pos_encoding"] is True
    assert predict(RunSettings.load(path)).parts["saved_for_backward"] > 0
    report = train(RunSettings.load(path))
    assert report.status == "finished"
    assert merge(tmp_path / "run", tmp_path / "merged").logits_error < 1e-5
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 25


def test_a_vit_is_told_nothing_where_images_have_its_size(image_run, vit):
    batch = next(iter(ready(image_run(model=str(vit))).trainer.get_train_dataloader()))
    assert set(batch) == {"pixel_values", "labels"}


@pytest.mark.parametrize("prepare_or_predict", [prepare, predict])
def test_a_size_that_is_no_whole_number_of_patches_is_refused(prepare_or_predict, image_run):
    settings = RunSettings.load(image_run(data={"image_size": 22}))
    told = r"patches of 5 x 5 pixels, and images of 22 x 22 are no whole .*; set data.image_size to 20 or 25\."
    with pytest.raises(SettingError, match=told):
        prepare_or_predict(settings)
    with pytest.raises(SettingError, match=r"images of 3 x 3 .*; set data.image_size to 5\."):
        prepare_or_predict(RunSettings.load(image_run(data={"image_size": 3})))


def test_a_processor_that_leaves_pictures_in_their_shape_is_refused(image_run, image_encoder_folder, tmp_path):
    shutil.copytree(image_encoder_folder, tmp_path / "uncropped")
    uncropped = BitImageProcessor(size={"shortest_edge": 15}, do_center_crop=False)
    uncropped.save_pretrained(tmp_path / "uncropped")
    with pytest.raises(SettingError, match=r"different shapes in different sizes, .*; crop them to one shape"):
        ready(image_run(model=str(tmp_path / "uncropped"), data={"image_size": 15}))


# What is refused


def test_a_column_that_is_not_there_is_refused(image_run):
    with pytest.raises(SettingError, match=r"The train data has no column 'img'\. Did you mean 'image'"):
        ready(image_run(data={"image": "img"}))
    with pytest.raises(SettingError, match=r"The train data has no column 'lable'\. Did you mean 'label'"):
        ready(image_run(data={"label": "lable"}))


def test_a_missing_package_is_named_with_the_extra_that_brings_it(image_run, monkeypatch):
    path = image_run()
    monkeypatch.setattr("shoestring.assets.extras.find_spec", lambda module: None)
    with pytest.raises(SettingError, match=r"Reading pictures needs PIL, .* pip install \"shoestring\[demo\]\""):
        ready(path)


def test_a_column_without_pictures_is_refused(image_run, kinds, tmp_path):
    data = {"train": str(parquet(tmp_path, kinds, ["a", "b"], pictures=False)), "label": "kind"}
    with pytest.raises(SettingError, match=r"data.image 'image' of train must hold pictures, but it holds"):
        ready(image_run(data=data))


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, 1, 4], r"Row 2 of train has the label 4 in 'kind', out of range: 3 classes are numbered 0 to 2\."),
        ([0.5, 1.0], r"data.label 'kind' must hold names or whole numbers, got 0.5\."),
        (["a"], r"All rows of train have the label 'a' in 'kind', but there must be at least two classes"),
    ],
    ids=["numbers with a gap", "fractions", "one class"],
)
def test_labels_that_are_no_classes_are_refused(labels, told, image_run, kinds, tmp_path):
    with pytest.raises(SettingError, match=told):
        ready(image_run(data={"train": str(parquet(tmp_path, kinds, labels)), "label": "kind"}))


def test_a_label_that_training_did_not_have_is_refused(image_run, kinds, tmp_path):
    (tmp_path / "other").mkdir()
    validation = parquet(tmp_path / "other", kinds, ["down", "up", "left"])
    data = {"train": str(parquet(tmp_path, kinds, ["down", "up"])), "validation": str(validation), "label": "kind"}
    with pytest.raises(SettingError, match=r"Row 2 of validation has the label 'left' .* training data has down, up\."):
        ready(image_run(data=data))


def test_a_model_of_other_channels_is_refused(image_run, tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    AutoModel.from_config(ViTConfig(**sizes, num_channels=1)).save_pretrained(tmp_path / "grey")
    ViTImageProcessor().save_pretrained(tmp_path / "grey")
    with pytest.raises(SettingError, match="takes 1 channels, but image-classification reads pictures as three"):
        ready(image_run(model=str(tmp_path / "grey")))


def test_prompts_are_refused(image_run):
    with pytest.raises(SettingError, match=r"prompt_tuning learns vectors among the tokens of a text, which the task"):
        ready(image_run(recipe=[{"prompt_tuning": {"num_virtual_tokens": 2}}]))


def test_an_objective_without_labels_is_refused(image_run):
    with pytest.raises(SettingError, match="has a head; load it with AutoModel"):
        ready(image_run(recipe=["masked_autoencoder"]))


def test_a_model_without_a_form_for_the_task_is_refused(image_run, tiny_decoder_folder):
    with pytest.raises(SettingError, match="cannot be loaded with AutoModelForImageClassification"):
        ready(image_run(model=str(tiny_decoder_folder)))


# Planning, merging, commands


@pytest.mark.parametrize("recipe", [[ALL_LINEAR], ["norm_tuning"], [LORA, "bitfit"], []], ids=str)
def test_planning_counts_what_is_trained(recipe, image_run):
    settings = RunSettings.load(image_run(recipe=recipe, data={"image_size": 20}))
    predicted, made = predict(settings), ready(image_run(recipe=recipe, data={"image_size": 20}))
    assert predicted.trained_parameters == sum(p.numel() for p in made.attached.model.parameters() if p.requires_grad)
    smaller = predict(RunSettings.load(image_run(recipe=recipe, data={"image_size": 10})))
    assert smaller.parts["saved_for_backward"] < predicted.parts["saved_for_backward"]


def test_planning_needs_the_size_of_images(image_run):
    with pytest.raises(SettingError, match=r"depends on the size of the images; set data.image_size"):
        predict(RunSettings.load(image_run()))


def test_a_run_ends_with_the_prediction_of_the_step_that_was_measured(image_run, capsys, tmp_path):
    assert main(["train", str(image_run(data={"image_size": 20})), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["predicted"]["peak_bytes"] == pytest.approx(report["memory"]["peak_bytes"], rel=0.02)


@pytest.mark.parametrize("recipe", [[ALL_LINEAR], ["norm_tuning"], []], ids=["lora", "norm_tuning", "full"])
def test_merged_the_run_is_an_ordinary_classifier(recipe, image_run, tmp_path):
    train(RunSettings.load(image_run(recipe=recipe)))
    report = merge(tmp_path / "run", tmp_path / "merged")
    assert report.logits_error < 1e-5 < report.logits_change
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert type(model) is Dinov2ForImageClassification
    assert model.config.id2label == {0: "down", 1: "up"}
    assert AutoImageProcessor.from_pretrained(tmp_path / "merged").size["height"] == 15


def test_every_command_takes_the_task(image_run, tmp_path, capsys):
    path = str(image_run(data={"image_size": 20}))
    for command in (
        ["plan", path],
        ["measure", path],
        ["measure", path, "--kept"],
        ["train", path],
        ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "merged")],
    ):
        assert main(command) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_packaged_encoder_tells_packaged_pictures_of_clothes_apart(tmp_path):
    need("dinov2-small", "fashion-mnist")
    fields = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "use_cpu": True, "seed": 0}
    data = {"train": "packaged:fashion-mnist", "image_size": 56, "max_train_rows": 640, "max_eval_rows": 300}
    settings = {
        "model": "packaged:dinov2-small",
        "task": "image-classification",
        "data": data,
        "recipe": [{"lora": {"r": 8, "target_modules": "all-linear"}}],
        "train": {**fields, "eval_strategy": "no"},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    report = train(RunSettings.load(tmp_path / "run.yaml"))
    assert report.quality["test"]["majority_class"] < 0.2
    assert report.quality["test"]["accuracy"] > 0.6
    assert merge(tmp_path / "run", tmp_path / "merged").logits_error < 1e-4
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label[9] == "ankle boot"
