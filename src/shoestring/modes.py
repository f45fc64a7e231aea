"""Which forwards are in training: by the modes of modules, or because a step is made of forwards alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_OF_FORWARDS_ALONE = ContextVar("a training step of forwards alone is at work", default=False)
_ASIDE = ContextVar("a forward beside those of the loss is at work", default=False)


def in_training(module: nn.Module) -> bool:
    """Whether a forward of `module` is one of training, also where `quiet` has put the module in evaluation mode."""
    return module.training or without_backward()


def in_backward() -> bool:
    """Whether a backward is at work, as where a block is run again in it."""
    return torch._C._current_graph_task_id() != -1


def without_backward() -> bool:
    """Whether forwards are those of a training step that has no backward, and so are to have no gradients."""
    return _OF_FORWARDS_ALONE.get()


def is_aside() -> bool:
    """Whether a forward is one that a technique runs for itself, inside of the model's own."""
    return _ASIDE.get()


def is_counted() -> bool:
    """Whether a forward in training is one of the loss; trainers run others, without gradients, for their metrics."""
    return (torch.is_grad_enabled() or without_backward()) and not is_aside()


@contextmanager
def aside() -> Iterator[None]:
    """Forwards of the model that a technique runs for itself: nothing is added to their loss or noted of them."""
    before = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(before)


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No gradients, no dropout, no statistics of batches: all modules in evaluation, but for the outermost.

    By the mode of that one trainers tell training from evaluation, and so what they add to a loss and write down.
    Techniques tell it by `in_training`.
    """
    outermost = [model]
    while isinstance(inside := getattr(outermost[-1], "module", None), nn.Module):  # in wrappers for several processes
        outermost.append(inside)
    with torch.no_grad(), in_eval_mode(model):
        for module in outermost:
            module.training = True
        before = _OF_FORWARDS_ALONE.set(True)
        try:
            yield
        finally:
            _OF_FORWARDS_ALONE.reset(before)


def dropouts(model: nn.Module) -> dict[str, float]:
    """The dropout that `quiet` switches off, by the names of modules: the share that each drops.

    Layers of dropout, and modules that keep a share in an attribute named for it, as attention does.
    """
    found = {}
    for name, module in model.named_modules():
        own = {"dropout": module.p} if isinstance(module, _DropoutNd) else vars(module)
        shares = [value for key, value in own.items() if "drop" in key and isinstance(value, float)]
        if (share := max(shares, default=0.0)) > 0:
            found[name] = share
    return found


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and back to its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    # at inference, bitsandbytes would reorder 4-bit weights on some CPUs, after which they give no gradients
    reordering: list[Any] = [
        module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    before = _OF_FORWARDS_ALONE.set(False)
    try:
        model.eval()
        for module in reordering:
            module.support_avx512bf16_for_cpu = False
        yield
    finally:
        _OF_FORWARDS_ALONE.reset(before)
        for module in reordering:
            module.support_avx512bf16_for_cpu = True
        for module, training in modes:
            module.training = training
