"""Suites that really run, each run in a process of its own: what is kept, what fails, and what a kill leaves."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from transformers import Trainer

from shoestring.compare import runner, worker
from shoestring.compare.extras import Extra
from shoestring.compare.measures import Measure
from shoestring.compare.results import Result
from shoestring.compare.runner import Store, check_suite, comparison_of, run_suite, state_of
from shoestring.compare.suite import Case, Suite
from shoestring.compare.summary import Asked, compare_results
from shoestring.compare.worker import Order, run_case
from shoestring.errors import SettingError
from shoestring.training.output import held
from shoestring.training.run import Ready
from tiny_runs import reviews

LORA = [{"lora": {"r": 2, "target_modules": ["query"]}}]
MEASURED_TIME = ("seconds", "_a_second", "process_peak", "latency")  # what no two runs share


@pytest.fixture
def suite_file(tmp_path: Path, run_file: Callable[..., Path], review_csv: Path) -> Callable[..., Path]:
    """Write a suite of the tiny classifier: three steps of full tuning and of LoRA, evaluated on the way."""

    def write(name: str = "suite", train: dict[str, Any] | None = None, **changes: Any) -> Path:
        evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        data = {"validation": str(review_csv), "test": str(review_csv)}
        run = yaml.safe_load(run_file("base", data=data, train=evaluated | (train or {})).read_text())
        del run["recipe"], run["output_dir"]
        suite = {
            "base": run,
            "recipes": {"full tuning": [], "lora": LORA},
            "seeds": [0],
            "budget": {"steps": 3},
            "baseline": "lora",
            "output_dir": str(tmp_path / name),
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(suite, sort_keys=False))
        return path

    return write


def order_of(case: Case, folder: Path, **changes: Any) -> Order:
    given = {"budget": None, "extras": (), "split": None, "quality": "accuracy", "target": None}
    return Order(cases=(case,), folder=str(folder), keep_weights=False, **given | changes)


def numbers_of(suite: Suite) -> dict[str, Any]:
    """What must be the same whenever a suite is run."""
    found = {}
    for digest, result in state_of(suite).results.items():
        own = result.shoestring
        assert own is not None
        values = {name: value for name, value in own.values.items() if not any(part in name for part in MEASURED_TIME)}
        curve = [(step, value) for step, _, value in own.curve]
        found[digest] = (values, own.losses, curve, own.scores, own.memory, own.quality)
    return found


def test_a_suite_runs_and_says_what_each_recipe_cost(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(seeds=[0, 1], target=0.1, measure=["latency"]))
    heard: list[Any] = []
    run_suite(suite, on_event=heard.append)
    assert [event[0] for event in heard if event[0] in ("checking", "started", "finished")] == [
        *["checking"] * 2,
        *["started", "finished"] * 4,
    ]
    assert {event[2:] for event in heard if event[0] == "step"} == {(1, 3), (2, 3), (3, 3)}
    found = comparison_of(suite)
    full, lora = sorted(found.recipes, key=lambda recipe: recipe.name)
    assert full.seeds == lora.seeds == (0, 1)
    assert lora.values["trained_parameters"].mean < full.values["trained_parameters"].mean
    assert lora.values["optimizer_bytes"].mean < full.values["optimizer_bytes"].mean
    assert lora.values["checkpoint_bytes"].mean < full.values["checkpoint_bytes"].mean
    for name in ("accuracy", "f1_macro", "peak_bytes", "kept_bytes", "step_seconds", "latency_seconds", "ppt", "pme"):
        assert name in full.values, name
    assert sum(lora.memory.values()) == lora.values["peak_bytes"].values[0]
    assert [step for step, _ in lora.losses[0]] == [1, 2, 3]
    assert len(lora.curve[0]) == 2  # after step 2, and at the end
    for recipe in (full, lora):  # steps that the ledger watched take their time, too
        ends = [recipe.curve[seed][-1][0] for seed in recipe.seeds]
        assert ends == pytest.approx(recipe.values["all_steps_seconds"].values)
    assert "seconds_to_target" in lora.values
    assert full.difference is not None
    assert found.missing == 0
    assert not (Path(suite.output_dir) / runner.AT_WORK).exists()
    (result,) = [r for r in state_of(suite).results.values() if r.run_info.experiment_name == "lora/seed1"]
    assert len(result.shoestring.scores) == 24
    assert len({r.shoestring.rows for r in state_of(suite).results.values()}) == 1
    assert sum(result.shoestring.scores) / 24 == pytest.approx(result.shoestring.values["accuracy"])
    assert result.run_info.peft_config["peft_type"] == "LORA"
    assert result.run_info.train_config["seed"] == 1
    assert result.train_info.metrics[-1]["test accuracy"] == result.shoestring.values["accuracy"]


def test_recipes_on_other_held_out_rows_are_not_paired(
    suite_file: Callable[..., Path], review_csv: Path, tmp_path: Path
) -> None:
    head, *rows = review_csv.read_text().splitlines(keepends=True)
    (tmp_path / "other.csv").write_text("".join([head, *rows[::-1]]))
    other = {"recipe": LORA, "data": {"test": str(tmp_path / "other.csv")}}
    suite = Suite.load(suite_file(recipes={"lora": LORA, "other": other}, budget={"steps": 1}))
    run_suite(suite, check=False)
    assert len({result.shoestring.rows for result in state_of(suite).results.values()}) == 2
    assert all(recipe.difference is None for recipe in comparison_of(suite).recipes)


def test_what_is_finished_is_used_again_also_under_another_name(suite_file: Callable[..., Path]) -> None:
    run_suite(Suite.load(suite_file(recipes={"lora": LORA})), check=False)
    wide = [{"lora": {"r": 3, "target_modules": ["query"]}}]
    suite = Suite.load(suite_file(recipes={"renamed": LORA, "wide": wide}, baseline="renamed"))
    assert state_of(suite).to_do == suite.cases[1:]
    kept = {path: path.read_bytes() for path in (Path(suite.output_dir) / "results").iterdir()}
    heard: list[Any] = []
    run_suite(suite, on_event=heard.append)
    assert {event[1].name for event in heard} == {"wide"}
    assert all(path.read_bytes() == held for path, held in kept.items())
    assert {recipe.name for recipe in comparison_of(suite).recipes} == {"renamed", "wide"}


def test_what_stands_under_two_names_is_run_once(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(recipes={"lora": LORA, "again": LORA}))
    assert state_of(suite).to_do == suite.cases[:1]
    run_suite(suite, check=False)
    first, second = comparison_of(suite).recipes
    assert {first.name, second.name} == {"lora", "again"}
    assert first.values == second.values


def test_the_same_suite_gives_the_same_numbers(suite_file: Callable[..., Path]) -> None:
    first, second = Suite.load(suite_file("one")), Suite.load(suite_file("two"))
    run_suite(first, check=False)
    run_suite(second, check=False, jobs=2)
    assert numbers_of(first) == numbers_of(second)


def test_a_run_in_a_suite_is_a_run_of_shoestring_train(suite_file: Callable[..., Path], tmp_path: Path) -> None:
    from shoestring.training.run import train
    from shoestring.training.settings import RunSettings

    suite = Suite.load(suite_file(recipes={"lora": LORA}))
    run_suite(suite, check=False)
    (result,) = state_of(suite).results.values()
    path = tmp_path / "alone.yaml"
    path.write_text(result.shoestring.run_file)
    report = train(RunSettings.load(path, [f"output_dir={tmp_path / 'alone'}"]))
    assert report.quality == result.shoestring.quality
    assert [list(row) for row in report.losses] == [list(row) for row in result.shoestring.losses]
    most = max((report.memory, report.memory_at_end), key=lambda memory: memory["peak_bytes"])
    assert most["at_peak"] == result.shoestring.memory
    assert report.memory_at_end["peak_bytes"] == result.shoestring.values["last_step_bytes"]


def test_what_cannot_run_is_told_before_the_first_run(suite_file: Callable[..., Path]) -> None:
    recipes = {
        "good": LORA,
        "no such layer": [{"lora": {"target_modules": ["nowhere"]}}],
        "no such column": {"recipe": LORA, "data": {"text": "review"}},
        "no linear layer": [{"hut": {"target_modules": ["LayerNorm"]}}],
    }
    suite = Suite.load(suite_file(recipes=recipes, baseline="good"))
    heard: list[Any] = []
    with pytest.raises(SettingError) as error:
        run_suite(suite, on_event=heard.append)
    text = str(error.value)
    assert text.startswith("3 of 4 recipes cannot run; nothing was started:")
    assert "no such layer: " in text
    assert "no such column: The train data has no column 'review'" in text
    assert "no linear layer: " in text
    assert "started" not in [event[0] for event in heard]
    with pytest.raises(SettingError) as error:
        check_suite(suite, jobs=3)
    assert str(error.value) == text
    assert not list(Path(suite.output_dir).rglob("*.json"))


def test_processes_that_check_end_by_themselves_and_leave_nothing_behind(suite_file: Callable[..., Path]) -> None:
    path = suite_file(recipes={"lora": LORA, "bitfit": ["bitfit"]}, baseline=None)
    command = [sys.executable, "-m", "shoestring", "compare", str(path), "--dry-run", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "Checked 2 recipes: nothing is in the way.\n"
    assert "leaked" not in done.stderr


def test_what_differs_in_the_learning_rate_alone_is_checked_once(suite_file: Callable[..., Path]) -> None:
    grid = {"train.learning_rate": [1e-3, 4e-3], "recipe.lora.target_modules": [["query"], ["nowhere"]]}
    suite = Suite.load(suite_file(recipes={"lora": {"recipe": LORA, "grid": grid}}, seeds=[0, 1], baseline=None))
    heard: list[Any] = []
    with pytest.raises(SettingError, match="2 of 4 recipes cannot run") as error:
        check_suite(suite, on_event=heard.append)
    assert [event[0] for event in heard] == ["checking"] * 2
    assert all("nowhere" in line for line in str(error.value).splitlines()[1:])


def test_a_failure_is_kept_with_its_reason_and_stops_no_other(suite_file: Callable[..., Path]) -> None:
    recipes = {"wild": {"recipe": [], "train": {"learning_rate": 1e30}}, "lora": LORA}
    suite = Suite.load(suite_file(recipes=recipes, train={"max_grad_norm": 0.0}))
    run_suite(suite)
    found = comparison_of(suite)
    assert [recipe.name for recipe in found.recipes] == ["lora"]
    (failure,) = found.failures
    assert (failure.name, failure.seed) == ("wild", 0)
    assert "The loss became" in failure.reason
    assert {p.suffix for p in (Path(suite.output_dir) / runner.FAILED).iterdir()} == {".json", ".log"}
    assert state_of(suite).to_do == ()  # what failed is tried again only if asked
    run_suite(suite, retry_failed=True)
    assert len(list((Path(suite.output_dir) / runner.FAILED).glob("*.json"))) == 2  # nothing is overwritten


def test_a_process_that_dies_is_a_failure_with_its_signal(
    suite_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = Suite.load(suite_file(recipes={"lora": LORA}, train={"max_steps": None}, budget={"steps": 500}))
    start, started = runner._start, []
    monkeypatch.setattr(runner, "_start", lambda *args, **kw: started.append(start(*args, **kw)) or started[-1])

    def kill(event: Any) -> None:
        if event[0] == "step" and event[2] == 2:
            os.kill(started[-1].process.pid, signal.SIGKILL)

    run_suite(suite, check=False, on_event=kill)
    (failure,) = comparison_of(suite).failures
    assert failure.reason == "The process was ended by SIGKILL; the system may have run out of memory."


def test_an_interrupted_run_is_written_down_and_run_again(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(recipes={"lora": LORA}))

    def interrupt(event: Any) -> None:
        if event[0] == "step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(suite, check=False, on_event=interrupt)
    (path,) = (Path(suite.output_dir) / runner.CANCELLED).glob("*.json")
    assert Result.read(path).train_info.status == "cancelled"
    assert state_of(suite).to_do == suite.cases
    run_suite(suite, check=False)
    assert len(state_of(suite).results) == 1


def test_two_comparisons_do_not_share_a_folder(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file())
    with held(Store(suite).folder, "comparison"), pytest.raises(SettingError, match="in use by another comparison"):
        run_suite(suite)


def test_a_folder_that_cannot_be_written_is_refused(suite_file: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="is a file, or lies inside one"):
        run_suite(Suite.load(suite_file(output_dir=str(tmp_path / "file" / "inner"))))
    with pytest.raises(SettingError, match="jobs must be at least 1, got 0"):
        run_suite(Suite.load(suite_file()), jobs=0)


def test_an_edited_result_is_refused_before_anything_runs(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(recipes={"lora": LORA}))
    run_suite(suite, check=False)
    (path,) = (Path(suite.output_dir) / runner.RESULTS).iterdir()
    values = json.loads(path.read_text())
    values["shoestring"]["values"]["accuracy"] = 1.0
    path.write_text(json.dumps(values))
    with pytest.raises(SettingError, match="was changed since it was written"):
        run_suite(suite)


class Precision(Extra):
    """Tells whether it looks at the model in mixed precision."""

    name: ClassVar[str] = "precision"

    @property
    def measures(self) -> tuple[Measure, ...]:
        return ()

    def before(self, ready: Ready) -> None:
        self.notes.append(f"before {torch.is_autocast_enabled('cpu')}")

    def after(self, ready: Ready) -> dict[str, float]:
        self.notes.append(f"after {torch.is_autocast_enabled('cpu')}")
        return {}


@pytest.mark.parametrize("bf16", [False, True])
def test_all_is_measured_in_the_precision_of_training(
    suite_file: Callable[..., Path], tmp_path: Path, bf16: bool
) -> None:
    (case,) = Suite.load(suite_file(recipes={"lora": LORA}, seeds=[0], train={"bf16": bf16})).cases
    order = order_of(case, tmp_path, extras=(Precision(),))
    result = run_case(case, order, lambda message: None)
    assert result.shoestring is not None
    assert result.shoestring.notes == [f"before {bf16}", f"after {bf16}"]


def test_losses_differ_as_they_are_shown_and_on_equal_batches_alone(
    run_file: Callable[..., Path], prompt_jsonl: Path, tmp_path: Path
) -> None:
    """Of 24 rows in batches of 7 the last has 3: a score is of a batch, and the loss is that of rows."""
    lora = [{"lora": {"r": 2, "target_modules": ["q_proj"]}}]

    def results_of(recipes: dict[str, Any], seeds: list[int], length: int = 12, batch: int = 7) -> list[Result]:
        data = {"test": str(prompt_jsonl), "max_length": length}
        run = yaml.safe_load(
            run_file("base", task="causal-lm", data=data, train={"per_device_eval_batch_size": batch}).read_text()
        )
        del run["recipe"], run["output_dir"]
        suite = Suite.from_dict({"base": run, "recipes": recipes, "seeds": seeds, "budget": {"steps": 2}})
        return [run_case(each, order_of(each, tmp_path, quality="loss"), lambda _: None) for each in suite.cases]

    results = results_of({"lora": lora, "full": {"recipe": [], "train": {"learning_rate": 0.05}}}, [0, 1])
    assert [result.shoestring.weights for result in results] == [[7, 7, 7, 3]] * 4
    assert len({(result.shoestring.rows, result.shoestring.batches) for result in results}) == 1
    compared = compare_results(Asked("suite", "causal-lm", "tiny", ("lora", "full"), "loss", "lora"), results)
    found = {recipe.name: recipe for recipe in compared.recipes}
    shown = found["full"].values["loss"].mean - found["lora"].values["loss"].mean
    assert found["full"].difference.mean == pytest.approx(shown, rel=1e-4)
    of_batches = [np.subtract(results[k].shoestring.scores, results[k + 2].shoestring.scores).mean() for k in (0, 1)]
    assert np.mean(of_batches) != pytest.approx(shown, rel=1e-3)
    others = [*results_of({"short": lora}, [0], length=6), *results_of({"even": lora}, [0], batch=6)]
    assert len({results[0].shoestring.batches, *(result.shoestring.batches for result in others)}) == 3
    assert others[1].shoestring.weights == []


def test_nothing_is_removed_that_a_comparison_has_not_made(suite_file: Callable[..., Path]) -> None:
    path = suite_file(recipes={"lora": LORA}, seeds=[0], keep_weights=True)
    suite = Suite.load(path)
    mine = Path(suite.output_dir, "runs", "mine.txt")
    mine.parent.mkdir(parents=True)
    mine.touch()
    run_suite(suite)
    kept = list(Path(suite.output_dir, "runs").rglob("*.safetensors"))
    assert kept
    again = Suite.load(path, ("keep_weights=false",))
    check_suite(again)
    run_suite(again)
    assert all(file.is_file() for file in (mine, *kept))
    assert not Path(suite.output_dir, runner.AT_WORK).exists()


def test_recipes_are_compared_on_the_split_that_is_wanted(suite_file: Callable[..., Path], tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("text,label\na lovely film,good\na dull film,bad\na warm plot,good\n")
    path = suite_file(recipes={"lora": LORA}, split="validation")
    suite = Suite.load(path, (f"base.data.validation={few}",))
    run_suite(suite, check=False)
    (result,) = state_of(suite).results.values()
    assert len(result.shoestring.scores) == 3
    assert result.shoestring.values["loss"] == result.shoestring.quality["validation"]["loss"]
    with pytest.raises(SettingError, match=r"split: this run has no validation data; name it as data\.validation"):
        run_suite(Suite.load(path, ("base.data.validation=", "base.train.eval_strategy=no")))


@pytest.mark.parametrize("budget", [{"tokens": 170}, {"seconds": 0.5}])
def test_budgets_in_tokens_and_seconds_become_steps(suite_file: Callable[..., Path], budget: dict[str, Any]) -> None:
    train = {"eval_strategy": "no", "save_strategy": "no"}
    suite = Suite.load(suite_file(recipes={"lora": LORA}, budget=budget, train=train))
    run_suite(suite)
    (result,) = state_of(suite).results.values()
    made = result.run_info.train_config["max_steps"]
    assert made == result.train_info.metrics[-1]["step"]
    assert yaml.safe_load(result.shoestring.run_file)["train"]["max_steps"] == made
    if "tokens" in budget:
        a_row = sum(len(row["text"].split()) + 2 for row in reviews(24)) / 24
        assert made == round(170 / (4 * a_row))
    else:
        assert made > 3
        assert 0.1 < result.train_info.train_time < 2.5  # a few milliseconds a step, on a machine that does other work


def test_neither_checks_nor_trials_make_a_hub_repository(
    suite_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(self: Any, *args: Any, **options: Any) -> None:
        raise AssertionError("a repository")

    monkeypatch.setattr(Trainer, "init_hf_repo", make)
    (case,) = Suite.load(suite_file(recipes={"lora": LORA}, seeds=[0], train={"push_to_hub": True})).cases
    worker.check(case, order_of(case, tmp_path))
    assert worker._seconds_a_step(case.settings) > 0


def process_of(settings: Any, threads: int) -> int:
    return os.getpid()


def test_a_trial_of_a_budget_in_seconds_is_no_part_of_the_measured_process(
    suite_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = Suite.load(suite_file(recipes={"lora": LORA}, seeds=[0])).cases
    monkeypatch.setattr(worker, "_trial", process_of)
    assert worker._seconds_a_step(case.settings) != os.getpid()


def test_what_was_told_of_a_run_is_there_when_an_extra_fails(suite_file: Callable[..., Path], tmp_path: Path) -> None:
    class Broken(Extra):
        name: ClassVar[str] = "broken"
        measures: ClassVar[tuple[Measure, ...]] = ()  # type: ignore[misc]

        def after(self, ready: Ready) -> dict[str, float]:
            raise ValueError("no such figure")

    (case,) = Suite.load(suite_file(recipes={"lora": LORA}, seeds=[0])).cases
    result = run_case(case, order_of(case, tmp_path, extras=(Broken(),)), lambda message: None)
    assert result.shoestring.notes == ["broken could not be measured: no such figure"]
    assert "accuracy" in result.shoestring.values


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "there are no held-out rows to measure accuracy on"),
        ({"quality": "loss", "target": 0.5, "test": True}, "target needs evaluations on the way"),
    ],
)
def test_data_without_the_rows_that_a_suite_needs_is_told_before_the_first_run(
    suite_file: Callable[..., Path], tmp_path: Path, review_csv: Path, changes: dict[str, Any], said: str
) -> None:
    data = {"validation": None, "test": str(review_csv) if changes.pop("test", False) else None}
    none = {"eval_strategy": "no", "save_strategy": "no"}
    recipes = {"lora": {"recipe": LORA, "data": data, "train": none}}
    (case,) = Suite.load(suite_file(recipes=recipes, seeds=[0])).cases
    with pytest.raises(SettingError, match=said):
        worker.check(case, order_of(case, tmp_path, **changes))


def test_the_peak_of_a_process_is_its_own(suite_file: Callable[..., Path]) -> None:
    """Memory that the starting process holds is not counted: a gigabyte more here changes nothing there."""
    suite = Suite.load(suite_file("one", recipes={"lora": LORA}))
    run_suite(suite, check=False)
    ballast = bytearray(os.urandom(1024)) * 2**20
    other = Suite.load(suite_file("two", recipes={"lora": LORA}))
    run_suite(other, check=False)
    peaks = [r.shoestring.values["process_peak_bytes"] for s in (suite, other) for r in state_of(s).results.values()]
    one, two = peaks
    assert len(ballast) == 2**30
    assert abs(two - one) < 2**27


def written_since(folder: Path, began: float) -> bool:
    for log in folder.glob("*.log"):
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_mtime > began:
                return True
    return False


def killed_and_resumed(path: Path, kills: int, seed: int) -> int:
    """Run a suite by the command line, killed at random moments of its runs, and again until it is finished.

    Returns how often it was killed before that.
    """
    at_work = Path(Suite.load(path).output_dir) / runner.AT_WORK
    draw, killed = random.Random(seed), 0
    command = [sys.executable, "-u", "-m", "shoestring", "compare", str(path), "--no-check"]
    while True:
        began = time.time()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        if killed < kills:
            lines = iter(process.stdout.readline, "")
            said = next((line for line in lines if line.startswith(("[1/", "error")) or "already" in line), "")
            assert "error" not in said, said
            while process.poll() is None and not written_since(at_work, began):  # until a run is at work
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 2))
            if process.poll() is None:
                process.kill()
                killed += 1
            process.communicate()
        else:
            said, _ = process.communicate()
            assert process.returncode == 0, said
        if process.returncode == 0:
            return killed


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "seed"), [(20, 0)])
def test_a_killed_suite_comes_to_the_same_numbers(suite_file: Callable[..., Path], kills: int, seed: int) -> None:
    recipes = {"full tuning": [], "lora": LORA, "bitfit": ["bitfit"]}
    changes = {"recipes": recipes, "seeds": list(range(14)), "budget": {"steps": 20}}
    whole, cut = Suite.load(suite_file("whole", **changes)), suite_file("cut", **changes)
    run_suite(whole, check=False)
    assert killed_and_resumed(cut, kills, seed) == kills
    assert numbers_of(Suite.load(cut)) == numbers_of(whole)
    assert len(numbers_of(whole)) == 42
