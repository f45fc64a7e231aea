"""When conversions are made, kept and made again."""

import importlib.util
import json

import pytest
from made_carrier import CONTENT

from shoestring import assets
from shoestring.assets import CarrierFile, ModelAsset, extras, opening
from shoestring.assets.catalogue import CATALOGUE
from shoestring.errors import RunFailed, SettingError

WORDS = "tiny_carrier/data/words.txt"


@pytest.fixture
def converted(tiny_carrier, monkeypatch):
    """A function that puts a model with this converter into the catalogue; the model's files are installed."""
    data = CATALOGUE["tiny"]

    def register(convert, version=1):
        file = next(file for file in data.files if file.path == WORDS)
        shared = {name: getattr(data, name) for name in ("package", "version", "carrier_bytes", "carrier_sha256")}
        described = {name: getattr(data, name) for name in ("licence", "task", "description")}
        model = ModelAsset(
            name="tiny-model", files=(file,), convert=convert, converter_version=version, **shared, **described
        )
        monkeypatch.setitem(CATALOGUE, "tiny-model", model)
        assets.install("tiny-model")

    return register


def copy_words(files, folder):
    (folder / "config.json").write_bytes((files / "words.txt").read_bytes())


def test_a_conversion_is_made_once(converted):
    calls = []

    def convert(files, folder):
        calls.append(folder)
        copy_words(files, folder)

    converted(convert)
    folder = assets.model_folder("tiny-model")
    assert assets.model_folder("tiny-model") == folder
    assert (folder / "config.json").read_bytes() == CONTENT[WORDS]
    assert len(calls) == 1


def test_a_newer_converter_makes_it_again(converted):
    converted(copy_words)
    assets.model_folder("tiny-model")
    converted(lambda files, folder: (folder / "config.json").write_text("new"), version=2)
    folder = assets.model_folder("tiny-model")
    assert (folder / "config.json").read_text() == "new"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["files", "model"]


def test_a_failed_conversion_leaves_nothing_half_written(converted, cache):
    def fail(files, folder):
        copy_words(files, folder)
        raise RuntimeError("out of memory")

    converted(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        assets.model_folder("tiny-model")
    assert [path.name for path in (cache / "tiny-model").iterdir()] == ["files"]


def test_a_damaged_conversion_is_made_again(converted):
    converted(copy_words)
    folder = assets.model_folder("tiny-model")
    (folder / "config.json").write_text("")
    assert (assets.model_folder("tiny-model") / "config.json").read_bytes() == CONTENT[WORDS]


def test_too_little_room_for_a_conversion_is_told(converted, monkeypatch):
    def no_room(size_bytes, purpose):
        raise SettingError(f"{purpose} needs room")

    converted(copy_words)
    monkeypatch.setattr(opening, "need_room", no_room)
    with pytest.raises(SettingError, match="Converting tiny-model needs room"):
        assets.model_folder("tiny-model")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == "onnx" else importlib.util.find_spec(name))
    with pytest.raises(SettingError, match=r'needs onnx, .* pip install "shoestring\[demo\]"'):
        extras.need_packages(("onnx", "json"), "Converting dinov2-small")


def test_a_model_that_does_not_get_all_its_weights_is_refused(tmp_path):
    import torch
    from transformers import BertConfig, BertModel

    from shoestring.assets.model_files import write_model

    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=11)
    weights = BertModel(config).state_dict()
    write_model(tmp_path, BertModel, config, weights)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["BertModel"]
    del weights["embeddings.LayerNorm.weight"]
    weights["stranger"] = torch.zeros(3)
    with pytest.raises(RunFailed, match=r"missing_keys.*embeddings.LayerNorm.weight.*stranger"):
        write_model(tmp_path, BertModel, config, weights)


def test_a_carrier_file_is_kept_under_the_last_part_of_its_path():
    assert CarrierFile("a/b/model.onnx", 1, "0" * 64).name == "model.onnx"
