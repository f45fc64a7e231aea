"""Merging a run: what is written is the trained model, as transformers loads it, and the report says how far off."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from shoestring.cli import main
from shoestring.errors import SettingError
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.assets import need
from shoestring.training import RunSettings, train
from shoestring.training.merging import OTHER_FUNCTION, merge, merged_model
from shoestring.training.models import load_pretrained
from shoestring.training.settings import ModelSettings

LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
HUT = {"hut": {"r": 4, "target_modules": "all-linear"}}


@pytest.fixture
def finished(run_file):
    """Trains a run and gives its folder."""

    def trained(name="run", **rest):
        rest = {"task": "causal-lm", "recipe": [LORA], **rest}
        train_fields = {"max_steps": 6, "learning_rate": 2e-2, **rest.pop("train", {})}
        settings = RunSettings.load(run_file(name, train=train_fields, **rest))
        train(settings)
        return settings, settings.output_dir

    return trained


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def words():
    return torch.randint(4, 38, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "recipe", [[LORA], [HUT], [LORA, "recompute", "chunked_loss"], [LORA, {"token_tune": {"keep_fraction": 0.5}}]]
)
def test_the_merged_model_is_the_trained_one(recipe, finished, tmp_path):
    settings, folder = finished(recipe=recipe)
    report = merge(folder, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base, _ = load_pretrained(settings.model, AutoModelForCausalLM)
    before = logits(base, words())
    trained = logits(load(base, f"{folder}/final"), words())
    torch.testing.assert_close(logits(merged, words()), trained, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, trained, atol=1e-3)
    assert report.logits_error < 1e-4 < report.logits_change
    assert report.agreement == 1
    assert len(report.layers) == 14
    assert all(layer.error < 1e-6 < layer.change for layer in report.layers)
    assert json.loads((tmp_path / "merged" / "merge.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<pad>"


SINGLE_NUMBERS = [
    {"sparse_grad": {"density": 0.1, "calibration_rows": 4}},
    {"speft": {"density": 0.1, "calibration_rows": 4}},
    {"id3": {"density": 0.1}},
    {"spt": {"budget": 0.1, "calibration_rows": 4}},
]


@pytest.mark.parametrize("recipe", [*([one] for one in SINGLE_NUMBERS), [LORA, SINGLE_NUMBERS[0]]])
def test_a_selection_that_learned_little_is_in_the_written_weights_and_nothing_else(recipe, finished, tmp_path):
    settings, folder = finished(recipe=recipe, train={"learning_rate": 1e-4})
    report = merge(folder, tmp_path / "merged")
    base, _ = load_pretrained(settings.model, AutoModelForCausalLM)
    names = set(base.state_dict())
    trained = logits(load(base, f"{folder}/final"), words())
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, words()), trained, rtol=1e-5, atol=1e-5)
    assert report.logits_error < report.logits_change / 20 < OTHER_FUNCTION / 20
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() <= names
    assert all(layer.error < 1e-6 < layer.change for layer in report.layers)


def test_a_selection_is_merged_in_hand(tiny_decoder_folder):
    base, _ = load_pretrained(ModelSettings(name=str(tiny_decoder_folder)), AutoModelForCausalLM)
    names, weight = set(base.state_dict()), base.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    model = Recipe.from_list([{"speft": {"density": 0.1, "score": "magnitude"}}]).apply(base)
    attached = attached_to(model)
    with torch.no_grad():
        for entries in attached.techniques[0].entries.values():
            entries.values.add_(0.1)
    trained = logits(model, words())
    merged = merged_model(attached)
    assert torch.equal(logits(merged, words()), trained)
    assert set(merged.state_dict()) == names
    attached.detach()
    assert not torch.equal(weight, before)
    assert torch.equal(logits(merged, words()), trained)


def test_a_new_head_is_merged_with_its_labels(finished, tmp_path):
    recipe = [{"lora": {"r": 4, "target_modules": ["query", "value"]}}]
    _, folder = finished(task="text-classification", recipe=recipe)
    report = merge(folder, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == {0: "bad", 1: "good"}
    assert report.logits_error < 1e-4


def test_a_run_without_adapters_is_written_whole(finished, tmp_path):
    _, folder = finished(recipe=[], train={"learning_rate": 1e-3})
    final = Path(folder, "final")
    assert [path.name for path in final.glob("*.safetensors")] == ["model.safetensors"]  # and no weight twice
    with pytest.raises(SettingError, match="holds a whole model, trained with an empty recipe"):
        load(AutoModelForCausalLM.from_pretrained(final), final)
    report = merge(folder, tmp_path / "merged")
    assert report.layers == ()
    assert report.logits_error < 1e-5 < report.logits_change


@pytest.mark.parametrize("recipe", [[LORA], [HUT]])
@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_packed_base_is_unpacked_merged_and_packed_again(kind, recipe, finished, wide_decoder, tmp_path):
    pytest.importorskip("torchao" if kind == "torchao-int8" else "bitsandbytes")
    model = {"name": str(wide_decoder), "quantization": kind, "dtype": "float32"}
    _, folder = finished(model=model, recipe=recipe)
    plain = merge(folder, tmp_path / "plain")
    assert (plain.quantization, plain.dtype) == (None, "float32")
    assert plain.logits_error < (
        0.03 if kind == "int8" else 1e-3
    )  # int8 rounds the inputs of its layers outside of training
    assert plain.logits_error < plain.logits_change / 5
    assert all(layer.error < 1e-6 for layer in plain.layers)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert getattr(merged.config, "quantization_config", None) is None

    packed = merge(folder, tmp_path / "packed", requantise=True)
    assert packed.quantization == kind
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert again.config.quantization_config is not None
    assert plain.logits_error < packed.logits_error < 0.2
    bound = 0.2 if kind == "nf4" else 0.02
    for layer, exact in zip(packed.layers, plain.layers, strict=True):
        assert layer.name == exact.name
        assert 1e-4 < layer.error < bound
        assert layer.change == pytest.approx(exact.change, rel=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_a_model_in_hand_with_a_packed_base_is_refused_without_a_word_of_peft(kind, wide_decoder):
    pytest.importorskip("torchao" if kind == "torchao-int8" else "bitsandbytes")
    model, _ = load_pretrained(ModelSettings(name=str(wide_decoder), quantization=kind), AutoModelForCausalLM)
    with pytest.raises(SettingError, match="its base is packed"):
        merged_model(attached_to(Recipe.from_list([LORA]).apply(model)))


def test_a_wider_dtype_holds_what_a_narrow_one_rounds_away(finished, tmp_path, tiny_decoder_folder):
    _, folder = finished(model={"name": str(tiny_decoder_folder), "dtype": "bfloat16"})
    narrow, wide = merge(folder, tmp_path / "narrow"), merge(folder, tmp_path / "wide", dtype="float32")
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    assert all(layer.error > 5e-4 for layer in narrow.layers)
    assert all(layer.error < 1e-6 for layer in wide.layers)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype is torch.float32


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            [{"lora": {"target_modules": ["v_proj"]}}, {"hut": {"r": 4, "target_modules": ["q_proj"]}}],
            "Recipes of one adapter can be merged; this run has lora and hut",
        ),
        ([{"prompt_tuning": {"num_virtual_tokens": 2}}], "prompt_tuning cannot be merged: it puts learned vectors"),
        ([{"bottleneck": {}}], r"model\.layers\.0.* cannot be merged: bottleneck changes a layer's output"),
        (
            [{"bitfit": {"added": ["q_proj"]}}],
            r"cannot be merged: its recipe has added model\.layers\.0\.self_attn\.q_proj\.bias \(2 in all\)",
        ),
        ([LORA, "reversible"], "cannot be merged: reversible changes what the model computes beside its weights"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(recipe, words, finished, tmp_path):
    _, folder = finished(recipe=recipe, train={"max_steps": 1, "learning_rate": 1e-3})
    with pytest.raises(SettingError, match=words):
        merge(folder, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_head_that_does_not_train_is_that_of_the_run(run_file, review_csv, tmp_path):
    path = run_file("run", recipe=[{"bitfit": {"train_head": False}}], train={"learning_rate": 1e-2})
    settings = RunSettings.load(path)
    heads = []
    train(settings, on_ready=lambda ready: heads.append(ready.attached.base_model.classifier.weight.detach().clone()))
    torch.manual_seed(7)
    merge(settings.output_dir, tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.classifier.weight, heads[0])


def test_trained_weights_that_are_missing_are_told_of(finished, tmp_path):
    settings, folder = finished(recipe=["norm_tuning"])
    (Path(folder) / "final" / "trained.safetensors").unlink()
    base, _ = load_pretrained(settings.model, AutoModelForCausalLM)
    with pytest.raises(SettingError, match=r"final holds no trained\.safetensors"):
        load(base, f"{folder}/final")


def test_wrong_folders_and_options_are_refused(finished, tmp_path):
    with pytest.raises(SettingError, match=r"nothing holds no finished run \(run.yaml and final/\)"):
        merge(tmp_path / "nothing", tmp_path / "merged")
    _, folder = finished(train={"max_steps": 1})
    with pytest.raises(SettingError, match=r"this run has no model\.quantization"):
        merge(folder, tmp_path / "merged", requantise=True)
    with pytest.raises(SettingError, match="--dtype must be one of float32, bfloat16, float16, got 'half'"):
        merge(folder, tmp_path / "merged", dtype="half")
    with pytest.raises(SettingError, match=r"--output .* is there already"):
        merge(folder, tmp_path)


def test_the_command_reports_and_writes(finished, tmp_path, capsys):
    _, folder = finished()
    assert main(["merge", folder, "--output", str(tmp_path / "merged"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(tmp_path / "merged")
    assert main(["merge", folder, "--output", str(tmp_path / "again")]) == 0
    text = capsys.readouterr().out
    assert "change by the adapter" in text
    assert "Logits differ from the trained model's by" in text
    assert main(["merge", folder, "--output", str(tmp_path / "again")]) == 2


@pytest.mark.slow
def test_what_packing_again_takes_from_a_packaged_decoder(tmp_path):
    need("smollm2", "gsm8k-test")
    pytest.importorskip("bitsandbytes")
    settings = RunSettings.from_dict(
        {
            "model": {"name": "packaged:smollm2", "quantization": "nf4", "dtype": "bfloat16"},
            "task": "causal-lm",
            "data": {"train": "packaged:gsm8k-test", "text": "question", "max_length": 160, "max_train_rows": 6},
            "recipe": "qlora",
            "train": {
                "max_steps": 3,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-3,
                "save_strategy": "no",
                "seed": 0,
            },
            "output_dir": str(tmp_path / "run"),
        }
    )
    train(settings)
    wide = merge(tmp_path / "run", tmp_path / "wide", dtype="float32")
    packed = merge(tmp_path / "run", tmp_path / "packed", requantise=True)
    assert wide.logits_error < 0.05 < wide.logits_change
    assert wide.logits_error < packed.logits_error
    assert packed.agreement > 0.8
    lost = sum(layer.error > 0.5 * layer.change for layer in packed.layers)
    assert lost > len(packed.layers) // 2  # small changes stay between the levels of 4 bit: packing takes them back
