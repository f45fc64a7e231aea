r"""Offload: tensors kept for backward wait in host memory or in files, and come back when backward needs them.

Source   the exact form of torch.autograd.graph.save_on_cpu; a bounded number in flight as in torchtune and trl
Update   none: every bit comes back
Costs    host: for a model on a GPU, pinned memory for all that is kept, and `max_in_flight` tensors on the device.
         Copies run on a stream of their own beside the computation, hidden where bytes / bandwidth is below a block's
         compute time (32 MiB take about 1.3 ms at 25 GB/s). disk: one file a tensor, written and read while the
         computation waits. Cheapest beside recomputation: then only the blocks' inputs are kept.
Differs  integers and masks move too: nothing is rounded, so nothing needs sparing.
"""

import os
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from weakref import ReferenceType, finalize, ref

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..technique import Advised, register_technique
from .base import Codec, Stage


@register_technique
@dataclass(kw_only=True)
class Offload(Codec):
    """Tensors kept for backward, elsewhere until backward.

    to: "host", memory of the host for a model on a GPU; "disk", files; "auto", the host for tensors on a GPU and files
        for those on the CPU.
    folder: not for host: where a temporary folder for the files is made; the system's place for such by default.
    max_in_flight: not for disk: tensors that stay on the device while they are copied; 5 by default.

    Raises SettingError if one of them is out of range or has no effect.
    """

    name = "offload"
    advised = (
        Advised(
            50, "what backward needs waits in host memory: exact, slower by transfers that the estimate leaves out"
        ),
    )
    exact = True
    stage = Stage.STORAGE
    removes = frozenset({"everything kept"})

    to: Literal["auto", "host", "disk"] = "auto"
    folder: str | None = None
    max_in_flight: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.to not in ("auto", "host", "disk"):
            raise SettingError(
                f"to of offload must be 'auto', 'host' or 'disk', got {self.to!r}; for files in a folder of your "
                "choice set to='disk' and folder."
            )
        if self.folder is not None and self.to == "host":
            raise SettingError("folder of offload has no effect on to='host'; leave it out or set to='disk'.")
        if self.max_in_flight is not None and self.to == "disk":
            raise SettingError("max_in_flight of offload has no effect on to='disk'; leave it out.")
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise SettingError(f"max_in_flight of offload must be at least 1, got {self.max_in_flight}.")
        self._places: dict[bool, _Place] = {}  # by whether a tensor is on a GPU
        self._warned = False

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Move what the model's training forwards keep; files are gone after."""
        with self._opened() as self._places:
            try:
                with super().attach(model):
                    yield model
            finally:
                self._places = {}

    def pack(self, tensor: Tensor) -> "_Moved":
        """Where the tensor went."""
        if not has_values(tensor):
            return _Unreal(tensor)
        if self.to == "host" and tensor.device.type != "cuda":
            return _Slow(tensor)
        return self._places[tensor.device.type == "cuda"].put(tensor)

    def unpack(self, packed: "_Moved") -> Tensor:
        """The tensor, on its device again."""
        return packed.get()

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor is large enough and not where it would go."""
        if self.to == "host" and tensor.device.type == "cpu":
            self._warn()
            return False
        return tensor.nbytes >= self.min_bytes

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "offload to='host' has no effect on tensors that are in host memory already; for a model on the CPU "
                "use to='disk' or leave offload out."
            )

    @contextmanager
    def _opened(self) -> Iterator[dict[bool, "_Place"]]:
        host = _Host(self.max_in_flight or 5)
        if self.to == "host":
            yield {True: host}
            return
        if self.folder is not None and not Path(self.folder).is_dir():
            raise SettingError(f"folder of offload must be a folder that exists, got {self.folder!r}.")
        try:
            folder = tempfile.TemporaryDirectory(prefix="offload-", dir=self.folder, ignore_cleanup_errors=True)
        except OSError as error:
            raise SettingError(f"folder of offload cannot be written: {error}; choose another folder.") from error
        with folder as path:
            disk = _Disk(Path(path))
            yield {True: disk if self.to == "disk" else host, False: disk}


class _Moved(Protocol):
    """A tensor in another place; it stays there until nobody refers to this any more."""

    def get(self) -> Tensor: ...


class _Place(Protocol):
    def put(self, tensor: Tensor) -> _Moved: ...


class _Unreal:
    """A fake or meta tensor, which has no values to move: only its bytes go and come back."""

    def __init__(self, tensor: Tensor):
        self.mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else None
        self.like: dict[str, Any] = {"size": tensor.shape, "dtype": tensor.dtype, "device": tensor.device}

    def get(self) -> Tensor:
        if self.mode is None:
            return torch.empty(**self.like)
        with self.mode:
            return torch.empty(**self.like)


class _Disk:
    """Files in one folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._written = 0

    def put(self, tensor: Tensor) -> "_File":
        self._written += 1
        return _File(tensor, self.folder / f"{self._written}.bin")


class _File:
    """One tensor in a file, which goes when this does: after backward, or with a graph that nobody keeps."""

    def __init__(self, tensor: Tensor, path: Path):
        self.path, self.dtype, self.device, self.nbytes = path, tensor.dtype, tensor.device, tensor.nbytes
        finalize(self, _remove, path)
        try:
            with open(path, "wb", buffering=0) as file:
                _write(file.fileno(), tensor.cpu().view(torch.uint8).numpy().data)
        except OSError as error:
            _remove(path)
            raise RunFailed(
                f"offload could not write {self.nbytes:,} bytes to {path.parent}: {error.strerror}. Make room there, "
                "or set folder to another disk."
            ) from error

    def get(self) -> Tensor:
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        try:
            with open(self.path, "rb") as file:
                read = file.readinto(data.numpy().data)
        except FileNotFoundError:
            raise RunFailed(
                f"offload no longer has {self.path}: call backward before the recipe is removed from the model."
            ) from None
        except OSError as error:
            raise RunFailed(f"offload could not read {self.path}: {error.strerror}.") from error
        if read != self.nbytes:
            raise RunFailed(f"offload wrote {self.nbytes:,} bytes to {self.path}, but only {read:,} are left.")
        return data.view(self.dtype).to(self.device)


def _write(file: int, data: memoryview) -> None:
    """All of `data`; a single write may stop early, at 2 GiB or when the disk is full."""
    while data:
        data = data[os.write(file, data) :]


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class _Host:
    """Pinned host memory, with a stream for each device, and a bound on what is on its way."""

    def __init__(self, max_in_flight: int):
        self.max_in_flight = max_in_flight
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._leaving: deque[ReferenceType[_HostCopy]] = deque()  # oldest first
        self._coming: list[ReferenceType[_HostCopy]] = []
        self._last: ReferenceType[_HostCopy] | None = None

    def put(self, tensor: Tensor) -> "_HostCopy":
        copy = _HostCopy(tensor, self, before=self._last)
        self._last = ref(copy)
        self._leaving.append(self._last)
        while len(self._leaving) > self.max_in_flight:
            if (oldest := self._leaving.popleft()()) is not None:
                oldest.leave()
        return copy

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]

    def fetch_before(self, copy: "_HostCopy") -> None:
        """Start the way back of those saved before `copy`, which backward needs next."""
        waiting = [reference for reference in self._coming if (other := reference()) is not None and other.is_coming]
        reference = copy.before
        for _ in range(self.max_in_flight):
            earlier = reference() if reference is not None else None
            if earlier is None or len(waiting) >= self.max_in_flight:
                break
            if earlier.on_device is None:
                earlier.fetch()
                waiting.append(ref(earlier))
            reference = earlier.before
        self._coming = waiting


class _Slow:
    """A copy on the CPU that the computation waits for: other accelerators than CUDA's."""

    def __init__(self, tensor: Tensor):
        self.copy, self.device = tensor.cpu(), tensor.device

    def get(self) -> Tensor:
        return self.copy.to(self.device)


class _OnDevice:
    """A device tensor that the copying stream reads or writes; its memory is not used again before that is done."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event):
        self.tensor, self.done = tensor, done
        self.home = torch.cuda.current_stream(tensor.device)  # where the memory will be used again

    def __del__(self) -> None:
        self.home.wait_event(self.done)


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class _HostCopy:
    """One tensor in pinned memory, and on the device while it is on its way there or back."""

    def __init__(self, tensor: Tensor, place: _Host, before: "ReferenceType[_HostCopy] | None"):
        self.place, self.before = place, before
        self.device, self.version, self.is_coming, self.changed = tensor.device, tensor._version, False, False
        self.host = _pinned(tensor)
        self.on_device: _OnDevice | None = _OnDevice(tensor, self._copy(tensor, self.host))

    def _copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Copy beside the computation, after all that is queued so far; the event tells when it is done."""
        stream = self.place.stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return stream.record_event()

    def leave(self) -> None:
        """Give the device memory back, once the copy is done."""
        if self.on_device is not None and not self.is_coming:
            # the copy may have run while somebody wrote to the tensor
            self.changed = self.on_device.tensor._version != self.version
            self.on_device = None

    def fetch(self) -> None:
        """Start the way back."""
        target = torch.empty(self.host.shape, dtype=self.host.dtype, device=self.device)
        self.on_device = _OnDevice(target, self._copy(self.host, target))
        self.is_coming = True

    def get(self) -> Tensor:
        if self.on_device is None:
            self.fetch()
        assert self.on_device is not None
        tensor = self.on_device.tensor
        if self.is_coming:
            torch.cuda.current_stream(self.device).wait_event(self.on_device.done)
            self.on_device, self.is_coming = None, False
        else:
            self.changed = tensor._version != self.version
        if self.changed:
            raise RuntimeError(
                "A tensor that backward needs was changed in place while offload copied it; change a copy of it."
            )
        self.place.fetch_before(self)
        return tensor
