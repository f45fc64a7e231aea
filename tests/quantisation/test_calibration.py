"""Calibration: moments against X^T X of a plain reference, rows without padding, and how adapters are prepared."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers as t
from peft import PeftModel, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from torch import nn

from shoestring.adapters import Adapter, AdapterConfig, register
from shoestring.errors import SettingError
from shoestring.fakes import Valueless
from shoestring.quantisation.calibration import Calibrated, input_moments, moments_in_parts
from shoestring.quantisation.gradients import batches_of, column_gradients, loss_of, loss_of_batches
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.adapters import tiny_llama
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import seeded
from shoestring.training import RunSettings, train

LENGTHS = (5, 11, 8)


def token_rows(padding=4, left=False):
    """Rows of several lengths, filled up with ids that attention_mask leaves out."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 50, (length,), generator=generator).tolist()
        pad, mask = [7] * padding, [0] * padding
        parts = ([*pad, *ids], [*mask, *[1] * length]) if left else ([*ids, *pad], [*[1] * length, *mask])
        rows.append({"input_ids": parts[0], "attention_mask": parts[1], "labels": parts[0], "text": "a film"})
    return rows


def tiny_bert():
    with seeded(0):
        config = t.BertConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            vocab_size=50,
            max_position_embeddings=32,
        )
        return t.BertForSequenceClassification(config)


def tiny_vit():
    with seeded(0):
        config = t.ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=40,
            image_size=16,
            patch_size=8,
        )
        return t.ViTForImageClassification(config)


def image_rows():
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator).tolist()} for _ in range(3)]


def chosen(model, *ends):
    return {name: module for name, module in model.named_modules() if name.endswith(ends)}


class _Recorder(nn.Module):
    """Stands in for a layer and keeps what it gets."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.seen = layer, []

    def forward(self, x):
        self.seen.append(x.detach().double().flatten(0, -2))
        return self.layer(x)


def reference(model, names, batches):
    """X^T X without hooks: each layer is put into a module that keeps its input, and every batch is one row."""
    recorders = {}
    for name in names:
        recorders[name] = _Recorder(model.get_submodule(name))
        model.set_submodule(name, recorders[name])
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    inputs = {name: torch.cat(recorder.seen) for name, recorder in recorders.items()}
    return {name: (x.T @ x, len(x)) for name, x in inputs.items()}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize(
    ("make", "ends"),
    [(tiny_bert, ("query", "value", "intermediate.dense")), (tiny_llama, ("q_proj", "k_proj", "o_proj", "down_proj"))],
)
def test_moments_are_those_of_a_reference_without_padding(make, ends, left):
    model = make().double().train()
    layers = chosen(model, *ends)
    moments = input_moments(model, layers, token_rows(left=left), 3)
    unpadded = [{"input_ids": torch.tensor([row["input_ids"]])} for row in token_rows(padding=0)]
    for name, (total, count) in reference(make().double(), layers, unpadded).items():
        assert moments[name].count == count == sum(LENGTHS)
        torch.testing.assert_close(moments[name].total, total, rtol=1e-12, atol=1e-12)


def test_moments_of_an_image_model_count_its_patches():
    layers = chosen(tiny_vit(), "q_proj", "query", "fc1", "intermediate.dense")
    model = tiny_vit()
    moments = input_moments(model, {name: model.get_submodule(name) for name in layers}, image_rows(), 3)
    batches = [{"pixel_values": torch.tensor(row["pixel_values"])[None]} for row in image_rows()]
    assert layers
    for name, (total, count) in reference(tiny_vit(), layers, batches).items():
        assert moments[name].count == count == 3 * 5
        torch.testing.assert_close(moments[name].total, total, rtol=1e-6, atol=1e-6)


def test_moments_of_an_encoder_and_decoder_follow_its_labels():
    rows = [{"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [8, 9, -100, -100]}]
    model = tiny_t5()
    layers = chosen(model, "decoder.block.0.layer.0.SelfAttention.q", "EncDecAttention.k")
    moments = input_moments(model, layers, rows, 1)
    batches = [{"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[8, 9]])}]
    for name, (total, count) in reference(tiny_t5(), layers, batches).items():
        assert moments[name].count == count == (3 if "EncDec" in name else 2)
        torch.testing.assert_close(moments[name].total, total, rtol=1e-6, atol=1e-6)


def test_a_four_bit_base_is_calibrated_and_gives_gradients_after():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes", exc_type=ImportError)
    model = nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 3))
    layer = bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(model[2].state_dict())
    model[2] = layer.to("cpu")
    rows = [{"input": torch.randn(7, 24)} for _ in range(2)]
    moments = input_moments(model, {"2": model[2], "4": model[4]}, rows, 2)
    with torch.no_grad():
        x = model[1](model[0](torch.cat([row["input"] for row in rows]))).double()
    torch.testing.assert_close(moments["2"].total, x.T @ x, rtol=1e-6, atol=1e-6)
    assert model[2].weight.quant_state is not None
    assert not getattr(model[2].weight.quant_state, "packing_format_for_cpu", False)
    z = rows[0]["input"].requires_grad_()
    assert torch.autograd.grad(model(z).sum(), z)[0].isfinite().all()


def test_modes_hooks_and_weights_are_as_they_were():
    model = tiny_bert().train()
    model.bert.encoder.layer[0].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def marks():
        return [(name, m.training, len(m._forward_pre_hooks)) for name, m in model.named_modules()]

    before, seed = marks(), torch.get_rng_state()
    layers = chosen(model, "query")
    input_moments(model, layers, token_rows(), 2)
    with pytest.raises(SettingError, match="row 0 has none of the inputs of BertForSequenceClassification, only words"):
        input_moments(model, layers, [{"words": "no"}], 1)
    assert marks() == before
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_rows_are_cut_to_the_length_asked_for_and_to_that_of_the_model():
    model = tiny_bert()
    layers = chosen(model, "0.attention.self.query")
    (moments,) = input_moments(model, layers, token_rows(), 3, max_tokens=6).values()
    assert moments.count == 5 + 6 + 6
    (moments,) = input_moments(model, layers, [{"input_ids": [4] * 40}], 1).values()
    assert moments.count == 32


def test_parts_give_the_same_moments_as_all_layers_at_once():
    model = tiny_llama()
    layers = chosen(model, "q_proj", "down_proj")
    whole = input_moments(model, layers, token_rows(), 3)
    parts = dict(moments_in_parts(model, layers, token_rows(), 3, most_bytes=8 * 24**2))
    assert list(parts) == list(layers)
    assert all(torch.equal(parts[name].total, whole[name].total) for name in layers)


def test_too_few_rows_are_refused_with_both_numbers():
    model = tiny_bert()
    with pytest.raises(SettingError, match=r"Calibration on 9 rows .* has only 3"):
        input_moments(model, chosen(model, "query"), token_rows(), 9)


def test_a_layer_that_no_token_reaches_is_refused_by_name():
    model = tiny_bert()
    model.spare = nn.Linear(24, 24)
    with pytest.raises(SettingError, match="No token of the 3 calibration rows reached spare"):
        input_moments(model, chosen(model, "query", "spare"), token_rows(), 3)


def test_a_nan_in_the_input_of_a_layer_is_refused_by_name_and_row():
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = float("nan")
    rows = [*token_rows()[:1], {"input_ids": [5, 49]}]
    layers = chosen(model, "layers.1.mlp.down_proj", "layers.0.self_attn.o_proj")
    with pytest.raises(SettingError, match=r"layers.0.self_attn.o_proj holds NaN or Inf at calibration row 1"):
        input_moments(model, layers, rows, 2)


def test_rows_without_model_inputs_or_tokens_are_refused():
    model = tiny_llama()
    layers = chosen(model, "q_proj")
    with pytest.raises(SettingError, match=r"row 0 has none of the inputs of LlamaForCausalLM, only words.*input_ids"):
        input_moments(model, layers, [{"words": "a film"}], 1)
    with pytest.raises(SettingError, match="input_ids of calibration row 0 is empty or all padding"):
        input_moments(model, layers, [{"input_ids": [1, 2], "attention_mask": [0, 0]}], 1)


class Probe(Adapter):
    """W' = W + c S / count, with S the moments that its layer was calibrated with."""

    name = "probe"

    def __init__(self, base, config, moments=None):
        super().__init__()
        self.c = nn.Parameter(torch.zeros(1))
        size = base.in_features
        self.register_buffer("seen", torch.zeros(size, size) if moments is None else moments.total.float())

    def delta_weight(self):
        return self.c * self.seen


@dataclass(kw_only=True)
class ProbeConfig(Calibrated, AdapterConfig):
    """For layers with as many outputs as inputs."""

    method: ClassVar = Probe
    prepared: ClassVar[list] = []

    def prepare(self, model):
        layers = self.layers_in(model)
        self.prepared.append(sorted(layers))
        self.by_layer = dict(self.moments(model, layers))

    def of_layer(self, model, key):
        return {"moments": self.by_layer.pop(key)} if getattr(self, "by_layer", None) else {}


@pytest.fixture(autouse=True)
def probe():
    """The method above, known to peft for the length of a test."""
    register(ProbeConfig)
    ProbeConfig.prepared.clear()
    yield
    for table in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        del table["PROBE"]


def seen_by_layer(model):
    return {name: module.seen for name, module in model.named_modules() if isinstance(module, Probe)}


def test_a_config_is_prepared_once_with_the_layers_it_will_adapt():
    config = ProbeConfig(target_modules=["q_proj", "o_proj"], layers_to_transform=[1], calibration_rows=3)
    config.see_data({"train": token_rows()})
    model = get_peft_model(tiny_llama(), config)
    names = ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj"]
    assert ProbeConfig.prepared == [names]
    plain = tiny_llama()
    expected = input_moments(plain, {name: plain.get_submodule(name) for name in names}, token_rows(), 3)
    seen = seen_by_layer(model)
    assert len(seen) == 2
    for name, buffer in seen.items():
        assert torch.equal(buffer, expected[names["q_proj" in name]].total.float())


def test_a_second_adapter_is_prepared_through_the_first():
    config = ProbeConfig(target_modules=["q_proj"], calibration_rows=3)
    config.see_data({"train": token_rows()})
    model = get_peft_model(tiny_llama(), config)
    second = ProbeConfig(target_modules="all-linear", exclude_modules=["gate_proj", "up_proj", "down_proj", "v_proj"])
    second.calibration_rows, second.exclude_modules = 2, {*second.exclude_modules, "k_proj"}
    second.see_data({"train": token_rows()})
    model.add_adapter("second", second)
    assert [name.rpartition(".")[2] for name in ProbeConfig.prepared[1]] == ["o_proj", "q_proj"] * 2
    assert len(seen_by_layer(model)) == 2 + 4


def test_an_adapter_that_is_loaded_is_not_prepared(tmp_path):
    config = ProbeConfig(target_modules=["q_proj"], calibration_rows=3)
    config.see_data({"train": token_rows()})
    model = get_peft_model(tiny_llama(), config)
    model.save_pretrained(tmp_path)
    for low in (False, True):
        again = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low)
        mine, loaded = seen_by_layer(model), seen_by_layer(again)
        assert all(torch.equal(loaded[name], buffer) for name, buffer in mine.items())
    again.load_adapter(tmp_path, "twice")
    assert len(ProbeConfig.prepared) == 1


def test_a_recipe_gives_its_data_and_a_folder_its_values(tmp_path):
    recipe = Recipe(ProbeConfig(target_modules=["q_proj"], calibration_rows=2, calibration_seed=3))
    model = recipe.apply(tiny_llama(), data={"train": token_rows(), "validation": token_rows()})
    attached_to(model).save(tmp_path)
    again = load(tiny_llama(), tmp_path)
    assert all(torch.equal(b, seen_by_layer(model)[name]) for name, b in seen_by_layer(again).items())
    assert len(ProbeConfig.prepared) == 1
    assert attached_to(model).techniques[0].config._rows is None


def test_the_same_seed_draws_the_same_rows():
    rows = [{"input_ids": [i]} for i in range(40)]

    def drawn(seed):
        config = ProbeConfig(calibration_rows=5, calibration_seed=seed)
        config.see_data({"train": rows})
        return [row["input_ids"][0] for row in config._rows]

    assert drawn(0) == drawn(0) == sorted(drawn(0))
    assert drawn(0) != drawn(1)


def test_without_values_and_without_a_start_nothing_is_prepared():
    with Valueless():
        get_peft_model(tiny_llama(), ProbeConfig(target_modules=["q_proj"]))
    get_peft_model(tiny_llama(), ProbeConfig(target_modules=["q_proj"], init_weights=False))
    assert not ProbeConfig.prepared


def test_gradients_are_those_of_the_tokens_with_labels():
    model, ids = tiny_llama(), [5, 9, 12, 7, 31, 8]
    row = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    layers = {"up": model.model.layers[1].mlp.up_proj}
    found = column_gradients(model, layers, [row], 1)["up"]
    model(input_ids=torch.tensor([ids]), labels=torch.tensor([row["labels"]])).loss.backward()
    torch.testing.assert_close(found, layers["up"].weight.grad.square().sum(0))


def tiny_t5():
    with seeded(0):
        sizes = {"d_model": 24, "d_kv": 12, "d_ff": 40, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
        return t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=0))


def tiny_whisper():
    sides = {f"{side}_{key}": size for side in ("encoder", "decoder") for key, size in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    places = {"max_source_positions": 6, "max_target_positions": 8, "num_mel_bins": 4}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 1)
    config = t.WhisperConfig(d_model=12, vocab_size=50, **sides, **heads, **places, **ids)
    return t.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "row", "layer"),
    [
        (tiny_t5, {"input_ids": [5, 6, 7]}, "decoder.block.0.layer.0.SelfAttention.q"),
        (tiny_whisper, {"input_features": torch.randn(4, 12)}, "model.decoder.layers.0.self_attn.q_proj"),
    ],
)
def test_an_encoder_and_decoder_is_scored_on_its_labels_and_refused_without(make, row, layer):
    model = make()
    layers = {"q": model.get_submodule(layer)}
    told = r"gives no loss for calibration row 0 \(input_.*: give rows with labels"
    with pytest.raises(SettingError, match=told):
        column_gradients(model, layers, [row], 1)
    with pytest.raises(SettingError, match=told):
        column_gradients(model, layers, [{**row, "decoder_input_ids": [0, 8]}], 1)
    found = column_gradients(model, layers, [{**row, "labels": [8, 9, 11]}], 1)["q"]
    batch = {name: torch.as_tensor(value)[None] for name, value in row.items()}
    model.eval()(**batch, labels=torch.tensor([[8, 9, 11]])).loss.backward()
    torch.testing.assert_close(found, layers["q"].weight.grad.square().sum(0))


def tiny_classifier(kind, **settings):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    with seeded(0):
        config = t.AutoConfig.for_model(kind, **sizes, vocab_size=50, num_labels=3, **settings)
        return t.AutoModelForSequenceClassification.from_config(config)


CLASSES = [{"input_ids": list(range(5, 8 + 2 * i)), "label": i % 3} for i in range(5)]
PAIRS = [{"input_ids": [5, 6, 7 + i], "labels": [8, 9 + i, 11]} for i in range(5)]


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (lambda: tiny_classifier("bert"), CLASSES),
        (lambda: tiny_classifier("roberta", pad_token_id=1, type_vocab_size=1), CLASSES),
        (lambda: tiny_classifier("llama", pad_token_id=3), CLASSES),
        (tiny_vit, [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 2} for i in range(5)]),
        (tiny_t5, [{**row, "input_ids": row["input_ids"] + [4] * i} for i, row in enumerate(PAIRS)]),
        (tiny_whisper, [{"input_features": torch.randn(4, 12), "labels": row["labels"]} for row in PAIRS]),
        (tiny_llama, [{"input_ids": [*range(i, i + 7)]} for i in range(5)]),
    ],
    ids=["bert", "roberta", "llama", "vit", "t5", "whisper", "decoder"],
)
def test_the_loss_of_rows_in_batches_is_the_mean_of_those_of_single_rows(make, rows):
    model = make().double().eval()
    rows = [{n: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for n, v in r.items()} for r in rows]
    batches = batches_of(model, rows, 3)
    assert [count for _, count in batches] == [3, 2]
    with torch.no_grad():
        alone = [float(loss_of(model, row, index, None)) for index, row in enumerate(rows)]
        assert abs(loss_of_batches(model, batches) - sum(alone) / 5) < 1e-6  # of losses in float32


def test_a_batch_of_texts_is_padded_without_labels_and_rows_that_make_none_stay_alone():
    model = tiny_llama()
    rows = [{"input_ids": [5, 9, 12, 7]}, {"input_ids": [5, 9], "labels": [-100, 9]}]
    ((batch, count),) = batches_of(model, rows, 2)
    assert count == 2
    assert batch["labels"].tolist() == [[5, 9, 12, 7], [-100, 9, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    rows = [{"pixel_values": torch.randn(3, side, side), "labels": 0} for side in (16, 24)]
    assert [count for _, count in batches_of(tiny_vit(), rows, 2)] == [1, 1]
    rows = [{"input_ids": [5, 9]}, {"inputs_embeds": torch.zeros(2, 24), "labels": [5, 9]}]
    assert [count for _, count in batches_of(model, rows, 2)] == [1, 1]


def test_a_row_whose_labels_are_cut_off_is_refused():
    model = tiny_llama()
    rows = [{"input_ids": [5, 9, 12], "labels": [-100, -100, 12]}]
    told = "Calibration row 0 has no label that the loss counts among its first 2 tokens: raise calibration_max_tokens"
    with pytest.raises(SettingError, match=told):
        column_gradients(model, {"up": model.model.layers[0].mlp.up_proj}, rows, 1, max_tokens=2)


def test_missing_and_unfit_data_are_refused():
    with pytest.raises(SettingError, match=r"probe is calibrated on data .* has seen none: .*see_data"):
        get_peft_model(tiny_llama(), ProbeConfig(target_modules=["q_proj"]))
    config = ProbeConfig(target_modules=["q_proj"], calibration_rows=9)
    with pytest.raises(SettingError, match="calibration_rows of probe is 9, but the training data has only 3 rows"):
        config.see_data({"train": token_rows()})
    with pytest.raises(SettingError, match=r"of the split 'train', .* got only validation"):
        config.see_data({"validation": token_rows()})
    with pytest.raises(SettingError, match="got a stream of type generator"):
        config.see_data({"train": (row for row in token_rows())})
    for name in ("calibration_rows", "calibration_max_tokens"):
        with pytest.raises(SettingError, match=f"{name} of probe must be a whole number of at least 1, got 0"):
            ProbeConfig(**{name: 0})


def test_layers_that_cannot_be_adapted_are_refused_before_any_row_is_run():
    config = ProbeConfig(target_modules=["q_proj", "embed_tokens"], calibration_rows=3)
    config.see_data({"train": token_rows()})
    with pytest.raises(TypeError, match=r"embed_tokens is of type Embedding"):
        get_peft_model(tiny_llama(), config)
    assert not ProbeConfig.prepared


@pytest.mark.slow
def test_a_run_of_a_packaged_decoder_calibrates_on_its_own_rows(tmp_path):
    need("smollm2", "gsm8k-test")
    settings = {
        "model": {"name": "packaged:smollm2", "dtype": "float32"},
        "task": "causal-lm",
        "data": {"train": "packaged:gsm8k-test", "text": "question", "max_length": 160, "max_train_rows": 6},
        "recipe": [{"probe": {"target_modules": ["q_proj"], "layers_to_transform": [0], "calibration_rows": 4}}],
        "train": {"max_steps": 1, "per_device_train_batch_size": 1, "save_strategy": "no", "seed": 0},
        "output_dir": str(tmp_path / "run"),
    }
    train(RunSettings.from_dict(settings))
    assert ProbeConfig.prepared == [["model.layers.0.self_attn.q_proj"]]
