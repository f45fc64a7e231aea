"""Ledger: counts the memory of training steps by following every live tensor storage.

Method   A dispatch mode sees each operation and keeps a weak reference to each storage it meets; the reference's
         callback tells when the storage dies, whoever held it (Python, autograd's graph, a `ctx` attribute). Births,
         changes of size and deaths go to a log; what each storage was for is decided afterwards, from the whole log.
Saved    Kept for backward is what was born since the forward began and is alive when the backward starts. What the
         model returned and what was made after it returned (the loss) counts only if the graph holds it too.
Sees     Views and shared storages once; tensors in `ctx` attributes; autocast's weight copies; recomputation; resizes.
Misses   Workspaces inside one kernel, the allocator's rounding and fragments, memory outside tensors. A tensor that an
         operation reads and none made counts from the start of the ledger, as if it had been there before. torch does
         not compile under a dispatch mode: compiled models run uncompiled, flex_attention refuses.
Fake     Storages are known by identity, never by address, so the same step under `FakeTensorMode` (entered first) is
         counted the same way. Meta tensors work too.
"""

import functools
import gc
import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..modes import in_backward
from .every_operation import EveryOperation
from .report import MemoryReport, Phase, replay
from .storages import (
    held_beyond,
    main_device,
    operands,
    resizes_told_to,
    storage_sizes,
    storages_of,
    tensors_in,
    vocabulary_of,
    weight_tensors,
)


class _Record:
    """One storage: its size now, its part once known, and where it was born."""

    __slots__ = ("alive", "born", "holders", "logits", "module", "part", "reference", "size")

    def __init__(self, size: int, born: int, module: str, part: str | None):
        self.size = size
        self.born = born  # place in the log; -1 if it was there before the ledger
        self.module = module
        self.part = part  # None: logits, saved for backward or temporary, decided in the report
        self.logits = False  # as wide as the vocabulary
        self.alive = True
        self.reference: weakref.ref[torch.UntypedStorage] | None = None
        self.holders: list[weakref.ref[Tensor]] | None = None  # by which Python may hold it after the forward

    def python_holders(self) -> list[Tensor]:
        return [tensor for reference in self.holders or () if (tensor := reference()) is not None]


class Ledger:
    """Counts the memory of the training steps that run inside it.

    model: its parameters, buffers and quantization constants are the weights; its calls are the forward.
    optimizer: found when it steps, if not given; give it where the ledger may see no step.
    module_depth: also split saved bytes by module path, cut after this many names; None does not.
    device: the device counted; the one with most weight bytes by default.

    One ledger runs at a time. It keeps a log of every storage, so give it a few steps, not an epoch.

    >>> model = nn.Linear(3, 2)
    >>> ledger = Ledger(model)
    >>> with ledger:
    ...     model(torch.ones(5, 3)).exp().sum().backward()
    >>> ledger.report().at_peak["weights"], ledger.report().saved_bytes  # 8 weights; 5 x 2 results of exp
    (32, 40)
    """

    _running: ClassVar["Ledger | None"] = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        module_depth: int | None = None,
        device: torch.device | str | None = None,
    ):
        if module_depth is not None and module_depth < 0:
            raise ValueError(f"module_depth of Ledger must be 0 or more, or None, got {module_depth}.")
        self.model = model
        self.optimizer = optimizer
        self.module_depth = module_depth
        self.device = torch.empty(0, device=device).device if device is not None else main_device(model)
        self._started = False

    def __enter__(self) -> "Ledger":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin counting, with an empty log. Raises RuntimeError if a ledger is running."""
        if Ledger._running is not None:
            raise RuntimeError("A ledger is already running and ledgers cannot nest; stop it before starting another.")
        gc.collect()  # cycles left from before would die at a random moment
        self._log: list[tuple[_Record, int, Phase]] = []
        self._existing: list[tuple[_Record, int]] = []
        self._live: dict[int, _Record] = {}
        self._window: list[_Record] | None = None  # born since the forward began, until backward begins
        self._window_start = 0
        self._at_forward_end: dict[_Record, int] = {}
        self._saved: list[dict[_Record, int]] = []
        self._roots: list[_Record] = []  # made by ones_like just now: backward's first gradients, if it starts next
        self._incoming: dict[int, list[_Record]] = {}
        self._modules: list[nn.Module] = []  # those running now, outermost first
        self._in_optimizer = False
        self._gradients_due = False
        self._cuda_max: int | None = None
        self._started = True
        self._paths = {id(module): name for name, module in self.model.named_modules()}
        self._vocabulary = vocabulary_of(self.model)

        learned = [p for p in self.model.parameters() if p.requires_grad]
        own, groups = {id(p) for p in self.model.parameters()}, self.optimizer.param_groups if self.optimizer else []
        beside = [p for group in groups for p in group["params"] if id(p) not in own]  # that it alone holds
        trainable = storage_sizes([*learned, *beside], self.device)
        weights = storage_sizes([*weight_tensors(self.model), *beside], self.device)
        self._trainable_bytes = sum(trainable.values())
        self._frozen_bytes = sum(weights.values()) - self._trainable_bytes
        self._claim([*weight_tensors(self.model), *beside], "weights")
        self._find_gradients()
        if self.optimizer is not None:
            self._find_state(self.optimizer)

        with ExitStack() as undo:  # undone at once if something here raises, by stop() otherwise
            self._install(undo)
            self._undo = undo.pop_all()
        Ledger._running = self

    def stop(self) -> None:
        """End counting and leave no hook behind. Raises RuntimeError if this ledger is not running."""
        if Ledger._running is not self:
            raise RuntimeError("This ledger is not running; call start() first.")
        if _get_current_dispatch_mode() is not self._mode:
            raise RuntimeError("stop() must be called outside any dispatch mode that was entered after start().")
        self._undo.close()
        Ledger._running = None
        self._end_window()
        self._find_gradients()
        self._claim(weight_tensors(self.model), "weights")  # a parameter may have been given a new storage
        for record in list(self._live.values()):
            record.reference = None
        self._live.clear()
        if self._watches_cuda():
            self._cuda_max = torch.cuda.max_memory_allocated(self.device)

    def report(self) -> MemoryReport:
        """What was counted since start(). Raises RuntimeError before the first start()."""
        if not self._started:
            raise RuntimeError("The ledger has counted nothing yet; run a step inside `with ledger:` first.")
        windows = [*self._saved, self._at_forward_end]
        saved = max(windows, key=lambda window: sum(window.values()))
        by_module: dict[str, int] = {}
        if self.module_depth is not None:
            for record, size in saved.items():
                path = ".".join(record.module.split(".")[: self.module_depth])
                by_module[path] = by_module.get(path, 0) + size

        kept = {record for window in windows for record in window}

        def part(record: _Record) -> str:
            if record.part is None and record.logits:
                return "logits_and_loss"
            return record.part or ("saved_for_backward" if record in kept else "temporary")

        peak = replay(
            ((part(record), size) for record, size in self._existing),
            ((part(record), change, phase) for record, change, phase in self._log),
        )
        return MemoryReport(
            peak_bytes=sum(peak.parts.values()),
            peak_phase=peak.phase,
            at_peak=peak.parts,
            by_phase=peak.by_phase,
            moments=peak.moments,
            saved_bytes=sum(saved.values()),
            largest=peak.largest,
            trainable_bytes=self._trainable_bytes,
            frozen_bytes=self._frozen_bytes,
            by_module=by_module,
            device=str(self.device),
            cuda_max_allocated_bytes=self._cuda_max,
        )

    def kept(self) -> list[tuple[torch.UntypedStorage, int, str]]:
        """Storages kept for backward if it began now, with bytes and the path of the module each was born in."""
        storages = ((record.reference() if record.reference else None, record) for record in self._kept_now())
        return [(storage, record.size, record.module) for storage, record in storages if storage is not None]

    # What the ledger is told, by torch's hooks

    def _install(self, undo: ExitStack) -> None:
        handles = [
            register_module_forward_pre_hook(self._before_module),
            register_module_forward_hook(self._after_module, with_kwargs=True, always_call=True),
            register_optimizer_step_pre_hook(self._before_step),
            register_optimizer_step_post_hook(self._after_step),
        ]
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_hook(functools.partial(self._before_accumulation, parameter)))
                handles.append(parameter.register_post_accumulate_grad_hook(self._after_accumulation))
        for handle in handles:
            undo.callback(handle.remove)

        undo.enter_context(resizes_told_to(self._resized))
        if self._watches_cuda():
            torch.cuda.reset_peak_memory_stats(self.device)
        self._mode = undo.enter_context(EveryOperation(self._operation))

    def _before_module(self, module: nn.Module, args: Any) -> None:
        if id(module) in self._paths:
            if not self._modules and not in_backward():
                self._find_gradients()
                self._in_optimizer = False
                if self._window is None:
                    self._window, self._window_start = [], len(self._log)
            self._modules.append(module)

    def _after_module(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if module in self._modules:
            while self._modules.pop() is not module:
                pass  # modules that an exception left without a call of this hook
        if self._modules or self._window is None or id(module) not in self._paths or in_backward():
            return
        if len(rest) == 2:  # kwargs and outputs; when the forward raised, torch passes a lone None
            self._claim_inputs(tensors_in((args, rest[0])))
            for tensor in tensors_in(rest[1]):
                for record in self._records(tensor):
                    record.holders = [*(record.holders or []), weakref.ref(tensor)]
        self._at_forward_end = self._kept_now()

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._find_gradients()
        self._find_state(optimizer)
        self._in_optimizer = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._find_state(optimizer)
        self._in_optimizer = False

    def _before_accumulation(self, parameter: nn.Parameter, gradient: Tensor) -> None:
        # A later hook of the user's may consume parameter.grad before ours sees it, so remember what came in.
        self._incoming[id(parameter)] = self._records(gradient) if parameter.grad is None else []

    def _after_accumulation(self, parameter: Tensor) -> None:
        incoming = self._incoming.pop(id(parameter), [])
        if parameter.grad is not None:
            self._claim([parameter.grad], "gradients")
        else:
            for record in incoming:
                record.part = record.part or "gradients"

    def _operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        phase = self._phase()
        if phase == "backward":
            self._gradients_due = True
            if self._window is not None:
                self._end_window()
        elif self._gradients_due:
            self._find_gradients()
        # torch.tensor makes its storage out of sight and then "lifts" it: the one argument that is new
        existing = func is not torch.ops.aten.lift_fresh.default
        for tensor in operands((*args, *kwargs.values())):
            if tensor.layout is not torch.strided or id(tensor.untyped_storage()) not in self._live:
                self._see(tensor, phase, existing=existing)
        result = func(*args, **kwargs)
        made = operands((result,))
        for tensor in made:
            self._see(tensor, phase)
        if func is torch.ops.aten.ones_like.default and phase == "other":
            self._roots += [record for tensor in made for record in self._records(tensor)]
        elif made:
            self._roots = []
        return result

    def _died(self, record: _Record, key: int, reference: object) -> None:
        if self._window is not None and in_backward():
            self._end_window()
        if self._live.get(key) is record:
            del self._live[key]
            self._log.append((record, -record.size, "other"))
        record.alive = False

    # The book itself

    def _phase(self) -> Phase:
        if in_backward():
            return "backward"
        if self._modules:
            return "forward"
        return "optimizer" if self._in_optimizer else "other"

    def _see(self, tensor: Tensor, phase: Phase, existing: bool = False) -> None:
        """Log the birth or the new size of the tensor's storages."""
        if tensor.device != self.device:
            return
        for storage in storages_of(tensor):
            key, size = id(storage), storage.nbytes()
            record = self._live.get(key)
            if record is not None:
                if size != record.size:
                    self._resized(storage)
                continue
            module = self._paths[id(self._modules[-1])] if self._modules else ""
            record = _Record(size, -1 if existing else len(self._log), module, "inputs" if existing else None)
            record.logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
            record.reference = weakref.ref(storage, functools.partial(self._died, record, key))
            self._live[key] = record
            if existing:
                self._existing.append((record, size))
                continue
            self._log.append((record, size, phase))
            if self._window is not None:
                self._window.append(record)
                if not self._modules:
                    record.holders = [weakref.ref(tensor)]

    def _resized(self, storage: torch.UntypedStorage) -> None:
        record, size = self._live.get(id(storage)), storage.nbytes()
        if record is not None and size != record.size:
            self._log.append((record, size - record.size, self._phase()))
            record.size = size

    def _records(self, tensor: Tensor) -> list[_Record]:
        """Records of the tensor's storages, those made on sight included; none on another device."""
        self._see(tensor, "other", existing=True)
        return [self._live[id(s)] for s in storages_of(tensor) if id(s) in self._live]

    def _claim(self, tensors: Iterable[Tensor], part: str) -> None:
        """Give the tensors' storages a part, where they have none or were taken for inputs."""
        for tensor in tensors:
            for record in self._records(tensor):
                if record.part in (None, "inputs"):
                    record.part = part

    def _claim_inputs(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            for record in self._records(tensor):
                if record.born < self._window_start:  # later ones are activations passed between parts of the model
                    record.part = record.part or "inputs"

    def _find_gradients(self) -> None:
        self._gradients_due = False
        self._claim((p.grad for p in self.model.parameters() if p.grad is not None), "gradients")

    def _find_state(self, optimizer: torch.optim.Optimizer) -> None:
        self._claim(tensors_in(list(optimizer.state.values())), "optimizer_state")

    def _kept_now(self) -> dict[_Record, int]:
        """What the window's graph keeps alive at this moment, with sizes."""
        born = (r for r in self._window or () if r.alive and r.part is None and r not in self._roots)
        return {r: r.size for r in born if r.holders is None or held_beyond(r.python_holders())}

    def _end_window(self) -> None:
        # Without a backward, what the last forward left at its end is the answer.
        self._saved.append(self._kept_now() if in_backward() else self._at_forward_end)
        self._window, self._at_forward_end = None, {}

    def _watches_cuda(self) -> bool:
        fake = any(isinstance(tensor, FakeTensor) for tensor in self.model.parameters())
        return self.device.type == "cuda" and torch.cuda.is_available() and not fake
