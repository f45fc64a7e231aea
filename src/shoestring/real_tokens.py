"""Which tokens of a batch are real and no padding, as a layer anywhere in the model sees them."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

NO_LABEL = -100
"""Marks tokens without a loss in labels, for torch and transformers."""

CROSS_KEYS = re.compile(r"(encoder_attn|EncDecAttention|cross_?attention|cross_attn)\.(.*\.)?(k|v|key|value)(_proj)?\.")
"""Layers of a decoder that read the encoder's tokens."""

_LEARNING: ContextVar[Tensor | None] = ContextVar("which of the rows that layers run on now learn", default=None)


@contextmanager
def only_learning(rows: Bool[Tensor, "batch rows"]) -> Iterator[None]:
    """Layers called inside run on rows of which only those marked True count: the others are there without gradient."""
    before = _LEARNING.set(rows)
    try:
        yield
    finally:
        _LEARNING.reset(before)


def learning_rows() -> Bool[Tensor, "batch rows"] | None:
    """Which rows of the layer that runs now count, for `real_tokens`; None: nobody said."""
    return _LEARNING.get()


def real_tokens(
    model: nn.Module, batch: Mapping[str, Any], name: str, shape: torch.Size, rows: Tensor | None = None
) -> Bool[Tensor, "batch *tokens"] | None:
    """Which tokens of the layer `name`, whose inputs have the leading sizes `shape`, are no padding; None: all of them.

    A mask is [batch, tokens] also for a layer that reads all tokens of a batch in one row, as in OPT.

    A decoder beside an encoder reads the tokens of the labels, or of the input where labels are no tokens, and by keys
    and values of cross-attention those of the encoder; which reads one row of each example where a batch has several.
    Tokens count all where no mask has their shape, as in packed batches. rows: what `learning_rows` gave when the layer
    ran, which goes before the masks of the batch.
    """
    if rows is not None and shape in (rows.shape, (rows.numel(),)) and not CROSS_KEYS.search(name):
        return rows
    of_input, of_output = batch.get("attention_mask"), batch.get("decoder_attention_mask")
    if of_output is None and (labels := batch.get("labels")) is not None:
        of_output = labels != NO_LABEL if labels.dim() > 1 else of_input
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    in_decoder = both and "decoder" in name.split(".")
    mask = of_output if in_decoder and not CROSS_KEYS.search(name) else of_input
    if both and not in_decoder and batch.get("example") is not None and isinstance(mask, Tensor):
        mask = mask[first_rows(batch["example"])]
    return mask.bool() if isinstance(mask, Tensor) and shape in (mask.shape, (mask.numel(),)) else None


def members(example: Int[Tensor, " rows"]) -> Bool[Tensor, "examples rows"]:
    """Which rows of a batch belong to which example; `example` is the number of each row's."""
    num_examples = int(example.max()) + 1
    return example == torch.arange(num_examples, device=example.device)[:, None]


def first_rows(example: Int[Tensor, " rows"]) -> Int[Tensor, " examples"]:
    """The first row of each example."""
    return members(example).int().argmax(1)
