"""Other forwards in place of a module's own, inside a context."""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_replaced(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[None]:
    """Call `replacement(plain forward, module, ...)` in place of `module.forward`, on deep copies of it too."""
    before = module.__dict__.get("forward")

    # trainers and generate() read the signature, which a bound method has lost its `self` from
    @functools.wraps(getattr(module.forward, "__func__", type(module).forward))
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        plain = before if before is not None else functools.partial(type(self).forward, self)
        return replacement(plain, self, *args, **kwargs)

    with forward_swapped(module, types.MethodType(forward, module)):
        yield


@contextmanager
def forward_swapped(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `forward` stand in for a module's own inside the context."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own
