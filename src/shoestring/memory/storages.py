"""Storages behind tensors: which there are, how large, and where tensors hide in other objects."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def operands(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(operands(value))
    return found


def tensors_in(root: Any) -> Iterator[Tensor]:
    """Every tensor reachable from `root` through containers and attributes; modules are not entered."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, (str, bytes, type, nn.Module)):
            seen.add(id(value))
            if isinstance(value, Mapping):
                stack.extend(value.values())
            elif isinstance(value, Collection) and not isinstance(value, range):
                stack.extend(value)
            else:
                stack.extend(getattr(value, "__dict__", {}).values())


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the constants of packed ones, wherever bitsandbytes keeps them.

    4-bit parameters have them in `quant_state`, 8-bit ones in `SCB` until their layer first runs and takes them over.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from tensors_in(getattr(tensor, "quant_state", None))
        yield from tensors_in(getattr(tensor, "SCB", None))
    for module in model.modules():
        yield from tensors_in(getattr(getattr(module, "state", None), "SCB", None))


def vocabulary_of(model: nn.Module) -> int | None:
    """The width of the model's logits, if it has a head over a vocabulary."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.dim() == 2 else None


def storages_of(tensor: Tensor) -> list[torch.UntypedStorage]:
    """The storages a tensor stands on: one if it is plain, those of its parts if it is sparse or a wrapper."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    elif tensor.layout is torch.strided:
        return [tensor.untyped_storage()]
    elif tensor.layout is torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    else:
        parts = []  # oneDNN's own layout has no storage to follow
    return [storage for part in parts if isinstance(part, Tensor) for storage in storages_of(part)]


def storage_sizes(tensors: Iterable[Tensor], device: torch.device) -> dict[int, int]:
    """Bytes of each distinct storage on the device; the tensors must outlive the answer, as its keys are identities."""
    on_device = (tensor for tensor in tensors if tensor.device == device)
    return {id(storage): storage.nbytes() for tensor in on_device for storage in storages_of(tensor)}


def main_device(model: nn.Module) -> torch.device:
    """The device that carries most weight bytes; torch's default device if the model has no weights."""
    tensors = list(weight_tensors(model))
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    totals = {device: sum(storage_sizes(tensors, device).values()) for device in devices}
    return max(totals, key=totals.__getitem__) if totals else torch.empty(0).device


def held_beyond(tensors: Iterable[Tensor]) -> bool:
    """Whether anything but these tensors, which share a storage and Python holds, keeps them or the storage alive.

    True for no tensors. What else it may be is autograd's graph, or a view of Python's that is not among them.
    """
    held = {id(tensor): tensor for tensor in tensors}
    views = [(tensor, base) for tensor in held.values() if (base := tensor._base) is not None]
    held |= {id(base): base for _, base in views}
    if not held:
        return True
    for tensor in held.values():
        in_views = sum(base is tensor for _, base in views)
        if tensor._use_count() > 1 + in_views:  # type: ignore[attr-defined]
            return True
    storage = next(iter(held.values())).untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > len(held) + 1  # `storage` itself is the one


@contextmanager
def resizes_told_to(tell: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Calls `tell` after each `storage.resize_`, which is no operation, so that no dispatch mode sees it."""
    own = vars(torch.UntypedStorage).get("resize_")
    resize = torch.UntypedStorage.resize_

    def resize_and_tell(storage: Any, size: int) -> Any:
        result = resize(storage, size)
        tell(storage)
        return result

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        if own is None:  # it was inherited
            del torch.UntypedStorage.resize_
        else:
            torch.UntypedStorage.resize_ = own  # type: ignore[method-assign]
