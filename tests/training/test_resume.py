"""Resume: a run that was killed ends bit for bit where one that was left alone ends."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from shoestring.quantisation.calibration import Calibrated
from shoestring.recipe import Moment, Phase, Technique
from shoestring.technique import register_technique
from shoestring.training import checkpoints
from shoestring.training.run import Ready, prepare, train
from shoestring.training.settings import RunSettings

LORA = {"lora": {"r": 2, "target_modules": ["query", "value"], "lora_dropout": 0.2}}
LORA_OF_A_DECODER = {"lora": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.2}}
BILEVEL = {"bilevel_zofo": {}}
BUDGET = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 8, "deltaT": 1}
RECIPES = {
    "lora": [LORA],
    "s2_lora": [{"s2_lora": {"r": 2, "target_modules": ["query", "value"], "sparsity": 0.5}}],
    # peft keeps the averages that its ranks are cut by outside of the weights
    "adalora": [{"adalora": {"target_modules": ["query"], **BUDGET}}],
    "own_state": [LORA, {"drifting_pull": {}}],
    "own_optimizer": [LORA, {"lora_fa": {}}],
    # layers and adapters are smaller from step 3 on, and the optimizer has forgotten those
    "light_peft": [
        LORA,
        {"light_peft": {"estimation_steps": 3, "channel_multiple": 4, "removed_heads_fraction": 0.5}},
    ],
    # which blocks train hangs on scores, and on draws that go on where they were
    "blocks_rest": [LORA, {"ist": {"active_layers": 1, "suppressed_layers": 1, "num_draws": 2, "period": 2}}],
    # what trains was found in the data
    "routed": [{"spt": {"budget": 300, "calibration_rows": 8, "r": 1}}],
    "full": [],
    # steps and offsets begin to learn at a step of their own
    "warm_up": [{"l4q": {"target_modules": ["query", "value"], "group_size": 4, "r": 2, "warmup_steps": 3}}],
    # which units train is drawn once, and the base stands in another order
    "permuted": [{"s2ft": {"o_ratio": 0.25, "down_ratio": 0.2, "permute": True}}],
    # the prompt is what an encoder gives, whose weights train
    "prompt_encoder": [{"p_tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8}}],
}
# 24 rows in batches of 4 are 3 steps of 2 batches an epoch: the checkpoints at 2 and 4 lie inside epochs, 6 between two
STEPS = {"max_steps": 8, "gradient_accumulation_steps": 2, "save_steps": 2, "lr_scheduler_type": "cosine"}
HELD_OUT = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": None}


@register_technique
@dataclass
class DriftingPull(Technique):
    """Pulls the trained weights towards a random tensor that moves after every step: state that steers training."""

    name: ClassVar[str] = "drifting_pull"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    strength: float = 0.5

    def __post_init__(self) -> None:
        self.target = torch.zeros(3)
        self.steps_seen = 0

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor:
        learned = [p for p in model.parameters() if p.requires_grad]
        aim = self.target.norm() + 0.01 * self.steps_seen
        return self.strength * torch.stack([(p - aim).square().mean() for p in learned]).mean()

    def on_step_end(self, moment: Moment) -> None:
        self.target += 0.1 * torch.randn(3)
        self.steps_seen += 1

    def state_dict(self) -> dict[str, Any]:
        return {"target": self.target.clone(), "steps_seen": self.steps_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.target, self.steps_seen = state["target"].clone(), state["steps_seen"]


def fails(reason: str) -> Callable[..., Any]:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(reason)

    return fail


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillAt(TrainerCallback):
    """Ends this process by SIGKILL at an event of step `step`."""

    def __init__(self, event: str, step: int):
        self.event, self.step = event, step

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "optimizer" and state.global_step + 1 == self.step:
            die()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "substep" and state.global_step + 1 == self.step:
            die()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "step" and state.global_step == self.step:
            die()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "evaluation" and state.global_step == self.step:
            die()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.event == "saved" and state.global_step == self.step:
            die()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        save, finish, rename = torch.save, checkpoints.finish, Path.rename

        def save_half(data: Any, path: Any, *rest: Any, **options: Any) -> None:
            save(data, path, *rest, **options)
            if "optimizer" in str(path) and f"checkpoint-{self.step}" in str(path):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        def without_manifest(written: Path, place: Path, *rest: Any) -> None:
            if written.name == f"checkpoint-{self.step}":
                die()
            finish(written, place, *rest)

        def before_rename(path: Path, target: Path) -> Path:
            if Path(target).name == f"checkpoint-{self.step}":
                die()
            return rename(path, target)

        if self.event == "optimizer file":
            torch.save = save_half
        elif self.event == "manifest":
            checkpoints.finish = without_manifest
        elif self.event == "rename":
            Path.rename = before_rename  # type: ignore[method-assign]


def train_in_child(path: Path, kill: tuple[str, int] | None, resume: bool) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # nothing may hang on what came before
    train(RunSettings.load(path), resume=resume, callbacks=[KillAt(*kill)] if kill else [])


@pytest.fixture(scope="module")
def child() -> Callable[..., int]:
    """Train in a process of its own, which is forked from one that has imported everything; gives the exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shoestring.training.run", "shoestring.training.trainer", "trl", "datasets"])

    def run(path: Path, kill: tuple[str, int] | None = None, resume: bool = False) -> int:
        process = context.Process(target=train_in_child, args=(path, kill, resume))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    return run


def outcome(folder: Path) -> tuple[list, dict[str, dict[str, float]], dict[str, Tensor]]:
    """Losses by step, quality, and all weights a run ended with."""
    report = json.loads((folder / "report.json").read_text())
    weights = {
        f"{path.name}/{name}": tensor
        for path in sorted((folder / "final").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return report["losses"], report["quality"], weights


def assert_same_end(one: Path, other: Path) -> None:
    losses, quality, weights = outcome(one)
    losses_too, quality_too, weights_too = outcome(other)
    assert losses == losses_too
    assert quality == quality_too
    assert weights.keys() == weights_too.keys()
    assert weights
    for name, tensor in weights.items():
        assert torch.equal(tensor, weights_too[name]), name


def uninterrupted(path: Path) -> None:
    report = train(RunSettings.load(path))
    assert report.status == "finished"
    assert len({loss for _, loss in report.losses}) > 1  # the losses compared say something


@pytest.mark.parametrize(
    ("recipe", "kill"),
    [
        ("lora", ("step", 5)),
        pytest.param("lora", ("optimizer file", 4), marks=pytest.mark.slow),
        ("s2_lora", ("manifest", 4)),
        ("adalora", ("step", 5)),
        pytest.param("own_optimizer", ("step", 5), marks=pytest.mark.slow),
        pytest.param("own_state", ("substep", 6), marks=pytest.mark.slow),
        ("own_state", ("saved", 6)),
        ("blocks_rest", ("step", 5)),
        pytest.param("routed", ("step", 5), marks=pytest.mark.slow),
        pytest.param("light_peft", ("step", 5), marks=pytest.mark.slow),
        pytest.param("light_peft", ("step", 3), marks=pytest.mark.slow),
        ("warm_up", ("step", 5)),
        pytest.param("warm_up", ("step", 3), marks=pytest.mark.slow),
        ("permuted", ("step", 5)),
        ("prompt_encoder", ("step", 5)),
        pytest.param("full", ("rename", 6), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value[0].replace(' ', '_')}-{value[1]}",
)
def test_resume_after_kill_9_ends_as_without_it(run_file, child, tmp_path, recipe, kill):
    uninterrupted(run_file("whole", recipe=RECIPES[recipe], train=STEPS))
    path = run_file("killed", recipe=RECIPES[recipe], train=STEPS)
    assert child(path, kill) == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_killed_twice_and_before_its_first_checkpoint_ends_as_without_it(run_file, child, tmp_path):
    uninterrupted(run_file("whole", recipe=RECIPES["own_state"], train=STEPS))
    path = run_file("killed", recipe=RECIPES["own_state"], train=STEPS)
    assert child(path, ("optimizer", 1)) == -signal.SIGKILL
    assert child(path, ("manifest", 4), resume=True) == -signal.SIGKILL
    assert child(path, ("step", 7), resume=True) == -signal.SIGKILL
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_resume_with_losses_logged_over_several_steps(run_file, child, tmp_path):
    logged = {**STEPS, "logging_steps": 3}
    uninterrupted(run_file("whole", train=logged))
    path = run_file("killed", train=logged)
    assert child(path, ("step", 5)) == -signal.SIGKILL  # the checkpoint lies between two logged losses
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "recipe",
    [
        [LORA_OF_A_DECODER],
        [{"speft": {"density": 0.05, "calibration_rows": 8}}, {"zeroth_order": {}}],
        [{"prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}}],
    ],
    ids=["lora", "single_numbers", "projected_prefix"],
)
def test_resume_of_causal_lm_through_trl(run_file, child, tmp_path, recipe):
    uninterrupted(run_file("whole", task="causal-lm", recipe=recipe, train=STEPS))
    path = run_file("killed", task="causal-lm", recipe=recipe, train=STEPS)
    assert child(path, ("step", 5)) == -signal.SIGKILL
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def best(folder: Path) -> tuple[int, float]:
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = json.loads((newest / "trainer_state.json").read_text())
    return state["best_global_step"], state["best_metric"]


def test_the_best_model_is_chosen_across_a_kill_during_evaluation(run_file, child, tmp_path, review_csv):
    arguments = {**STEPS, **HELD_OUT, "metric_for_best_model": "loss", "greater_is_better": False, "learning_rate": 0.3}
    held_out = {"validation": str(review_csv)}
    uninterrupted(run_file("whole", data=held_out, train=arguments))
    assert best(tmp_path / "whole")[0] < 8  # so that the best is not simply the last
    path = run_file("killed", data=held_out, train=arguments)
    assert child(path, ("evaluation", 6)) == -signal.SIGKILL
    assert child(path, resume=True) == 0
    assert best(tmp_path / "killed") == best(tmp_path / "whole")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    "kill",
    [
        ("step", 5),
        pytest.param(("evaluation", 6), marks=pytest.mark.slow),
        pytest.param(("saved", 6), marks=pytest.mark.slow),
    ],
    ids=lambda kill: f"{kill[0]}-{kill[1]}",
)
def test_early_stopping_counts_on_across_a_kill(run_file, child, tmp_path, review_csv, kill):
    # with steps this small the accuracy never changes: the first evaluation is the best, two more end the run
    arguments = {**STEPS, **HELD_OUT, "max_steps": 20, "learning_rate": 1e-9}
    settings = {"data": {"validation": str(review_csv)}, "train": arguments, "early_stopping_patience": 2}
    uninterrupted(run_file("whole", **settings))
    assert outcome(tmp_path / "whole")[0][-1][0] == 6
    path = run_file("killed", **settings)
    assert child(path, kill) == -signal.SIGKILL
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_a_checkpoint_at_the_end_of_an_epoch_holds_its_evaluation(run_file, child, tmp_path, review_csv):
    """A run that goes on from it begins with the next epoch, so what it leaves out would never be done."""
    arguments = {**STEPS, "save_steps": 3, "eval_strategy": "epoch", "max_steps": 20, "learning_rate": 1e-9}
    settings = {"data": {"validation": str(review_csv)}, "train": arguments, "early_stopping_patience": 2}
    uninterrupted(run_file("whole", **settings))
    assert outcome(tmp_path / "whole")[0][-1][0] == 9  # of three evaluations the first is the best
    path = run_file("killed", **settings)
    assert child(path, ("saved", 3)) == -signal.SIGKILL
    state = json.loads((tmp_path / "killed" / "checkpoint-3" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "eval_loss" in row] == [3]
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


def test_early_stopping_added_at_a_resume_counts_from_there(run_file, tmp_path, review_csv):
    arguments = {**STEPS, **HELD_OUT, "max_steps": 20, "learning_rate": 1e-9}
    settings = {"data": {"validation": str(review_csv)}, "train": arguments}

    class Interrupt(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RunSettings.load(run_file("run", **settings)), callbacks=[Interrupt()])
    path = run_file("run", early_stopping_patience=2, **settings)
    report = train(RunSettings.load(path), resume=True)
    assert report.steps == 6  # no better than at step 2, at 4 and 6


CHOSEN_BY_DATA = {
    "spt": [{"spt": {"budget": 300, "calibration_rows": 8, "r": 1}}],
    "speft": [{"speft": {"count": 50, "calibration_rows": 8}}],
    "speft_beside_bilevel": [LORA_OF_A_DECODER, {"speft": {"count": 50, "calibration_rows": 8}}, BILEVEL],
    "sparse_grad": [{"sparse_grad": {"density": 0.05, "calibration_rows": 8}}],
    "sketchtune": [{"sketchtune": {"groups": 1, "bits": 2, "calibration_rows": 8}}],
}


@pytest.mark.parametrize("recipe", CHOSEN_BY_DATA.values(), ids=CHOSEN_BY_DATA)
def test_what_was_chosen_by_data_is_there_at_a_resume_and_not_chosen_anew(run_file, monkeypatch, prompt_jsonl, recipe):
    """On another machine, or a GPU whose sums are not the same twice, another choice might come of it."""
    data = {"validation": str(prompt_jsonl)}
    settings = RunSettings.load(run_file("run", task="causal-lm", data=data, recipe=recipe, train=STEPS))
    trained: list[dict[str, torch.Size]] = []

    def note(ready: Ready) -> None:
        trained.append({name: p.shape for name, p in ready.attached.model.named_parameters() if p.requires_grad})

    train(settings, on_ready=note)
    monkeypatch.setattr(Calibrated, "rows_drawn", fails("data is looked at"))
    ready = prepare(settings, checkpoint=Path(settings.output_dir) / "checkpoint-8")
    note(ready)
    assert trained[0] == trained[1]
    assert ready.trainer.create_optimizer() is not None  # where all that trains has its group
    with pytest.raises(AssertionError, match="data is looked at"):
        prepare(settings)


def test_the_quality_before_training_is_evaluated_once(run_file, tmp_path, review_csv):
    settings = {"data": {"validation": str(review_csv)}, "train": {**STEPS, "eval_on_start": True}}
    path, report = run_file("run", **settings), tmp_path / "run" / "report.json"
    quality = train(RunSettings.load(path)).quality
    report.unlink()  # as if it had been killed after its last checkpoint
    said: list[str] = []
    assert train(RunSettings.load(path), resume=True, say=said.append).quality == quality
    assert said.count("Evaluating on validation") == 1
    report.unlink()
    settings["data"]["test"] = str(review_csv)
    assert "test, before" in train(RunSettings.load(run_file("run", **settings)), resume=True).quality


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "import sys; from shoestring.cli import main; sys.exit(main())", *arguments]


@contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen]:
    """The command line in a process of its own, ended whatever happens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen, there: Callable[[], bool], pause_seconds: float = 0.01) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(pause_seconds)


@pytest.mark.slow
def test_the_command_killed_while_it_writes_a_checkpoint_goes_on_by_resume(run_file, child, tmp_path):
    many = {"max_steps": 60, "save_steps": 1, "gradient_accumulation_steps": 2}
    uninterrupted(run_file("whole", recipe=RECIPES["lora"], train=many))
    path, folder = run_file("killed", recipe=RECIPES["lora"], train=many), tmp_path / "killed"
    with started("train", str(path)) as process:
        wait_for(process, (folder / "checkpoint-3").exists)
        wait_for(process, (folder / checkpoints.BESIDE).exists, pause_seconds=0)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", folder)


def test_ctrl_c_saves_says_how_to_go_on_and_resumes(run_file, child, tmp_path):
    many = {"max_steps": 60, "save_steps": 50, "gradient_accumulation_steps": 2}
    uninterrupted(run_file("whole", recipe=RECIPES["lora"], train=many))
    path, folder = run_file("stopped", recipe=RECIPES["lora"], train=many), tmp_path / "stopped"
    with started("train", str(path), "train.logging_steps=1") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait(60) == 130, said
    (written,) = folder.glob("checkpoint-*")
    step = int(written.name.split("-")[1])
    assert 3 <= step < 50
    assert checkpoints.damage(written) is None
    assert f"Stopped after step {step}, with a checkpoint." in said
    assert f"shoestring train {path} train.logging_steps=1 --resume" in " ".join(said.split())
    assert "Traceback" not in said
    assert not (folder / "report.json").exists()
    assert child(path, resume=True) == 0
    assert_same_end(tmp_path / "whole", folder)
