"""Tasks of EleutherAI's lm-evaluation-harness, on the model as it was trained."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ...errors import SettingError, did_you_mean
from ...modes import in_eval_mode
from ..measures import Better, Measure
from .base import Extra

if TYPE_CHECKING:
    from ...training.run import Ready
    from ...training.settings import RunSettings

LESS_IS_BETTER = ("perplexity", "bits_per_byte", "ter", "brier_score")


class LmEval(Extra):
    """The figures `metrics` of `tasks`, as task_metric; of the metrics a task must have one.

    limit: rows of each task. include_path: a folder of task files of one's own.
    """

    name: ClassVar[str] = "lm_eval"
    of_language_models: ClassVar[bool] = True

    tasks: list[str] = Field(min_length=1, description="names of tasks")
    metrics: list[str] = Field(default_factory=lambda: ["acc"], min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    batch: int = Field(8, ge=1)
    include_path: str | None = Field(None, min_length=1)

    @property
    def measures(self) -> tuple[Measure, ...]:
        pairs = [(task, metric) for task in self.tasks for metric in self.metrics]
        return tuple(Measure(_name(task, metric), f"{metric} of {task}", "", way_of(metric)) for task, metric in pairs)

    @property
    def source(self) -> str | None:
        return self.include_path

    def check(self, run: RunSettings) -> None:
        super().check(run)
        try:
            known = _task_manager(self.include_path).all_tasks
        except ImportError:
            raise SettingError("it needs lm_eval, which is missing: pip install 'shoestring[lm-eval]'") from None
        if unknown := [task for task in self.tasks if task not in known]:
            raise SettingError(f"unknown task {unknown[0]!r}. {did_you_mean(unknown[0], known)}")

    def before(self, ready: Ready) -> None:
        manager = _task_manager(self.include_path)
        for task in self.tasks:
            try:
                loaded = manager.load(task)
            except Exception as error:  # whatever the file of a task or its data may bring
                raise SettingError(f"measure.lm_eval: {task} cannot be loaded: {error}") from error
            if task not in {**loaded["tasks"], **loaded["groups"]}:
                raise SettingError(f"measure.lm_eval: {task} is a tag; name tasks of it: {', '.join(loaded['tasks'])}.")
            self._need_metric(task, {metric for part in loaded["tasks"].values() for metric in part.aggregation()})

    def _need_metric(self, task: str, has: Collection[str]) -> None:
        if not set(self.metrics) & set(has):
            wanted, known = ", ".join(self.metrics), ", ".join(sorted(has))
            raise SettingError(f"measure.lm_eval: {task} has none of {wanted}; it has {known}.")

    def after(self, ready: Ready) -> dict[str, float]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        model: Any = ready.attached.model
        with in_eval_mode(model):
            harness = HFLM(pretrained=model, tokenizer=ready.trainer.processing_class, batch_size=self.batch)
            found: Any = simple_evaluate(
                model=harness,
                tasks=self.tasks,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=_task_manager(self.include_path),
                bootstrap_iters=0,
                log_samples=False,
            )
        figures: dict[str, float] = {}
        for task in self.tasks:
            has = {name.partition(",")[0]: value for name, value in found["results"][task].items() if name != "alias"}
            self._need_metric(task, has)  # a group may have fewer than its tasks
            figures |= {_name(task, metric): float(has[metric]) for metric in self.metrics if metric in has}
        return figures


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """The harness's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _name(task: str, metric: str) -> str:
    """A name that filters of reports can read."""
    return re.sub(r"\W+", "_", f"{task}_{metric}")


def way_of(metric: str) -> Better:
    """Which way a metric of the harness is better."""
    return "lower" if any(part in metric for part in LESS_IS_BETTER) else "higher"
