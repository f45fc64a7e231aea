"""Own backward: modules that compute what they always did and keep something else for backward.

Method   While training with gradients, a module's forward is replaced by one that ends in an autograd function; in
         evaluation and without gradients its own forward runs. The replacement is a bound method, so that a copy of the
         model runs the copy's modules.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
"""Takes the module, the module's own forward (to be called without the module) and the arguments of the call."""


@contextmanager
def training_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give each module another forward for training, and its own back after."""
    earlier = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = MethodType(_in_training(forward, earlier[module]), module)
    try:
        yield
    finally:
        for module, own in earlier.items():
            del module.forward
            if own is not None:
                module.forward = own


def _in_training(forward: Forward, earlier: Callable[..., Any] | None) -> Callable[..., Any]:
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = earlier or MethodType(type(module).forward, module)
        if module.training and torch.is_grad_enabled():
            return forward(module, own, *args, **kwargs)
        return own(*args, **kwargs)

    return run
