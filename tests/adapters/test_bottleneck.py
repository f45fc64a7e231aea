"""Bottleneck adapters: counts, starts, decoding, memory, hooks on the residual stream, refusals."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from families import FAMILIES
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

from shoestring.adapters import Bottleneck, BottleneckConfig
from shoestring.memory import Ledger
from shoestring.recipe import Recipe

FORMS = ["houlsby", "pfeiffer", "parallel", "adaptformer"]


def adapters_in(model: nn.Module) -> list[Bottleneck]:
    return [m for m in model.modules() if isinstance(m, Bottleneck)]


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_one_adapter_on_numbers_small_enough_to_check_by_hand():
    base = nn.Linear(2, 2)
    adapter = Bottleneck(base, BottleneckConfig(r=1, scale=0.5, form="houlsby", activation="relu"))
    with torch.no_grad():
        adapter.down.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.b_down.fill_(-1)
        adapter.up.copy_(torch.tensor([[3.0], [-4.0]]))
        adapter.b_up.copy_(torch.tensor([1.0, 0.0]))
    # o = (1, 2): inner 1 + 4 - 1 = 4; A(o) = 0.5 (3 * 4 + 1, -4 * 4) = (6.5, -8)
    y = torch.tensor([[1.0, 2.0], [-5.0, 0.0]])
    expected = torch.tensor([[7.5, -6.0], [-4.5, 0.0]])  # the second inner number is below 0
    assert torch.equal(adapter.new_output(torch.zeros(2, 2), y, base), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "dinov2", "gemma3", "t5", "whisper"])
def test_a_zero_start_is_the_pretrained_model_bit_by_bit(name: str, form: str):
    family = FAMILIES[name]
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in family.inputs().items()}
    model = get_peft_model(family.build().float(), BottleneckConfig(form=form, init="lora", r=4)).eval()
    with torch.no_grad():  # whether a weight trains decides which kernel torch takes
        assert torch.equal(model(**inputs)[0], family.build().float()(**inputs)[0])


@pytest.mark.parametrize("init", ["bert", "houlsby"])
@pytest.mark.parametrize("form", ["houlsby", "pfeiffer"])
def test_the_other_starts_are_close_to_the_pretrained_model_but_not_equal(form: str, init: str):
    family = FAMILIES["bert"]
    expected = family.build()(**family.inputs())[0]
    model = get_peft_model(family.build(), BottleneckConfig(form=form, init=init, r=4)).eval()
    difference = (model(**family.inputs())[0] - expected).abs().max()
    assert 1e-7 < difference < 0.02
    bound = {"houlsby": 0.02, "bert": 0.2}[init]
    assert all(a.down.abs().max() <= bound and a.b_down.eq(0).all() for a in adapters_in(model))


@pytest.mark.parametrize(
    ("form", "r", "count"),
    [
        ("houlsby", 64, 2_379_264),
        ("houlsby", None, 24 * (2 * 768 * 48 + 48 + 768)),
        ("pfeiffer", None, 894_528),
        ("parallel", None, 12 * (2 * 768 * 384 + 384 + 768)),
        ("adaptformer", None, 1_189_632),
        ("adaptformer", 8, 156_768),
    ],
)
@pytest.mark.parametrize("model", ["BertModel", "ViTModel"])
def test_counts_of_base_sized_models_are_those_of_the_papers(model: str, form: str, r: int | None, count: int):
    with torch.device("meta"):
        base = getattr(t, model)(getattr(t, model.replace("Model", "Config"))())
    assert trained(get_peft_model(base, BottleneckConfig(form=form, r=r))) == count


def test_norm_and_learned_scale_add_their_own_parameters():
    family = FAMILIES["llama"]
    plain = trained(get_peft_model(family.build(), BottleneckConfig(r=3)))
    assert plain == 2 * (2 * 24 * 3 + 3 + 24)
    assert trained(get_peft_model(family.build(), BottleneckConfig(r=3, norm=True))) == plain + 2 * 2 * 24
    assert trained(get_peft_model(family.build(), BottleneckConfig(r=3, scale="learned"))) == plain + 2


def test_the_file_holds_four_bytes_a_parameter(tmp_path: Path):
    model = get_peft_model(FAMILIES["bert"].build().float(), BottleneckConfig(form="pfeiffer", r=4))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - 4 * trained(model) < 2048


@pytest.mark.parametrize(("name", "form"), [("bert", "pfeiffer"), ("llama", "pfeiffer"), ("dinov2", "parallel")])
def test_on_norms_and_taps_adapters_switch_disable_save_and_go(name: str, form: str, tmp_path: Path):
    family = FAMILIES[name]
    config = BottleneckConfig(form=form, r=3, init_weights=False)
    base = family.build()
    expected, hooks, kinds = base(**family.inputs())[0], hooks_in(base), [type(m) for m in base.modules()]
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    first = model(**family.inputs())[0]
    model.add_adapter("other", BottleneckConfig(form=form, r=5, init_weights=False), autocast_adapter_dtype=False)
    model.eval()
    model.set_adapter("other")
    other = model(**family.inputs())[0]
    assert (other - first).abs().max() > 1e-4
    assert hooks_in(model) - hooks == (0 if (name, form) == ("bert", "pfeiffer") else 4)
    model.set_adapter("default")
    assert torch.equal(model(**family.inputs())[0], first)
    assert all(a.tapped is None for a in adapters_in(model))
    model.delete_adapter("other")
    assert torch.equal(model(**family.inputs())[0], first)
    with model.disable_adapter():
        assert torch.equal(model(**family.inputs())[0], expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(family.build(), tmp_path, autocast_adapter_dtype=False).eval()
    assert torch.equal(loaded(**family.inputs())[0], first)
    twin = copy.deepcopy(model)
    plain = model.unload()
    assert hooks_in(plain) == hooks
    assert [type(m) for m in plain.modules()] == kinds
    assert torch.equal(plain(**family.inputs())[0], expected)
    assert torch.equal(twin(**family.inputs())[0], first), "the copy has taps of its own"


def test_an_adapter_out_of_effect_keeps_no_activations():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(), BottleneckConfig(r=3))
    with model.disable_adapter():
        model(**family.inputs())
    assert all(a.tapped is None for a in adapters_in(model))
    copy.deepcopy(model)


@pytest.mark.parametrize("form", FORMS)
def test_up_learns_first_and_down_from_the_second_step(form: str):
    family = FAMILIES["gpt2"]
    model = get_peft_model(family.build().float(), BottleneckConfig(form=form, r=3, init="lora"))
    ids = family.inputs()["input_ids"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        for adapter in adapters_in(model):
            assert adapter.up.grad.abs().max() > 0
            assert (adapter.down.grad.abs().max() > 0) == (step > 0)
        optimizer.step()
    assert all(p.grad is None for n, p in model.named_parameters() if "bottleneck_" not in n)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_decoders_stay_causal_and_decode_the_same_with_a_cache(name: str, form: str):
    family = FAMILIES[name]
    model = get_peft_model(family.build().float(), BottleneckConfig(form=form, r=6, init_weights=False)).eval()
    ids = family.inputs()["input_ids"]
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 50
    before, after = model(input_ids=ids).logits, model(input_ids=changed).logits
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-6)
    assert (after[:, 7:] - before[:, 7:]).abs().max() > 1e-4
    settings = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    plain = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert cached.shape == (2, 20)
    assert torch.equal(cached, plain)


def saved_for_backward(config: BottleneckConfig | LoraConfig | None) -> int:
    """Bytes that a 12-layer pre-LN encoder of width 768 keeps for backward; 8 images of 129 tokens, float32."""
    with torch.device("meta"):
        model = t.ViTModel(t.ViTConfig(image_size=(128, 256), patch_size=16), add_pooling_layer=False)
        model = model if config is None else get_peft_model(model, config)
        with Ledger(model.train()) as ledger:
            model(pixel_values=torch.randn(8, 3, 128, 256)).last_hidden_state.sum().backward()
        return ledger.report().saved_bytes


def test_adaptformer_keeps_fewer_activations_than_full_training_and_lora():
    full = saved_for_backward(None)
    lora = saved_for_backward(LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    adaptformer = saved_for_backward(BottleneckConfig(form="adaptformer"))
    assert adaptformer <= 0.62 * full, (adaptformer, full)
    assert adaptformer <= 0.90 * lora, (adaptformer, lora)


def test_dropout_acts_on_the_inner_numbers_in_training_only():
    torch.manual_seed(0)
    adapter = Bottleneck(nn.Linear(6, 6), BottleneckConfig(r=500, dropout=0.5, form="houlsby", activation="relu"))
    with torch.no_grad():
        adapter.down.zero_()
        adapter.b_down.fill_(1)
        adapter.up.fill_(1 / 500)
        adapter.b_up.fill_(3)
    out = adapter.train().branch(torch.zeros(40, 6)).detach()
    torch.testing.assert_close(out, out[:, :1].expand(-1, 6))  # one mask, over the inner numbers
    assert out.std() > 0.01
    assert abs(float(out.mean()) - 4) < 0.05
    torch.testing.assert_close(adapter.eval().branch(torch.zeros(1, 6)), torch.full((1, 6), 4.0))


def test_two_active_adapters_add_up_on_a_layer_and_are_refused_on_a_norm():
    for form, refused in (("parallel", False), ("pfeiffer", True)):
        family = FAMILIES["bert"]
        model = get_peft_model(family.build(), BottleneckConfig(form=form, r=3, init_weights=False))
        model.add_adapter("other", BottleneckConfig(form=form, r=3, init_weights=False))
        model.base_model.set_adapter(["default", "other"])
        model.eval()
        if refused:
            with pytest.raises(ValueError, match="cannot have several active adapters on one LayerNorm"):
                model(**family.inputs())
        else:
            x, layer = torch.randn(3, 24).double(), model.base_model.model.encoder.layer[0].output.dense
            for adapter in layer.adapters.values():
                adapter.tapped = x
            y = torch.randn(3, 40).double()
            parts = [a.branch(x) for a in layer.adapters.values()]
            torch.testing.assert_close(layer(y), layer.base_layer(y) + parts[0].double() + parts[1].double())


def test_a_tap_that_another_adapter_replaces_is_named():
    family = FAMILIES["llama"]
    norms = LNTuningConfig(target_modules=["post_attention_layernorm"])
    own = BottleneckConfig(r=3)
    with Recipe(norms, own)(family.build()) as model:
        assert torch.isfinite(model(**family.inputs())[0]).all()
    model = Recipe(own, norms).apply(family.build())
    with pytest.raises(RuntimeError, match="put bottleneck after that one in the recipe"):
        model(**family.inputs())


def test_autocast_keeps_the_residual_stream_at_its_precision():
    adapter = Bottleneck(nn.Linear(6, 6), BottleneckConfig(r=2, form="houlsby", init_weights=False))
    y = torch.randn(3, 6, dtype=torch.bfloat16)
    assert adapter.new_output(y, y, nn.Identity()).dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adapter.branch(torch.randn(3, 6)).dtype == torch.bfloat16


def test_activations_are_those_of_transformers():
    adapter = Bottleneck(nn.Linear(4, 4), BottleneckConfig(r=2, activation="gelu", form="houlsby", init_weights=False))
    x = torch.randn(3, 4)
    expected = F.gelu(x @ adapter.down.T + adapter.b_down) @ adapter.up.T + adapter.b_up
    torch.testing.assert_close(adapter.branch(x), expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "serial"}, "form of bottleneck must be one of 'houlsby', .*, got 'serial'"),
        ({"init": "xavier"}, "init of bottleneck must be one of 'lora', 'bert', 'houlsby', got 'xavier'"),
        ({"activation": "rellu"}, "Unknown activation 'rellu' of bottleneck. Did you mean 'relu"),
        ({"r": 0}, "r of bottleneck must be a whole number of at least 1, got 0"),
        ({"r": 1.5}, "r of bottleneck must be a whole number of at least 1, got 1.5"),
        ({"r": True}, "r of bottleneck must be a whole number"),
        ({"reduction_factor": 0}, "reduction_factor of bottleneck must be a whole number of at least 1"),
        ({"r": 4, "reduction_factor": 4}, "both set the inner size; give one of them"),
        ({"scale": "large"}, "scale of bottleneck must be a number or 'learned', got 'large'"),
        ({"dropout": 1.0}, r"dropout of bottleneck must be in \[0, 1\), got 1.0"),
        ({"cross_attention": True}, "cross_attention of bottleneck is for the houlsby form only"),
        ({"form": "houlsby", "reads": "norm"}, "reads of bottleneck has no effect in the houlsby form"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bert", {"reduction_factor": 7}, "reduction_factor of bottleneck must divide the width 24, got 7"),
        ("bert", {"layers_to_transform": [0, 5]}, "layers_to_transform of bottleneck: BertModel has no block 5"),
        ("bert", {"form": "houlsby", "cross_attention": True}, "BertModel has no cross-attention"),
        ("bert", {"target_modules": ["embeddings.word_embeddings"]}, "word_embeddings is of type Embedding"),
    ],
)
def test_what_a_model_lacks_is_named(name: str, settings: dict, message: str):
    with pytest.raises((ValueError, TypeError), match=message):
        get_peft_model(FAMILIES[name].build(), BottleneckConfig(**settings))


def test_merging_is_refused_with_the_reason_and_leaves_the_taps():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(), BottleneckConfig(r=3, init_weights=False)).eval()
    expected = model(**family.inputs())[0]
    with pytest.raises(ValueError, match=re.escape("bottleneck changes a layer's output, not its weight")):
        model.merge_and_unload()
    assert torch.equal(model(**family.inputs())[0], expected)
