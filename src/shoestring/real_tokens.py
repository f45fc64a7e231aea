"""Which tokens of a batch are real and no padding, as a layer anywhere in the model sees them."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

CROSS_KEYS = re.compile(r"(encoder_attn|EncDecAttention|cross_?attention|cross_attn)\.(.*\.)?(k|v|key|value)(_proj)?\.")
"""Layers of a decoder that read the encoder's tokens."""


def real_tokens(
    model: nn.Module, batch: Mapping[str, Any], name: str, shape: torch.Size
) -> Bool[Tensor, "*batch"] | None:
    """Which tokens of the layer `name`, whose inputs have the leading sizes `shape`, are no padding; None: all of them.

    A decoder beside an encoder reads the tokens of the labels, and by keys and values of cross-attention those of the
    encoder. Tokens count all where no mask has their shape, as in packed batches.
    """
    of_input, of_output = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    if of_output is None and batch.get("labels") is not None:
        of_output = batch["labels"] != -100
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    reads_output = both and "decoder" in name.split(".") and not CROSS_KEYS.search(name)
    mask = of_output if reads_output else of_input
    return mask.bool() if isinstance(mask, Tensor) and mask.shape == shape else None
