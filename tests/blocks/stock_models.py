"""Tiny stock models of many families with a batch each, and the plain reference of training on selected tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shoestring.blocks import Stack, find_stacks
from shoestring.blocks.token_selection import Selection

WORDS, LENGTH, BATCH = 99, 13, 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {**SIZES, "vocab_size": WORDS, "pad_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2, "head_dim": 4}
SLIDING = ["sliding_attention", "sliding_attention", "full_attention"]
SIDES = {
    **{f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in (("layers", 3), ("ffn_dim", 24))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "d_model": 16,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5_SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
GPT2_SIZES = {"n_embd": 16, "n_layer": 3, "n_head": 4}
OPT_SIZES = {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
IMAGE = {**SIZES, "image_size": 12, "patch_size": 4, "problem_type": "single_label_classification"}
CLASSES = {"problem_type": "single_label_classification"}

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**TEXT)),
    "llama grouped": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED, sliding_window=5)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, sliding_window=5)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, sliding_window=5, layer_types=SLIDING)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2_SIZES, vocab_size=WORDS)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT_SIZES, vocab_size=WORDS, ffn_dim=24, pad_token_id=0)),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: t.BertForSequenceClassification(t.BertConfig(**TEXT, **CLASSES)),
    "roberta": lambda: t.RobertaForSequenceClassification(t.RobertaConfig(**TEXT, **CLASSES)),
    "distilbert": lambda: t.DistilBertForSequenceClassification(
        t.DistilBertConfig(vocab_size=WORDS, dim=16, n_layers=3, n_heads=4, hidden_dim=24, **CLASSES)
    ),
    "modernbert": lambda: t.ModernBertForSequenceClassification(
        t.ModernBertConfig(**TEXT, **CLASSES, local_attention=6)
    ),
    "bert tokens": lambda: t.BertForTokenClassification(t.BertConfig(**TEXT, num_labels=5)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**IMAGE)),
    "dinov2": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**IMAGE)),
}
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(vocab_size=WORDS, **T5_SIZES)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**SIDES)),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(**SIDES, num_mel_bins=8, max_source_positions=15, max_target_positions=32)
    ),
}
MODELS = {**DECODERS, **ENCODERS, **ENCODER_DECODERS}
DEBERTA = {**TEXT, **CLASSES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
OWN_ATTENTION: dict[str, Callable[[], nn.Module]] = {  # and blocks that return tuples
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=WORDS, hidden_size=16, n_layer=3, n_head=4)),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**TEXT)),
    "gptj": lambda: t.GPTJForCausalLM(t.GPTJConfig(**GPT2_SIZES, vocab_size=WORDS, rotary_dim=4)),
    "deberta": lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**DEBERTA)),
}


def made(name: str, dropout: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in training mode, always the same, with weights so large that attention is far from even."""
    torch.manual_seed(0)
    model = {**MODELS, **OWN_ATTENTION}[name]().train()
    model = model if dtype == torch.float32 else model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and name != "t5":
                parameter.mul_(4)
    if not dropout:
        without_dropout(model)
    return model


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def batch_for(name: str, model: nn.Module, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Samples of different lengths, padded right or left; of tokens, some have no label."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    ids = torch.randint(3, WORDS, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[1, 12:] = 0, 0
    if left:
        mask = mask.flip(1)
    ids[mask == 0] = 0
    classes = torch.arange(BATCH) % 2
    if name in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator).to(dtype), "labels": classes}
    targets = ids[:, :9].masked_fill(mask[:, -9:] == 0, -100)
    if name == "whisper":
        return {"input_features": torch.randn(BATCH, 8, 30, generator=generator).to(dtype), "labels": targets}
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name in ENCODER_DECODERS:
        return {**inputs, "labels": targets}
    if name == "bert tokens":
        return {**inputs, "labels": (ids % 5).masked_fill((mask == 0) | (ids % 3 == 0), -100)}
    if name in ENCODERS or name == "deberta":
        return {**inputs, "labels": classes}
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100  # a prompt
    return {**inputs, "labels": labels}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, zeros where there is none; taken away from the model."""
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    return found


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest distance of two gradients of a weight, relative to the gradient, or a millionth of the largest."""
    assert one.keys() == other.keys()
    floor = 1e-6 * max(float(g.norm()) for g in other.values())
    distances = [(one[n] - g).norm() / (g.norm() + floor) for n, g in other.items()]
    return float(torch.stack(distances).max())  # NaN if one is


# The reference: the stock forward, where keys and values have a gradient at selected tokens only, and a loss of these

_SELECTED: list[Callable[[nn.Module], Tensor | None]] = []


def _reference_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    selected = _SELECTED[-1](module)
    if selected is not None:
        weight = selected[:, None, :, None].to(key.dtype)
        key, value = (x * weight + (x * (1 - weight)).detach() for x in (key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (options.get("scaling") or query.shape[-1] ** -0.5)
    if (cap := options.get("softcap")) is not None:
        scores = (scores / cap).tanh() * cap
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def whole_mask(*args: Any, **options: Any) -> Tensor:
    """The mask of sdpa, also where sdpa would need none."""
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **options)


ALL_ATTENTION_FUNCTIONS.register("reference_of_selected_tokens", _reference_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("reference_of_selected_tokens", whole_mask)


@contextmanager
def attention_is(model: nn.Module, name: str) -> Iterator[None]:
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, old in before:
            config._attn_implementation = old


def run_reference(
    model: nn.Module, batch: dict[str, Tensor], selections: dict[str, Selection], token_labels: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of all tokens, and gradients, for selections by the name of their stack; no dropout."""
    stacks = find_stacks(model)
    first, last = stacks[0], stacks[-1]
    of_encoder = set(first.blocks.modules()) | last.cross_attentions if len(stacks) > 1 else set()
    batch = {**batch, "use_cache": False} if any(s.causal for s in stacks) else dict(batch)
    if len(stacks) > 1:
        batch["decoder_input_ids"] = decoder_inputs(model, batch["labels"])
    if token_labels:
        batch["labels"] = labels_of_selected(batch["labels"], selections[last.name].mask, shifted=_predicts_next(model))
    hooks = [
        stack.blocks[-1].register_forward_hook(stop_outside(selections[stack.name].mask))
        for stack in stacks
        if not (token_labels and stack is last)
    ]
    _SELECTED.append(lambda module: selections[(first if module in of_encoder else last).name].mask)
    try:
        with attention_is(model, "reference_of_selected_tokens"):
            outputs = model(**batch)
            outputs.loss.backward()
    finally:
        _SELECTED.pop()
        for hook in hooks:
            hook.remove()
    return outputs, gradients(model)


def decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "prepare_decoder_input_ids_from_labels"):
        return base.prepare_decoder_input_ids_from_labels(labels=labels)
    start = torch.full_like(labels[:, :1], base.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, base.config.pad_token_id)], 1)


def labels_of_selected(labels: Tensor, selected: Tensor, shifted: bool) -> Tensor:
    if not shifted:
        return labels.masked_fill(~selected, -100)
    return torch.cat([torch.full_like(labels[:, :1], -100), labels[:, 1:].masked_fill(~selected[:, :-1], -100)], 1)


def _predicts_next(model: nn.Module) -> bool:
    return len(stacks := find_stacks(model)) == 1 and stacks[0].causal


def stop_outside(selected: Tensor) -> Any:
    """A forward hook that stops gradients at tokens that are not selected."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        weight = selected[:, :, None].to(x.dtype)
        x = x * weight + (x * (1 - weight)).detach()
        return x if isinstance(output, Tensor) else (x, *output[1:])

    return hook


@contextmanager
def watched_inputs(stacks: list[Stack]) -> Iterator[dict[str, Tensor]]:
    """What enters each stack, by its name, with the gradient there."""
    found: dict[str, Tensor] = {}
    hooks = []
    for stack in stacks:

        def note(module: nn.Module, args: Any, kwargs: Any, name: str = stack.name) -> None:
            found[name] = args[0] if args else kwargs["hidden_states"]
            if found[name].requires_grad:  # under adapters nothing below the first one has a gradient
                found[name].retain_grad()

        hooks.append(stack.blocks[0].register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
