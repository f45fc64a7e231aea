"""Which weights of a pretrained model its loss does not depend on, told from the graph of a forward without values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fakes import Valueless


def without_effect(model: nn.Module, inputs: Mapping[str, Any]) -> set[str]:
    """Names of parameters that the loss does not depend on, in the plain model of this class; none if it cannot be run.

    Such are norms whose output a classifier of images does not read. What a recipe has made of the model does not
    count, so that a graph that it has broken still shows.
    inputs: what the model is called with, of which only names and shapes count.
    """
    make: Any = getattr(type(model), "_from_config", None)
    if make is None:
        return set()
    try:
        with Valueless():
            plain: nn.Module = make(copy.deepcopy(model.config), attn_implementation="eager").train()
            shaped = {name: _like(value) for name, value in inputs.items()}
            output = plain(**shaped)
            loss = getattr(output, "loss", None)
            read = _leaves(output[0] if loss is None else loss)
    except Exception:  # a forward may need values in many ways, and then says nothing
        return set()
    return {name for name, parameter in plain.named_parameters() if id(parameter) not in read}


def _like(value: Any) -> Any:
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _leaves(output: Tensor) -> set[int]:
    """The ids of all tensors that a gradient of the output would reach."""
    waiting: list[Any] = [output.grad_fn]
    seen: set[Any] = set()
    found: set[int] = set()
    while waiting:
        if (node := waiting.pop()) is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting.extend(before for before, _ in node.next_functions)
    return found
