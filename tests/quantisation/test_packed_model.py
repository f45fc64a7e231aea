"""Packed layers and models of them: bit-equal outputs, casts, files and their size, ties, refusals."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from shoestring.adapters import L4QConfig, S2LoRAConfig
from shoestring.errors import SettingError
from shoestring.quantisation import (
    PackedLinear,
    dequantise,
    load_packed,
    pack_model,
    packed_layer,
    read_packed,
    round_to_nearest,
    save_packed,
)
from shoestring.quantisation.packed_model import LAYERS_FILE, TENSORS_FILE
from shoestring.recipe import Recipe
from shoestring.testing.adapters import adapted, batch, tokens, two_layers
from shoestring.testing.tiny_models import seeded

SETTINGS = {"group_size": 8, "bits": 3}


def layer(bits: int = 3, dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[PackedLinear, torch.Tensor]:
    """A packed layer of 24 -> 13, and its weight as it should be."""
    torch.manual_seed(bits)
    codes, step, offset = round_to_nearest(torch.randn(13, 24), bits, 8, symmetric=False)
    packed = PackedLinear.of(codes, step, offset, bits, torch.randn(13).to(dtype) if bias else None, dtype)
    return packed, dequantise(codes, step, offset)


def packed_two_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    return pack_model(adapted(L4QConfig, lambda: SETTINGS, two_layers(dtype)))


def decoder(tied: bool = False) -> LlamaForCausalLM:
    with seeded(0):
        config = LlamaConfig(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
            tie_word_embeddings=tied,
            dtype=torch.bfloat16,
        )
        return LlamaForCausalLM._from_config(config).eval()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_linear_layer_of_its_weight_bit_by_bit(bits: int, dtype: torch.dtype):
    packed, weight = layer(bits, dtype)
    assert torch.equal(packed.weight, weight.to(dtype))
    for shape in ((24,), (5, 24), (2, 3, 24)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(packed(x), nn.functional.linear(x, weight.to(dtype), packed.bias))
    assert sum(b.nbytes for b in (packed.codes, packed.step, packed.offset)) == 13 * (3 * bits) + 13 * 3 * 8
    assert not any(p.requires_grad for p in packed.parameters())


def test_gradients_pass_to_the_input():
    packed, weight = layer()
    x = torch.randn(5, 24, requires_grad=True)
    packed(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, 24))


def test_a_cast_of_the_model_leaves_the_weight_as_it_is():
    packed, weight = layer()
    cast = copy.deepcopy(packed).to(torch.bfloat16)
    assert cast.step.dtype == cast.offset.dtype == torch.float32
    assert cast.bias.dtype == cast.dtype == torch.bfloat16
    assert torch.equal(cast.weight, weight.bfloat16())
    assert torch.equal(cast.float().weight, weight)


def test_under_autocast_it_computes_in_the_lower_dtype_as_the_trained_layer_does():
    model = adapted(L4QConfig, lambda: SETTINGS)
    packed = pack_model(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
        assert y.dtype == torch.bfloat16
        assert torch.equal(packed(batch()), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_saved_model_gives_the_outputs_of_training_bit_by_bit(tmp_path: Path, dtype: torch.dtype):
    model = adapted(L4QConfig, lambda: SETTINGS, two_layers(dtype))
    expected = model(batch(dtype))
    packed = pack_model(model)
    assert type(packed).__name__ == "TwoLayers"
    assert torch.equal(packed(batch(dtype)), expected)
    save_packed(packed, tmp_path)
    again = read_packed(two_layers(dtype), tmp_path)
    assert torch.equal(again(batch(dtype)), expected)
    assert {n: (t.dtype, t.shape) for n, t in again.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in packed.state_dict().items()
    }
    with torch.device("meta"):
        empty = two_layers()
    assert torch.equal(read_packed(empty, tmp_path)(batch(dtype)), expected)


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_is_loaded_by_its_class_with_tied_weights_stored_once(tmp_path: Path, tied: bool):
    model = get_peft_model(decoder(tied), L4QConfig(group_size=8, init_weights=False)).eval()
    expected = model(input_ids=tokens()).logits
    packed = pack_model(model)
    assert torch.equal(packed(input_ids=tokens()).logits, expected)
    save_packed(packed, tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / TENSORS_FILE)) is not tied
    for model_class in (AutoModelForCausalLM, LlamaForCausalLM):
        again = load_packed(model_class, tmp_path)
        assert not again.training
        assert torch.equal(again(input_ids=tokens()).logits, expected)
        assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
        again.generate(tokens()[:1, :4], max_new_tokens=2, do_sample=False)


def test_the_linear_layers_take_about_bits_16ths_of_16_bits(tmp_path: Path):
    base = nn.Sequential(nn.Linear(512, 256, bias=False, dtype=torch.bfloat16))
    model = get_peft_model(base, L4QConfig(bits=4, group_size=128, target_modules=["0"], learn_offset=False))
    save_packed(pack_model(model), tmp_path)
    size = (tmp_path / TENSORS_FILE).stat().st_size
    whole = 2 * 512 * 256
    assert size < (4 / 16 + 4 / 128 / 2) * whole + 512, "and 4 bytes a group"


@pytest.mark.parametrize("own_first", [True, False])
def test_other_adapters_of_a_recipe_are_merged(tmp_path: Path, own_first: bool):
    own = L4QConfig(group_size=8, target_modules=["v_proj", "down_proj"], init_weights=False)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    with seeded(3):
        model = Recipe(own, lora).apply(decoder()) if own_first else Recipe(lora, own).apply(decoder())
    expected = model.eval()(input_ids=tokens()).logits
    packed = pack_model(model)
    assert type(packed) is LlamaForCausalLM
    assert not [name for name, _ in packed.named_modules() if "lora" in name or "base_layer" in name]
    torch.testing.assert_close(packed(input_ids=tokens()).logits, expected, rtol=0.05, atol=0.02)
    save_packed(packed, tmp_path)
    again = load_packed(LlamaForCausalLM, tmp_path)
    assert torch.equal(again(input_ids=tokens()).logits, packed(input_ids=tokens()).logits)


def test_layers_that_keep_their_weight_turned_are_packed_too(tmp_path: Path):
    with seeded(0):
        base = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=50, n_positions=64)).eval()
    model = get_peft_model(base, L4QConfig(group_size=8, target_modules=["c_attn", "c_fc"], init_weights=False)).eval()
    expected = model(input_ids=tokens()).logits
    save_packed(pack_model(model), tmp_path)
    assert torch.equal(load_packed(GPT2LMHeadModel, tmp_path)(input_ids=tokens()).logits, expected)


def test_a_head_that_was_trained_beside_is_the_trained_one():
    model = adapted(L4QConfig, lambda: SETTINGS, target_modules=["first"], modules_to_save=["second"])
    with torch.no_grad():
        model.base_model.model.second.modules_to_save["default"].weight.add_(1)
    expected = model(batch())
    assert torch.equal(pack_model(model)(batch()), expected)


def test_a_model_without_such_layers_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="TwoLayers has no layer to pack: no adapter on it has a form in packed"):
        pack_model(two_layers())
    with pytest.raises(ValueError, match="TwoLayers has no packed layer; call pack_model first"):
        save_packed(two_layers(), tmp_path)


def test_adapters_out_of_effect_are_refused():
    model = adapted(L4QConfig, lambda: SETTINGS)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"first: To be packed, a layer must have one adapter in effect.*merged"):
        pack_model(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match=r"first: .*disabled"):
        pack_model(model)
    pack_model(model)


def test_what_would_be_lost_is_refused_before_anything_is_packed():
    own = L4QConfig(group_size=8, target_modules=["down_proj"])
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    twice = Recipe(own, lora, S2LoRAConfig(r=2, target_modules=["q_proj"])).apply(decoder())
    with pytest.raises(ValueError, match=r"q_proj.* has adapters of two kinds, one over the other"):
        pack_model(twice)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="Learned prompts are no part of a layer"):
        pack_model(Recipe(own, prompts).apply(decoder()))


def test_adapters_that_are_still_there_are_not_lost(tmp_path: Path):
    model = get_peft_model(packed_two_layers(), LoraConfig(target_modules=["image"], r=1))
    with pytest.raises(ValueError, match="image still has an adapter, which would be lost"):
        save_packed(model, tmp_path)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(SettingError, match=r"holds no packed\.json: it was not written by save_packed"):
        read_packed(two_layers(), tmp_path)
    save_packed(packed_two_layers(), tmp_path)
    with pytest.raises(SettingError, match="holds the layer first, which Sequential does not have"):
        read_packed(nn.Sequential(), tmp_path)
    other = two_layers()
    other.first = nn.Linear(16, 40)
    with pytest.raises(SettingError, match=r"first has sizes \(40, 24\), but in this TwoLayers \(40, 16\)"):
        read_packed(other, tmp_path)
    description = json.loads((tmp_path / LAYERS_FILE).read_text())
    for change, message in (
        ({"version": 9}, "is of version 9, which this package cannot read"),
        ({"layers": {"first": {"kind": "cubes"}}}, "first is a layer of the unknown kind 'cubes'. Known: .*grid"),
    ):
        (tmp_path / LAYERS_FILE).write_text(json.dumps(description | change))
        with pytest.raises(SettingError, match=message):
            read_packed(two_layers(), tmp_path)
    (tmp_path / LAYERS_FILE).write_text("{")
    with pytest.raises(SettingError, match="is damaged"):
        read_packed(two_layers(), tmp_path)


@pytest.mark.parametrize("value", [0.0, -0.5, float("nan"), float("inf")])
def test_steps_that_are_not_positive_numbers_are_refused_naming_the_layer(tmp_path: Path, value: float):
    save_packed(packed_two_layers(), tmp_path)
    held = load_file(tmp_path / TENSORS_FILE)
    held["second.step"][2, 1] = value
    save_file(held, tmp_path / TENSORS_FILE)
    with pytest.raises(SettingError, match=r"second\.step must hold positive numbers"):
        read_packed(two_layers(), tmp_path)


def test_tensors_that_are_missing_are_refused_by_name(tmp_path: Path):
    save_packed(packed_two_layers(), tmp_path)
    held = load_file(tmp_path / TENSORS_FILE)
    del held["first.codes"]
    save_file(held, tmp_path / TENSORS_FILE)
    with pytest.raises(SettingError, match=r"(?s)does not fit this TwoLayers.*first\.codes"):
        read_packed(two_layers(), tmp_path)


def test_two_kinds_of_layers_cannot_have_one_name():
    with pytest.raises(ValueError, match="Packed layers of the kind 'grid' are already registered"):
        packed_layer("grid")(nn.Linear)
