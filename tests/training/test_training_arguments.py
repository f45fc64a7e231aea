"""The trainer's arguments: defaults that fit what a run file says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from shoestring.training import RunSettings
from shoestring.training.run import training_arguments
from shoestring.training.tasks import TASKS


def test_checkpoints_come_where_evaluations_do(run_file: Callable[..., Path]) -> None:
    def steps_of(**train: Any) -> tuple[float, float | None]:
        settings = RunSettings.load(run_file("run", train={"eval_strategy": "steps", "eval_steps": 40, **train}))
        made = training_arguments(settings, TASKS[settings.task](settings), {"validation": ()})  # type: ignore[arg-type]
        assert made.load_best_model_at_end
        return made.save_steps, made.eval_steps

    assert steps_of(save_steps=None) == (40, 40)
    assert steps_of(save_steps=80) == (80, 40)
