"""Latency: how long a forward of the trained model takes, with its adapters merged where they can be."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from ...errors import SettingError
from ...training.merging import merged_model
from ..measures import Measure
from .base import Extra, device_of

if TYPE_CHECKING:
    from ...training.run import Ready


class Latency(Extra):
    """Median seconds of a forward of one batch of training rows without dropout or gradients."""

    name: ClassVar[str] = "latency"
    alters_model: ClassVar[bool] = True

    batch: int = Field(8, ge=1)
    repeats: int = Field(10, ge=1)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (Measure("latency_seconds", f"a forward of {self.batch} rows, adapters merged", "seconds"),)

    def after(self, ready: Ready) -> dict[str, float]:
        batch = self._batch(ready.trainer)
        model: Any = ready.attached.model
        try:
            model = merged_model(ready.attached)
        except SettingError as error:
            self._notes.append(f"latency of the model as trained: {error}")
        model.eval()
        seconds = []
        with torch.no_grad():
            for repeat in range(self.repeats + 2):  # two to warm up
                if device_of(model).type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                model(**batch)
                if device_of(model).type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 2:
                    seconds.append(time.perf_counter() - began)
        return {"latency_seconds": statistics.median(seconds)}

    def _batch(self, trainer: Any) -> dict[str, Any]:
        rows, arguments = trainer.train_dataset, trainer.args
        evaluated = arguments.per_device_eval_batch_size
        arguments.per_device_eval_batch_size = self.batch
        try:
            loader = trainer.get_eval_dataloader(rows.select(range(min(self.batch, len(rows)))))
            return dict(trainer._prepare_inputs(next(iter(loader))))
        finally:
            arguments.per_device_eval_batch_size = evaluated
