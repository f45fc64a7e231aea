"""Codecs: how a tensor kept for backward is stored, and the one place where all of them act.

Method   torch calls a pair of hooks for each tensor that autograd keeps. Of nested pairs only the innermost is called,
         so each model has one pair, and the codecs of a recipe run one after another inside it: those that compress,
         then those that put what is left elsewhere. It is in force during the model's own forward, while it trains.
Keeps    Weights, buffers and quantization constants, views of them too, and layouts other than strided stay as they
         are. Each storage is packed once: queries, keys and values that read one x share one copy of it. A view of less
         than half its storage is packed by itself.
In place A packed tensor has the values it had when it was saved, so changing the original later does no harm, where
         plain torch would refuse. One that is kept as it is refuses as in plain torch.
Beside   Under torch's checkpoint, not reentrant, only what a checkpointed block takes in arrives here.
Misses   Tensors that a custom autograd function puts on `ctx` without `save_for_backward`. What a loss outside the
         model's forward keeps. Operations inside graphs that torch.compile makes: what such a graph keeps arrives, but
         not what for, so codecs that must know refuse a model that is compiled when they are attached. A forward that a
         keyboard interrupt ends leaves the hooks in force until the recipe is removed.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..errors import SettingError
from ..memory.storages import storages_of, weight_tensors
from ..technique import Phase, Technique

COMPILED = "{name} cannot tell operations apart in a model under torch.compile; leave out one."


class Stage(IntEnum):
    """The order in which the codecs of one model see a tensor."""

    COMPRESSION = 10  # fewer bytes
    STORAGE = 20  # the same bytes in another place


class Operation(NamedTuple):
    """The call of a torch function that is saving a tensor."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(kw_only=True)
class Codec(Technique):
    """Packs tensors that are kept for backward and gives them back; a subclass writes `pack` and `unpack`.

    min_bytes: smaller tensors stay as they are.

    stage: compression comes before storage.
    reads_operations: `packer` wants to know the operation; costs some microseconds for each torch function called.
    """

    phase = Phase.ACTIVATION
    stage: ClassVar[Stage]
    reads_operations: ClassVar[bool] = False
    min_bytes: int = 1024

    def __post_init__(self) -> None:
        if self.min_bytes < 0:
            raise SettingError(f"min_bytes of {self.name} must be 0 or more, got {self.min_bytes}.")

    def pack(self, tensor: Tensor) -> Any:
        """A contiguous tensor of one dimension as whatever `unpack` takes.

        Tensors inside tuples, lists and dicts go on to the next codec and come back as they were.
        """
        raise NotImplementedError

    def unpack(self, packed: Any) -> Tensor:
        """What was packed, in its shape, dtype and device; may be called again for the same `packed`."""
        raise NotImplementedError

    def takes(self, tensor: Tensor) -> bool:
        """Whether `pack` should be called for a tensor, a saved one or part of what a codec before this one packed."""
        return tensor.is_floating_point() and tensor.nbytes >= self.min_bytes

    def packer(self, tensor: Tensor, operation: Operation | None) -> Callable[[Tensor], Any] | None:
        """What packs a tensor, which has the shape in which `operation` saves it; None: it must stay as it is."""
        return self.pack

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Pack what the model's training forwards keep, together with the codecs that are there already.

        Raises SettingError if the codec must know operations and the model is compiled.
        """
        if self.reads_operations and any(_is_compiled(module) for module in model.modules()):
            raise SettingError(COMPILED.format(name=self.name))
        with _joined(self, model):
            yield model


class _Packer(NamedTuple):
    codec: Codec
    pack: Callable[[Tensor], Any]


@dataclass
class _Stored:
    """What one codec made of a tensor; other codecs may have gone on with the tensors in it."""

    codec: Codec
    packed: Any
    shape: torch.Size


def _store(tensor: Tensor, packers: list[_Packer]) -> Any:
    """The tensor, or a `_Stored` where a codec took it."""
    for index, (codec, pack) in enumerate(packers):
        if codec.takes(tensor):
            store_part = partial(_store, packers=packers[index + 1 :])
            packed = pack(tensor.contiguous().view(-1))
            return _Stored(codec, tree_map_only(Tensor, store_part, packed), tensor.shape)
    return tensor


def _load(stored: Any) -> Tensor:
    if isinstance(stored, _Stored):
        return stored.codec.unpack(tree_map_only(_Stored, _load, stored.packed)).view(stored.shape)
    return stored


class _Kept:
    """A tensor that stays as it is, and refuses to be used once it was changed, as autograd itself does."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor
        self.version = tensor._version

    def load(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"A tensor of shape {list(self.tensor.shape)} that backward needs was changed in place after it was "
                f"saved: it is at version {self.tensor._version}, expected {self.version}."
            )
        return self.tensor


class _Entry:
    """A storage, or part of one, that any number of saved tensors share."""

    def __init__(self, stored: _Stored | _Kept):
        self.stored = stored

    def load(self) -> Tensor:
        return self.stored.load() if isinstance(self.stored, _Kept) else _load(self.stored)


class _View(NamedTuple):
    """A saved tensor as a window on the storage that its entry holds."""

    entry: _Entry
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def load(self) -> Tensor:
        return self.entry.load().as_strided(self.size, self.stride, self.offset)


class _Part(NamedTuple):
    """A saved tensor whose entry holds its own elements only; strides come back, since kernels may round by them."""

    entry: _Entry
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        part = self.entry.load()
        return torch.empty_strided(part.shape, self.stride, dtype=part.dtype, device=part.device).copy_(part)


class _Operations(TorchFunctionMode):
    """Knows which torch function is running."""

    def __init__(self) -> None:
        super().__init__()
        self.current: Operation | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outer, self.current = self.current, Operation(getattr(func, "__name__", ""), args, kwargs or {})
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = outer


class _Manager:
    """The saved-tensor hooks of one model and the codecs that act in them."""

    def __init__(self, model: nn.Module):
        self.model = ref(model)
        self.codecs: list[Codec] = []
        self._open: list[ExitStack] = []  # one a running forward of the model, outermost first
        self._watch: _Operations | None = None
        self._weights: dict[int, torch.UntypedStorage] = {}  # by id; held, so that no id is used again meanwhile
        # by identity of a living storage: addresses are used again, dead keys leave by themselves
        self._entries: WeakKeyDictionary[torch.UntypedStorage, WeakValueDictionary[Any, _Entry]] = WeakKeyDictionary()
        # plain functions, so that a copy of the model does not copy the manager
        before = model.register_forward_pre_hook(lambda module, args: self._before(module), prepend=True)
        after = model.register_forward_hook(lambda module, args, result: self._after(module), always_call=True)
        self._handles = (before, after)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        while self._open:
            self._open.pop().close()

    def _before(self, module: nn.Module) -> None:
        if module is not self.model():
            return  # a copy of the model
        self._open.append(ExitStack())
        if len(self._open) > 1 or not (module.training and torch.is_grad_enabled()):
            return
        self._weights = {id(storage): storage for weight in weight_tensors(module) for storage in storages_of(weight)}
        if any(codec.reads_operations for codec in self.codecs):
            self._watch = self._open[0].enter_context(_Operations())
        self._open[0].enter_context(saved_tensors_hooks(self._pack, _unpack))
        self._open[0].callback(self._forget)

    def _after(self, module: nn.Module) -> None:
        if module is self.model() and self._open:
            self._open.pop().close()

    def _forget(self) -> None:
        self._weights = {}
        self._watch = None

    def _pack(self, tensor: Tensor) -> "_Kept | _View | _Part":
        tensor = tensor.detach()  # an operation that keeps its result hands it over with itself behind it: a cycle
        if not _is_plain(tensor) or id(tensor.untyped_storage()) in self._weights:
            return _Kept(tensor)
        entries = self._entries.setdefault(tensor.untyped_storage(), WeakValueDictionary())
        size, stride, offset = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        whole_key = (tensor._version, tensor.dtype)
        part_key = (*whole_key, size, stride, offset)
        if whole_key in entries:
            return _View(entries[whole_key], size, stride, offset)
        if part_key in entries:
            return _Part(entries[part_key], stride)

        packers = self._packers(tensor)
        if packers and _is_small_part(tensor):
            stored = _store(tensor, packers)
            if not isinstance(stored, _Stored):
                return _Kept(tensor)
            entries[part_key] = entry = _Entry(stored)
            return _Part(entry, stride)
        flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        stored = _store(flat, packers)
        entries[whole_key] = entry = _Entry(stored if isinstance(stored, _Stored) else _Kept(flat))
        return _View(entry, size, stride, offset)

    def _packers(self, tensor: Tensor) -> list[_Packer]:
        operation = self._watch.current if self._watch is not None else None
        packers = ((codec, codec.packer(tensor, operation)) for codec in self.codecs)
        return [_Packer(codec, pack) for codec, pack in packers if pack is not None]


def _unpack(saved: "_Kept | _View | _Part") -> Tensor:
    return saved.load()


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(module, OptimizedModule)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is nothing but a window on one storage."""
    return (
        tensor.layout is torch.strided
        and not hasattr(tensor, "__tensor_flatten__")
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _is_small_part(tensor: Tensor) -> bool:
    """Whether the tensor has less than half the bytes of its storage, and no element twice."""
    if 2 * tensor.nbytes >= tensor.untyped_storage().nbytes():
        return False
    reach = 0  # of the dimensions so far, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.size(), strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


_MANAGERS: WeakKeyDictionary[nn.Module, _Manager] = WeakKeyDictionary()


@contextmanager
def _joined(codec: Codec, model: nn.Module) -> Iterator[None]:
    """The codec among those of the model; the first one brings the manager, the last one takes it away."""
    home = next((module for module in model.modules() if module in _MANAGERS), model)
    manager = _MANAGERS.get(home) or _MANAGERS.setdefault(home, _Manager(home))
    manager.codecs = sorted([*manager.codecs, codec], key=lambda each: each.stage)
    try:
        yield
    finally:
        manager.codecs = [each for each in manager.codecs if each is not codec]
        if not manager.codecs:
            manager.close()
            _MANAGERS.pop(home, None)  # which is gone from it already where the model is garbage
