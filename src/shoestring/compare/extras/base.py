"""The base of what a suite may measure beside training: settings, checks, and figures from the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, PrivateAttr

from ...errors import SettingError
from ...training.tasks import TASKS
from ..measures import Measure

if TYPE_CHECKING:
    from ...training.run import Ready
    from ...training.settings import RunSettings


class Extra(BaseModel, ABC):
    """One thing to measure; its fields are its settings in a suite.

    name: in a suite's `measure`. alters_model: whether `after` leaves another model behind, so that others go first.
    of_language_models: whether only these have it. notes: what is to be said of the figures of this run.
    split: of the held-out rows that runs are compared on, set before `before` and `after`; None without such rows.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    name: ClassVar[str]
    alters_model: ClassVar[bool] = False
    of_language_models: ClassVar[bool] = False
    _notes: list[str] = PrivateAttr(default_factory=list)
    _split: str | None = PrivateAttr(None)

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The figures it gives."""

    def check(self, run: RunSettings) -> None:
        """Refuse what it cannot measure, before anything is loaded.

        Raises SettingError.
        """
        if self.of_language_models and TASKS[run.task].peft_task_type != "CAUSAL_LM":
            raise SettingError(f"it is for language models, which {run.task} does not train.")

    def before(self, ready: Ready) -> None:
        """Look at the model with its recipe, before the first step.

        Raises SettingError where the data is not fit for it.
        """

    @property
    def source(self) -> str | None:
        """A file or folder that its figures depend on."""
        return None

    @abstractmethod
    def after(self, ready: Ready) -> dict[str, float]:
        """The figures, from the trained model."""

    @property
    def split(self) -> str | None:
        return self._split

    @split.setter
    def split(self, split: str | None) -> None:
        self._split = split

    @property
    def notes(self) -> list[str]:
        return self._notes


def device_of(model: Any) -> Any:
    """Where a model's inputs go."""
    return next(model.parameters()).device
