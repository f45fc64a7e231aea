"""S2FT: selection, permutation, gradients of slices, what is kept, saving, fusing, composition, refusals."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from shoestring import assets
from shoestring.adapters import S2FT, S2FTConfig
from shoestring.adapters.coupled import channel_order, find_structures, head_order, order_of
from shoestring.adapters.s2ft import fuse
from shoestring.blocks import Recompute, TokenTune, TokenWindows
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.objectives import ChunkedLoss
from shoestring.recipe import Recipe, attached_to, load
from shoestring.testing.adapters import assert_near, batch, chain, counted_step, trainable, two_layers
from shoestring.testing.assets import need
from shoestring.testing.packed_layers import KINDS, pack_layer
from shoestring.testing.tiny_models import DECODER, WORDS, decoder, seeded, step

ALL: dict[str, Any] = {"o_ratio": 0.4, "down_ratio": 0.1, "v_ratio": 0.5, "up_ratio": 0.1}
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


def parts(model: nn.Module) -> dict[str, S2FT]:
    return {m.layer: m for m in model.modules() if isinstance(m, S2FT)}


def s2ft(model: nn.Module | None = None, **settings: Any) -> PeftModel:
    """In double precision, with random changes, in eval mode."""
    with seeded(3):
        config = S2FTConfig(**{**ALL, "init_weights": False, **settings})
        return get_peft_model((decoder() if model is None else model).double(), config).double().eval()


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=DECODER.batch()["input_ids"]).logits


def llama(**settings: Any) -> nn.Module:
    """As `decoder`, with any number of heads."""
    with seeded(0):
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": WORDS}
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_attention_heads": 4, **settings}))
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model


def phi3(**_: Any) -> nn.Module:
    """q, k and v in one layer, gate and up in another; grouped heads."""
    with seeded(0):
        sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": WORDS}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
        return Phi3ForCausalLM(Phi3Config(**sizes, **heads))


def odd(family: str, base: str = "ForCausalLM", **settings: Any) -> Any:
    """Makes a tiny model of a family in double precision, all of whose weights are random."""

    def make() -> nn.Module:
        sizes = {"vocab_size": WORDS, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 40}
        others = {"GPT2": ("n_embd", "n_layer", "n_head"), "GPTBigCode": ("n_embd", "n_layer", "n_head")}
        if family in others:
            sizes = dict(zip(others[family], (24, 2, 4), strict=True)) | {"vocab_size": WORDS}
        elif family == "Mpt":
            sizes = {"vocab_size": WORDS, "d_model": 24, "n_layers": 2, "n_heads": 4}
        else:
            sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
        if family == "LayoutLMv3":
            sizes |= {"coordinate_size": 4, "shape_size": 4, "visual_embed": False}
        with seeded(0):
            config = getattr(transformers, f"{family}Config")(**sizes, **settings)
            model = getattr(transformers, f"{family}{base}")(config).double().eval()
            for parameter in model.parameters():
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model

    make.__name__ = " ".join([family, *settings])
    return make


# ---- coupled structures ----


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_a_permuted_model_gives_the_same_outputs_and_comes_back_bit_by_bit(heads: str, biases: bool, seed: int):
    model = llama(num_key_value_heads=HEADS[heads], attention_bias=biases, mlp_bias=biases).eval()
    before, expected = copy.deepcopy(model.state_dict()), logits(model)
    permuted = get_peft_model(model, S2FTConfig(**ALL, permute=True, seed=seed)).eval()
    assert (logits(permuted) - expected).abs().max() < 1e-5
    inside = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
    assert any(not inside[name].equal(value) for name, value in before.items() if name.endswith("up_proj.weight"))
    plain = permuted.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    "family", ["bert", "vit", "gpt2", "opt", "distilbert", "modernbert", "dinov2", "whisper", "phi"]
)
def test_plain_and_fused_layers_of_other_families_are_permuted_the_same_way(family: str):
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs()
    before, expected = copy.deepcopy(model.state_dict()), model(**inputs)[0]
    permuted = get_peft_model(model, S2FTConfig(**ALL, permute=True, seed=1)).eval()
    weights = [m.base_layer.weight for m in permuted.modules() if hasattr(m, "base_layer")]
    assert not all(any(w.equal(old) for old in before.values()) for w in weights), "something moved"
    torch.testing.assert_close(permuted(**inputs)[0], expected, rtol=1e-10, atol=1e-10)
    plain = permuted.unload()
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            odd("StableLm", qk_layernorm=True),
            r"layers.0.self_attn cannot be permuted: q_layernorm.norms.0 has .* 6 numbers that may belong to heads",
        ),
        (odd("StableLm"), ""),
        (odd("GPTBigCode"), ""),
        (odd("GPTBigCode", multi_query=False), r"attn.c_attn does not hold q, k and v one after the other"),
        (
            odd("GPT2", "LMHeadModel", add_cross_attention=True),
            r"crossattention.c_attn does not hold q, k and v one after the other",
        ),
        (odd("LayoutLMv3", "Model"), r"attention cannot be permuted: its heads have a bias by position"),
        (odd("Mpt"), r"attn cannot be permuted: its heads have a bias by position"),
        (odd("Qwen3"), ""),
    ],
    ids=lambda one: getattr(one, "__name__", None),
)
def test_what_is_permuted_gives_the_same_outputs_and_the_rest_is_refused(make: Any, message: str):
    model = make()
    inputs = {"input_ids": torch.arange(3, 12)[None]}
    expected = model(**inputs)[0]
    config = S2FTConfig(o_ratio=0.5, down_ratio=0.2, permute=True, seed=1)
    if message:
        with pytest.raises(SettingError, match=message):
            get_peft_model(model, config)
    else:
        torch.testing.assert_close(get_peft_model(model, config).eval()(**inputs)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("make", [phi3, decoder])
def test_permuted_and_not_the_same_weights_train(make: Any):
    model = s2ft(make())
    permuted = s2ft(make(), permute=True)
    for name, part in parts(model).items():
        other = parts(permuted)[name]
        at = [part.indices.tolist().index(place) for place in other.indices.tolist()]
        other.delta.data.copy_(part.delta.data.index_select(part.dim, torch.tensor(at)))
    torch.testing.assert_close(logits(permuted), logits(model), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits(permuted.merge_and_unload()), logits(model.merge_and_unload()))


@pytest.mark.parametrize("seed", range(5))
def test_selected_units_become_slices_where_every_query_head_has_its_own_key(seed: int):
    permuted = s2ft(llama(num_key_value_heads=4), permute=True, seed=seed)
    assert all(isinstance(part.part, slice) for part in parts(permuted).values())
    channels = [p for name, p in parts(s2ft(permute=True, seed=seed)).items() if "mlp" in name]
    assert all(isinstance(part.part, slice) for part in channels)


def test_orders_by_hand():
    assert channel_order(6, rows=[1, 4], columns=[4, 5]) == [1, 4, 5, 0, 2, 3]
    # 6 query heads, 3 KV heads; heads 1, 2, 3 and 4: group 0 ends and group 2 begins with what is selected
    heads, kv = head_order(6, 3, kv_rows=[], columns=[1, 2, 3, 4])
    chosen = [head in (1, 2, 3, 4) for head in heads]
    assert sorted(heads) == list(range(6))
    assert chosen == [False, True, True, True, True, False]
    assert [heads[2 * i] // 2 for i in range(3)] == kv, "each KV head stands where its queries do"
    heads, kv = head_order(8, 4, kv_rows=[3, 1], columns=[0, 1, 6])
    assert kv[:2] == [1, 3], "selected KV heads come first, those with selected queries last of them"
    assert [heads[2 * i] // 2 for i in range(4)] == kv


def test_every_known_family_has_attention_and_feedforward_parts():
    for name, family in FAMILIES.items():
        model = family.build()
        found = {part.role for structure in find_structures(model) for part in structure.parts}
        assert {"o", "v", "down", "up"} <= found, name
        blocks = sum(len(model.get_submodule(stack)) for stack in family.stacks.split())
        assert len([s for s in find_structures(model) if s["down"] is not None]) == blocks, name


def test_a_selected_query_head_trains_its_own_columns_under_grouped_keys():
    model = s2ft(o_ratio=0.25, down_ratio=0.0, v_ratio=0.0, up_ratio=0.0)
    selected = model.peft_config["default"].selected
    assert sum(map(len, selected.values())) == 2, "a quarter of 8 heads in all"
    for name, heads in selected.items():
        columns = [6 * head + i for head in heads for i in range(6)]
        assert parts(model)[name].indices.tolist() == columns


def test_units_that_are_given_train_alone():
    given = {"model.layers.0.self_attn.v_proj": [1], "model.layers.1.mlp.down_proj": [3, 7]}
    model = s2ft(selected=given, o_ratio=0)
    assert {name: part.indices.tolist() for name, part in parts(model).items()} == {
        "model.layers.0.self_attn.v_proj": [6, 7, 8, 9, 10, 11],
        "model.layers.1.mlp.down_proj": [3, 7],
    }
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj: it is among target_modules of s2ft, but not in"):
        s2ft(selected=given, target_modules=["o_proj"])


def test_rows_of_a_kv_head_change_what_its_own_queries_read_and_nothing_else():
    name = "model.layers.0.self_attn.v_proj"
    model = s2ft(selected={name: [1]}, target_modules=[name])
    seen = []
    model.base_model.model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    logits(model)
    with model.disable_adapter():
        logits(model)
    changed = (seen[0] - seen[1]).abs().amax((0, 1)) > 0
    assert changed.tolist() == [False] * 12 + [True] * 12, "of four query heads of 6, the last two share KV head 1"


def test_rows_in_a_layer_that_holds_q_k_and_v_are_those_of_v():
    model = s2ft(FAMILIES["gpt2"].build(), down_ratio=0.1)
    for name, part in parts(model).items():
        if name.endswith("c_attn"):
            assert part.dim == 0
            assert all(48 <= row < 72 for row in part.indices.tolist())


# ---- selection ----


def test_shares_are_of_all_layers_together_and_layers_without_any_are_left_alone():
    model = llama(num_hidden_layers=5)
    adapted = get_peft_model(model, S2FTConfig(o_ratio=0.1, down_ratio=0.05, seed=2))
    selected = adapted.peft_config["default"].selected
    assert sum(len(v) for name, v in selected.items() if "o_proj" in name) == 2
    assert sum(len(v) for name, v in selected.items() if "down" in name) == 10
    assert set(parts(adapted)) == set(selected)
    assert len([name for name in selected if "o_proj" in name]) < 5
    assert len({len(v) for name, v in selected.items() if "down" in name}) > 1, "layers get different counts"


def test_selection_depends_on_its_own_seed_and_not_on_torch():
    def selected(seed: int) -> dict[str, list[int]]:
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        chosen = get_peft_model(decoder(), S2FTConfig(**ALL, seed=seed % 2)).peft_config["default"].selected
        assert torch.equal(torch.get_rng_state(), before)
        return chosen

    assert selected(0) == selected(2) != selected(1) == selected(3)


@pytest.mark.parametrize("end", ["large", "small"])
def test_scores_pick_the_units_with_the_largest_or_smallest_norms(end: str):
    model = decoder()
    down = model.model.layers[1].mlp.down_proj.weight
    v = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        for channel in (3, 17, 28, 39):
            down[:, channel] *= 9.0 if end == "large" else 0.05
        v[6:] *= 9.0 if end == "large" else 0.05
    settings = {"o_ratio": 0, "down_ratio": 0.05, "v_ratio": 0.25, "selection": "weight", "end": end}
    selected = get_peft_model(model, S2FTConfig(**settings)).peft_config["default"].selected
    assert selected["model.layers.1.mlp.down_proj"] == [3, 17, 28, 39]
    assert selected["model.layers.0.self_attn.v_proj"] == [1]


@pytest.mark.parametrize("selection", ["activation", "product"])
def test_activations_over_calibration_rows_choose_channels(selection: str, tmp_path: Path):
    model, rows = decoder(), DECODER.data()["train"]
    reads: list[Tensor] = []
    layer = model.model.layers[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(lambda _, x: reads.append(x[0].detach()))
    with torch.no_grad():
        for row in rows:
            model.eval()(input_ids=row["input_ids"][row["attention_mask"] > 0][None])
    hook.remove()
    score = torch.cat([x[0] for x in reads]).double().square().mean(0).sqrt()
    score = score * layer.weight.double().norm(dim=0) if selection == "product" else score
    config = S2FTConfig(
        target_modules=["0.mlp.down_proj"], down_ratio=0.1, selection=selection, calibration_rows=len(rows)
    )
    recipe = Recipe(config)
    adapted = recipe.apply(model, data={"train": rows})
    (selected,) = adapted.peft_config["default"].selected.values()
    assert selected == sorted(score.topk(4).indices.tolist())
    for part in parts(adapted).values():
        nn.init.normal_(part.delta)
    expected = logits(adapted.eval())
    attached_to(adapted).save(tmp_path)
    assert torch.equal(logits(load(decoder(), tmp_path).eval()), expected), "loaded without the data"


def test_gradients_over_calibration_rows_choose_heads():
    model, rows = decoder().eval(), DECODER.data()["train"]
    weights = {f"model.layers.{i}.self_attn.o_proj": model.model.layers[i].self_attn.o_proj.weight for i in range(2)}
    squares = {name: torch.zeros(4) for name in weights}
    for row in rows:
        real = {name: value[row["attention_mask"] > 0][None] for name, value in row.items()}
        for name, gradient in zip(
            weights, torch.autograd.grad(model(**real).loss, list(weights.values())), strict=True
        ):
            squares[name] += gradient.square().sum(0).view(4, 6).sum(1)
    scores = {(name, head): float(s[head].sqrt() / s.sqrt().mean()) for name, s in squares.items() for head in range(4)}
    largest = sorted(scores, key=scores.get)[-2:]
    config = S2FTConfig(o_ratio=0.25, down_ratio=0, selection="gradient", calibration_rows=len(rows))
    config.see_data({"train": rows})
    selected = get_peft_model(model, config).peft_config["default"].selected
    assert sorted((name, head) for name, heads in selected.items() for head in heads) == sorted(largest)


def test_without_calibration_data_it_says_how_to_give_some():
    with pytest.raises(SettingError, match=r"s2ft is calibrated on data.*see_data"):
        get_peft_model(decoder(), S2FTConfig(**ALL, selection="activation"))


# ---- gradients, merging, counts ----


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("permute", [False, True])
def test_gradients_are_the_slices_of_the_dense_ones(permute: bool, seed: int):
    dense = decoder(attention_bias=True).double()
    model = s2ft(decoder(attention_bias=True), seed=seed, permute=permute, init_weights=True)
    inputs = DECODER.batch()
    words = dense.get_input_embeddings()(inputs["input_ids"]).detach()
    gradients = []
    for one in (dense, model):
        x = words.clone().requires_grad_()
        one(inputs_embeds=x, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)
    for name, part in parts(model).items():
        whole = dense.get_submodule(name).weight.grad
        wanted = whole.index_select(part.dim, part.indices)
        torch.testing.assert_close(part.delta.grad, wanted, rtol=1e-12, atol=1e-12)
    assert {part.dim for part in parts(model).values()} == {0, 1}


def test_a_fresh_adapter_is_the_model_and_a_merged_one_equals_it():
    base = decoder().double()
    expected = logits(base.eval())
    assert torch.equal(logits(s2ft(init_weights=True)), expected)
    model = s2ft()
    changed = logits(model)
    assert (changed - expected).abs().max() > 1e-3
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), changed, rtol=1e-12, atol=1e-12)
    for name, part in parts(model).items():
        old, new = base.get_submodule(name).weight, merged.get_submodule(name).weight
        others = torch.tensor(
            [i for i in range(old.shape[part.dim]) if i not in part.indices.tolist()], dtype=torch.long
        )
        assert torch.equal(new.index_select(part.dim, others), old.index_select(part.dim, others))


def test_trained_numbers_are_as_many_as_the_formula_says_and_the_optimizer_holds_two_for_each():
    model = s2ft(**{"o_ratio": 0.5, "down_ratio": 0.2, "v_ratio": 0.25, "up_ratio": 0.1})
    heads, channels, kv_heads, up = 4, 16, 1, 8
    count = heads * 6 * 24 + channels * 24 + kv_heads * 6 * 24 + up * 24
    assert sum(p.numel() for p in trainable(model).values()) == count
    optimizer = torch.optim.AdamW(trainable(model).values())
    model(**DECODER.batch()).loss.backward()
    optimizer.step()
    assert sum(t.numel() for s in optimizer.state.values() for t in s.values() if t.dim()) == 2 * count


def test_four_micro_batches_give_the_gradient_of_one():
    whole, parted = s2ft(), s2ft()
    inputs = {name: value.repeat(2, 1)[:4] for name, value in DECODER.batch(samples=4).items()}
    inputs.pop("attention_mask")
    inputs["labels"] = inputs["input_ids"]
    whole(**inputs).loss.backward()
    for row in range(4):
        (parted(**{name: value[row : row + 1] for name, value in inputs.items()}).loss / 4).backward()
    for name, gradient in trainable(whole).items():
        torch.testing.assert_close(trainable(parted)[name].grad, gradient.grad, rtol=1e-6, atol=1e-9)


# ---- memory ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_keep_their_part_of_the_input_alone(dtype: torch.dtype):
    model = chain(S2FTConfig(down_ratio=0.05)).to(dtype)
    selected = model.peft_config["default"].selected
    assert sum(map(len, selected.values())) == 19
    assert counted_step(model, 64).saved_bytes == 64 * 19 * dtype.itemsize


def test_saved_and_peak_bytes_are_below_those_of_lora_and_of_full_training():
    def run(config: Any) -> tuple[int, int]:
        with torch.device("meta"):
            block = [(256, 256), (256, 1024), (1024, 256)]
            model: nn.Module = nn.Sequential(*(nn.Linear(*sizes) for sizes in block * 8))
            if config is not None:
                config.target_modules = {str(i) for i in range(24)}
                model = get_peft_model(model, config)
        if isinstance(config, S2FTConfig):
            assert 0.98 < sum(p.numel() for p in trainable(model).values()) / lora_numbers < 1.02
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        with Ledger(model) as ledger:
            model(torch.empty(4, 128, 256, device="meta")).sum().backward()
            optimizer.step()
        return ledger.report().saved_bytes, ledger.report().peak_bytes

    lora_numbers = 8 * 8 * (512 + 1280 + 1280)
    lora, ours, full = run(LoraConfig(r=8)), run(S2FTConfig(down_ratio=0.044)), run(None)
    assert ours[0] <= 0.2 * lora[0]
    assert ours[1] <= 0.95 * lora[1]
    assert ours[1] <= 0.5 * full[1]


# ---- saving, switching, fusing ----


@pytest.mark.parametrize("permute", [False, True])
def test_what_was_saved_goes_on_the_base_as_it_was_loaded(permute: bool, tmp_path: Path):
    model = s2ft(permute=permute)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    assert all(name.endswith(("indices", "delta")) for name in held)
    for again_permuted in (False, permute):
        config = S2FTConfig.from_pretrained(tmp_path)
        config.permute = again_permuted
        again = PeftModel.from_pretrained(decoder().double(), tmp_path, config=config).eval()
        torch.testing.assert_close(logits(again), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(logits(again), expected)


def test_a_permuted_adapter_that_is_deleted_leaves_the_base_as_it_was():
    base = decoder().double()
    before = copy.deepcopy(base.state_dict())
    model = s2ft(base, permute=True)
    with pytest.raises(SettingError, match="permute of s2ft moves the base for one adapter"):
        model.add_adapter("second", S2FTConfig(**ALL))
    model.delete_adapter("default")
    model.add_adapter("third", S2FTConfig(**ALL))
    model.delete_adapter("third")
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items()}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_adapters_switch_add_up_where_they_overlap_and_are_averaged():
    base = decoder().double().eval()
    model = s2ft(base, target_modules=["down_proj", "v_proj"], o_ratio=0.0)
    with seeded(5):
        model.add_adapter("other", S2FTConfig(**{**ALL, "down_ratio": 0.5, "init_weights": False, "seed": 1}))
    model.double()
    first, other = model.peft_config["default"].selected, model.peft_config["other"].selected
    assert any(set(first[name]) & set(other.get(name, [])) for name in first), "some units are selected by both"

    def dense(**weights: float) -> Tensor:
        plain = decoder().double().eval()
        for adapter, weight in weights.items():
            for name in model.peft_config[adapter].selected:
                layer = model.base_model.model.get_submodule(name)
                plain.get_submodule(name).weight.data += weight * layer.get_delta_weight(adapter)
        return logits(plain)

    torch.testing.assert_close(logits(model), dense(default=1.0))
    model.set_adapter("other")
    torch.testing.assert_close(logits(model), dense(other=1.0))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model.eval()), dense(default=1.0, other=1.0))
    fuse(model, {"default": 0.5, "other": 0.5}, "mean")
    model.double().set_adapter("mean")
    torch.testing.assert_close(logits(model.eval()), dense(default=0.5, other=0.5))
    with pytest.raises(ValueError, match=r"no s2ft adapter 'othr' to fuse. Did you mean 'other'"):
        fuse(model, {"othr": 1.0}, "again")
    with pytest.raises(ValueError, match=r"a new name, got .* and 'mean'"):
        fuse(model, {"other": 1.0}, "mean")


@pytest.mark.parametrize("first", ["attention", "mlp"])
def test_layers_that_one_adapter_leaves_out_are_in_the_fused_one_if_another_trains_them(first: str):
    without = {"attention": "mlp", "mlp": "self_attn"}
    model = s2ft(exclude_modules=rf".*\.{without[first]}\..*")
    (other,) = {"attention", "mlp"} - {first}
    with seeded(5):
        model.add_adapter("other", S2FTConfig(**ALL, exclude_modules=rf".*\.{without[other]}\..*", init_weights=False))
    model.double().base_model.set_adapter(["default", "other"])
    expected = logits(model.eval())
    fuse(model, {"default": 1.0, "other": 1.0}, "sum")
    model.double().set_adapter("sum")
    assert set(model.peft_config["sum"].selected) == {part.layer for part in parts(model).values()}
    torch.testing.assert_close(logits(model.eval()), expected)


def test_adapters_with_a_trained_head_are_not_fused():
    model = s2ft(modules_to_save=["lm_head"])
    with seeded(5):
        model.add_adapter("other", S2FTConfig(**ALL))
    with pytest.raises(ValueError, match=r"but default has modules_to_save lm_head, of which there is no sum"):
        fuse(model, {"other": 0.5, "default": 0.5}, "mean")
    assert "mean" not in model.peft_config


def test_indices_that_do_not_fit_the_layer_are_refused_when_they_are_loaded(tmp_path: Path):
    s2ft().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    held = load_file(file)
    name = next(key for key in held if "down_proj" in key and key.endswith("indices"))
    for wrong, message in (
        (held[name] + 40, r"mlp.down_proj has 40 columns, but the adapter was saved for .* another model"),
        (held[name] * 0, r"mlp.down_proj has 40 columns.* 1 of them different"),
        (held[name][:-1], r"mlp.down_proj of 40 -> 24 takes a change of .* got"),
    ):
        save_file({**held, name: wrong.contiguous()}, file)
        with pytest.raises(SettingError, match=message):
            PeftModel.from_pretrained(decoder(), tmp_path)
    save_file(held, file)
    with pytest.raises(SettingError, match=r"has the (heads|channels) 0 to .*made for another model"):
        PeftModel.from_pretrained(llama(intermediate_size=20, num_attention_heads=2), tmp_path)


def test_the_indices_that_were_saved_count_whatever_would_be_selected_now(tmp_path: Path):
    model = s2ft(target_modules=["down_proj"], down_ratio=0.2)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    config = S2FTConfig(target_modules=["down_proj"], down_ratio=0.3, seed=8)
    config.values_follow = True
    again = PeftModel.from_pretrained(decoder().double(), tmp_path, config=config).eval()
    assert torch.equal(logits(again), expected)


# ---- with other techniques ----


@pytest.mark.parametrize("make", [decoder, gpt2])
@pytest.mark.parametrize(
    "others",
    [
        (Recompute(),),
        (ChunkedLoss(),),
        (TokenWindows(window_tokens=4),),
        (Recompute(), TokenTune(keep_fraction=1.0)),
        (TokenTune(keep_fraction=0.5),),
    ],
    ids=lambda others: "+".join(t.name for t in others),
)
def test_gradients_beside_other_techniques_are_slices_of_dense_ones(others: tuple, make: Any):
    with seeded(3):
        model = Recipe(*others, S2FTConfig(**ALL, init_weights=False)).apply(make(), data=DECODER.data())
    step(model, DECODER.batch())
    dense = make()
    for name, part in parts(model).items():
        out_in(dense.get_submodule(name), "data").index_add_(part.dim, part.indices, part.delta.detach())
    sampled = others == (TokenTune(keep_fraction=0.5),)  # changes the gradient; the others must not
    step(Recipe(*others).apply(dense) if sampled else dense, DECODER.batch())
    for name, part in parts(model).items():
        wanted = out_in(dense.get_submodule(name), "grad").index_select(part.dim, part.indices)
        assert_near(part.delta.grad, wanted, name, share=1e-4)


def out_in(layer: Any, of: str) -> Tensor:
    """`of` its weight, as [out, in]."""
    tensor: Tensor = getattr(layer.weight, of)
    return tensor.T if isinstance(layer, Conv1D) else tensor


@pytest.mark.slow
def test_the_packaged_encoder_learns_and_is_saved_and_loaded(tmp_path: Path):
    need("minilm", "rotten-tomatoes")
    folder = assets.model_folder("minilm")
    rows = assets.load_data("rotten-tomatoes")["train"].shuffle(seed=0).select(range(8))
    inputs = AutoTokenizer.from_pretrained(folder)(list(rows["text"]), padding=True, max_length=24, truncation=True)
    given = {name: torch.tensor(value) for name, value in inputs.items()} | {"labels": torch.tensor(rows["label"])}
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    with seeded(0):
        model = Recipe(S2FTConfig(task_type="SEQ_CLS", o_ratio=0.1, permute=True)).apply(base).train()
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=5e-3)
    losses = []
    for _ in range(10):
        loss = model(**given).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    model.eval().save_pretrained(tmp_path)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    again = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(again(**given).logits, model(**given).logits)


# ---- refusals ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"o_ratio": -0.1}, r"o_ratio of s2ft must be in \(0, 1\], or 0 to train none, got -0.1"),
        ({"down_ratio": 1.5}, r"down_ratio of s2ft must be in \(0, 1\].*got 1.5"),
        (
            {"o_ratio": 0, "down_ratio": 0},
            "s2ft has nothing to train: o_ratio, down_ratio, v_ratio, up_ratio are all 0",
        ),
        ({"selection": "loss"}, "selection of s2ft must be one of random, weight, activation, .* got 'loss'"),
        ({"end": "top"}, "end of s2ft must be 'large' or 'small', got 'top'"),
        ({"permute": True, "bias": "all"}, "bias of s2ft must be 'none' with permute, which moves biases too"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        S2FTConfig(**settings)


def no_head_size() -> nn.Module:
    model = decoder()
    del model.model.layers[1].self_attn.head_dim
    return model


def mixed_heads() -> nn.Module:
    """q of one block has rows for three heads only, up of the other fewer than down reads."""
    model = decoder()
    model.model.layers[0].self_attn.q_proj = nn.Linear(24, 18)
    model.model.layers[1].mlp.up_proj = nn.Linear(24, 32)
    return model


def tied_gates() -> nn.Module:
    model = decoder()
    model.model.layers[1].mlp.gate_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    return model


def unknown_attention() -> nn.Module:
    model = decoder()
    for block in model.model.layers:
        block.self_attn.last = block.self_attn.o_proj
        del block.self_attn.o_proj
    return model


def tied_feedforwards() -> nn.Module:
    model = decoder()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    return model


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            decoder,
            {"o_ratio": 0.1},
            r"o_ratio of s2ft is 0.1, which is less than one of the 8 heads of 2 layers: .* to 1/8 or",
        ),
        (decoder, {"down_ratio": 0.001}, r"less than one of the 80 channels of 2 layers: set it to 1/80 or more"),
        (
            decoder,
            {"target_modules": ["q_proj"]},
            r"self_attn.q_proj holds q, and s2ft trains parts of o, down",
        ),
        (decoder, {"target_modules": ["v_proj"]}, r"v_ratio of s2ft is 0, so that nothing of .*v_proj would train"),
        (decoder, {"selected": {"model.layers.0.self_attn.o_proj": [4]}}, r"o_proj has the heads 0 to 3, but 4 was"),
        (
            FAMILIES["gpt-neox"].build,
            {"v_ratio": 0.5},
            r"query_key_value has no heads or channels that can be",
        ),
        (
            no_head_size,
            {},
            r"layers.1.self_attn.o_proj has no heads .* paired: the 24 channels .* how large",
        ),
        (two_layers, {}, "TwoLayers has no list of equal blocks with attention or feed-forward layers of names known"),
        (
            FAMILIES["t5"].build,
            {"permute": True},
            r"SelfAttention cannot be permuted: its heads have a bias",
        ),
        (
            FAMILIES["olmo2"].build,
            {"permute": True},
            r"self_attn cannot be permuted: q_norm has a weight of its own",
        ),
        (
            odd("BitNet"),
            {"permute": True, "o_ratio": 0.0},
            r"layers.0.mlp cannot be permuted: ffn_sub_norm has .* 40 numbers that may belong to channels",
        ),
        (
            odd("GPTBigCode", multi_query=False),
            {"v_ratio": 0.5},
            r"attn.c_attn has no heads or channels that can be",
        ),
        (
            unknown_attention,
            {},
            r"o_ratio of s2ft is 0.5, but LlamaForCausalLM has no layer known to be o: set it to 0",
        ),
        (
            tied_feedforwards,
            {},
            r"mlp.down_proj in place, and its weight is held by .*0.mlp.down_proj and .*1.mlp.down_proj",
        ),
        (
            decoder,
            {"selected": {"model.layers.0.self_attn.v_proj": [2]}},
            r"v_proj has the heads 0 to 1, but 2 was selected",
        ),
        (
            mixed_heads,
            {"v_ratio": 0.5, "target_modules": ["v_proj"]},
            r"0.self_attn.v_proj has no heads .* paired: rows of q, k and v do not fit 4 heads of 6.*Set v_ratio",
        ),
        (
            mixed_heads,
            {"permute": True, "o_ratio": 0.5},
            r"0.self_attn cannot be permuted: rows of q, k and v do not fit 4 heads of 6; set permute to False",
        ),
        (
            mixed_heads,
            {"up_ratio": 0.5, "target_modules": ["up_proj"]},
            r"1.mlp.up_proj has no heads or channels that .*: .*up_proj has 32 rows, and .* reads 40 channels",
        ),
        (tied_gates, {"permute": True}, r"mlp.gate_proj cannot be permuted: .* hold the same weight"),
        (
            two_layers,
            {"permute": True, "target_modules": ["first"]},
            "first belongs to no attention or feed-forward part that s2ft knows",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused_and_leaves_it_as_it_was(make: Any, settings: dict, message: str):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, S2FTConfig(**{"o_ratio": 0.5, "down_ratio": 0.2, **settings}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(m, S2FT) for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_permute_moves_no_packed_weights(kind: str):
    model = decoder()
    name = "model.layers.1.self_attn.k_proj"  # trains nothing, and would move
    pack_layer(model, name, kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SettingError, match=rf"^{name} is quantised and cannot be permuted: Linear.*set permute to"):
        get_peft_model(model, S2FTConfig(**ALL, permute=True))
    for key, value in model.state_dict().items():
        assert not isinstance(value, Tensor) or not key.startswith("model.layers.1") or str(value) == str(before[key])
    get_peft_model(model, S2FTConfig(**ALL))


def test_weights_saved_in_the_order_of_permute_are_refused(tmp_path: Path):
    model = s2ft(permute=True)
    model.get_base_model().config.save_pretrained(tmp_path)
    permuted = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path))
    for settings in ({}, {"permute": True}):
        with pytest.raises(SettingError, match="LlamaForCausalLM were saved while permute of s2ft had moved its heads"):
            get_peft_model(permuted, S2FTConfig(**ALL, **settings))
    assert permuted.config.s2ft_permuted
    get_peft_model(permuted, LoraConfig(target_modules=["q_proj"])).unload()
    base = model.unload()
    assert not hasattr(base.config, "s2ft_permuted")
    get_peft_model(base, S2FTConfig(**ALL, permute=True)).delete_adapter("default")
    assert not hasattr(base.config, "s2ft_permuted")


def test_a_structure_moved_by_hand_moves_every_part():
    model = decoder().double()
    expected, structures = logits(model.eval()), find_structures(model)
    for structure in structures:
        order_of(structure, [0], [1]).move(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)
    assert {part.role for s in structures for part in s.parts} == {"q", "k", "v", "o", "up", "gate", "down"}


def test_a_layer_of_no_known_part_trains_single_columns():
    model = get_peft_model(two_layers(), S2FTConfig(target_modules=["first", "second"], down_ratio=0.2))
    assert {name: len(p.indices) for name, p in parts(model).items()} == {"first": 5, "second": 7}
    assert model(batch()).shape == (2, 63, 16)
