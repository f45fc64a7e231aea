"""Tensors without values, fake or on the meta device: the same steps run on them, count bytes and compute nothing."""

from typing import Any

from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in `x` to look at."""
    return not (x.is_meta or isinstance(x, FakeTensor))


def without_values(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with fake tensors of `mode` for its weights and buffers, for good; those that were one stay one.

    Adapters of peft must be in place before: they cannot be made under fake tensors.
    """
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in fakes:
                fake = mode.from_tensor(parameter.detach())
                fakes[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
            if parameter is not None:
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)
    return model
