"""Token windows: gradients are those of the whole sequence, for every family of models, mask and schedule."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from shoestring.blocks import Recompute, TokenWindows
from shoestring.errors import SettingError
from shoestring.recipe import Recipe

TOKENS = 37
SIZES = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
SLIDING = {**DECODER, "num_key_value_heads": 2, "head_dim": 4, "sliding_window": 7, "query_pre_attn_scalar": 4}
SCHEDULES = ["layer_major", "window_major"]


def llama(key_value_heads: int = 2, **options) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**DECODER, "num_key_value_heads": key_value_heads, **options}))


def gpt2(dropout: float = 0.0) -> nn.Module:
    drops = {"resid_pdrop": dropout, "embd_pdrop": 0.0, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_embd=16, n_layer=2, n_head=4, n_positions=64, **drops))


def gemma3() -> nn.Module:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SLIDING, layer_types=layers))


DECODERS = {
    "llama": llama,
    "llama without groups": partial(llama, 4),
    "gpt2": gpt2,
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SIZES, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, dropout=0.0)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**{k: SLIDING[k] for k in SLIDING if k[0] != "q"})),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SLIDING, attn_implementation="eager")),
    "gemma3": gemma3,
}


def build(make, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make().double().train()


def text_batch(padding: str = "right", seed: int = 1, vocabulary: int = 61) -> dict[str, torch.Tensor]:
    """Two sequences, one of them padded, with a prompt that has no labels."""
    torch.manual_seed(seed)
    ids = torch.randint(3, vocabulary, (2, TOKENS))
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    if padding == "left":
        mask[0, :8] = 0
    elif padding == "right":
        mask[0, -8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :11] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), outputs.logits.detach(), found


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all parameters, the largest difference relative to that parameter's largest gradient.

    Biases of keys have gradients of rounding errors only, hence the floor.
    """
    assert found.keys() == wanted.keys()
    floor = float(max(w.abs().max() for w in wanted.values())) / 1e3
    scale = {name: w.abs().max().clamp(min=floor) for name, w in wanted.items()}
    return max(float((found[name] - w).abs().max() / scale[name]) for name, w in wanted.items())


def check_same(model: nn.Module, batch: dict, tolerance: float = 1e-12, adapters=(), **settings) -> None:
    reference = Recipe(*adapters).apply(model)
    loss, logits, wanted = gradients(reference, batch)
    start = {n: p.detach().clone() for n, p in reference.named_parameters()}
    Recipe.remove(reference)
    with Recipe(*adapters, TokenWindows(**settings))(model) as windowed:
        windowed.load_state_dict(start, strict=False)
        new_loss, new_logits, found = gradients(windowed, batch)
    seen = batch["attention_mask"].bool() if new_logits.dim() == 3 and "attention_mask" in batch else ...
    if new_logits.dim() == 3 and seen is not ... and seen.shape != new_logits.shape[:2]:
        seen = ...
    torch.testing.assert_close(new_loss, loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(new_logits[seen], logits[seen], rtol=tolerance, atol=tolerance)
    assert largest_difference(found, wanted) < tolerance


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("window", [TOKENS, TOKENS // 2, 50, 16, 1])
@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
def test_gradients_are_those_of_the_whole_sequence(schedule, window, key_value_heads):
    check_same(build(partial(llama, key_value_heads)), text_batch(), schedule=schedule, window_tokens=window)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", DECODERS)
def test_every_family_of_decoders(family, schedule):
    tolerance = 2e-6 if "gemma" in family else 1e-12  # which has norms in float32
    padding = "none" if family == "gemma2" else "right"  # eager attention in float64 makes masked rows NaN
    check_same(build(DECODERS[family], 3), text_batch(padding), tolerance, schedule=schedule, window_tokens=16)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("padding", ["left", "right", "none"])
def test_padding_on_either_side(schedule, padding):
    check_same(build(llama), text_batch(padding), schedule=schedule, window_tokens=10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_eager_attention(schedule, padding):
    model = build(partial(llama, attn_implementation="eager")).float()  # in float64 its masked rows are NaN
    check_same(model, text_batch(padding), 2e-6, schedule=schedule, window_tokens=10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_float32_within_2e_6(schedule):
    for seed in range(3):
        model = build(llama, seed).float()
        check_same(model, text_batch(seed=seed), tolerance=2e-6, schedule=schedule, window_tokens=16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lora_and_frozen_lower_blocks(schedule):
    lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj"], layers_to_transform=[1, 2])
    check_same(build(llama), text_batch(), adapters=[lora], schedule=schedule, window_tokens=16)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_frozen_embeddings(schedule):
    model = build(llama)
    model.get_input_embeddings().requires_grad_(False)
    check_same(model, text_batch(), schedule=schedule, window_tokens=16, keep_keys=schedule == "layer_major")


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_packed_documents(schedule):
    batch = text_batch("none")
    del batch["attention_mask"]
    batch["position_ids"] = torch.cat([torch.arange(15), torch.arange(TOKENS - 15)]).expand(2, -1)
    model = build(partial(llama, use_cache=False))  # with a cache, transformers does not look for documents
    check_same(model, batch, schedule=schedule, window_tokens=9)
    apart = model(input_ids=batch["input_ids"][:, 15:]).logits
    with Recipe(TokenWindows(schedule=schedule, window_tokens=9))(model) as windowed:
        together = windowed(**batch).logits
    torch.testing.assert_close(together[:, 15:], apart)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mask_of_the_users_own(schedule):
    batch = text_batch("none")
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    visible[20:, :5] = False
    batch["attention_mask"] = visible.expand(2, 1, -1, -1)
    check_same(build(llama), batch, schedule=schedule, window_tokens=9)


def with_a_prefix(kind: str) -> dict[str, torch.Tensor]:
    """A batch whose first 15 tokens all see each other, in one sample, and 12 in the other."""
    batch = text_batch("none")
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    visible[0, :, :15, :15] = visible[1, :, :12, :12] = True
    numbers = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    batch["attention_mask"] = {"booleans": visible, "numbers": numbers, "a row": visible[:, :, -1:]}[kind]
    return batch


@pytest.mark.parametrize("kind", ["booleans", "numbers", "a row"])
@pytest.mark.parametrize("settings", [{}, {"keep_keys": True}], ids=["keys again", "keys kept"])
def test_a_mask_by_which_a_prefix_sees_all_of_itself(kind, settings):
    tolerance = 1e-7  # gradients of the two rounds go through norms in float32
    check_same(build(llama), with_a_prefix(kind), tolerance, window_tokens=9, **settings)


def test_a_mask_by_which_a_prefix_sees_all_of_itself_is_refused_in_window_major():
    with (
        Recipe(TokenWindows(window_tokens=9, schedule="window_major"))(build(llama)) as windowed,
        pytest.raises(SettingError, match=r"tokens of model\.layers see later ones; use schedule='layer_major'"),
    ):
        windowed(**with_a_prefix("booleans"))


def test_images_among_words_that_see_all_of_themselves():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Gemma3Config(text_config={**SLIDING}, vision_config={**sizes, "image_size": 12, "patch_size": 4})
    batch = text_batch("none")
    del batch["attention_mask"]
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    batch["token_type_ids"][:, 5:15] = 1
    check_same(build(partial(Gemma3ForConditionalGeneration, config)), batch, 2e-6, window_tokens=9)


ENCODERS = {
    "bert": (BertConfig, BertForSequenceClassification, {"attention_probs_dropout_prob": 0.0}),
    "modernbert": (ModernBertConfig, ModernBertForSequenceClassification, {"local_attention": 8}),
    "distilbert": (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        {
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 2,
            "n_heads": 4,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "seq_classif_dropout": 0.0,
        },
    ),
}


def encoder(family: str) -> nn.Module:
    config, model, more = ENCODERS[family]
    own = {**SIZES, "cls_token_id": 1, "sep_token_id": 2} if family == "modernbert" else SIZES
    shape = {} if family == "distilbert" else {k: v for k, v in DECODER.items() if k not in SIZES}
    quiet = {"hidden_dropout_prob": 0.0} if family == "bert" else {}
    return model(config(**own, **shape, **more, **quiet))


@pytest.mark.parametrize("window", [TOKENS, 16, 5])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_layer_by_layer(family, window):
    batch = text_batch()
    batch["labels"] = torch.tensor([0, 1])
    check_same(build(partial(encoder, family)), batch, window_tokens=window, keep_keys=window == 5)


def test_encoders_with_lora_on_keys_only():
    batch = {**text_batch(), "labels": torch.tensor([0, 1])}
    lora = LoraConfig(r=2, target_modules=["key"])
    check_same(build(partial(encoder, "bert")), batch, adapters=[lora], window_tokens=16)


def test_vision():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = build(lambda: ViTForImageClassification(ViTConfig(**sizes, image_size=12, patch_size=4)))
    batch = {"pixel_values": torch.randn(2, 3, 12, 12, dtype=torch.float64), "labels": torch.tensor([0, 1])}
    check_same(model, batch, window_tokens=4)


def t5() -> nn.Module:
    shape = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(**SIZES, **shape, decoder_start_token_id=0))


def bart() -> nn.Module:
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "dropout": 0.0}
    return BartForConditionalGeneration(BartConfig(**SIZES, **sides, **heads, d_model=16, decoder_start_token_id=2))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("length", [TOKENS, 23])
@pytest.mark.parametrize("make", [t5, bart])
def test_encoder_decoder(make, length, schedule):
    batch = text_batch()
    batch["labels"] = batch["labels"][:, -length:].clone()
    model = build(make)
    tolerance = 2e-6 if make is t5 else 1e-12  # which has norms in float32
    check_same(model, batch, tolerance, schedule=schedule, window_tokens=10)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_speech(schedule):
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 24))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 20}
    special = {**SIZES, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    config = WhisperConfig(**special, **sides, **heads, d_model=16, num_mel_bins=8, dropout=0.0)
    model = build(lambda: WhisperForConditionalGeneration(config))
    batch = {"input_features": torch.randn(2, 8, 40, dtype=torch.float64), "labels": text_batch()["labels"]}
    check_same(model, batch, schedule=schedule, window_tokens=7)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_dropout_of_backward_is_that_of_forward(schedule):
    """Numerical derivatives under one seed: they hold only if backward draws what forward drew."""
    model, batch = build(partial(gpt2, 0.2)), text_batch()
    lora = LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.3, fan_in_fan_out=True, init_lora_weights=False)
    with Recipe(lora, TokenWindows(window_tokens=10, schedule=schedule))(model) as windowed:
        check_derivative(windowed, batch)


def test_dropout_of_encoders():
    torch.manual_seed(0)
    shape = {k: v for k, v in DECODER.items() if k not in SIZES}
    model = BertForSequenceClassification(BertConfig(**SIZES, **shape)).double().train()
    lora = LoraConfig(r=2, target_modules=["key", "value"], lora_dropout=0.3, init_lora_weights=False)
    batch = {**text_batch(), "labels": torch.tensor([0, 1])}
    with Recipe(lora, TokenWindows(window_tokens=10))(model) as windowed:
        check_derivative(windowed, batch)


def check_derivative(model: nn.Module, batch: dict, step: float = 1e-5) -> None:
    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return model(**batch).logits.square().mean()  # the models' own losses are in float32

    first, second = loss(), loss()
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    first.backward()
    trained = [p for p in model.parameters() if p.grad is not None]
    directions = [torch.randn_like(p) for p in trained]
    wanted = sum(float((p.grad * d).sum()) for p, d in zip(trained, directions, strict=True))

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(trained, directions, strict=True):
                p.add_(d, alpha=by)
        return float(loss().detach())

    ahead, behind = moved(step), moved(-2 * step)
    moved(step)
    assert (ahead - behind) / (2 * step) == pytest.approx(wanted, rel=1e-6)


def test_dropout_draws_differ_between_windows_and_blocks():
    drawn = []

    class Noted(nn.Dropout):
        def forward(self, x):
            new = super().forward(torch.ones_like(x))
            drawn.append(new.detach().flatten())
            return x * new

    model, batch = build(partial(gpt2, 0.0)), text_batch()
    for block in model.transformer.h:
        block.mlp.dropout = Noted(0.5)
    with Recipe(TokenWindows(window_tokens=10))(model) as windowed:
        windowed(**batch)
        firsts = {tuple(x[:100].tolist()) for x in drawn}
        assert len(firsts) == len(drawn) == 8
        windowed(**batch)
    assert len({tuple(x[:100].tolist()) for x in drawn}) == 16


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_random_numbers_are_left_alone_without_dropout(schedule):
    model, batch = build(llama), text_batch()
    with Recipe(TokenWindows(window_tokens=10, schedule=schedule))(model) as windowed:
        torch.manual_seed(3)
        windowed(**batch).loss.backward()
        found = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(3))


def test_blocks_below_the_lowest_trained_weight_keep_nothing():
    from shoestring.memory.ledger import Ledger

    saved = {}
    for lowest in (0, 3):
        model = build(partial(llama, num_hidden_layers=4))
        model.requires_grad_(False)
        model.model.layers[lowest:].requires_grad_(True)
        with Recipe(TokenWindows(window_tokens=10))(model) as windowed:
            ledger = Ledger(windowed, module_depth=3)
            with ledger:
                windowed(**text_batch()).loss.backward()
        saved[lowest] = {k: v for k, v in ledger.report().by_module.items() if "layers" in k and v}
        assert all(p.grad is None for block in model.model.layers[:lowest] for p in block.parameters())
    assert not any(f"layers.{i}" in name for name in saved[3] for i in (0, 1))  # 2 makes the input of 3
    assert sum(saved[3].values()) < sum(saved[0].values()) / 2


def test_evaluation_and_generation_run_the_stock_blocks():
    model = build(llama).eval()
    batch = text_batch("left")
    prompt = {k: batch[k] for k in ("input_ids", "attention_mask")}
    logits, answer = model(**prompt).logits, model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with Recipe(TokenWindows(window_tokens=10))(model) as windowed:
        assert torch.equal(windowed(**prompt).logits, logits)
        assert torch.equal(windowed.generate(**prompt, max_new_tokens=5, do_sample=False), answer)


def test_exact_is_said_and_the_recipe_leaves_nothing_behind():
    model, batch = build(llama), text_batch()
    before = gradients(model, batch)
    recipe = Recipe(TokenWindows(window_tokens=10))
    assert recipe.exact
    with recipe(copy.deepcopy(model)):
        pass
    with recipe(model):
        pass
    after = gradients(model, batch)
    assert all(torch.equal(after[2][name], wanted) for name, wanted in before[2].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window_tokens": 0}, "window_tokens of token_windows must be at least 1, got 0"),
        ({"schedule": "both"}, "must be layer_major or window_major, got 'both'"),
        ({"memory_budget": "much"}, "memory_budget of token_windows must be a number of bytes .* got 'much'"),
        ({"memory_budget": 0}, "got 0"),
        ({"memory_budget": "1GiB", "window_tokens": 3}, "both set the window; give one"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        TokenWindows(**settings)


def test_window_major_is_refused_where_tokens_see_later_ones():
    with pytest.raises(SettingError, match=r"see all; use schedule='layer_major'"):
        Recipe(TokenWindows(schedule="window_major")).apply(build(partial(encoder, "bert")))


def test_attention_without_masks_by_row_is_refused():
    model = build(llama)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(SettingError, match="'flash_attention_2' takes no masks by row; load the model with"):
        Recipe(TokenWindows()).apply(model)


def test_attention_that_is_not_transformers_is_refused():
    model = BloomForCausalLM(BloomConfig(**SIZES, hidden_size=16, n_layer=2, n_head=4))
    with pytest.raises(SettingError, match=r"BloomBlock of transformer\.h does not call it .*; use recompute instead"):
        Recipe(TokenWindows()).apply(model)


def test_modules_that_mix_tokens_are_refused():
    model = build(llama)
    model.model.layers[0].mlp.conv = nn.Conv1d(16, 16, 3)
    with pytest.raises(SettingError, match="in which tokens meet in attention only"):
        Recipe(TokenWindows()).apply(model)


def test_blocks_left_out_at_random_are_refused_in_window_major():
    model = build(DECODERS["opt"])
    model.config.layerdrop = 0.1
    with pytest.raises(SettingError, match="set layerdrop of the model to 0"):
        Recipe(TokenWindows(schedule="window_major")).apply(model)


def test_recomputation_beside_windows_is_refused():
    with pytest.raises(SettingError, match="leave recompute out"):
        Recipe(TokenWindows(), Recompute())
