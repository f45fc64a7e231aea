"""Quantised bases in the planner: packed without values, they take the bytes of packed models that hold them."""

import json
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
)

from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.memory.storages import storage_sizes, weight_tensors
from shoestring.planning import models, predict, predict_model, prediction, quantised
from shoestring.planning.rehearsal import rehearse, run_one_step
from shoestring.training import RunSettings, measure
from shoestring.training.models import load_pretrained
from shoestring.training.quantised import numbers_in
from shoestring.training.settings import ModelSettings

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")

LORA = {"lora": {"r": 4, "target_modules": "all-linear"}}
RUNS = {
    "lora": ([LORA], {}),
    "hut": ([{"hut": {"r": 4, "target_modules": "all-linear"}}], {}),
    "recompute": ([LORA, {"recompute": {}}], {}),
    "token_tune": ([LORA, {"token_tune": {"keep_fraction": 0.25}}], {}),
    "reversible": ([LORA, {"reversible": {}}], {}),
    "ba_lora": ([LORA, {"ba_lora": {}}], {}),  # runs the model without gradients too
    "gradient checkpointing": ([LORA], {"gradient_checkpointing": True}),
}


def llama(**settings):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaConfig(vocab_size=67, architectures=["LlamaForCausalLM"], **{**sizes, **heads, **settings})


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory):
    """A Llama of two layers as files, with a tokenizer of few words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(llama()).save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def made(config, kind, dtype=torch.float32, auto_class=None):
    with Valueless():
        return models.make_model(config, models.model_class(config, auto_class), dtype, quantization=kind)


def weight_bytes(model):
    return sum(storage_sizes(weight_tensors(model), torch.device("cpu")).values())


@pytest.mark.parametrize(
    ("kind", "dtype", "run"),
    [
        *(("nf4", "bfloat16", run) for run in RUNS),
        ("nf4", "float32", "lora"),
        ("int8", "bfloat16", "lora"),
        ("int8", "float32", "gradient checkpointing"),
        ("int8", "bfloat16", "ba_lora"),
        *(("torchao-int8", "bfloat16", run) for run in RUNS),
        ("torchao-int8", "float32", "lora"),
    ],
)
def test_the_prediction_is_what_a_loaded_model_takes(kind, dtype, run, llama_folder):
    recipe, train = RUNS[run]
    model = ModelSettings(name=str(llama_folder), quantization=kind, dtype=dtype)

    def loaded():
        return load_pretrained(model, AutoModelForCausalLM)[0].train()

    config = models.configuration(str(llama_folder))
    work = prediction.work_of_model(
        config, recipe, batch=2, length=32, dtype=getattr(torch, dtype), quantization=kind, train=train
    )
    predicted, measured = rehearse(work), run_one_step(replace(work, make_model=loaded))
    assert predicted.memory.peak_bytes == pytest.approx(measured.memory.peak_bytes, rel=0.03)
    for part in ("weights", "gradients", "optimizer_state"):
        assert predicted.memory.at_peak[part] == measured.memory.at_peak[part]
    assert predicted.memory.saved_bytes == pytest.approx(measured.memory.saved_bytes, rel=0.03)
    assert predicted.total_parameters == measured.total_parameters
    assert predicted.trained_parameters == measured.trained_parameters


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_file_is_predicted_as_it_is_measured(kind, llama_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text((json.dumps({"text": "a " * 40}) + "\n") * 8)
    settings = RunSettings.from_dict(
        {
            "model": {"name": str(llama_folder), "quantization": kind, "dtype": "bfloat16"},
            "task": "causal-lm",
            "data": {"train": str(data), "max_length": 24},
            "recipe": [LORA],
            "train": {"per_device_train_batch_size": 2, "use_cpu": True},
            "output_dir": str(tmp_path / "run"),
        }
    )
    predicted, measured = predict(settings), measure(settings, say=lambda text: None)
    assert predicted.parts["adapters"] == measured.trainable_bytes  # float32 adapters in both
    assert predicted.parts["weights"] + predicted.parts["adapters"] == measured.at_peak["weights"]
    assert max(predicted.by_step["forward"], predicted.by_step["backward"]) == pytest.approx(
        measured.peak_bytes, rel=0.03
    )


def test_packed_llama_8b_has_the_weights_worked_out_by_hand():
    config = models.configuration("known:llama-3.1-8b")
    hidden, kv, mlp, blocks, words = 4096, 1024, 14336, 32, 128256
    linear = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp
    whole = 2 * words * hidden + (2 * blocks + 1) * hidden  # embeddings and head, norms
    four_bit = linear // 2 + linear // 64 + 4 * linear // (64 * 256)
    layers = 7 * blocks
    with_tables = blocks * four_bit + 2 * whole + layers * 4 * (16 + 256 + 1)  # levels, and an offset, of each layer
    assert weight_bytes(made(config, "nf4", torch.bfloat16)) == pytest.approx(with_tables, abs=1024)
    rows = 2 * hidden + 2 * kv + 2 * mlp + hidden
    eight_bit = linear + 4 * rows
    assert weight_bytes(made(config, "int8", torch.bfloat16)) == pytest.approx(blocks * eight_bit + 2 * whole, abs=1024)


def test_a_packed_layer_turns_back_into_its_own_shape():
    from transformers.pytorch_utils import Conv1D

    config = GPT2Config(vocab_size=67, n_embd=64, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    whole = {name: m for name, m in made(config, None).named_modules() if isinstance(m, Conv1D)}
    packed = made(config, "nf4")
    for name, layer in whole.items():
        state = packed.get_submodule(name).weight.quant_state
        assert tuple(state.shape) == tuple(layer.weight.T.shape), name
        assert numbers_in(packed.get_submodule(name).weight) == layer.weight.numel()
    assert type(packed.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_heads_stay_whole_and_are_trained(kind):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = BertConfig(vocab_size=67, num_labels=3, **sizes)
    model = made(config, kind, auto_class=AutoModelForSequenceClassification)
    assert type(model.classifier) is torch.nn.Linear
    assert type(model.bert.pooler.dense).__name__ in ("Linear4bit", "Linear8bitLt")
    found = predict_model(
        config,
        [{"lora": {"r": 2, "target_modules": ["query"], "task_type": "SEQ_CLS"}}],
        batch=2,
        length=8,
        quantization=kind,
        auto_class=AutoModelForSequenceClassification,
    )
    assert found.trained_parameters == 2 * 2 * 64 + 3 * 64 + 3


def test_packing_makes_weights_smaller_and_changes_nothing_else_that_is_counted():
    def predicted(kind):
        config = llama(num_hidden_layers=1)
        return predict_model(
            config, [LORA], batch=1, length=16, dtype=torch.bfloat16, quantization=kind, count_operations=True
        )

    nf4, int8, sixteen = (predicted(kind) for kind in ("nf4", "int8", None))
    assert nf4.parts["weights"] < int8.parts["weights"] < sixteen.parts["weights"]
    assert nf4.parts["adapters"] == int8.parts["adapters"] == sixteen.parts["adapters"]
    assert nf4.total_parameters == int8.total_parameters == sixteen.total_parameters
    flops = {found.operations.flops_in("forward") for found in (nf4, int8, sixteen)}
    assert len(flops) == 1


def test_files_that_are_packed_are_predicted_packed():
    config, plain = llama(), llama()
    config.quantization_config = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    config.quantization_config |= {"quant_method": "bitsandbytes", "bnb_4bit_compute_dtype": "bfloat16"}
    assert weight_bytes(made(config, None, torch.bfloat16)) == weight_bytes(made(plain, "nf4", torch.bfloat16))
    with pytest.raises(SettingError, match="are quantised already; set no quantization"):
        made(config, "nf4")


def test_files_packed_by_others_are_refused():
    config = llama()
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(SettingError, match="quantised by gptq, which cannot be predicted; only bitsandbytes can"):
        predict_model(config, [LORA], batch=1, length=16)


def test_packed_weights_without_an_adapter_are_refused():
    with pytest.raises(SettingError, match=r"quantization: nf4 freezes the weights .* no adapter that could"):
        predict_model(llama(), [{"recompute": {}}], batch=1, length=16, quantization="nf4")


def test_the_tables_of_bitsandbytes_keep_their_values(monkeypatch):
    from bitsandbytes import functional

    monkeypatch.delitem(functional.name2qmap, "dynamic", raising=False)
    made(llama(num_hidden_layers=1), "nf4")
    assert not isinstance(functional.name2qmap["dynamic"], FakeTensor)


def test_a_model_with_values_is_packed_by_bitsandbytes_itself():
    model = models.make_model(llama(), LlamaForCausalLM, torch.float32, quantization="nf4")
    projection = model.model.layers[0].self_attn.q_proj
    assert type(projection.weight) is bitsandbytes.nn.Params4bit
    back = bitsandbytes.functional.dequantize_4bit(projection.weight.data, projection.weight.quant_state)
    assert back.shape == (64, 64)
    assert back.abs().max() > 0
    assert quantised.of_checkpoint(model.config).bnb_4bit_quant_type == "nf4"
