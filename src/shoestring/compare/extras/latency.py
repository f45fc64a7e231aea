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
        rows: Any = ready.trainer.train_dataset
        ready.trainer.args.per_device_eval_batch_size = self.batch
        loader = ready.trainer.get_eval_dataloader(rows.select(range(min(self.batch, len(rows)))))
        batch = dict(ready.trainer._prepare_inputs(next(iter(loader))))
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
