"""Models in packed form without values: what transformers makes in loading, on tensors that hold nothing.

Method   transformers' quantizer puts bitsandbytes' layers in place of linear ones. bitsandbytes packs the weights by
         its own operations, which know their shapes on fake tensors; so forward and backward are its own too. torchao
         packs by torch's operations, into a tensor whose parts are then fake.
Leaves   Workspaces inside of bitsandbytes' kernels, as the ledger does: in forward, a product of many tokens with 4-bit
         weights unpacks one layer's weight. Backward does so in the open, where it is counted.
CPU      int8 is rehearsed as bitsandbytes trains on a CPU, with one layer's weight unpacked. On GPUs one layer's input
         and product are there in narrower and wider integers instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer

from ..errors import SettingError
from ..fakes import has_values
from ..training.quantised import keep_training_layout, need


def of_checkpoint(config: Any) -> BitsAndBytesConfig | None:
    """How the files of a model are packed, as its configuration says; None where they are not.

    Raises SettingError for a form that is not of bitsandbytes.
    """
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    values = given if isinstance(given, dict) else given.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method", "bitsandbytes")))
    if not method.startswith("bitsandbytes"):
        raise SettingError(
            f"The files of this {config.model_type!r} are quantised by {method}, which cannot be predicted; only "
            "bitsandbytes can. Give the model's original files."
        )
    return BitsAndBytesConfig.from_dict(values)


def quantise(model: Any, config: BitsAndBytesConfig | TorchAoConfig) -> nn.Module:
    """The model with its linear layers packed as `from_pretrained` would, with or without values.

    Raises SettingError if the package that packs is missing.
    """
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    (_pack_by_torchao if isinstance(config, TorchAoConfig) else _pack_by_bitsandbytes)(model, quantizer)
    keep_training_layout(model)
    model.hf_quantizer = quantizer
    model.hf_device_map = {"": "cpu"}
    return quantizer.postprocess_model(model)


def _pack_by_torchao(model: Any, quantizer: Any) -> None:
    from torchao.quantization import quantize_

    quantizer.preprocess_model(model=model)
    for name, layer in model.named_modules():
        if getattr(layer, "weight", None) is not None and quantizer.param_needs_quantization(model, f"{name}.weight"):
            quantize_(layer, quantizer.quantization_config.get_apply_tensor_subclass())


def _pack_by_bitsandbytes(model: Any, quantizer: Any) -> None:
    need("bitsandbytes", "A quantised model")
    import bitsandbytes

    whole = dict(model.named_modules())
    with unset_fake_temporarily():  # new layers are on the meta device, as in loading
        _make_tables()
        quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    for name, layer in model.named_modules():
        if isinstance(layer, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)):
            before = whole[name]
            weight = before.weight.detach()
            layer.bias = before.bias
            layer.weight = _packed(layer, weight.T if isinstance(before, Conv1D) else weight)


def _packed(layer: Any, weight: Tensor) -> nn.Parameter:
    """The layer's weight, as a parameter of bitsandbytes' class."""
    kind, options = type(layer.weight), dict(vars(layer.weight))
    if has_values(weight):
        return kind(weight, requires_grad=False, **options).to(weight.device)
    from bitsandbytes import functional

    if "quant_type" not in options:
        layer.state.threshold = 0.0  # how many columns are large only values tell
        packed, constants, _ = functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
        return _without_values(kind, packed, {**options, "CB": packed, "SCB": constants})
    names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
    packed, state = functional.quantize_4bit(weight.contiguous(), **{name: options[name] for name in names})
    layer.quant_state = state
    return _without_values(kind, packed, {**options, "quant_state": state, "bnb_quantized": True})


def _without_values(kind: type, data: Tensor, attributes: dict[str, Any]) -> nn.Parameter:
    """A fake parameter with the name and the attributes of another class, which is how peft knows it.

    It cannot be of that class: what makes a tensor fake is a class as well.
    """
    parameter = nn.Parameter(data, requires_grad=False)
    parameter.__class__ = _LOOKALIKES.setdefault(kind.__name__, type(kind.__name__, (FakeTensor,), {}))
    vars(parameter).update(attributes)
    return parameter


_LOOKALIKES: dict[str, type] = {}


def _make_tables() -> None:
    """Let bitsandbytes make the tables that it keeps for good: without values they would spoil all that follows."""
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(torch.zeros(64, 64), compress_statistics=True, quant_type="nf4")
    functional.dequantize_4bit(packed, state)
