"""Which dtype a computation runs in: under autocast, and where 16 bits are too few."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast runs matrix products of `x` in; None where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """A context without autocast on the device of `x`, for what has a dtype of its own."""
    return torch.autocast(x.device.type, enabled=False) if autocast_dtype(x) else nullcontext()


def autocast_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """What enters the autocast that is in force now, for what runs again in backward.

    Without its cache: weights that were cast without a graph must not serve where one is needed.
    """
    if device_type == "meta":
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled, cache_enabled=False)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """The forward of `model` as it was before accelerate put it under autocast for a trainer."""
    own: dict[str, Any] = vars(model)
    if "_original_forward" not in own or "forward" not in own:
        yield
        return
    prepared, own["forward"] = own["forward"], own["_original_forward"]
    try:
        yield
    finally:
        own["forward"] = prepared


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype where that is wider."""
    return tensor.to(wide_dtype(tensor.dtype))
