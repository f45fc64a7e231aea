"""Quantised bases: the frozen weights of linear layers in 4 or 8 bit, packed and multiplied by bitsandbytes or torchao.

Source   Dettmers et al., QLoRA, arXiv:2305.14314 (nf4); Dettmers et al., LLM.int8(), arXiv:2208.07339 (int8)
Code     bitsandbytes and torchao, through transformers' BitsAndBytesConfig and TorchAoConfig
nf4      4 bit a weight; 64 weights share a constant, itself in 8 bit: 0.516 bytes a weight (double quantisation).
         Products are in the model's own dtype, so that no activation changes its dtype on the way through a layer.
int8     8 bit a weight and a float32 constant a row. On GPUs inputs are rounded to 8 bit too, but for columns with
         values of 6 and above; in training on a CPU bitsandbytes unpacks the weight instead.
         Backward keeps the input of each layer where torch's checkpointing cannot drop it, unless that is reentrant.
torchao-int8
         8 bit a weight, a float32 constant and a zero point of 1 byte a row. Inputs are never rounded, and backward
         keeps nothing (torchao_layers.py). Of torchao's 4-bit weights peft trains none, and they are packed by kernels
         of GPUs alone: nf4 is the 4-bit form.
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
    from transformers import BitsAndBytesConfig, TorchAoConfig

    from ..technique import Technique

Quantization = Literal["nf4", "int8", "torchao-int8"]
NO_TRAINING = {  # forms that exist, and why they are refused
    "torchao-int4": "torchao's 4-bit weights give their input no gradient, and only GPUs can pack them; take nf4"
}
PACKAGES = {"bitsandbytes": "quant", "torchao": "torchao"}  # and the extras of this package that bring them


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


def quantization_config(kind: Quantization, model: nn.Module, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers takes to load or make a model in packed form.

    model: one of the same class, of which only the structure counts. dtype: of products and of all that stays whole.

    Raises SettingError if the package that packs is missing, or has nothing to pack.
    """
    from transformers import BitsAndBytesConfig

    need("torchao" if kind == "torchao-int8" else "bitsandbytes", f"model.quantization: {kind}")
    if kind == "torchao-int8":
        return _torchao_config(model)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept_whole(model))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept_whole(model),
    )


def _torchao_config(model: nn.Module) -> TorchAoConfig:
    from torch import nn
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    whole = kept_whole(model)
    if not any(isinstance(module, nn.Linear) and name not in whole for name, module in model.named_modules()):
        raise SettingError(
            f"model.quantization: torchao-int8 packs nn.Linear only, of which the body of {type(model).__name__} has "
            "none; take nf4 or int8, which pack Conv1D too."
        )
    # torchao would change torch's settings for compiling and for float32 products, of all that runs in this process
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=whole)


def need(package: str, wanted_by: str) -> None:
    """Raises SettingError if a package that packs weights or optimizer states is missing."""
    if importlib.util.find_spec(package) is None:
        raise SettingError(
            f"{wanted_by} needs {package}, which is missing: pip install 'shoestring[{PACKAGES[package]}]'"
        )


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
    """Make packed layers ready to train through: bitsandbytes' keep their order of weights, torchao's keep no copy.

    4-bit layers have another order of weights for inference on some CPUs. They would take it at the first evaluation,
    or where a technique runs a block without gradients, and keep it, and in that order a product gives its input no
    gradient, without a word. For torchao's layers, see torchao_layers.py.
    """
    from torch import nn

    from .torchao_layers import PackedLinear, is_packed

    layers: Iterable[Any] = model.modules()
    for module in layers:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if type(module) is nn.Linear and is_packed(module.weight):
            module.__class__ = PackedLinear


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
