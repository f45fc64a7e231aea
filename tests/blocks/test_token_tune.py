"""token_tune against its plain reference, and its promises: memory, dropout, several forwards, undoing, refusals."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from stock_models import (
    BATCH,
    DECODERS,
    ENCODER_DECODERS,
    ENCODERS,
    GROUPED,
    LENGTH,
    MODELS,
    SIZES,
    SLIDING,
    TEXT,
    WORDS,
    apart,
    attention_is,
    batch_for,
    gradients,
    labels_of_selected,
    made,
    run_reference,
    stop_outside,
    watched_inputs,
    whole_mask,
    without_dropout,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoestring import Ledger, Recipe
from shoestring.activations import LowBitActivations
from shoestring.adapters import BottleneckConfig, HUTConfig, MoLAConfig
from shoestring.blocks import Recompute, TokenTune, find_stacks, token_tune
from shoestring.blocks.token_selection import Selection
from shoestring.errors import RunFailed, SettingError
from shoestring.recipe import attached_to
from shoestring.technique import Technique

GPT = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 4}
TOKEN_LABELS = {*DECODERS, *ENCODER_DECODERS, "bert tokens"}


@contextmanager
def tuned(model: nn.Module, *others: Any, **settings: Any) -> Iterator[tuple[nn.Module, list[Any]]]:
    """The model with token_tune, and the states of its passes as they end."""
    with Recipe(TokenTune(**settings), *others)(model) as attached:
        technique = next(x for x in attached_to(attached).techniques if isinstance(x, TokenTune))
        states: list[Any] = []

        def end(current: Any, outputs: Any) -> Any:
            states.append(current.state)
            return outputs

        technique.end = end
        yield attached, states


def assert_equals_reference(
    name: str, model: nn.Module, batch: dict[str, Tensor], tolerance: float = 2e-6, **settings: Any
) -> dict[str, Selection]:
    """Outputs at selected tokens, and all gradients; those that enter the blocks outside the selection are zero."""
    stacks = find_stacks(model)
    with tuned(model, **settings) as (attached, states), watched_inputs(stacks) as entered:
        outputs = attached(**batch)
        outputs.loss.backward()
        found = gradients(attached)
    selections = states[-1].selections
    for stack in stacks:
        gradient = entered[stack.name].grad
        if gradient is not None:
            assert not gradient[~selections[stack.name].mask].any()
    expected, reference = run_reference(model, batch, selections, name in TOKEN_LABELS)
    torch.testing.assert_close(outputs.loss, expected.loss, rtol=tolerance, atol=tolerance)
    logits = expected.logits
    if name in TOKEN_LABELS:
        kept = selections[stacks[-1].name].kept
        logits = logits.gather(1, kept[:, :, None].expand(-1, -1, logits.shape[2]))
    torch.testing.assert_close(outputs.logits, logits, rtol=tolerance, atol=tolerance * float(logits.abs().max()))
    assert apart(found, reference) < tolerance
    return selections


def one_token(name: str) -> dict[str, Any]:
    return {"keep_fraction": 0.01, "keep_ends": name not in TOKEN_LABELS}


@pytest.mark.parametrize("name", MODELS)
def test_streams_equal_the_reference(name):
    model = made(name, dtype=torch.float64)
    for seed, settings in enumerate(({"keep_fraction": 0.4}, {"keep_fraction": 1.0}, one_token(name))):
        batch = batch_for(name, model, seed)
        selections = assert_equals_reference(name, model, batch, seed=seed, **settings)
        own = selections[find_stacks(model)[-1].name]
        if "keep_ends" in settings:
            assert own.kept.shape == (BATCH, 1)
        if settings["keep_fraction"] == 1 and "attention_mask" in batch and name not in ENCODER_DECODERS:
            assert torch.equal(own.mask, batch["attention_mask"].bool())


@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_the_reference(name):
    model = made(name, dtype=torch.float64)
    assert_equals_reference(name, model, batch_for(name, model, 1), keep_fraction=0.4, form="rows", seed=1)


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("name", ["llama grouped", "mistral", "gemma3", "opt", "bert tokens"])
def test_left_padding_equals_the_reference(name, form):
    model = made(name, dtype=torch.float64)
    for seed in (1, 2):
        batch = batch_for(name, model, seed, left=True)
        assert_equals_reference(name, model, batch, keep_fraction=0.5, form=form, seed=seed)


@pytest.mark.parametrize("name", ["llama", "llama grouped", "opt", "bert", "roberta", "vit", "bart", "t5"])
def test_float32_equals_the_reference_to_2e_6(name):
    model = made(name)
    for seed in (0, 1):
        assert_equals_reference(name, model, batch_for(name, model, seed), keep_fraction=0.3, seed=seed)


@pytest.mark.parametrize("select", ["supervised", "seek"])
@pytest.mark.parametrize("name", ["llama grouped", "gemma3", "bert tokens", "t5", "whisper"])
def test_other_selections_equal_the_reference(name, select):
    model = made(name, dtype=torch.float64)
    batch = batch_for(name, model, 3)
    assert_equals_reference(name, model, batch, keep_fraction=0.4, select=select)


LORA = {"r": 3, "lora_dropout": 0.0, "init_lora_weights": False}


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("llama grouped", ["q_proj", "k_proj", "v_proj", "down_proj"]),
        ("opt", ["q_proj", "v_proj", "fc1"]),
        ("bert", ["query", "value", "dense"]),
        ("vit", "all-linear"),
        ("t5", ["q", "k", "v", "wi"]),
        ("bart", ["q_proj", "v_proj", "fc2"]),
    ],
)
def test_lora_equals_the_reference(name, layers, form):
    model = get_peft_model(made(name, dtype=torch.float64), LoraConfig(target_modules=layers, **LORA)).double().train()
    for fraction in (0.4, 1.0):
        batch = batch_for(name, model, 1)
        assert_equals_reference(name, model, batch, keep_fraction=fraction, form=form, seed=1)


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("name", MODELS)
def test_all_tokens_are_full_training(name, form):
    model = made(name)
    batch = batch_for(name, model)
    model(**batch).loss.backward()
    full = gradients(model)
    with tuned(model, keep_fraction=1.0, form=form) as (attached, _):
        attached(**batch).loss.backward()
        assert apart(gradients(attached), full) < 2e-6


def test_capped_scores_of_eager_attention_equal_the_reference():
    torch.manual_seed(0)
    config = t.Gemma2Config(**GROUPED, sliding_window=5, attn_implementation="eager", attn_logit_softcapping=2.0)
    model = t.Gemma2ForCausalLM(config).double().train()
    assert_equals_reference("gemma2", model, batch_for("gemma2", model), keep_fraction=0.4)
    with attention_is(model, "sdpa"), tuned(model) as (attached, _), pytest.raises(SettingError, match="'eager'"):
        attached(**batch_for("gemma2", model))


@pytest.mark.parametrize("form", ["streams", "rows"])
def test_masks_that_are_given_whole_and_packed_samples(form):
    model = made("llama grouped", dtype=torch.float64)
    ids = torch.randint(3, WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    whole = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    whole[..., 6:, :6] = False
    found = []
    for mask in ({}, {"attention_mask": whole}, {"attention_mask": torch.where(whole, 0.0, -torch.inf).double()}):
        batch = {"input_ids": ids, "labels": ids, "position_ids": positions, **mask}
        with tuned(model, keep_fraction=0.4, form=form) as (attached, states):
            attached(**batch).loss.backward()
            found.append(gradients(attached))
    _, reference = run_reference(model, {**batch, "attention_mask": whole}, states[0].selections, True)
    assert all(apart(one, reference) < 1e-9 for one in found)


def on_text_alone() -> tuple[nn.Module, nn.Module]:
    """A model of images and text, and its part for text with the same weights."""
    torch.manual_seed(0)
    config = t.Gemma3Config(
        text_config={**GROUPED, "sliding_window": 5, "layer_types": SLIDING},
        vision_config={**SIZES, "image_size": 12, "patch_size": 4},
    )
    both = t.Gemma3ForConditionalGeneration(config).double().train()
    text = t.Gemma3ForCausalLM(config.text_config).double().train()
    text.model.load_state_dict(both.model.language_model.state_dict())
    text.lm_head.load_state_dict(both.lm_head.state_dict())
    return both, text


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("select", ["random", "supervised"])
def test_a_stack_for_images_beside_the_one_for_text_is_no_encoder(form, select):
    both, text = on_text_alone()
    batch = batch_for("gemma3", text)
    found = []
    for model in (both, text):
        with tuned(model, keep_fraction=0.4, form=form, select=select) as (attached, _):
            loss = attached(**batch).loss
            loss.backward()
            found.append((loss, gradients(model.model.language_model if model is both else model.model)))
    assert any(g.any() for g in found[0][1].values())
    assert torch.equal(found[0][0], found[1][0])
    assert apart(found[0][1], found[1][1]) < 1e-9


def test_rows_of_a_model_with_attention_of_its_own():
    model = made("bloom", dtype=torch.float64)
    batch = batch_for("bloom", model)
    with tuned(model, keep_fraction=0.4, form="rows") as (attached, states):
        loss = attached(**batch).loss
        loss.backward()
    (selection,) = states[0].selections.values()
    expected = model(**{**batch, "labels": labels_of_selected(batch["labels"], selection.mask, shifted=True)}).loss
    torch.testing.assert_close(loss, expected)
    with pytest.raises(SettingError, match=r"BloomBlock of transformer\.h does not call it .*; set form='rows'"):
        Recipe(TokenTune()).apply(model)


# What rows are told by: sizes that are equal by chance, attention that saves tokens first, numbers that are divided by

PER_TOKEN = {"hidden_size": 52, "num_attention_heads": LENGTH}
WITH_A_HEAD_PER_TOKEN: dict[str, Any] = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**{**TEXT, **PER_TOKEN})),
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, **PER_TOKEN})),
    "llama grouped": lambda: t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, **PER_TOKEN, "num_key_value_heads": 1})),
    "llama, groups": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**{**GROUPED, "hidden_size": 52, "num_attention_heads": 26, "num_key_value_heads": LENGTH})
    ),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**{**GROUPED, **PER_TOKEN, "num_key_value_heads": LENGTH})),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**{**TEXT, **PER_TOKEN}, qk_layernorm=True)),
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(
            vocab_size=WORDS, d_model=52, d_kv=4, d_ff=24, num_layers=3, num_heads=LENGTH, decoder_start_token_id=0
        )
    ),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", WITH_A_HEAD_PER_TOKEN)
def test_as_many_heads_as_tokens_equal_the_reference(name, implementation):
    torch.manual_seed(0)
    model = WITH_A_HEAD_PER_TOKEN[name]().double().train()
    without_dropout(model)
    with attention_is(model, implementation):
        known = "t5" if name == "t5" else "bert" if name == "bert" else "llama"
        assert_equals_reference(known, model, batch_for(known, model, 1), keep_fraction=0.4, form="rows", seed=1)


def assert_equals_stopped_projections(
    model: nn.Module, batch: dict[str, Tensor], projections: str, token_labels: bool
) -> None:
    """Gradients of rows are those of the stock model with gradients stopped at what first calls of layers return."""
    with tuned(model, keep_fraction=0.4, form="rows") as (attached, states):
        attached(**batch).loss.backward()
        found = gradients(attached)
    (stack,) = find_stacks(model)
    mask = states[0].selections[stack.name].mask
    seen: set[nn.Module] = set()

    def stop_first(module: nn.Module, args: Any, output: Tensor) -> Any:
        first = module not in seen
        seen.add(module)
        return stop_outside(mask)(module, args, output) if first else None

    layers = [m for n, m in model.named_modules() if n.split(".")[-1] in projections.split()]
    hooks = [module.register_forward_hook(stop_first) for module in layers]
    if token_labels:
        batch = {**batch, "labels": labels_of_selected(batch["labels"], mask, shifted=True)}
    else:
        hooks.append(stack.blocks[-1].register_forward_hook(stop_outside(mask)))
    model(**batch).loss.backward()
    for hook in hooks:
        hook.remove()
    assert apart(found, gradients(model)) < 1e-9


@pytest.mark.parametrize("heads", [4, LENGTH])
def test_rows_of_attention_that_puts_heads_and_samples_together(heads):
    torch.manual_seed(0)
    config = t.BloomConfig(vocab_size=WORDS, hidden_size=4 * heads, n_layer=3, n_head=heads)
    model = t.BloomForCausalLM(config).double().train()
    assert_equals_stopped_projections(model, batch_for("bloom", model), "query_key_value", token_labels=True)


@pytest.mark.parametrize("name", ["deberta", "deberta v1"])
@pytest.mark.parametrize("rows", [1, BATCH])
def test_a_table_with_as_many_rows_as_tokens_is_not_taken_for_them(name, rows):
    model: nn.Module
    sizes = {**TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    torch.manual_seed(0)
    if name == "deberta":
        model = t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**sizes, share_att_key=True))
    else:
        model = t.DebertaForSequenceClassification(t.DebertaConfig(**sizes))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(not parameter_name.endswith("v_bias"))  # has the gradient of all tokens
    without_dropout(model := model.double().train())
    ids = torch.randint(3, WORDS, (rows, 16), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}
    keys_and_values = "in_proj" if name == "deberta v1" else "key_proj value_proj"
    assert_equals_stopped_projections(model, batch, keys_and_values, token_labels=False)


class _SavesTokensFirst(torch.autograd.Function):
    """Attention that keeps its arguments as [batch, tokens, heads, width], as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        return nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        *saved, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in saved]
            heads_first = (x.transpose(1, 2) for x in inputs)
            output = nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=mask).transpose(1, 2)
        return *torch.autograd.grad(output, inputs, upstream), None


def _attention_saving_tokens_first(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
) -> tuple[Tensor, None]:
    return _SavesTokensFirst.apply(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask), None


ALL_ATTENTION_FUNCTIONS.register("saves_tokens_first", _attention_saving_tokens_first)
ALL_MASK_ATTENTION_FUNCTIONS.register("saves_tokens_first", whole_mask)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_what_attention_saves_is_kept_whole(name):
    model = made(name, dtype=torch.float64)
    with attention_is(model, "saves_tokens_first"):
        assert_equals_reference(name, model, batch_for(name, model, 1), keep_fraction=0.4, form="rows", seed=1)


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("name", ["bert", "opt", "gpt2"])
def test_biases_of_layers_read_by_their_weight_equal_the_reference(name, form):
    layers = {"bert": ["query", "key", "value"], "opt": ["k_proj", "v_proj"], "gpt2": ["c_attn"]}[name]
    config = HUTConfig(r=3, target_modules=layers, bias="all", init_weights=False)
    model = get_peft_model(made(name, dtype=torch.float64), config).double().train()
    assert_equals_reference(name, model, batch_for(name, model, 1), keep_fraction=0.4, form=form, seed=1)


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_adapters_that_divide_by_what_they_saved_equal_the_reference(name, form):
    layers = {"llama": ["q_proj", "k_proj", "down_proj"], "bert": ["query", "value", "dense"]}[name]
    config = MoLAConfig(r=2, experts=3, balance=0.0, target_modules=layers, init_weights=False)
    model = get_peft_model(made(name, dtype=torch.float64), config).double().train()
    assert_equals_reference(name, model, batch_for(name, model, 1), keep_fraction=0.4, form=form, seed=1)


@pytest.mark.parametrize("name", ["mistral", "gemma3", "modernbert", "bert", "t5"])
def test_batches_without_padding_equal_the_reference(name):
    model = made(name, dtype=torch.float64)
    batch = batch_for(name, model, 1)
    batch["input_ids"] = batch["input_ids"].clamp(min=3)
    del batch["attention_mask"]
    assert_equals_reference(name, model, batch, keep_fraction=0.4)


def test_samples_with_few_tokens_or_labels_are_filled_up_without_gradient():
    model = made("llama", dtype=torch.float64)
    batch = batch_for("llama", model)
    batch["attention_mask"][0, 2:] = 0
    batch["input_ids"][0, 2:] = 0
    batch["labels"][0, 2:] = -100
    batch["labels"][1] = -100  # without a label of its own
    for form in ("streams", "rows"):
        selections = assert_equals_reference(
            "llama", model, batch, keep_fraction=0.5, keep_ends=False, select="supervised", form=form
        )
        (selection,) = selections.values()
        assert selection.valid.sum(1).tolist() == [1, 0, 4]
        assert not (selection.mask & (batch["attention_mask"] == 0)).any()


def test_padding_is_never_selected():
    for name in ("llama", "bert", "t5"):
        model = made(name)
        for seed in range(5):
            batch = batch_for(name, model, seed, left=name == "llama" and seed % 2 == 0)
            with tuned(model, keep_fraction=0.9, seed=seed) as (attached, states):
                attached(**batch)
            for stack in find_stacks(model):
                decodes = name == "t5" and stack.causal
                allowed = batch["labels"] != -100 if decodes else batch["attention_mask"].bool()
                selected = states[0].selections[stack.name].mask
                if decodes:  # labels end with the sample; those before are none of its padding
                    allowed = allowed.flip(1).cumsum(1).flip(1) > 0
                assert not (selected & ~allowed).any()


# One draw of dropout, several forwards, recomputation, narrow numbers


@pytest.mark.parametrize("form", ["streams", "rows"])
def test_tokens_are_seen_as_they_were_computed_under_dropout(form):
    """What tokens attend to is what the selected ones are themselves: their rows and gradients are of one draw."""
    torch.manual_seed(0)
    config = t.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=WORDS, resid_pdrop=0.5, attn_pdrop=0.0)
    model = t.GPT2LMHeadModel(config).double().train()
    batch = batch_for("gpt2", model)
    seen: list[dict[str, Tensor]] = []
    made_by_projection: list[Tensor] = []
    hook = model.transformer.h[1].attn.c_attn.register_forward_hook(
        lambda module, args, output: made_by_projection.append(output.detach())
    )
    own = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append({"key": key.detach(), "value": value.detach()})
        return own(query, key, value, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, tuned(model, keep_fraction=0.4, form=form) as (attached, _):
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        attached(**batch)
    hook.remove()
    if form == "rows":
        (whole,) = made_by_projection
        assert len(seen) == 3
        assert torch.equal(seen[1]["key"], keys_in(whole))
        return
    # of each block the selected tokens attend first, then the others; of the last block only the selected ones
    assert len(seen) == 5
    for selected, others in ((0, 1), (2, 3)):
        assert all(torch.equal(seen[selected][kind], seen[others][kind]) for kind in ("key", "value"))
    others, selected = made_by_projection
    assert torch.equal(seen[2]["key"], keys_in(torch.cat([selected, others], 1)))


def keys_in(projected: Tensor) -> Tensor:
    """The keys of four heads in what GPT-2 projects to queries, keys and values."""
    return projected.split(16, 2)[1].view(BATCH, LENGTH, 4, 4).transpose(1, 2)


@pytest.mark.parametrize("name", ["llama grouped", "gpt2", "bert", "t5", "bart", "whisper"])
@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize("settings", [{}, {"keep": "attention"}, {"every": 2}], ids=["all", "attention", "every 2"])
def test_recomputation_changes_nothing(name, form, settings):
    model = made(name, dropout=True)
    batch = batch_for(name, model)
    found = []
    for others in ((), (Recompute(**settings),)):
        with tuned(model, *others, keep_fraction=0.4, form=form) as (attached, _):
            torch.manual_seed(5)
            loss = attached(**batch).loss
            loss.backward()
            found.append((loss, gradients(attached)))
    assert torch.equal(found[0][0], found[1][0])
    for name_of_weight, gradient in found[0][1].items():
        assert torch.equal(gradient, found[1][1][name_of_weight]), name_of_weight


@pytest.mark.parametrize("others", [(), (Recompute(),)], ids=["alone", "recompute"])
def test_several_forwards_may_come_before_one_backward(others):
    model = made("llama grouped")
    batches = [batch_for("llama grouped", model, seed) for seed in (0, 1)]
    with tuned(model, *others, keep_fraction=0.4) as (attached, _):
        (attached(**batches[0]).loss + attached(**batches[1]).loss).backward()
        together = gradients(attached)
    with tuned(model, *others, keep_fraction=0.4) as (attached, _):
        for batch in batches:
            attached(**batch).loss.backward()
        assert apart(together, gradients(attached)) < 1e-6


@pytest.mark.parametrize("select", ["random", "seek"])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
@pytest.mark.parametrize("name", ["llama grouped", "bert", "t5"])
def test_autocast_loses_no_gradient(name, fraction, select):
    model = made(name)
    batch = batch_for(name, model)

    def found() -> dict[str, Tensor]:
        with tuned(model, keep_fraction=fraction, select=select) as (attached, _):
            attached(**batch).loss.backward()
            return gradients(attached)

    with torch.autocast("cpu", torch.bfloat16):
        narrow = found()
    # seek may rank tokens otherwise in bfloat16: there it is only held to leave out no weight
    wide = narrow if select == "seek" and fraction < 1 else found()
    for weight, gradient in wide.items():
        if gradient.norm() > 1e-4 * max(g.norm() for g in wide.values()):
            assert (narrow[weight] - gradient).norm() < 0.3 * gradient.norm(), weight
    assert all(gradient.any() for gradient in narrow.values())


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_rows_tell_weights_from_tokens_under_autocast(trained):
    """Weights in bfloat16 are copies, and here have as many rows as the batch has tokens."""
    torch.manual_seed(0)
    sizes = {**TEXT, "intermediate_size": BATCH * LENGTH, "num_key_value_heads": 2, "hidden_size": 24}
    model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, use_cache=False)).train()
    for block in model.model.layers:
        block.mlp.requires_grad_(trained)
    batch = batch_for("llama", model)

    def found() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16), tuned(model, keep_fraction=0.4, form="rows") as (attached, _):
            attached(**batch).loss.backward()
            return gradients(attached)

    cut = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_tune, "kept_by_rows", lambda *_: nullcontext())
        whole = found()
    assert apart(cut, whole) < 1e-6


def test_rows_of_tokens_are_told_where_weights_have_as_many():
    ids = torch.randint(3, WORDS, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    shares = []
    for width in (BATCH * LENGTH, BATCH * LENGTH + 1):
        torch.manual_seed(0)
        model = t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "intermediate_size": width})).train()
        whole = saved_bytes(model, {"input_ids": ids, "labels": ids})
        with Recipe(TokenTune(keep_fraction=0.3, form="rows"))(model) as attached:
            shares.append(saved_bytes(attached, {"input_ids": ids, "labels": ids}) / whole)
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def test_the_same_seed_draws_the_same_and_each_step_anew():
    model = made("llama")
    batch = batch_for("llama", model)

    def draws(seed: int) -> list[Tensor]:
        with tuned(model, keep_fraction=0.4, seed=seed) as (attached, states):
            for global_seed in (1, 2):
                torch.manual_seed(global_seed)
                attached(**batch)
        return [state.selections["model.layers"].mask for state in states]

    first, second, other = draws(3), draws(3), draws(4)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


def test_selection_leaves_torchs_random_numbers_alone():
    model = made("llama")
    for select in ("random", "seek"):
        with tuned(model, select=select) as (attached, _):
            before = torch.get_rng_state()
            attached(**batch_for("llama", model))
            assert torch.equal(torch.get_rng_state(), before)


# Memory


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    with Ledger(model) as ledger:
        model(**batch, use_cache=False).loss.backward()
    model.zero_grad()
    return ledger.report().saved_bytes


@pytest.mark.parametrize(("kv_heads", "excess", "at_three_tenths"), [(8, 1.05, 0.42), (2, 1.13, 0.38)])
def test_what_is_kept_falls_with_the_tokens(kv_heads, excess, at_three_tenths):
    """To the share of the tokens, and keys and values of the others; under grouped heads the mask is kept per group."""
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=500, num_key_value_heads=kv_heads, **sizes)).train()
    ids = torch.randint(0, 500, (1, 512))
    batch = {"input_ids": ids, "labels": ids}
    whole = saved_bytes(model, batch)
    keys_and_values = 8 * 2 * 512 * kv_heads * 32 * 4 / whole
    for fraction in (0.1, 0.3, 0.5):
        with Recipe(TokenTune(keep_fraction=fraction))(model) as attached:
            share = saved_bytes(attached, batch) / whole
        assert share <= excess * (fraction + keys_and_values * (1 - fraction)), (fraction, share)
        if fraction == 0.3:
            assert share <= at_three_tenths


@pytest.mark.parametrize("select", ["random", "seek"])
def test_bytes_without_data_are_those_with_data(select):
    ids = torch.randint(3, WORDS, (2, 40), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def count(batch: dict[str, Tensor]) -> int:
        with Recipe(TokenTune(keep_fraction=0.25, select=select))(made("llama grouped")) as attached:
            return saved_bytes(attached, batch)

    with FakeTensorMode():
        fake = count({name: torch.empty(x.shape, dtype=x.dtype) for name, x in batch.items()})
    assert fake == count(batch)


@pytest.mark.parametrize("form", ["streams", "rows"])
def test_memory_falls_further_with_other_techniques(form):
    """Each alone keeps more than both: nothing is kept past the other, and nothing stays alive after the backward."""
    model = made("llama")
    ids = torch.randint(3, WORDS, (2, 33), generator=torch.Generator().manual_seed(0))

    def saved(*techniques: Technique) -> int:
        with Recipe(*techniques)(model) as attached:
            return saved_bytes(attached, {"input_ids": ids, "labels": ids})

    tune = TokenTune(keep_fraction=0.3, form=form)
    for other in (Recompute(), LowBitActivations()):
        assert saved(tune, other) < min(saved(tune), saved(other))


@pytest.mark.parametrize("name", MODELS)
def test_every_family_runs_without_data(name):
    example = batch_for(name, made(name))
    with FakeTensorMode(), no_init_weights():
        model = made(name)
        batch = {n: torch.empty(x.shape, dtype=x.dtype) for n, x in example.items()}
        for form in ("streams",) if name in ENCODERS else ("streams", "rows"):
            with Recipe(TokenTune(form=form))(model) as attached:
                attached(**batch).loss.backward()


# Nothing is left behind


def test_evaluation_and_generation_run_the_stock_model():
    for name in ("llama grouped", "gemma3", "t5"):
        model = made(name)
        batch = batch_for(name, model)
        model.eval()
        prompt = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        steps = {"max_new_tokens": 5, "do_sample": False}
        outputs, text = model(**batch), model.generate(**prompt, **steps)
        with tuned(model) as (attached, states):
            attached.eval()
            assert torch.equal(attached(**batch).logits, outputs.logits)
            assert torch.equal(attached.generate(**prompt, **steps), text)
            attached.train()
            with torch.no_grad():
                assert attached(**batch).logits.shape == outputs.logits.shape
        assert states == []


def test_the_model_is_as_it_was_after():
    model = made("llama grouped")
    batch = batch_for("llama grouped", model)
    model.config.use_cache = True
    before = copy.deepcopy({n: dict(m.__dict__) for n, m in model.named_modules() if n.endswith("layers.1")})
    implementation = model.config._attn_implementation
    with tuned(model) as (attached, _):
        attached(**batch).loss.backward()
        assert model.config.use_cache
    gradients(model)
    assert model.config._attn_implementation == implementation
    assert model.config.use_cache
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert {n: sorted(m.__dict__) for n, m in model.named_modules() if n in before} == {
        n: sorted(d) for n, d in before.items()
    }
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_the_forward_leaves_nothing_behind():
    model = made("llama")
    batch = batch_for("llama", model)
    with tuned(model, keep_fraction=0.4) as (attached, states):
        technique = attached_to(attached).techniques[0]
        breaks = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attached(**batch)
        breaks.remove()
        assert technique.current is None
        assert model.config.use_cache
        attached(**batch).loss.backward()
        assert len(states) == 1
        assert any(g.any() for g in gradients(attached).values())
        attached.eval()
        logits = attached(**batch).logits
    assert torch.equal(model(**batch).logits, logits)


def test_saved_configs_do_not_name_our_attention(tmp_path):
    model = made("llama")
    with tuned(model) as (attached, _):
        attached.save_pretrained(tmp_path)
        copied = copy.deepcopy(model.config)
    for file in tmp_path.glob("*.json"):
        assert "shoestring" not in file.read_text()
    assert "shoestring" not in json.dumps(copied.to_dict(), default=str)
    again = t.LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"


def test_a_recipe_can_be_copied_saved_and_used_twice():
    recipe = copy.deepcopy(Recipe(TokenTune(keep_fraction=0.25, select="supervised"), Recompute()))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    one, other = made("llama"), made("gpt2")
    with recipe(one) as first, recipe(other) as second:
        first(**batch_for("llama", one)).loss.backward()
        second(**batch_for("gpt2", other)).loss.backward()
        assert any(g.any() for g in gradients(one).values())
        assert any(g.any() for g in gradients(other).values())


def test_several_choices_of_one_question_are_samples():
    torch.manual_seed(0)
    model = t.BertForMultipleChoice(t.BertConfig(**TEXT)).train()
    batch = {n: x[:, None].repeat(1, 2, 1) for n, x in batch_for("bert", model).items() if n != "labels"}
    with tuned(model, keep_fraction=0.9) as (attached, states):
        attached(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    mask = batch["attention_mask"].view(2 * BATCH, LENGTH).bool()
    assert not (states[0].selections["bert.encoder.layer"].mask & ~mask).any()


def test_position_zero_stays_selected_for_heads_that_read_it():
    for name in ("bert", "vit"):
        model = made(name)
        for seed in range(4):
            with tuned(model, keep_fraction=0.2, seed=seed) as (attached, states):
                attached(**batch_for(name, model))
            assert next(iter(states[0].selections.values())).mask[:, 0].all()


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_fraction": 0.0}, "keep_fraction of token_tune must be above 0 and at most 1, got 0.0"),
        ({"keep_fraction": 1.5}, "at most 1, got 1.5"),
        ({"keep_fraction": float("nan")}, "at most 1, got nan"),
        ({"select": "best"}, "must be random, supervised or seek, got 'best'"),
        ({"form": "columns"}, "must be streams or rows, got 'columns'"),
        ({"form": "rows", "select": "seek"}, "use streams"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        TokenTune(**settings)


@pytest.mark.parametrize("form", ["streams", "rows"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=2)),
            r"MixtralSparseMoeBlock\) routes tokens to experts",
        ),
        (lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)), "no list of"),
        (lambda: t.Wav2Vec2ConformerModel(t.Wav2Vec2ConformerConfig(**SIZES)), "neighbouring tokens"),
        (lambda: t.LevitForImageClassification(t.LevitConfig()), "couples tokens or samples|no list of"),
    ],
    ids=["experts", "mamba", "convolution", "batch norm"],
)
def test_models_that_mix_tokens_elsewhere_are_refused(make, message, form):
    with pytest.raises(SettingError, match=message), tuned(make(), form=form):
        pass


def test_experts_behind_dense_blocks_are_refused():
    sizes = {**TEXT, "moe_intermediate_size": 8, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
    sizes |= {"q_lora_rank": None, "kv_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    model = t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**sizes, topk_group=1, num_experts_per_tok=2, first_k_dense_replace=1)
    )
    with pytest.raises(SettingError, match="experts"), tuned(model):
        pass


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"use_cache": True}, "use_cache=False"),
        ({"past_key_values": t.DynamicCache()}, "no past_key_values"),
        ({"output_attentions": True}, "output_attentions is not there under token_tune"),
        ({"output_hidden_states": True}, "output_hidden_states is not there under token_tune"),
    ],
)
def test_calls_that_need_the_stock_blocks_are_refused(extra, message):
    model = made("llama")
    with tuned(model) as (attached, _), pytest.raises(SettingError, match=message):
        attached(**batch_for("llama", model), **extra)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix tuning"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "learned prompts in front of the tokens"),
    ],
)
def test_learned_prompts_are_refused(config, message):
    model = made("llama grouped")
    with tuned(model, config) as (attached, _), pytest.raises(SettingError, match=message):
        attached(**batch_for("llama grouped", model))


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
def test_attention_that_takes_no_masks_of_ours_is_refused(implementation):
    model = made("llama")
    with (
        attention_is(model, implementation),
        pytest.raises(SettingError, match="attn_implementation='sdpa' or 'eager'"),
        tuned(model),
    ):
        pass


def test_batches_without_a_label_to_learn_from_are_refused():
    model = made("llama")
    batch = batch_for("llama", model)
    with tuned(model) as (attached, _), pytest.raises(RunFailed, match="without a single labelled token"):
        attached(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    only_first = torch.full_like(batch["labels"], -100)
    only_first[:, 0] = 5  # nothing predicts the first token
    with tuned(model) as (attached, _), pytest.raises(RunFailed, match="without a single labelled token"):
        attached(**{**batch, "labels": only_first})


def test_what_needs_labels_of_tokens_says_so():
    for name in ("bert", "vit"):
        model = made(name)
        with tuned(model, select="supervised") as (attached, _), pytest.raises(SettingError, match="use random"):
            attached(**batch_for(name, model))
        with tuned(model, keep_ends=False) as (attached, _), pytest.raises(SettingError, match="no gradient"):
            attached(**batch_for(name, model))
    model = made("llama")
    batch = batch_for("llama", model)
    del batch["labels"]
    for select, message in (("supervised", "needs labels of tokens"), ("seek", "needs labels, from which")):
        with tuned(model, select=select) as (attached, _), pytest.raises(SettingError, match=message):
            attached(**batch)


def test_padded_input_without_a_mask_is_refused():
    for name in ("llama", "bert", "t5"):
        model = made(name)
        batch = batch_for(name, model)
        del batch["attention_mask"]
        with tuned(model) as (attached, _), pytest.raises(SettingError, match="without an attention_mask"):
            attached(**batch)
        batch["input_ids"] = batch["input_ids"].clamp(min=3)
        with tuned(model) as (attached, _):
            attached(**batch).loss.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda: t.GPT2DoubleHeadsModel(t.GPT2Config(**GPT)),
        lambda: t.ImageGPTForCausalImageModeling(t.ImageGPTConfig(**GPT)),
    ],
    ids=["gpt2", "imagegpt"],
)
def test_losses_that_shift_labels_by_themselves_are_refused(make):
    model = make().train()
    ids = torch.randint(3, WORDS, (2, LENGTH))
    with pytest.raises(SettingError, match="shifts labels by itself"), tuned(model, form="rows") as (attached, _):
        attached(input_ids=ids, labels=ids)


@pytest.mark.parametrize(
    "technique", [TokenTune(form="rows", keep_fraction=1.0), Recompute()], ids=["rows", "recompute"]
)
def test_blocks_that_return_lists_run(technique):
    torch.manual_seed(0)
    model = t.OpenAIGPTLMHeadModel(t.OpenAIGPTConfig(**GPT, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).train()
    ids = torch.randint(3, WORDS, (2, LENGTH))
    expected = model(input_ids=ids, labels=ids).loss
    with Recipe(technique)(model) as attached:
        torch.testing.assert_close(attached(input_ids=ids, labels=ids).loss, expected)


def test_adapters_that_read_what_enters_the_block_read_it_for_both_streams():
    found = {}
    for form in ("streams", "rows"):
        torch.manual_seed(0)
        model = t.PhiForCausalLM(t.PhiConfig(**TEXT)).double()  # attention and MLP side by side, after one norm
        adapter = BottleneckConfig(form="parallel", r=3, init_weights=False)
        with tuned(model.train(), adapter, keep_fraction=0.4, form=form, seed=1) as (attached, _):
            attached(**batch_for("llama", model)).loss.backward()
            found[form] = gradients(attached)
    assert apart(found["streams"], found["rows"]) < 1e-9


@pytest.mark.parametrize("form", ["streams", "rows"])
def test_blocks_that_run_several_times_are_refused_where_labels_are_of_tokens(form):
    settings = {**TEXT, "embedding_size": 16, "num_hidden_groups": 1}
    batch = {"input_ids": torch.randint(3, WORDS, (2, 7)), "labels": torch.randint(0, 2, (2, 7))}
    with (
        Recipe(TokenTune(form=form))(t.AlbertForTokenClassification(t.AlbertConfig(**settings)).train()) as attached,
        pytest.raises(SettingError, match=r"runs albert\.encoder\.albert_layer_groups several times"),
    ):
        attached(**batch)


def test_a_forward_that_the_keyboard_ended_is_not_gone_on_with():
    model = made("llama")
    batch = batch_for("llama", model)
    shorter = {name: tensor[:2, :7] for name, tensor in batch.items()}

    def end(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    with tuned(model, keep_fraction=0.5) as (attached, states):
        handle = find_stacks(model)[0].blocks[-1].register_forward_pre_hook(end)
        with pytest.raises(KeyboardInterrupt):
            attached(**batch)
        handle.remove()
        attached(**shorter).loss.backward()
        (selection,) = states[-1].selections.values()
        assert selection.order.shape == (2, 7)
