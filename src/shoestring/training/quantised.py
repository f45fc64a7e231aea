"""Quantised bases: the frozen weights of linear layers in 4 or 8 bit, packed and multiplied by bitsandbytes.

Source   Dettmers et al., QLoRA, arXiv:2305.14314 (nf4); Dettmers et al., LLM.int8(), arXiv:2208.07339 (int8)
Code     bitsandbytes, through transformers' BitsAndBytesConfig
nf4      4 bit a weight; 64 weights share a constant, itself in 8 bit: 0.516 bytes a weight (double quantisation).
         Products are in the model's own dtype, so that no activation changes its dtype on the way through a layer.
int8     8 bit a weight and a float32 constant a row. On GPUs inputs are rounded to 8 bit too, but for columns with
         values of 6 and above; in training on a CPU bitsandbytes unpacks the weight instead.
         Backward keeps the input of each layer where torch's checkpointing cannot drop it, unless that is reentrant.
Keeps    Embeddings, norms, biases, what is outside of the model's body (heads, which may be new and train) and the
         output embeddings, tied or not, stay in the model's dtype.
Differs  peft's `prepare_model_for_kbit_training` is not called. It makes all that is not packed float32: embeddings and
         head of a large vocabulary would take twice their bytes, and so would activations between blocks, while norms
         compute in float32 by themselves. It freezes the base, as adapters do anyway, and lets the embeddings' output
         ask for gradients, as trainers do where they turn on checkpointing.
         TRL makes the trained weights of a quantised model bfloat16. Here they stay as their method made them, as on
         any other base: bfloat16 loses updates below one part in 500.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SettingError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

    from ..technique import Technique

Quantization = Literal["nf4", "int8"]


def check_adapters(kind: Quantization | None, techniques: Sequence[Technique]) -> None:
    """Refuse to train packed weights themselves.

    Raises SettingError if a quantised base has no adapter or prompt that could train.
    """
    from ..technique import Phase

    if kind is not None and not any(technique.phase in (Phase.ADAPTER, Phase.PROMPT) for technique in techniques):
        raise SettingError(
            f"model.quantization: {kind} freezes the weights in packed form, which cannot train, and the recipe has no "
            "adapter that could; add one, such as lora, or leave model.quantization out."
        )


def quantization_config(kind: Quantization, model: nn.Module, dtype: torch.dtype) -> BitsAndBytesConfig:
    """What transformers takes to load or make a model in packed form.

    model: one of the same class, of which only the structure counts. dtype: of products and of all that stays whole.

    Raises SettingError if bitsandbytes is missing.
    """
    from transformers import BitsAndBytesConfig

    need_bitsandbytes(f"model.quantization: {kind}")
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept_whole(model))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept_whole(model),
    )


def need_bitsandbytes(wanted_by: str) -> None:
    """Raises SettingError if bitsandbytes is missing."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError(f"{wanted_by} needs bitsandbytes, which is missing: pip install 'shoestring[quant]'")


def kept_whole(model: Any) -> list[str]:
    """Paths of the linear layers that are not packed: those outside of the body, and the output embeddings."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    inside = {id(module) for module in model.base_model.modules()}
    head = model.get_output_embeddings()
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and (id(module) not in inside or module is head)
    )


def keep_training_layout(model: nn.Module) -> None:
    """Never let 4-bit layers take up the other order of weights that bitsandbytes has for inference on some CPUs.

    They would take it at the first evaluation, or where a technique runs a block without gradients, and keep it, and
    in that order a product gives its input no gradient, without a word.
    """
    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def numbers_in(parameter: torch.Tensor) -> int:
    """How many weights a parameter stands for; of 4 bit two are in one byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


@contextmanager
def trained_dtypes_kept(model: Any) -> Iterator[None]:
    """Gives trained weights back as they were where something inside casts them."""
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, before in trained:
        if parameter.dtype != before.dtype and parameter.shape == before.shape:
            parameter.data = before
