"""Callbacks that look at a run without changing it: memory of one step, time, and a wish to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..fakes import has_values
from ..memory import Kept, KeptReport, Ledger, MemoryReport


@dataclass(frozen=True)
class StepShape:
    """The largest micro-batch of one step.

    tokens: of a row, padding included; None where the inputs are no sequences of tokens.
    padding_fraction: share of its tokens that is padding; None where nothing says so.
    """

    rows: int
    tokens: int | None
    padding_fraction: float | None

    def to_dict(self) -> dict[str, Any]:
        """The shape as plain JSON values."""
        return asdict(self)


def shape_of(model: nn.Module, inputs: dict[str, Any]) -> StepShape | None:
    """Of what a model is called with; None where its main input is not among the named arguments."""
    main = inputs.get(str(getattr(model, "main_input_name", "input_ids")))
    if not isinstance(main, Tensor) or main.dim() == 0:
        return None
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    of_tokens = main if main.dim() == 2 else labels if isinstance(labels, Tensor) and labels.dim() == 2 else None
    padding = None
    if isinstance(mask, Tensor) and mask.shape == main.shape and has_values(mask):
        padding = 1 - float(mask.count_nonzero()) / mask.numel()
    return StepShape(main.shape[0], None if of_tokens is None else of_tokens.shape[1], padding)


class StepMemory(TrainerCallback):
    """The ledger over a step: the second of this process, when the optimizer's state is there, or the only one.

    And over the last one, since some methods change what a step takes as they go. report: of the first of these.
    at_end: of the last step, None where that is the same or where training ended before. shape: of the largest
    micro-batch in the first.
    """

    def __init__(self, module_depth: int | None = None, *, explain: bool = False) -> None:
        self.module_depth = module_depth
        self.explain = explain
        self.report: MemoryReport | None = None
        self.at_end: MemoryReport | None = None
        self.shape: StepShape | None = None
        self.kept: KeptReport | None = None  # only if it is to explain what is kept
        self.watching = False
        self.steps = 0
        self._ledger: Ledger | None = None
        self._kept: Kept | None = None
        self._looking: Any = None  # the hook that looks at the inputs

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Start before a chosen step."""
        self.steps += 1
        is_last = state.max_steps - state.global_step == 1
        if self.steps == 2 or is_last:
            self._ledger = Ledger(model, getattr(optimizer, "optimizer", optimizer), module_depth=self.module_depth)
            self._ledger.start()
            self.watching = True
            if self.report is not None:
                return
            self._looking = model.register_forward_pre_hook(self._look, with_kwargs=True)
            if self.explain:
                self._kept = Kept(self._ledger)
                self._kept.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after it."""
        if self.watching and self._ledger is not None:
            self.abandon()
            if self.report is not None:
                self.at_end = self._ledger.report()
            else:
                self.report = self._ledger.report()
                self.kept = self._kept.report() if self._kept is not None else None
            self._ledger = self._kept = None

    def abandon(self) -> None:
        """Stop, also in the middle of a step that failed."""
        if self.watching and self._ledger is not None:
            if self._kept is not None:
                self._kept.stop()
            self._ledger.stop()
            if self._looking is not None:
                self._looking.remove()
            self.watching = False

    def _look(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Keep the shape with most tokens."""
        found = shape_of(model, kwargs)
        if found is not None and (self.shape is None or _tokens(found) > _tokens(self.shape)):
            self.shape = found


def _tokens(shape: StepShape) -> int:
    return shape.rows * (shape.tokens or 1)


class StepTimes(TrainerCallback):
    """Seconds from the first forward of a step to its update; data loading and the step the ledger slowed left out."""

    def __init__(self, memory: StepMemory):
        self.seconds: list[float] = []
        self.tokens = 0
        self._memory = memory
        self._began: tuple[float, int] | None = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the time; runs after StepMemory, so that the step it watches is known."""
        _synchronize()
        self._began = None if self._memory.watching else (time.perf_counter(), int(state.num_input_tokens_seen))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step."""
        if self._began is not None:
            _synchronize()
            began, tokens = self._began
            self.seconds.append(time.perf_counter() - began)
            self.tokens += int(state.num_input_tokens_seen) - tokens


def _synchronize() -> None:
    """Wait for the GPU, whose work a clock on the CPU does not see."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class AtFirstStep(TrainerCallback):
    """Calls what it is given once the first step was made, before anything of the run is saved."""

    def __init__(self, call: Callable[[], None]):
        self._call = call

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Call it; again and again does no harm."""
        self._call()


class StopWhenAsked(TrainerCallback):
    """Ends a run after the current step, with a checkpoint, once ctrl-C was pressed; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop where that was asked for."""
        if self.asked:
            control.should_save = True
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave out what belongs to the end of an epoch where the run stops within one: the loop calls this anyway."""
        if self.asked and state.global_step < state.max_steps and (state.epoch or 0) % 1:
            control.should_save = control.should_evaluate = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch ctrl-C for the length of a with-block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        before = signal.signal(signal.SIGINT, ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
