"""Forgetting: the loss on text that the run does not train on, after training less before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field, PrivateAttr

from ...errors import SettingError
from ...modes import in_eval_mode
from ...training.data import load_splits, need_columns
from ...training.settings import DataSettings
from ..measures import Measure
from .base import Extra, device_of

if TYPE_CHECKING:
    from ...training.run import Ready


class Forgetting(Extra):
    """Mean cross-entropy a token on `rows` texts of the column `text` of `data`, of its test split if it has one."""

    name: ClassVar[str] = "forgetting"
    of_language_models: ClassVar[bool] = True

    data: str = Field(min_length=1, description="general text, as data.train of a run file names it")
    text: str = Field("text", min_length=1)
    rows: int = Field(64, ge=1)
    max_length: int = Field(256, ge=2)
    _before: float = PrivateAttr(0.0)

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("forgetting", "forgetting: loss on other text, after less before"),
            Measure("general_loss", "loss on other text"),
        )

    @property
    def source(self) -> str:
        return self.data

    def before(self, ready: Ready) -> None:
        self._before = self._loss(ready)

    def after(self, ready: Ready) -> dict[str, float]:
        loss = self._loss(ready)
        return {"forgetting": loss - self._before, "general_loss": loss}

    def _loss(self, ready: Ready) -> float:
        wanted = {"train": self.data, "max_train_rows": self.rows, "max_eval_rows": self.rows}
        splits = load_splits(DataSettings.model_validate(wanted), seed=0)
        rows = splits["test"] if "test" in splits else splits["train"]
        need_columns("general", rows, self.text)
        model: Any = ready.attached.model
        tokenizer: Any = ready.trainer.processing_class
        total, tokens = 0.0, 0
        with torch.no_grad(), in_eval_mode(model):
            for text in rows[self.text]:
                encoded = tokenizer(text, truncation=True, max_length=self.max_length, return_tensors="pt")
                ids = encoded["input_ids"].to(device_of(model))
                if ids.shape[1] > 1:
                    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
                    total, tokens = total + float(loss) * (ids.shape[1] - 1), tokens + ids.shape[1] - 1
        ready.attached.take_outputs()
        if not tokens:
            raise SettingError(f"measure.forgetting: the texts in {self.text!r} of {self.data} are empty.")
        return total / tokens
