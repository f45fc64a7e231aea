"""Light-PEFT: masks, importance, pruning between two steps, restoring, storing smaller models, and what is refused."""

import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from shoestring import Recipe, load
from shoestring.adapters import BottleneckConfig, HUTConfig
from shoestring.adapters.slicing import TokensSeen
from shoestring.blocks import Recompute
from shoestring.errors import RunFailed, SettingError
from shoestring.modes import aside
from shoestring.optimizers import LoraFA
from shoestring.pruning import LightPEFT, SketchTune, load_pruned, save_pruned
from shoestring.pruning.light_peft import FILE, MASK, highest, kept_channels, kept_heads
from shoestring.real_tokens import only_learning
from shoestring.recipe import attached_to
from shoestring.selection.speft import Speft
from shoestring.technique import Moment
from shoestring.testing.tiny_models import DECODER, seeded, step

WIDTH, INNER, HEADS = 24, 40, 6
TEXT: dict[str, Any] = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# what builds a tiny model, and its linear layers
MODELS: dict[str, tuple[Callable[..., nn.Module], list[str]]] = {
    "bert": (
        lambda **s: BertForSequenceClassification(BertConfig(**TEXT, **SIZES, **NO_DROPOUT, **s)),
        ["query", "key", "value", "dense"],
    ),
    "distilbert": (
        lambda **s: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=61, dim=WIDTH, hidden_dim=INNER, n_layers=2, n_heads=HEADS, dropout=0.0, **s)
        ),
        ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    ),
    "gpt2": (
        lambda **s: GPT2LMHeadModel(
            GPT2Config(
                **TEXT, n_embd=WIDTH, n_inner=INNER, n_layer=2, n_head=HEADS, n_positions=32, resid_pdrop=0.0, **s
            )
        ),
        ["c_attn", "c_proj", "c_fc"],
    ),
    "llama": (
        lambda **s: LlamaForCausalLM(LlamaConfig(**TEXT, **SIZES, num_key_value_heads=3, mlp_bias=True, **s)),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
    "qwen3": (  # norms of heads, and heads that do not make up the width
        lambda **s: Qwen3ForCausalLM(Qwen3Config(**TEXT, **SIZES, num_key_value_heads=2, head_dim=6, **s)),
        ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    ),
    "opt": (
        lambda **s: OPTForCausalLM(
            OPTConfig(
                **TEXT,
                hidden_size=WIDTH,
                word_embed_proj_dim=WIDTH,
                ffn_dim=INNER,
                num_hidden_layers=2,
                num_attention_heads=HEADS,
                dropout=0.0,
                max_position_embeddings=32,
                **s,
            )
        ),
        ["q_proj", "v_proj", "out_proj", "fc1", "fc2"],
    ),
    "vit": (
        lambda **s: ViTForImageClassification(ViTConfig(**SIZES, **NO_DROPOUT, image_size=12, patch_size=4, **s)),
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    ),
}
SETTINGS: dict[str, Any] = {"estimation_steps": 2, "channel_multiple": 4}


def build(name: str, **settings: Any) -> nn.Module:
    with seeded(0):
        model = MODELS[name][0](**settings)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def lora(name: str, **settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": MODELS[name][1], "init_lora_weights": False, **settings})


def batch_of(name: str, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        pixels = torch.randn(3, 3, 12, 12, generator=generator)
        return {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1])}
    ids = torch.randint(3, 61, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    is_classifier = name in ("bert", "distilbert")
    labels = torch.tensor([0, 1, 1]) if is_classifier else ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def logits(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        of_model: Tensor = model.eval()(**batch_of(name)).logits
    return of_model


def technique_of(model: nn.Module) -> LightPEFT:
    found = next(t for t in attached_to(model).techniques if isinstance(t, LightPEFT))
    return found


def scatter_masks(model: nn.Module) -> None:
    """Have every unit, adapter and rank count differently, as after an estimation."""
    technique, generator = technique_of(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mask in technique._masks().values():
            mask.copy_(torch.rand(mask.shape, generator=generator) + 0.5)
    for adapter in technique._adapters:
        technique._sums["ratios"][adapter.key] = torch.rand((), generator=generator)
        technique._sums["ranks"][adapter.key] = torch.rand(adapter.num_ranks, generator=generator)


def attach(base: nn.Module, *adapters: Any, **settings: Any) -> nn.Module:
    with seeded(1):
        return Recipe(*adapters, LightPEFT(**{**SETTINGS, **settings})).apply(base)


def run_steps(model: nn.Module, name: str, count: int, optimizer: Any = None, first: int = 0) -> Any:
    attached = attached_to(model)
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for index in range(first, first + count):
        attached.event("on_step_begin", Moment(model, optimizer, index))
        step(model, batch_of(name, index))
        attached.event("on_gradients", Moment(model, optimizer, index))
        optimizer.step()
        attached.event("on_step_end", Moment(model, optimizer, index + 1))
    return optimizer


def zero_what_goes(model: nn.Module) -> None:
    """What pruning takes away, set to zero in the whole model."""
    technique = technique_of(model)
    plan = technique._chosen()
    with torch.no_grad():
        for name, mask in technique._masks().items():
            kept, _ = plan.units[name]
            left = torch.zeros_like(mask)
            left[kept] = mask[kept]
            mask.copy_(left)
        for adapter in technique._adapters:
            kept = plan.ranks[adapter.key]
            for name, parameter in adapter.parameters.items():
                axes = adapter.axes[name]
                if not len(kept):
                    parameter.zero_()
                elif "rank" in axes:
                    gone = torch.ones(parameter.shape[axes.index("rank")], dtype=torch.bool)
                    gone[kept] = False
                    parameter.index_fill_(axes.index("rank"), gone.nonzero()[:, 0], 0.0)


@pytest.mark.parametrize("name", MODELS)
def test_masks_of_one_change_no_bit(name: str):
    with seeded(1):
        plain = Recipe(lora(name)).apply(build(name))
    assert torch.equal(logits(attach(build(name), lora(name)), name), logits(plain, name))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_the_pruned_model_is_the_masked_one(name: str, attention: str):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = attach(build(name, attn_implementation=attention).to(dtype), lora(name))
        scatter_masks(model)
        zero_what_goes(model)
        wanted = logits(model.to(dtype), name)
        technique_of(model).prune()
        found = logits(model, name)
        if dtype == torch.float64 and name in ("llama", "qwen3"):
            bound = 1e-5  # their norms compute in float32
        assert (found - wanted).abs().max() < bound
        run_steps(model, name, 1, first=2)  # and it trains on


@pytest.mark.parametrize("form", ["houlsby", "pfeiffer", "parallel", "adaptformer"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_bottleneck_adapters_are_pruned_too(name: str, form: str):
    adapter = BottleneckConfig(form=form, r=6, init_weights=False, scale=2.0)
    model = attach(build(name), adapter, removed_modules_fraction=0.3)
    scatter_masks(model)
    zero_what_goes(model)
    wanted = logits(model, name)
    technique_of(model).prune()
    assert (logits(model, name) - wanted).abs().max() < 1e-5
    run_steps(model, name, 1, first=2)


def test_a_bottleneck_that_reads_what_is_cut_is_cut_with_it():
    targets = ["output.dense", "query"]  # reads channels, and adds to heads
    adapter = BottleneckConfig(form="parallel", r=6, init_weights=False, target_modules=targets, reads=None)
    model = attach(build("bert"), lora("bert"), adapter, removed_modules_fraction=0.3)
    scatter_masks(model)
    zero_what_goes(model)
    wanted = logits(model, "bert")
    technique_of(model).prune()
    assert (logits(model, "bert") - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_kept_counts_are_the_shares(name: str):
    model = attach(build(name), lora(name), removed_channels_fraction=0.4)
    start = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2)
    modules = len(technique_of(model)._adapters)
    scatter_masks(model)
    technique_of(model).prune()
    technique = technique_of(model)
    channels = [units for units in technique.units if not units.are_heads]
    for units in technique.units:
        kept, _ = technique._plan.units[units.name]
        if units.are_heads:
            groups = units.count // units.group
            assert len(kept) == (groups - groups // 3) * units.group
        else:
            assert len(kept) >= 4
            assert len(kept) % 4 == 0
        weight = units.reading_layer.weight
        assert len(kept) * units.width in weight.shape
    total = sum(len(technique._plan.units[units.name][0]) for units in channels)
    assert total == INNER * 2 * 0.6
    left = [adapter for adapter in technique._adapters if not adapter.taken_off]
    assert sum(adapter.num_ranks for adapter in left) == -(-(modules - int(0.75 * modules)) * 4 // 2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained <= 0.25 * start


def test_shares_by_layer_and_single_channels():
    model = attach(build("bert"), lora("bert"), channels_scope="layer", ranks_scope="layer", channel_multiple=1)
    scatter_masks(model)
    technique_of(model).prune()
    technique = technique_of(model)
    for units in technique.units:
        if not units.are_heads:
            assert len(technique._plan.units[units.name][0]) == INNER - INNER // 3
    assert {adapter.num_ranks for adapter in technique._adapters if not adapter.taken_off} == {2}


def test_highest_keeps_one_and_breaks_ties_by_order():
    assert highest(torch.tensor([1.0, 3.0, 2.0, 2.0]), 0.5).tolist() == [1, 2]
    assert highest(torch.ones(5), 0.4).tolist() == [0, 1, 2]
    assert highest(torch.ones(3), 0.99).tolist() == [0]
    assert kept_heads(torch.tensor([5.0, 0.0, 2.0, 2.0, 1.0, 1.0]), 2, 1 / 3).tolist() == [0, 1, 2, 3]


def test_channels_stay_in_blocks_over_all_layers():
    good, bad = torch.linspace(1, 2, 12), torch.linspace(-1, 0, 12)
    kept = kept_channels([bad, good], 0.5, 4)
    assert [each.tolist() for each in kept] == [[8, 9, 10, 11], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert [len(each) for each in kept_channels([bad, good], 0.95, 4)] == [4, 4]
    assert [len(each) for each in kept_channels([bad, good], 0.0, 5)] == [12, 12]
    generator = torch.Generator().manual_seed(0)
    masks = [torch.randn(n, generator=generator) for n in (7, 13, 5)]
    threshold = torch.cat(masks).sort().values[int(0.4 * 25)]
    for found, mask in zip(kept_channels(masks, 0.4, 1), masks, strict=True):
        assert found.tolist() == (mask >= threshold).nonzero()[:, 0].tolist()


def test_importance_is_that_of_the_paper():
    """By a plain computation from inputs, outputs and gradients, over the second half of the steps."""
    name = "bert"
    model = attach(build(name), lora(name), estimation_steps=4)
    technique = technique_of(model)
    seen: dict[str, list[Tensor]] = {}
    ranks: dict[str, Tensor] = {}
    attached = attached_to(model)
    for index in range(3):  # the first two are not counted
        taken: dict[str, Any] = {}

        def take(key: str, taken: dict[str, Any] = taken) -> Callable[..., None]:
            return lambda module, args, output: taken.update({key: (args[0], output)})

        hooks = [adapter.wrapper.register_forward_hook(take(adapter.key)) for adapter in technique._adapters]
        attached.event("on_step_begin", Moment(model, None, index))
        step(model, batch_of(name, index))
        if index >= 2:
            for adapter in technique._adapters:
                (x, y), layer = taken[adapter.key], adapter.layer
                h = x @ layer.weight.T + layer.bias
                ratio = (y - h).norm(dim=-1) / h.norm(dim=-1)
                mask = batch_of(name, index)["attention_mask"].bool()
                of_tokens = ratio[mask] if ratio.dim() == 2 else ratio
                seen.setdefault(adapter.key, []).append(of_tokens.mean().detach())
                a, b = adapter.parameters["A"], adapter.parameters["B"]
                ranks[adapter.key] = (a * a.grad).mean(1).abs() + (b * b.grad).mean(0).abs()
        attached.event("on_gradients", Moment(model, None, index))
        for hook in hooks:
            hook.remove()
    for key, ratios in seen.items():
        assert torch.allclose(technique._score("ratios", key, torch.zeros(())), torch.stack(ratios).mean(), rtol=1e-3)
        assert torch.allclose(technique._score("ranks", key, torch.zeros(4)), ranks[key], rtol=1e-5)


def test_scores_are_taken_before_clipping_and_not_of_steps_that_overflowed():
    model = attach(build("bert"), lora("bert"), estimation_steps=8)
    technique, attached = technique_of(model), attached_to(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted: dict[str, Tensor] = {}
    for index in range(4, 8):
        attached.event("on_step_begin", Moment(model, None, index))
        step(model, batch_of("bert", index))
        if index == 5:
            technique._adapters[0].parameters["B"].grad.mul_(math.inf)
        else:
            for adapter in technique._adapters:
                wanted[adapter.key] = wanted.get(adapter.key, 0) + adapter.rank_scores() / 3
        if index != 7:  # where nothing is clipped, there is no such event
            attached.event("before_clipping", Moment(model, None, index))
            nn.utils.clip_grad_norm_(trained, 1e-3)
        attached.event("on_gradients", Moment(model, None, index))
    for key, scores in wanted.items():
        torch.testing.assert_close(technique._score("ranks", key, torch.zeros(4)), scores)
        assert technique._score("ratios", key, torch.zeros(())).isfinite()


def test_the_loss_holds_the_masks():
    model = attach(build("bert"), lora("bert"), sparsity_weight=0.01)
    plain = step(model, batch_of("bert")).loss
    for mask in technique_of(model)._masks().values():
        mask.data.neg_()
    technique = technique_of(model)
    wanted = 0.01 * 2 * (HEADS + INNER)
    assert technique.added_loss(model, {}, None).item() == pytest.approx(wanted)
    with torch.no_grad():
        for mask in technique._masks().values():
            mask.neg_()
    technique.sparsity_weight = 0.0
    assert (plain - step(model, batch_of("bert")).loss).item() == pytest.approx(wanted, rel=1e-4)


def test_optimizer_state_follows_what_is_left():
    model = attach(build("llama"), lora("llama"))
    optimizer = run_steps(model, "llama", 1)
    assert len(optimizer.state) == len(optimizer.param_groups[0]["params"])
    run_steps(model, "llama", 1, optimizer, first=1)
    held = optimizer.param_groups[0]["params"]
    assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}
    run_steps(model, "llama", 1, optimizer, first=2)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].shape == parameter.shape


def test_memory_of_what_is_gone_is_free(tmp_path: Path):
    model = attach(build("llama"), lora("llama"), offload_folder=str(tmp_path))
    technique = technique_of(model)
    before = sum(p.numel() for units in technique.units for layer in units.layers.values() for p in layer.parameters())
    adapters = [weakref.ref(p.untyped_storage()) for a in technique._adapters for p in a.parameters.values()]
    old = [weakref.ref(layer.weight.untyped_storage()) for u in technique.units for layer in u.layers.values()]
    scatter_masks(model)
    technique.prune()
    gc.collect()
    assert not any(reference() for reference in old)
    assert sum(reference() is not None for reference in adapters) < len(adapters) / 4
    after = sum(p.numel() for units in technique.units for layer in units.layers.values() for p in layer.parameters())
    assert after < 0.7 * before
    assert not list(tmp_path.iterdir())  # files have no name, and end with the process


@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_removing_brings_the_base_back_bit_for_bit(name: str, offloads: bool, tmp_path: Path):
    base, wanted = build(name), build(name)
    model = attach(base, lora(name), offload_folder=str(tmp_path) if offloads else None)
    run_steps(model, name, 3)
    assert technique_of(model).is_pruned
    assert Recipe.remove(model) is base
    for (key, ours), (_, theirs) in zip(base.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), key
    assert torch.equal(logits(base, name), logits(wanted, name))
    assert not any(MASK in key for key, _ in base.named_parameters())


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_the_original_base_and_the_files_give_the_same_outputs(name: str, steps: int, tmp_path: Path):
    model = attach(build(name), lora(name))
    run_steps(model, name, steps)
    attached_to(model).save(tmp_path)
    again = load(build(name), tmp_path)
    assert technique_of(again).is_pruned == (steps == 3)
    assert torch.equal(logits(again, name), logits(model, name))
    Recipe.remove(again)


@pytest.mark.parametrize("adapter", [lora("bert"), BottleneckConfig(form="parallel", r=6, init_weights=False)])
def test_an_earlier_state_can_be_restored_into_a_pruned_model(adapter: Any, tmp_path: Path):
    model = attach(build("bert"), adapter)
    run_steps(model, "bert", 1)
    wanted = logits(model, "bert")
    attached_to(model).save(tmp_path / "early")
    run_steps(model, "bert", 2, first=1)
    attached_to(model).save(tmp_path / "late")
    late = logits(model, "bert")
    with pytest.warns(UserWarning, match=r"has pruned the model since.*train\.load_best_model_at_end: false"):
        attached_to(model).restore(tmp_path / "early")
    assert torch.equal(logits(model, "bert"), wanted)
    attached_to(model).restore(tmp_path / "late")
    assert torch.equal(logits(model, "bert"), late)
    run_steps(model, "bert", 1, first=3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "opt", "bert"])
def test_a_smaller_model_is_written_and_runs_by_itself(name: str, tmp_path: Path):
    model = attach(build(name), lora(name))
    run_steps(model, name, 3)
    before = logits(model, name)
    save_pruned(model, tmp_path)
    assert torch.equal(logits(model, name), before)  # it stays as it is
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    smaller: Any = load_pruned(auto, tmp_path)
    assert (logits(smaller, name) - before).abs().max() < 1e-5
    whole = sum(p.numel() for p in build(name).parameters())
    assert sum(p.numel() for p in smaller.parameters()) < whole
    sizes = json.loads((tmp_path / "pruned.json").read_text())
    for layer, (rows, columns) in sizes["layers"].items():
        assert sorted(smaller.get_submodule(layer).weight.shape) == sorted((rows, columns))
    if name != "bert":
        prompt = {"input_ids": batch_of(name)["input_ids"][:1, :5], "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(smaller.generate(**prompt), model.eval().generate(**prompt))  # type: ignore[operator]
        cached = smaller.generate(**prompt, use_cache=False)
        assert torch.equal(cached, smaller.generate(**prompt))


def test_only_what_can_be_part_of_the_weights_is_written(tmp_path: Path):
    model = attach(build("bert"), lora("bert"))
    with pytest.raises(SettingError, match="this one is whole"):
        save_pruned(model, tmp_path)
    model = attach(build("bert"), BottleneckConfig(form="parallel", r=6))
    run_steps(model, "bert", 2)
    with pytest.raises(SettingError, match="cannot be part of a pruned model's weights"):
        save_pruned(model, tmp_path)
    with pytest.raises(SettingError, match=r"holds no pruned\.json"):
        load_pruned(AutoModelForCausalLM, tmp_path)


def test_it_goes_with_recompute_and_bfloat16():
    for dtype in (torch.float32, torch.bfloat16):
        with seeded(1):
            model = Recipe(DECODER.lora(), LightPEFT(**SETTINGS), Recompute()).apply(DECODER.make().to(dtype))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        attached = attached_to(model)
        for index in range(3):
            attached.event("on_step_begin", Moment(model, optimizer, index))
            assert step(model, DECODER.batch(index)).loss.isfinite()
            attached.event("on_gradients", Moment(model, optimizer, index))
            optimizer.step()
            attached.event("on_step_end", Moment(model, optimizer, index + 1))
        assert technique_of(model).is_pruned


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"removed_heads_fraction": 1.0}, "would prune everything of a layer"),
        ({"removed_channels_fraction": -0.1}, "at least 0 and below 1, got -0.1"),
        ({"removed_modules_fraction": 1.5}, "removed_modules_fraction"),
        ({"removed_ranks_fraction": 1.0}, "removed_ranks_fraction"),
        ({"estimation_steps": 1}, "estimation_steps of light_peft must be at least 2, got 1"),
        ({"channel_multiple": 0}, "channel_multiple of light_peft must be at least 1"),
        ({"channels_scope": "block"}, "must be 'model' or 'layer', got 'block'"),
        ({"ranks_scope": "block"}, "ranks_scope"),
        ({"sparsity_weight": -1.0}, "must be a number of at least 0"),
        ({"sparsity_weight": float("nan")}, "must be a number of at least 0"),
        ({"mask_lr_factor": 0.0}, "must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(SettingError, match=message):
        LightPEFT(**settings)


def test_a_recipe_without_adapters_is_refused():
    with pytest.raises(SettingError, match="light_peft needs a technique of the phase adapter"):
        Recipe(LightPEFT())


def _tied() -> nn.Module:
    model: Any = build("bert")
    first, second = model.bert.encoder.layer
    second.output.dense.weight = first.output.dense.weight
    return model


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=24, d_kv=6, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def _phi3() -> nn.Module:
    return Phi3ForCausalLM(Phi3Config(**TEXT, **SIZES, num_key_value_heads=2))


def _int8() -> nn.Module:
    model: Any = build("bert")
    layer = model.bert.encoder.layer[1].intermediate.dense
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("base", "adapter", "settings", "message"),
    [
        (_int8, LoraConfig(target_modules=["query"]), {}, r"layer\.1\.intermediate\.dense is quantised .* be pruned"),
        (_tied, lora("bert"), {}, "cannot be pruned: .* hold the same weight"),
        (_t5, LoraConfig(target_modules=["q"]), {}, "bias by position each; set removed_heads_fraction to 0"),
        (_phi3, LoraConfig(target_modules=["o_proj"]), {}, "takes the number of heads from the model's config"),
        (lambda: build("bert"), HUTConfig(target_modules=["query"]), {}, "cannot slice the hut adapter on .*query"),
        (
            lambda: build("bert"),
            IA3Config(target_modules=["query"], feedforward_modules=[]),
            {},
            "cannot slice the ia3 adapter",
        ),
        (lambda: build("bert"), lora("bert", use_dora=True), {}, "its variant Dora depends on whole weights"),
        (lambda: build("bert"), lora("bert", bias="all"), {}, "cuts frozen layers, but .* trains"),
        (
            lambda: build("bert"),
            BottleneckConfig(form="houlsby", target_modules=["query"]),
            {},
            "reads all outputs of its layer",
        ),
        (lambda: build("bert"), lora("bert"), {"channel_multiple": 64}, "reads only 40 channels"),
        (lambda: build("bert"), lora("bert"), {"offload_folder": "/no/such/folder"}, "must be a folder"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(
    base: Callable[[], nn.Module], adapter: Any, settings: dict[str, Any], message: str
):
    with pytest.raises(SettingError, match=message):
        attach(base(), adapter, **settings)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (SketchTune(groups=2, calibrate=False), "replaces it or chooses numbers of it by their place"),
        (Speft(count=50, score="magnitude", target_modules=["up_proj"]), "chooses numbers of it by their place"),
        (LoraFA(), "lora_fa and light_peft cannot be combined"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_techniques_that_count_on_the_sizes_are_refused(other: Any, message: str):
    with pytest.raises(SettingError, match=message):
        Recipe(lora("llama"), LightPEFT(**SETTINGS), other).apply(build("llama"))


def test_unknown_architectures_are_refused():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(SettingError, match="architecture that is not supported"):
        attach(Plain(), LoraConfig(target_modules=["0"]))


def test_importance_in_a_decoder_beside_an_encoder_is_that_of_real_tokens():
    """Padding of the labels, of another length than the input, changes nothing."""
    adapter = LoraConfig(target_modules=["q", "k", "wi", "wo"], init_lora_weights=False)
    ids, labels = torch.arange(3, 12).view(1, 9), torch.arange(20, 25).view(1, 5)
    plain = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    padded = {
        "input_ids": nn.functional.pad(ids, (0, 2)),
        "attention_mask": nn.functional.pad(plain["attention_mask"], (0, 2)),
        "labels": nn.functional.pad(labels, (0, 3), value=-100),
    }
    found = []
    for batch in (plain, padded):
        with seeded(0):
            base = _t5().eval()
        model = attach(base, adapter, removed_heads_fraction=0).eval()
        attached_to(model).event("on_step_begin", Moment(model, None, 1))
        model(**batch).loss.backward()
        attached_to(model).event("on_gradients", Moment(model, None, 1))
        found.append(technique_of(model)._sums["ratios"])
    assert any("EncDecAttention.k" in key for key in found[0])
    for key, ratio in found[0].items():
        torch.testing.assert_close(found[1][key], ratio, msg=lambda text, key=key: f"{key}: {text}")


def test_importance_is_of_tokens_that_learn():
    tokens, rows = TokensSeen(), torch.tensor([[True, True, False], [True, True, True]])
    tokens.recording = True
    tokens.look(build("bert"), (), {"attention_mask": torch.ones(2, 5)})
    with only_learning(rows):  # as token_tune runs a selection that is filled up with others
        assert torch.equal(tokens.counted("layer", torch.zeros(2, 3)), rows.float())
    with aside():  # as it looks for tokens
        assert not tokens.are_counted
    assert tokens.are_counted


def test_t5_loses_channels_alone():
    model = attach(_t5(), LoraConfig(target_modules=["q", "wi", "wo"]), removed_heads_fraction=0)
    assert len(technique_of(model).units) == 4
    with pytest.raises(RunFailed, match="no gradient reached them"):
        technique_of(model).prune()
    scatter_masks(model)
    technique_of(model).prune()
    ids = torch.arange(3, 12)[None]
    assert model(input_ids=ids, labels=ids).loss.isfinite()


def test_other_bases_and_damaged_files_are_refused(tmp_path: Path):
    model = attach(build("bert"), lora("bert"))
    run_steps(model, "bert", 3)
    attached_to(model).save(tmp_path)
    other = build("bert")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    with pytest.raises(SettingError, match="belongs to another base model"):
        load(other, tmp_path)
    fewer: Any = MODELS["bert"][0](num_labels=2)
    fewer.bert.encoder.layer = fewer.bert.encoder.layer[:1]
    with pytest.raises(SettingError, match="only one of the two has the layer"):
        load(fewer, tmp_path)
    (file,) = tmp_path.rglob(FILE)
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("/kept"))
    save_file({**tensors, name: tensors[name][:0]}, file, metadata={"stage": "pruned"})
    with pytest.raises(SettingError, match="everything of a layer cannot be pruned"):
        load(build("bert"), tmp_path)
    save_file({**tensors, name: tensors[name] + 100}, file, metadata={"stage": "pruned"})
    with pytest.raises(SettingError, match="made for another model"):
        load(build("bert"), tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(SettingError, match="cannot be read"):
        load(build("bert"), tmp_path)
    file.unlink()
    with pytest.raises(SettingError, match="holds no light_peft"):
        load(build("bert"), tmp_path)


def test_a_run_that_is_too_short_warns():
    model = attach(build("bert"), lora("bert"), estimation_steps=50)
    with pytest.warns(UserWarning, match="prunes nothing in this run"):
        attached_to(model).event("on_step_begin", Moment(model, None, 0, 0.0, 50))
