"""Own backward: modules that compute what they always did and keep something else for backward.

Method   While training with gradients, a module's forward is replaced by one that ends in an autograd function; in
         evaluation and without gradients its own forward runs. The replacement is a bound method, so that a copy of the
         model runs the copy's modules.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..forwards import forward_replaced

Forward = Callable[..., Any]
"""Takes the module, the module's own forward (to be called without the module) and the arguments of the call."""


@contextmanager
def training_forwards(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Give each module another forward for training, and its own back after."""
    with ExitStack() as undo:
        for module, forward in forwards.items():
            undo.enter_context(forward_replaced(module, partial(_in_training, forward)))
        yield


def _in_training(forward: Forward, own: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if module.training and torch.is_grad_enabled():
        return forward(module, own, *args, **kwargs)
    return own(*args, **kwargs)
