"""Tensors without values, fake or on the meta device: the same steps run on them, count bytes and compute nothing."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.fake_tensor import is_fake
from transformers.utils import import_utils

ASKED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


def has_values(x: Tensor) -> bool:
    """Whether there are numbers in `x`, or in the parts that it is a wrapper of, to look at."""
    return not (x.is_meta or is_fake(x))


class Valueless(FakeTensorMode):
    """A mode in which models are made, adapted and trained by any code, though no tensor holds a value.

    Whoever asks a tensor for its value is told 1 or True: a loss is a number, a mask of padding masks nothing. So what
    is run is the step of a batch without padding. transformers is told that tensors are not fake, and then makes the
    masks that it makes in training; modules can be moved and cast, which torch refuses for fake parameters.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._entered = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ASKED and getattr(args[0], "constant", None) is None:
            return _one(args[0].dtype)
        return super().__torch_dispatch__(func, types, args, kwargs or {})

    def __enter__(self) -> Self:
        if self._entered == 0:  # torch enters a mode again for many operations
            with ExitStack() as undo:
                undo.enter_context(patch.object(import_utils, "is_fake_tensor", lambda tensor: False))
                undo.enter_context(patch.object(nn.Module, "_apply", _apply_to_fakes(nn.Module._apply)))
                # it draws until no number is out of bounds, and each question about that is answered by True
                undo.enter_context(patch.object(nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor))
                undo.enter_context(patch.object(FakeTensor, "__deepcopy__", _deep_copy))  # torch's copies the mode too
                self._patches = undo.pop_all()
        self._entered += 1
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._entered -= 1
        if self._entered == 0:
            self._patches.close()


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1


def _deep_copy(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        copied: Tensor = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied)
        memo[id(tensor)] = copied.requires_grad_(tensor.requires_grad)
    return memo[id(tensor)]


def _apply_to_fakes(apply: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`nn.Module._apply` with new parameters in place of fake ones: torch would swap them, which it cannot always."""

    def applied(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if not any(map(is_fake, module.parameters())):
            return apply(module, fn, recurse)
        for child in module.children() if recurse else ():
            child._apply(fn)
        tables: list[dict[str, Any]] = [module._parameters, module._buffers]
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and (new := fn(tensor.detach())) is not None and _differs(new, tensor):
                    parameter = isinstance(tensor, nn.Parameter)
                    table[name] = nn.Parameter(new, requires_grad=tensor.requires_grad) if parameter else new
        return module

    return applied


def _differs(new: Tensor, old: Tensor) -> bool:
    return new.dtype != old.dtype or new.device != old.device or new.shape != old.shape


def without_values(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The model with fake tensors of `mode` for its weights and buffers, for good; those that were one stay one.

    Adapters of peft must be in place before, unless `mode` is a `Valueless` one.
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
