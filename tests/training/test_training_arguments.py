"""The trainer's arguments: defaults that fit what a run file says."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoestring import Recipe
from shoestring.errors import SettingError
from shoestring.training import RunSettings
from shoestring.training.run import move_ahead, training_arguments
from shoestring.training.tasks import TASKS


def made(path: Path) -> Any:
    settings = RunSettings.load(path)
    return training_arguments(settings, TASKS[settings.task](settings), {"validation": ()})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "metric", "higher"),
    [
        ("text-classification", None, True),
        ("text-classification", "eval_accuracy", True),
        ("text-classification", "loss", False),
        ("causal-lm", None, False),
        ("causal-lm", "mean_token_accuracy", True),
    ],
)
def test_the_best_model_is_that_of_the_metric_asked_for(
    run_file: Callable[..., Path], task: str, metric: str | None, higher: bool
) -> None:
    train = {"save_strategy": None, "save_steps": None, "metric_for_best_model": metric}
    assert made(run_file("run", task=task, train=train)).greater_is_better is higher


@pytest.mark.parametrize("metric", ["f1", "perplexity", "id3_numbers"])
def test_what_is_not_evaluated_chooses_no_model(run_file: Callable[..., Path], metric: str) -> None:
    train = {"metric_for_best_model": metric}
    with pytest.raises(SettingError, match=f"must be one of loss, mean_token_accuracy, .* measures '{metric}'"):
        made(run_file("run", task="causal-lm", train=train))


@pytest.mark.parametrize(("technique", "metric"), [("id3", "id3_numbers"), ("density_loss", "density")])
def test_what_a_technique_measures_may_choose_the_model(
    run_file: Callable[..., Path], technique: str, metric: str
) -> None:
    train = {"metric_for_best_model": metric, "greater_is_better": False}
    chosen = made(run_file("one", task="causal-lm", recipe=[technique], train=train))
    assert (chosen.metric_for_best_model, chosen.greater_is_better) == (metric, False)


def test_a_metric_that_is_left_empty_is_the_tasks(run_file: Callable[..., Path]) -> None:
    path = run_file("run")
    path.write_text(path.read_text().replace("train:\n", "train:\n  metric_for_best_model:\n"))
    assert made(path).metric_for_best_model == "accuracy"


@pytest.mark.parametrize(("metric", "mode"), [("accuracy", "max"), ("loss", "min")])
def test_schedules_that_look_at_quality_know_which_way_is_better(
    run_file: Callable[..., Path], metric: str, mode: str
) -> None:
    train = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": metric, "eval_strategy": "epoch"}
    assert made(run_file("run", train=train)).lr_scheduler_kwargs == {"mode": mode}
    train["lr_scheduler_kwargs"] = {"patience": 3}
    assert made(run_file("two", train=train)).lr_scheduler_kwargs == {"mode": mode, "patience": 3}
    train["lr_scheduler_kwargs"] = '{"patience": 3}'
    assert made(run_file("three", train=train)).lr_scheduler_kwargs == {"mode": mode, "patience": 3}


def test_evaluations_by_the_steps_of_logging_have_checkpoints_too(run_file: Callable[..., Path]) -> None:
    train = {"eval_strategy": "steps", "logging_steps": 30, "save_steps": None}
    arguments = made(run_file("run", train=train))
    assert (arguments.load_best_model_at_end, arguments.eval_steps, arguments.save_steps) == (True, 30, 30)


def test_early_stopping_needs_no_checkpoints_but_evaluations(run_file: Callable[..., Path]) -> None:
    train = {"save_strategy": "no", "eval_strategy": "epoch"}
    arguments = made(run_file("run", train=train, early_stopping_patience=2))
    assert (arguments.load_best_model_at_end, arguments.metric_for_best_model) == (False, "accuracy")
    with pytest.raises(SettingError, match=r"early_stopping_patience needs evaluations; set train\.eval_strategy"):
        made(run_file("none", train={"eval_strategy": "no"}, early_stopping_patience=2))


def test_checkpoints_come_where_evaluations_do(run_file: Callable[..., Path]) -> None:
    def steps_of(**train: Any) -> tuple[float, float | None]:
        settings = RunSettings.load(run_file("run", train={"eval_strategy": "steps", "eval_steps": 40, **train}))
        made = training_arguments(settings, TASKS[settings.task](settings), {"validation": ()})  # type: ignore[arg-type]
        assert made.load_best_model_at_end
        return made.save_steps, made.eval_steps

    assert steps_of(save_steps=None) == (40, 40)
    assert steps_of(save_steps=80) == (80, 40)


@pytest.mark.parametrize(
    ("changed", "attributes", "moved"),
    [
        ({}, {}, "meta"),
        ({"device": torch.device("cpu")}, {}, "cpu"),
        ({"fsdp": "full_shard"}, {}, "cpu"),
        ({}, {"hf_device_map": {"": 0}}, "cpu"),
        ({}, {"is_quantized": True}, "cpu"),
    ],
)
def test_a_model_is_where_it_will_train_before_it_is_calibrated(
    changed: dict[str, Any], attributes: dict[str, Any], moved: str
) -> None:
    model = torch.nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(model, name, value)
    arguments = SimpleNamespace(**{"device": torch.device("meta"), "fsdp": "", "deepspeed": None, **changed})
    move_ahead(model, arguments)  # type: ignore[arg-type]
    assert model.weight.device.type == moved


@pytest.mark.parametrize(
    ("recipe", "runs"),
    [
        ([{"lora": {"r": 2}}], False),
        ([{"paca": {"r": 2}}], False),
        ([{"paca": {"r": 2, "selection": "gradient"}}], True),
        ([{"speft": {"count": 5}}], True),
        ([{"speft": {"count": 5, "score": "magnitude"}}], False),
        ([{"lora": {"r": 2}}, {"embedding_pruning": {}}], False),
    ],
)
def test_recipes_say_whether_they_run_the_model_to_be_attached(recipe: list[Any], runs: bool) -> None:
    assert any(technique.runs_model for technique in Recipe.from_list(recipe).techniques) is runs
