"""Trainings of a benchmark: what each comes to, and a list of them worked off so that it can be stopped and resumed."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback

from shoestring import assets
from shoestring.training import RunSettings, train

Outcome = dict[str, Any]


class Curve(TrainerCallback):
    """The held-out loss after each evaluation, and the processor's seconds of each step."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.process_time() - self.began)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        if "eval_loss" in metrics:
            self.points.append((state.global_step, metrics["eval_loss"]))


def run(settings: dict[str, Any]) -> Outcome:
    """Quality, held-out curve, bytes kept, seconds a step and losses of one training, whose files are not kept."""
    curve = Curve()
    with tempfile.TemporaryDirectory() as folder:
        settings = {**settings, "output_dir": f"{folder}/run"}
        settings["train"] = {**settings["train"], "save_strategy": "no", "report_to": "none"}
        report = train(RunSettings.from_dict(settings), callbacks=[curve])
    return {
        "quality": report.quality,
        "curve": curve.points,
        "saved_bytes": report.memory["saved_bytes"] if report.memory else None,
        "step_seconds": statistics.median(curve.seconds),
        "trained_parameters": report.trained_parameters,
        "losses": report.losses,
    }


def finish(
    planned: Iterable[tuple[str, dict[str, Any]]],
    done: dict[str, Outcome],
    measure: Callable[[dict[str, Any]], Outcome],
    keep: Callable[[], None],
) -> None:
    """Put what is planned and not done yet into `done`, and `keep` it after each."""
    for key, settings in planned:
        if key not in done:
            done[key] = measure(settings)
            keep()
            print(f"finished {key}", flush=True)


@functools.cache
def word_problems() -> dict[str, str]:
    """Files of the packaged word problems, those that are not trained on as validation data."""
    folder = tempfile.mkdtemp()
    files = {"train": f"{folder}/train.jsonl", "test": f"{folder}/validation.jsonl"}
    for split, file in files.items():
        assets.load_data("gsm8k-test")[split].to_json(file)
    return {"train": files["train"], "validation": files["test"]}
