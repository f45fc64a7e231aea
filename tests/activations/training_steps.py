"""Tiny stock models and what one training step of them gives."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    OPTConfig,
    OPTModel,
    T5Config,
    T5Model,
    ViTConfig,
    ViTModel,
)

from shoestring.memory import Ledger
from shoestring.recipe import Recipe

TOKENS = 13  # odd, so that packed codes do not fill their bytes
WIDTH, INNER = 12, 21
BATCH = 3


def llama(**settings: Any) -> nn.Module:
    return LlamaModel(
        LlamaConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=INNER,
            **settings,
        )
    )


def bert(**settings: Any) -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=INNER,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **settings,
        ),
        add_pooling_layer=False,
    )


def opt() -> nn.Module:
    return OPTModel(
        OPTConfig(
            vocab_size=40,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=INNER,
            max_position_embeddings=32,
            dropout=0.0,
        )
    )


def vit() -> nn.Module:
    return ViTModel(
        ViTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=INNER,
            image_size=12,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )


def t5() -> nn.Module:
    return T5Model(
        T5Config(
            vocab_size=40,
            d_model=WIDTH,
            d_kv=6,
            d_ff=INNER,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "opt": opt, "vit": vit, "t5": t5}
MLP_LAYERS = {
    "llama": ["down_proj"],
    "bert": ["intermediate.dense", "output.dense"],
    "opt": ["fc2"],
    "vit": ["fc1", "fc2"],
    "t5": ["wo"],
}


def made(name: str, seed: int = 0, **settings: Any) -> nn.Module:
    """The model with weights that are not at their start: norms too have weights and biases of all sizes."""
    torch.manual_seed(seed)
    model = MODELS[name](**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def inputs_of(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12, generator=generator).to(dtype)}
    ids = torch.randint(1, 40, (BATCH, TOKENS), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {})}


@dataclass
class Step:
    """Output, gradients by name, and bytes kept for backward, 0 where they were not counted."""

    output: Tensor
    gradients: dict[str, Tensor]
    saved_bytes: int


def step(
    model: nn.Module,
    *techniques: Any,
    seed: int = 0,
    inputs: dict[str, Tensor] | None = None,
    count: bool = False,
    lora_std: float = 0.2,
) -> Step:
    """One training step of the model with a recipe; the loss weighs each output number differently.

    count: whether to count bytes, which takes most of the time.
    lora_std: size of the factors of LoRA, both of them.
    """
    with Recipe(*techniques)(model) as trained:
        torch.manual_seed(seed)
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=lora_std)
        trained.train()
        ledger = Ledger(trained)
        with ledger if count else nullcontext():
            output = trained(**(inputs_of(model, seed) if inputs is None else inputs)).last_hidden_state
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
        return Step(output.detach().clone(), gradients, ledger.report().saved_bytes if count else 0)


def kept_bytes(model: nn.Module, *techniques: Any) -> int:
    """What one training step with a recipe keeps for backward."""
    return step(model, *techniques, count=True).saved_bytes


def error(one: Step, other: Step) -> float:
    """Length of the difference of all gradients over that of `other`'s."""
    assert one.gradients.keys() == other.gradients.keys()
    assert other.gradients
    difference = sum(float((g.double() - one.gradients[n].double()).square().sum()) for n, g in other.gradients.items())
    return (difference / sum(float(g.double().square().sum()) for g in other.gradients.values())) ** 0.5
