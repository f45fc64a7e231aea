"""Quantised bases in run files: packed linear layers stay, adapters learn, save and load on them."""

import json

import pytest
import torch

from shoestring.errors import SettingError
from shoestring.recipe import Recipe, load
from shoestring.testing.adapters import assert_near
from shoestring.testing.assets import need
from shoestring.training import RunSettings, measure, train
from shoestring.training.models import load_pretrained
from shoestring.training.quantised import keep_training_layout, quantization_config, trained_dtypes_kept
from shoestring.training.run import prepare
from shoestring.training.settings import ModelSettings

bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")

PACKED = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)


def no_words(text):
    pass


def a_quantised_run(run_file, folder, kind, **rest):
    recipe = [{"lora": {"r": 4, "target_modules": "all-linear"}}]
    model = {"name": str(folder), "quantization": kind}
    return RunSettings.load(run_file(task="causal-lm", **{"recipe": recipe, "model": model, **rest}))


@pytest.mark.parametrize("kind", ["nf4", "int8", "torchao-int8"])
def test_a_run_on_a_packed_base_learns_saves_and_loads(kind, run_file, wide_decoder):
    settings = a_quantised_run(run_file, wide_decoder, kind, train={"max_steps": 12})
    report = train(settings)
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < losses[0] - 0.2
    assert report.memory["at_peak"]["weights"] > 0

    def outputs(model):
        torch.manual_seed(0)
        ids = torch.randint(4, 38, (2, 9))
        with torch.no_grad():
            return model.train()(input_ids=ids).logits  # in training, packed weights are multiplied as they are stored

    from transformers import AutoModelForCausalLM

    base, _ = load_pretrained(settings.model, AutoModelForCausalLM)
    before = outputs(base)
    learned = outputs(load(base, report.saved["weights"]))
    assert not torch.allclose(learned, before, atol=1e-2)
    again, _ = load_pretrained(settings.model, AutoModelForCausalLM)
    torch.testing.assert_close(outputs(load(again, report.saved["weights"])), learned)


def test_the_named_qlora_is_that_of_transformers_and_peft(wide_decoder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def filled(make):
        torch.manual_seed(3)
        model = make().train()
        started = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at the start, and so A's gradient
                torch.nn.init.normal_(parameter, std=0.1)
        return model, started

    def plain():
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        config.bnb_4bit_compute_dtype = torch.float32
        model = AutoModelForCausalLM.from_pretrained(wide_decoder, quantization_config=config)
        return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    def named():
        model, _ = load_pretrained(ModelSettings(name=str(wide_decoder), quantization="nf4"), AutoModelForCausalLM)
        return Recipe.named("qlora").apply(model)

    (ours, start), (theirs, start_of_theirs) = filled(named), filled(plain)
    ids = torch.randint(4, 38, (2, 9), generator=torch.Generator().manual_seed(0))
    assert start.keys() == start_of_theirs.keys()
    assert all(torch.equal(value, start_of_theirs[name]) for name, value in start.items())
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    losses = [model(input_ids=ids, labels=ids).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    for name in start:
        assert_near(ours.get_parameter(name).grad, theirs.get_parameter(name).grad, name, share=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("nf4", {"init_lora_weights": "pissa"}, "Please initialize PiSSA under float32, float16, or bfloat16"),
        ("torchao-int8", {"lora_bias": True}, "TorchaoLoraLinear does not support lora_bias yet, set it to False"),
        ("torchao-int8", {"init_lora_weights": "olora"}, "Int8Tensor dispatch: attempting to run unimplemented"),
    ],
)
def test_what_peft_cannot_do_on_a_packed_base_is_refused(kind, settings, message, run_file, wide_decoder):
    recipe = [{"lora": {"r": 4, "target_modules": "all-linear", **settings}}]
    with pytest.raises(SettingError, match=f"The recipe does not fit the model: {message}"):
        prepare(a_quantised_run(run_file, wide_decoder, kind, recipe=recipe), say=no_words)


@pytest.mark.parametrize("task", ["causal-lm", "text-classification"])
def test_linear_layers_are_packed_and_the_rest_stays_as_it_was(task, run_file, wide_decoder):
    ready = prepare(
        RunSettings.load(
            run_file(
                task=task,
                model={"name": str(wide_decoder), "quantization": "nf4", "dtype": "bfloat16"},
                recipe=[{"lora": {"r": 2, "target_modules": ["q_proj"]}}],
            )
        ),
        say=no_words,
    )
    base = ready.attached.base_model
    packed = [name for name, module in base.named_modules() if isinstance(module, PACKED)]
    assert len(packed) == 7 * 2
    assert not any("head" in name or "score" in name for name in packed)
    layer = base.get_submodule(packed[0])
    assert layer.compute_dtype is torch.bfloat16
    assert layer.weight.quant_state.nested
    for name, parameter in ready.attached.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == (torch.bfloat16 if "score" in name else torch.float32), name
        elif parameter.is_floating_point():
            assert parameter.dtype == torch.bfloat16, name


def test_a_trained_weight_that_is_cast_comes_back_with_its_value():
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    before = model.weight.detach().clone()
    with trained_dtypes_kept(model):
        model.to(torch.bfloat16)
    assert torch.equal(model.weight, before)
    assert model.bias.dtype is torch.bfloat16


def test_products_are_in_the_dtype_of_the_files_where_none_is_set(wide_decoder):
    from transformers import AutoModelForCausalLM

    model, _ = load_pretrained(ModelSettings(name=str(wide_decoder), quantization="nf4"), AutoModelForCausalLM)
    assert model.dtype is torch.float32
    assert {module.compute_dtype for module in model.modules() if isinstance(module, PACKED)} == {torch.float32}


@pytest.mark.parametrize("recipe", [[], [{"recompute": {}}]])
def test_packed_weights_without_an_adapter_are_refused_before_anything_is_loaded(recipe, run_file):
    model = {"name": "packaged:no-such-model", "quantization": "nf4"}
    with pytest.raises(SettingError, match=r"run.yaml, line 3: model.quantization: nf4 freezes .* no adapter that"):
        RunSettings.load(run_file(task="causal-lm", model=model, recipe=recipe))


def test_an_unknown_form_is_refused_once(run_file):
    with pytest.raises(
        SettingError, match=r"model.quantization must be one of nf4, int8, torchao-int8, got 'nf5'"
    ) as error:
        RunSettings.load(run_file(model={"name": "m", "quantization": "nf5"}, recipe=[]))
    assert "problems" not in str(error.value)


def test_four_bits_of_torchao_are_refused_with_the_reason(run_file):
    with pytest.raises(SettingError, match=r"line 3: model.quantization: torchao's 4-bit weights .* take nf4") as error:
        RunSettings.load(run_file(model={"name": "m", "quantization": "torchao-int4"}, recipe=[]))
    assert "problems" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "package", "extra"), [("nf4", "bitsandbytes", "quant"), ("torchao-int8", "torchao", "torchao")]
)
def test_a_missing_package_is_named_with_its_extra(kind, package, extra, run_file, wide_decoder, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(SettingError, match=rf"{kind} needs {package}, .*: pip install 'shoestring\[{extra}\]'"):
        measure(a_quantised_run(run_file, wide_decoder, kind), say=no_words)


def test_torchao_has_nothing_to_pack_where_no_layer_is_linear():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(SettingError, match=r"packs nn.Linear only, .* GPT2LMHeadModel has none; take nf4 or int8"):
        quantization_config("torchao-int8", model, torch.float32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_torchao_packs_keeps_nothing_and_has_its_gradients(dtype, bias):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    layer = torch.nn.Linear(33, 17, bias=bias).to(dtype).requires_grad_(False)
    quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
    if bias:
        layer.bias.requires_grad_()
    x = torch.randn(2, 5, 33, dtype=dtype, requires_grad=True)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), [x, *([layer.bias] if bias else [])])
    keep_training_layout(torch.nn.Sequential(layer))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert kept == []
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.square().sum(), [x, *([layer.bias] if bias else [])])
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-2 if dtype is torch.bfloat16 else 1e-6)


def test_packing_by_torchao_leaves_settings_of_torch_alone(wide_decoder):
    from transformers import AutoModelForCausalLM

    before = torch.get_float32_matmul_precision()
    load_pretrained(ModelSettings(name=str(wide_decoder), quantization="torchao-int8"), AutoModelForCausalLM)
    assert torch.get_float32_matmul_precision() == before


def test_files_that_are_packed_already_are_refused(run_file, wide_decoder, tmp_path):
    import shutil

    folder = tmp_path / "packed"
    shutil.copytree(wide_decoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=r"are quantised already; leave model.quantization out"):
        measure(a_quantised_run(run_file, folder, "nf4"), say=no_words)


def test_the_setting_comes_back_from_the_settings_that_are_written(run_file, wide_decoder, tmp_path):
    settings = a_quantised_run(run_file, wide_decoder, "int8")
    (tmp_path / "again.yaml").write_text(settings.to_yaml())
    assert RunSettings.load(tmp_path / "again.yaml") == settings


def test_layers_that_ran_without_gradients_still_give_them(wide_decoder):
    from transformers import AutoModelForCausalLM

    model, _ = load_pretrained(ModelSettings(name=str(wide_decoder), quantization="nf4"), AutoModelForCausalLM)
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(3, layer.in_features)

    def gradient():
        y = layer.train()(z := x.clone().requires_grad_())
        return torch.autograd.grad(y.sum(), z)[0]

    before = gradient()
    with torch.no_grad():
        layer.eval()(x)
    assert torch.equal(gradient(), before)


@pytest.mark.slow
def test_a_packaged_decoder_in_four_bit_learns_grade_school_maths(tmp_path):
    need("smollm2", "gsm8k-test")
    report = train(
        RunSettings.from_dict(
            {
                "model": {"name": "packaged:smollm2", "quantization": "nf4", "dtype": "float32"},
                "task": "causal-lm",
                "data": {
                    "train": "packaged:gsm8k-test",
                    "text": "question",
                    "max_length": 96,
                    "max_train_rows": 3,
                },
                "recipe": [{"lora": {"r": 8, "target_modules": "all-linear"}}],
                "train": {
                    "max_steps": 5,
                    "per_device_train_batch_size": 2,
                    "learning_rate": 2e-3,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "seed": 0,
                },
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    losses = [loss for _, loss in report.losses]
    assert losses[-1] < 0.8 * losses[0], losses
    assert report.memory["frozen_bytes"] < 0.35 * 4 * 134.5e6  # of 32 bit; embeddings are not packed
