"""Known configurations: each builds its model, with as many weights as the published files hold."""

import json
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from shoestring.errors import SettingError
from shoestring.memory import configurations

# Weights of the published files, those that are tied once and position_ids left out. Qwen3 0.6B and 1.7B are stored
# with the tied table twice, which is not counted twice here. Gemma 3's text decoders are its multimodal models without
# the vision tower (416,866,032) and the projector.
PUBLISHED = {
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-small": 76_961_152,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-12b": 12_187_325_040,
    "gemma-3-12b-text": 12_187_325_040 - 416_866_032 - 1152 * (3840 + 1),
    "gemma-3-1b": 999_885_952,
    "gemma-3-27b": 27_432_406_640,
    "gemma-3-27b-text": 27_432_406_640 - 416_866_032 - 1152 * (5376 + 1),
    "gemma-3-4b": 4_300_079_472,
    "gemma-3-4b-text": 4_300_079_472 - 416_866_032 - 1152 * (2560 + 1),
    "gpt2": 124_439_808,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 751_632_384 - 151_936 * 1024,
    "qwen3-1.7b": 2_031_739_904 - 151_936 * 2048,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "t5-3b": 2_851_598_336,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-small": 60_506_624,
    "vit-base-patch16-224": 86_567_656,
    "vit-large-patch16-224": 304_326_632,
    "whisper-base": 72_593_920,
    "whisper-large-v3": 1_543_490_560,
    "whisper-medium": 763_857_920,
    "whisper-small": 241_734_912,
    "whisper-tiny": 37_760_640,
}
# BERT's files hold the head for sentence pairs too, which the masked-language model of its config.json leaves out.
PUBLISHED_AS = {"bert-base": "BertForPreTraining", "bert-large": "BertForPreTraining"}


def without_memory(name: str) -> nn.Module:
    """The model on the meta device, as the class that its published files are of."""
    config = configurations.load(name)
    assert config.architectures
    with torch.device("meta"):
        return getattr(transformers, PUBLISHED_AS.get(name, config.architectures[0]))._from_config(config)


def test_every_configuration_is_in_the_table():
    assert configurations.names() == tuple(sorted(PUBLISHED))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_model_has_as_many_weights_as_the_published_files(name):
    model = without_memory(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    if name.startswith("flan-t5"):  # a T5 from a configuration has no output table of its own; see the docstring
        assert model.lm_head.weight is model.shared.weight
        assert model.config.scale_decoder_outputs is False
        count += model.lm_head.weight.numel()
    assert count == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_is_a_configuration_that_transformers_reads_and_holds_no_defaults(name):
    path = configurations.path_of(name)
    written = json.loads(path.read_text())
    config = AutoConfig.from_pretrained(path)
    assert type(config) is type(configurations.load(name))
    assert isinstance(config, PretrainedConfig)
    assert hasattr(transformers, written["architectures"][0])
    assert str(config.dtype) == f"torch.{written['dtype']}"
    default = type(config)().to_dict()
    fields = {key: value for key, value in written.items() if key not in ("model_type", "architectures", "dtype")}
    assert [key for key, value in fields.items() if key in default and default[key] == value] == []


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(SettingError, match=r"no known configuration 'Llama-3\.1-8'.*'llama-3\.1-8b'"):
        configurations.path_of("Llama-3.1-8")
    with pytest.raises(SettingError, match=r"'qwen2\.5-7b'"):
        configurations.load("qwen2.5_7b")


def test_the_files_are_package_data():
    project = Path(__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["shoestring"]
    files = [f"memory/configurations/{configurations.path_of(name).name}" for name in configurations.names()]
    assert all(any(fnmatch(file, pattern) for pattern in patterns) for file in files)
