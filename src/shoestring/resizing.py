"""Layers that get another size in place: their weights, what they say of their sizes, and head counts around them."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
INNER_WIDTHS = ("all_head_size", "split_size", "inner_dim", "embed_dim", "dim")


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter data of another shape; names, ties and optimizers hold the same parameter still."""
    parameter.grad = None
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    # autograd's accumulator knows the old shape, and a change of dtype is what it is thrown away for
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def resize(layer: nn.Module) -> None:
    """Have a linear layer say the sizes that its weight has."""
    weight: Any = layer.weight
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = weight.shape
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape


def rows_first(layer: nn.Module) -> Float[Tensor, "out in"]:
    """The weight of a linear layer as [out, in], sharing its memory."""
    weight: Any = layer.weight
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


def set_weight(layer: nn.Module, weight: Float[Tensor, "out in"]) -> None:
    """Give a linear layer a weight of any size."""
    own = weight.T if isinstance(layer, Conv1D) else weight
    replace_data(layer.weight, own.contiguous())  # type: ignore[arg-type]
    resize(layer)


def head_counts(attention: nn.Module, old: Mapping[str, int], new: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What the modules of an attention must say of its heads: new values of attributes by module, then attribute.

    old, new: "heads", "kv_heads" and "inner" (heads times their size).
    """
    kinds = {**dict.fromkeys(HEADS, "heads"), **dict.fromkeys(KV_HEADS, "kv_heads")}
    kinds |= dict.fromkeys(INNER_WIDTHS, "inner")
    found: dict[str, dict[str, int]] = {}
    for module_name, module in attention.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            continue
        for name, kind in kinds.items():
            if type(value := module.__dict__.get(name)) is int and value == old[kind]:
                found.setdefault(module_name, {})[name] = new[kind]
    return found
