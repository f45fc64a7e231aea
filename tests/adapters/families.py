"""Tiny models of many families, each with what a reference needs to know of its blocks, and an input."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from shoestring.testing.tiny_models import seeded

WIDTH = 24
COMMON = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}
TEXT = {**COMMON, "vocab_size": 50, "max_position_embeddings": 64}
DECODER = {**TEXT, "num_key_value_heads": 1, "head_dim": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
IMAGE = {**COMMON, "image_size": 16, "patch_size": 8}
SEQ2SEQ = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
OPT = {
    "hidden_size": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "ffn_dim": 40,
    "vocab_size": 50,
    "max_position_embeddings": 64,
}


def ids(seed: int = 0, length: int = 11) -> Tensor:
    """[2, 11] token numbers from 3 to 49."""
    return torch.randint(3, 50, (2, length), generator=torch.Generator().manual_seed(seed))


def pixels() -> Tensor:
    """[2, 3, 16, 16] in double precision."""
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def text() -> dict[str, Tensor]:
    """Input of a model of one stack."""
    return {"input_ids": ids()}


def text_pair() -> dict[str, Tensor]:
    """Input of an encoder and decoder."""
    return {"input_ids": ids(), "decoder_input_ids": ids(1, 7)}


def speech() -> dict[str, Tensor]:
    """Input of Whisper: 8 mel bins, 40 frames."""
    frames = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"input_features": frames, "decoder_input_ids": ids(1, 7)}


@dataclass(frozen=True)
class Family:
    """One tiny model.

    order: "pre", "post" or "side": whether norms stand before a part, after the sum, or both parts side by side.
    attention: pre, side: the module whose output the block adds; post: the norm of the first sum.
    entry: the module whose input is the residual stream at the feed-forward part.
    last: post: the norm of the second sum; side: the feed-forward part.
    """

    config: Callable[[], Any]
    model: str
    inputs: Callable[[], dict[str, Tensor]]
    order: str
    stacks: str
    attention: str
    entry: str
    last: str = ""

    def build(self) -> nn.Module:
        """In double precision, in eval mode, the same weights every time; norms and scales away from their start."""
        torch.manual_seed(0)
        model = getattr(t, self.model)(self.config()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    def blocks(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
        """Every block with its name and that of its entry; a name with | has one part for encoder and for decoder."""
        for number, stack in enumerate(self.stacks.split()):
            entry = self.entry.split("|")[min(number, self.entry.count("|"))]
            for index, block in enumerate(model.get_submodule(stack)):  # type: ignore[arg-type]
                yield f"{stack}.{index}", block, entry


BERT = ("post", "encoder.layer", "attention.output.LayerNorm", "intermediate", "output.LayerNorm")
LLAMA = ("pre", "model.layers", "self_attn", "post_attention_layernorm")
NORMS_AFTER = ("pre", "model.layers", "post_attention_layernorm", "pre_feedforward_layernorm")

FAMILIES = {
    "bert": Family(lambda: t.BertConfig(**TEXT), "BertModel", text, *BERT),
    "roberta": Family(lambda: t.RobertaConfig(**TEXT), "RobertaModel", text, *BERT),
    "mpnet": Family(lambda: t.MPNetConfig(**TEXT), "MPNetModel", text, *BERT[:2], "attention.LayerNorm", *BERT[3:]),
    "distilbert": Family(
        lambda: t.DistilBertConfig(dim=WIDTH, hidden_dim=40, n_layers=2, n_heads=2, vocab_size=50),
        "DistilBertModel",
        text,
        "post",
        "transformer.layer",
        "sa_layer_norm",
        "ffn",
        "output_layer_norm",
    ),
    "albert": Family(
        lambda: t.AlbertConfig(**TEXT, embedding_size=8),
        "AlbertModel",
        text,
        "post",
        "encoder.albert_layer_groups.0.albert_layers",
        "attention.LayerNorm",
        "ffn",
        "full_layer_layer_norm",
    ),
    "modernbert": Family(
        lambda: t.ModernBertConfig(
            **TEXT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
        ),
        "ModernBertModel",
        text,
        "pre",
        "layers",
        "attn",
        "mlp_norm",
    ),
    "vit": Family(
        lambda: t.ViTConfig(**IMAGE),
        "ViTModel",
        lambda: {"pixel_values": pixels()},
        "pre",
        "layers",
        "attention",
        "layernorm_after",
    ),
    "dinov2": Family(
        lambda: t.Dinov2Config(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=16, patch_size=8
        ),
        "Dinov2Model",
        lambda: {"pixel_values": pixels()},
        "pre",
        "encoder.layer",
        "layer_scale1",
        "norm2",
    ),
    "clip": Family(
        lambda: t.CLIPVisionConfig(**IMAGE),
        "CLIPVisionModel",
        lambda: {"pixel_values": pixels()},
        "pre",
        "encoder.layers",
        "self_attn",
        "layer_norm2",
    ),
    "gpt2": Family(
        lambda: t.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=50, n_positions=64, bos_token_id=1, eos_token_id=2
        ),
        "GPT2LMHeadModel",
        text,
        "pre",
        "transformer.h",
        "attn",
        "ln_2",
    ),
    "opt": Family(
        lambda: t.OPTConfig(**OPT),
        "OPTForCausalLM",
        text,
        "pre",
        "model.decoder.layers",
        "self_attn",
        "final_layer_norm",
    ),
    "opt-post": Family(
        lambda: t.OPTConfig(**OPT, do_layer_norm_before=False),
        "OPTForCausalLM",
        text,
        "post",
        "model.decoder.layers",
        "self_attn_layer_norm",
        "fc1",
        "final_layer_norm",
    ),
    "llama": Family(lambda: t.LlamaConfig(**DECODER), "LlamaForCausalLM", text, *LLAMA),
    "qwen3": Family(lambda: t.Qwen3Config(**DECODER), "Qwen3ForCausalLM", text, *LLAMA),
    "smollm3": Family(lambda: t.SmolLM3Config(**DECODER), "SmolLM3ForCausalLM", text, *LLAMA),
    "gemma": Family(lambda: t.GemmaConfig(**DECODER), "GemmaForCausalLM", text, *LLAMA),
    "gemma3": Family(lambda: t.Gemma3TextConfig(**DECODER), "Gemma3ForCausalLM", text, *NORMS_AFTER),
    "olmo2": Family(lambda: t.Olmo2Config(**DECODER), "Olmo2ForCausalLM", text, *NORMS_AFTER[:3], "mlp"),
    "gpt-neox": Family(
        lambda: t.GPTNeoXConfig(**TEXT, use_parallel_residual=False, bos_token_id=1, eos_token_id=2),
        "GPTNeoXForCausalLM",
        text,
        "pre",
        "gpt_neox.layers",
        "attention",
        "post_attention_layernorm",
    ),
    "gpt-neox-side": Family(
        lambda: t.GPTNeoXConfig(**TEXT, use_parallel_residual=True, bos_token_id=1, eos_token_id=2),
        "GPTNeoXForCausalLM",
        text,
        "side",
        "gpt_neox.layers",
        "attention",
        "input_layernorm",
        "mlp",
    ),
    "phi": Family(
        lambda: t.PhiConfig(**TEXT, bos_token_id=1, eos_token_id=2),
        "PhiForCausalLM",
        text,
        "side",
        "model.layers",
        "self_attn",
        "input_layernorm",
        "mlp",
    ),
    "t5": Family(
        lambda: t.T5Config(
            d_model=WIDTH,
            d_kv=12,
            d_ff=40,
            num_layers=2,
            num_heads=2,
            vocab_size=50,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        "T5ForConditionalGeneration",
        text_pair,
        "pre",
        "encoder.block decoder.block",
        "layer.0.SelfAttention",
        "layer.1.layer_norm|layer.2.layer_norm",
    ),
    "bart": Family(
        lambda: t.BartConfig(**SEQ2SEQ),
        "BartForConditionalGeneration",
        text_pair,
        "post",
        "model.encoder.layers model.decoder.layers",
        "self_attn_layer_norm",
        "fc1",
        "final_layer_norm",
    ),
    "mbart": Family(
        lambda: t.MBartConfig(**SEQ2SEQ),
        "MBartForConditionalGeneration",
        text_pair,
        "pre",
        "model.encoder.layers model.decoder.layers",
        "self_attn",
        "final_layer_norm",
    ),
    "whisper": Family(
        lambda: t.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20),
        "WhisperForConditionalGeneration",
        speech,
        "pre",
        "model.encoder.layers model.decoder.layers",
        "self_attn",
        "final_layer_norm",
    ),
}


def gpt2() -> nn.Module:
    """Of Conv1D layers and as many words as `tiny_models` has, without dropout."""
    sizes = {"vocab_size": 61, "n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 32}
    with seeded(0):
        return t.GPT2LMHeadModel(t.GPT2Config(**sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
