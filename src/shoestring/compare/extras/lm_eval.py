"""Tasks of EleutherAI's lm-evaluation-harness, on the model as it was trained."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ...errors import SettingError, did_you_mean
from ...modes import in_eval_mode
from ..measures import Better, Measure
from .base import Extra

if TYPE_CHECKING:
    from ...training.run import Ready
    from ...training.settings import RunSettings


class LmEval(Extra):
    """The figures `metrics` of `tasks`, as task_metric; of the metrics a task must have one.

    metrics: names, or METRIC,FILTER where a task has one by several filters of answers. limit: rows of each task.
    include_path: a folder of task files of one's own.
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
        return tuple(
            Measure(_name(task, metric), f"{metric} of {task}", "", self._better(task, metric))
            for task in self.tasks
            for metric in self.metrics
        )

    def _better(self, task: str, metric: str) -> Better | None:
        """Which way is better, as the task's file says or else the harness; None where neither does."""
        from lm_eval.api.registry import is_higher_better

        metric = metric.partition(",")[0]
        higher = next(_told(_task_manager(self.include_path).task_index, task, metric), None)
        if higher is None:
            higher = is_higher_better(metric)
        return None if higher is None else "higher" if higher else "lower"

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
            parts = loaded["tasks"].values()
            known = {f"{metric},{name}" for part in parts for metric in part.aggregation() for name in _filters(part)}
            self._chosen(task, known)

    def _chosen(self, task: str, known: Iterable[str]) -> dict[str, str]:
        """Names of our figures, and which of the harness's they are. known: of the task, as METRIC,FILTER."""
        known = sorted(known)
        found: dict[str, str] = {}
        for metric in self.metrics:
            fitting = [each for each in known if metric in (each, each.partition(",")[0])]
            if len(fitting) > 1:
                named = " or ".join(map(repr, fitting))
                raise SettingError(f"measure.lm_eval: {task} has {metric} by several filters; name one: {named}.")
            found |= {_name(task, metric): each for each in fitting}
        if not found:
            has = ", ".join(each.removesuffix(",none") for each in known)
            raise SettingError(f"measure.lm_eval: {task} has none of {'; '.join(self.metrics)}; it has {has}.")
        return found

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
            has = found["results"][task]
            known = (name for name in has if "," in name and not name.partition(",")[0].endswith("_stderr"))
            chosen = self._chosen(task, known)  # a group may have fewer than its tasks
            figures |= {name: float(has[each]) for name, each in chosen.items()}
        return figures


@functools.cache
def _task_manager(include_path: str | None) -> Any:
    """The harness's index of tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _name(task: str, metric: str) -> str:
    """A name that filters of reports can read."""
    return re.sub(r"\W+", "_", f"{task}_{metric}")


def _told(index: Mapping[str, Any], task: Any, metric: str) -> Iterator[bool]:
    """What the files of a task, or of those in a group or under a tag, say of whether more of a metric is better."""
    entry = index.get(task.get("task", "") if isinstance(task, dict) else task)
    told = (entry and entry.cfg) or {}
    for each in told.get("metric_list") or ():
        if each.get("metric") == metric and "higher_is_better" in each:
            yield bool(each["higher_is_better"])
    inside = told["task"] if isinstance(told.get("task"), list) else []
    for inner in inside + (sorted(entry.tags) if entry and entry.kind.name == "TAG" else []):
        yield from _told(index, inner, metric)


def _filters(task: Any) -> list[str]:
    """What a task makes of an answer before it is scored; a metric is there once for each."""
    told = getattr(getattr(task, "config", None), "filter_list", None)
    return [each["name"] for each in told] if told else ["none"]
