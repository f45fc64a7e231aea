"""Bad input: one clear message each, exit code 2 (1 for a run that failed), and nothing lost or half-written."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers.models.bert.modeling_bert import BertOutput

from shoestring.cli import main
from shoestring.training import RunSettings, checkpoints, train
from shoestring.training.output import LOCK


def fails(capsys, *arguments, code: int = 2) -> str:
    """The one message that `shoestring train ARGUMENTS` ends with."""
    capsys.readouterr()
    assert main(["train", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert printed.err.count("error:") == 1
    return " ".join(printed.err[printed.err.index("error:") :].split())


@pytest.fixture(autouse=True)
def without_prediction(monkeypatch):
    """The report's prediction beside the measurement takes longer than these runs."""
    monkeypatch.setattr(sys.modules["shoestring.cli.train"], "_predict", None)


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but the lock, with what it holds."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != LOCK}


def finished(path: Path) -> Path:
    """The output folder of a run that has ended well."""
    assert main(["train", str(path)]) == 0
    return path.with_suffix("")


class Interrupted(Exception):
    """Ends a run in a test as a kill would: nothing of ours catches it."""


@pytest.fixture(scope="module")
def kept_folder(tmp_path_factory):
    """Where the stopped run is kept for the next test; not there before the first."""
    return tmp_path_factory.mktemp("stopped") / "run"


@pytest.fixture
def stopped(run_file, monkeypatch, kept_folder):
    """A run with checkpoints 2 and 4 and no end; gives its run file and folder."""
    path = run_file("stopped")
    folder = path.with_suffix("")
    if kept_folder.exists():
        shutil.copytree(kept_folder, folder)
        return path, folder

    def stop(*args, **kwargs):
        raise Interrupted("stopped by the test")

    with monkeypatch.context() as patch:
        patch.setattr("shoestring.training.run._save_final", stop)
        assert main(["train", str(path)]) == 1
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    shutil.copytree(folder, kept_folder)
    return path, folder


class TestRunFile:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"train": {"learning_rat": 1}}, "Did you mean 'learning_rate'"),
            ({"train": {"save_only_model": True}}, "checkpoints hold all that --resume needs"),
            ({"train": {"enable_jit_checkpoint": True}}, "as of ctrl-C, saves a checkpoint"),
            ({"train": {"prediction_loss_only": True}}, "evaluation measures what the task is measured by"),
            (
                {"train": {"train_sampling_strategy": "group_by_length"}},
                "must be random or sequential, since a",
            ),
            ({"modle": "x"}, "Did you mean 'model'"),
            ({"task": "text-clasification"}, "Did you mean 'text-classification'"),
            ({"recipe": [{"lorra": {}}]}, "unknown technique 'lorra'. Did you mean 'lora'"),
            ({"recipe": [{"lora": {"r": 0}}]}, "r"),
            ({"model": "packaged:minilmm"}, "minilm"),
            ({"model": "./no/such/folder"}, "The model folder ./no/such/folder does not exist"),
            ({"model": "./weights.gguf"}, "The model file ./weights.gguf does not exist"),
            ({"model": "nobody/no-such-model"}, "The model 'nobody/no-such-model' cannot be loaded"),
            ({"data": {"train": "no-such-file.csv"}}, "The train data file no-such-file.csv does not exist"),
            ({"data": {"train": "nobody/no-such-data"}}, "is no hub id that can be reached"),
            ({"data": {"train": "packaged:rotten-tomatos"}}, "rotten-tomatoes"),
            ({"data": {"text": "txet"}}, "no column 'txet'. Did you mean 'text'"),
            ({"data": {"label": "lable"}}, "no column 'lable'. Did you mean 'label'"),
            ({"data": {"max_length": 33}}, "data.max_length must be at most 32, the positions of this model, got 33"),
            ({"recipe": [{"lora": {"target_modules": ["querry"]}}]}, "query"),
            ({"recipe": [{"hut": {"target_modules": ["embedings", "query"]}}]}, "embeddings"),
            ({"recipe": [{"lora": {"target_modules": ".*no_such.*"}}]}, "no_such"),
            ({"train": {"eval_strategy": "epoch"}}, "needs a validation split"),
            ({"train": {"fp16": True, "bf16": True}}, "bf16"),
            ({"early_stopping_patience": 2}, "early_stopping_patience needs a validation split"),
        ],
    )
    def test_it_is_refused_by_name_and_nothing_is_written(self, change, message, run_file, capsys):
        path = run_file("wrong", **change)
        assert message in fails(capsys, path)
        assert not path.with_suffix("").exists()

    def test_the_line_is_told(self, run_file, capsys):
        path = run_file("wrong", train={"learning_rat": 1})
        line = 1 + next(i for i, text in enumerate(path.read_text().splitlines()) if "learning_rat:" in text)
        assert f"wrong.yaml:{line}" in fails(capsys, path).replace(", line ", ":").replace(" line ", ":")

    def test_a_wrong_override_is_told(self, run_file, capsys):
        assert "per_device_train_batch_size must be at least 1, got 0" in fails(
            capsys, run_file("wrong"), "train.per_device_train_batch_size=0"
        )

    def test_errors_are_json_for_machines(self, run_file, capsys):
        assert main(["train", str(run_file("wrong", modle="x")), "--json"]) == 2
        assert "modle" in json.loads(capsys.readouterr().out)["error"]

    def test_debug_shows_where(self, run_file, capsys):
        assert main(["train", str(run_file("wrong", modle="x")), "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err

    def test_no_traceback_from_the_command_itself(self, run_file):
        path = run_file("wrong", data={"train": "no-such-file.csv"})
        command = [sys.executable, "-c", "import sys; from shoestring.cli import main; sys.exit(main())", "train"]
        ended = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 2
        assert "no-such-file.csv does not exist" in ended.stderr.replace("\n", " ")
        assert "Traceback" not in ended.stderr


class TestData:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "is empty"),
            ("text,label\n", "is empty: it has no rows"),
            (
                "text,label\na film,0\nthe plot,7\na story,1\n",
                "Row 1 of train has the label 7 in 'label', out of range",
            ),
            ("text,label\na film,0.5\nthe plot,1\n", "must hold names or whole numbers, got 0.5"),
            ("text,label\na film,good\nthe plot,\n", "must hold names or whole numbers, got None"),
            (
                "text,label\na film,good\nthe plot,good\n",
                "All rows of train have the label 'good' in 'label', but there must be at least two classes",
            ),
            ("text,label\n,good\nthe plot,bad\n", "Row 0 of train holds no text in 'text'"),
            ("text,label\n" + "film " * 40 + ",good\nplot,bad\n", "more than the 32 positions of this model"),
        ],
    )
    def test_rows_that_cannot_be_learned_from_are_refused(self, text, message, run_file, tmp_path, capsys):
        data = tmp_path / "data.csv"
        data.write_text(text)
        assert message in fails(capsys, run_file("wrong", data={"train": str(data)}))

    def test_a_label_of_the_held_out_data_that_training_lacks_is_refused(self, run_file, tmp_path, capsys):
        held_out = tmp_path / "held_out.csv"
        held_out.write_text("text,label\na film,good\nthe plot,awful\n")
        message = fails(capsys, run_file("wrong", data={"validation": str(held_out)}))
        assert "Row 1 of validation has the label 'awful'" in message

    def test_a_decoder_without_its_columns_is_refused(self, run_file, tmp_path, capsys):
        data = tmp_path / "data.jsonl"
        data.write_text('{"question": "a", "answer": "b"}\n')
        message = fails(capsys, run_file("wrong", task="causal-lm", data={"train": str(data)}))
        assert "it has question, answer" in message or "it has answer, question" in message

    def test_a_decoder_is_refused_a_column_of_numbers(self, run_file, tmp_path, capsys):
        data = tmp_path / "data.csv"
        data.write_text("prompt,completion\none and one,2\ntwo and one,3\n")
        message = fails(capsys, run_file("wrong", task="causal-lm", data={"train": str(data)}))
        assert "Row 0 of train holds no text in 'completion', but 2" in message

    def test_a_file_that_is_no_table_is_refused(self, run_file, tmp_path, capsys):
        data = tmp_path / "data.parquet"
        data.write_bytes(b"no parquet at all")
        assert "cannot be read as parquet" in fails(capsys, run_file("wrong", data={"train": str(data)}))


class TestOutputFolder:
    def test_a_finished_run_is_neither_overwritten_nor_resumed(self, run_file, capsys):
        path = run_file("once")
        folder = finished(path)
        before = files(folder)
        assert "holds a run already" in fails(capsys, path)
        assert "has finished" in fails(capsys, path, "--resume")
        assert "give one of them" in fails(capsys, path, "--resume", "--overwrite")
        assert "no column 'txet'" in fails(capsys, path, "--overwrite", "data.text=txet")
        assert files(folder) == before

    def test_overwriting_starts_over(self, run_file):
        path = run_file("twice")
        losses = json.loads((finished(path) / "report.json").read_text())["losses"]
        assert main(["train", str(path), "--overwrite"]) == 0
        assert json.loads((path.with_suffix("") / "report.json").read_text())["losses"] == losses

    def test_a_run_that_comes_to_nothing_before_its_first_step_leaves_the_old_one(
        self, run_file, capsys, monkeypatch, review_csv
    ):
        def interrupted(*args, **kwargs):
            raise KeyboardInterrupt

        path = run_file("twice")
        folder = finished(path)
        before = files(folder)
        zeroth = [{"lora": {"r": 2, "target_modules": ["query"]}}, "bilevel_zofo"]
        run_file("twice", recipe=zeroth)  # which is told in the first step that it needs held-out rows
        assert "give a validation split" in fails(capsys, path, "--overwrite")
        assert files(folder) == before
        evaluated = {"data": {"validation": str(review_csv)}, "train": {"eval_on_start": True}}
        with monkeypatch.context() as patch:
            patch.setattr("shoestring.training.trainer.RecipeTrainer.training_step", interrupted)
            for name in ("twice", "new"):
                with pytest.raises(KeyboardInterrupt):
                    train(RunSettings.load(run_file(name, **evaluated)), overwrite=True)
        assert files(folder) == before
        assert not (folder.parent / "new").exists()
        (folder / ".replaced").mkdir()  # as a kill before the first step leaves it
        for path in (folder / "report.json", folder / "final"):
            path.rename(folder / ".replaced" / path.name)
        (folder / "before.json").touch()
        assert "has finished" in fails(capsys, run_file("twice"), "--resume")
        assert files(folder) == before
        fresh = run_file("fresh", recipe=zeroth)
        assert "give a validation split" in fails(capsys, fresh)
        assert not fresh.with_suffix("").exists()

    def test_overwriting_leaves_files_that_are_not_the_runs(self, run_file):
        path = run_file("twice")
        kept = finished(path) / "checkpoint-2-to-keep"
        kept.mkdir()
        (kept / "notes.txt").write_text("mine")
        os.utime(kept, (0, 0))  # older than every checkpoint: neither overwriting nor save_total_limit may remove it
        assert main(["train", str(path), "--overwrite"]) == 0
        assert (kept / "notes.txt").read_text() == "mine"

    def test_the_end_of_a_run_removes_no_checkpoint_of_another_name(self, run_file, review_csv):
        train = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2}
        path = run_file("limited", data={"validation": str(review_csv)}, train=train)
        kept = path.with_suffix("") / "checkpoint-2-to-keep"
        kept.mkdir(parents=True)
        (kept / "notes.txt").write_text("mine")
        finished(path)
        assert (kept / "notes.txt").read_text() == "mine"

    def test_a_readme_that_was_there_stays(self, run_file):
        path = run_file("documented", task="causal-lm")
        readme = path.with_suffix("") / "README.md"
        readme.parent.mkdir()
        readme.write_text("mine")
        finished(path)
        assert readme.read_text() == "mine"

    def test_several_processes_are_refused(self, run_file, capsys, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "trained by one process so far" in fails(capsys, run_file("two"))

    @pytest.mark.parametrize("fields", [{}, {"fsdp": "full_shard"}], ids=["copies", "fsdp"])
    def test_several_gpus_are_refused_before_anything_is_loaded(self, run_file, capsys, monkeypatch, fields):
        monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
        path = run_file("two", data={"train": "not there.csv"}, train=fields)
        assert "2 GPUs are visible to one process" in fails(capsys, path)

    def test_several_gpus_are_left_to_deepspeed(self, run_file, capsys, monkeypatch):
        monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
        path = run_file("two", data={"train": "not there.csv"}, train={"deepspeed": "stage2.json"})
        assert "not there.csv" in fails(capsys, path)

    def test_kernels_that_are_not_installed_are_refused_before_anything_is_loaded(self, run_file, capsys, monkeypatch):
        monkeypatch.setattr("shoestring.training.run.is_liger_kernel_available", lambda: False)
        path = run_file("kernels", data={"train": "not there.csv"}, train={"use_liger_kernel": True})
        assert "train.use_liger_kernel needs the package liger-kernel" in fails(capsys, path)

    def test_nothing_to_resume_is_told(self, run_file, capsys):
        assert "There is no run in" in fails(capsys, run_file("none"), "--resume")

    def test_a_file_in_its_place_is_told(self, run_file, capsys, tmp_path):
        (tmp_path / "taken").write_text("mine")
        assert "is a file" in fails(capsys, run_file("run"), f"output_dir={tmp_path / 'taken'}")
        assert (tmp_path / "taken").read_text() == "mine"

    def test_one_in_use_by_another_process_is_told(self, run_file, capsys):
        path = run_file("busy")
        folder = path.with_suffix("")
        folder.mkdir()
        hold = (
            f"from filelock import FileLock; lock = FileLock({str(folder / LOCK)!r}); lock.acquire(); "
            "print('held', flush=True); input()"
        )
        with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1, text=True) as other:
            assert other.stdout.readline() == "held\n"
            assert "is in use by another run" in fails(capsys, path)
            other.communicate("\n")
        finished(path)

    def test_no_permission_is_told(self, run_file, capsys, monkeypatch):
        path, access = run_file("locked"), os.access
        monkeypatch.setattr(os, "access", lambda place, mode: place != path.with_suffix("") and access(place, mode))
        assert "No permission to write in output_dir" in fails(capsys, path)


class TestFailedRuns:
    def test_a_loss_that_is_no_number_ends_the_run(self, run_file, capsys, monkeypatch):
        from shoestring.training.trainer import RecipeTrainer

        compute_loss = RecipeTrainer.compute_loss

        def diverging(self, *args, **kwargs):
            loss, outputs = compute_loss(self, *args, **{**kwargs, "return_outputs": True})
            loss = loss * (float("nan") if self.state.global_step == 3 else 1.0)
            return (loss, outputs) if kwargs.get("return_outputs") else loss

        monkeypatch.setattr(RecipeTrainer, "compute_loss", diverging)
        path = run_file("diverging")
        assert "became nan at step 4" in fails(capsys, path, code=1)
        folder = path.with_suffix("")
        assert [p.name for p in folder.glob("checkpoint-*")] == ["checkpoint-2"]
        assert checkpoints.damage(folder / "checkpoint-2") is None
        assert not (folder / "final").exists()
        assert not (folder / "report.json").exists()

    @pytest.mark.parametrize("where", ["checkpoint", "final", "report"])
    def test_a_disk_that_fills_loses_nothing(self, where, run_file, capsys, monkeypatch):
        full = OSError(errno.ENOSPC, "No space left on device")

        def fill(*args, **kwargs):
            raise full

        path = run_file("full")
        folder = path.with_suffix("")
        with monkeypatch.context() as patch:
            if where == "checkpoint":
                save = transformers.TrainerState.save_to_json

                def fill_later(state, *args):
                    return fill() if state.global_step == 4 else save(state, *args)

                patch.setattr(transformers.TrainerState, "save_to_json", fill_later)
            else:
                target = {"final": "trainer.RecipeTrainer.save_model", "report": "report.Report.write"}[where]
                if where == "final":
                    patch.setattr("shoestring.training.run._save_final", fill)
                else:
                    patch.setattr(f"shoestring.training.{target}", fill)
            message = fails(capsys, path, code=1)
        assert "The disk is full" in message
        assert "--resume" in message
        left = sorted(p.name for p in folder.glob("checkpoint-*"))
        assert left == (["checkpoint-2"] if where == "checkpoint" else ["checkpoint-2", "checkpoint-4"])
        assert all(checkpoints.damage(folder / name) is None for name in left)
        assert not (folder / "report.json").exists()
        assert main(["train", str(path), "--resume"]) == 0
        report = json.loads((folder / "report.json").read_text())
        assert (report["status"], report["steps"]) == ("finished", 4)
        assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    @pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("mount") is None,
        reason="a real full disk is a small tmpfs, which needs root to mount",
    )
    def test_a_disk_that_is_really_full(self, run_file, capsys, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.decode().strip()}")
        try:
            message = fails(capsys, run_file("full"), f"output_dir={disk / 'run'}", code=1)
            assert "The disk is full" in message
            assert all(checkpoints.damage(p) is None for p in (disk / "run").glob("checkpoint-*"))
            assert not (disk / "run" / "final").exists()
        finally:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("recipe", [[], [{"token_windows": {"window_tokens": 4}}]])
def test_a_machine_without_memory_for_a_step_says_so(run_file, capsys, monkeypatch, recipe):
    path = run_file("large", recipe=[{"lora": {"r": 2, "target_modules": ["query"]}}, *recipe])
    forward = BertOutput.forward
    monkeypatch.setattr(BertOutput, "forward", lambda *args: forward(*args) + torch.empty(2**50)[0])
    message = fails(capsys, path, code=1)
    assert "The machine ran out of memory" in message
    assert "train.per_device_train_batch_size" in message


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("name", "damage", "told"),
        [
            ("adapter_model.safetensors", lambda data: data[:-7], "bytes instead of"),
            ("optimizer.pt", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:], "does not hold what was"),
            ("trainer_state.json", None, "trainer_state.json is missing"),
            (checkpoints.MANIFEST, None, "not written to the end"),
            (checkpoints.MANIFEST, lambda data: data.replace(b'"identity"', b'"identify"'), "missing or unreadable"),
        ],
    )
    def test_a_damaged_one_is_named_and_the_one_before_used(self, name, damage, told, stopped, capsys):
        path, folder = stopped
        file = folder / "checkpoint-4" / name
        file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
        assert main(["train", str(path), "--resume"]) == 0
        printed = capsys.readouterr().out
        assert "checkpoint-4 is damaged" in printed
        assert told in printed
        assert "checkpoint-2." in printed
        assert json.loads((folder / "report.json").read_text())["steps"] == 4

    def test_without_a_whole_one_the_run_is_not_started_over_in_silence(self, stopped, capsys):
        path, folder = stopped
        for checkpoint in folder.glob("checkpoint-*"):
            (checkpoint / checkpoints.MANIFEST).unlink()
        assert "No whole checkpoint is left; start over with --overwrite" in fails(capsys, path, "--resume")

    @pytest.mark.parametrize(
        ("override", "told"),
        [
            ("recipe.0.lora.r=3", "its recipe is"),
            ("train.seed=7", "its train.seed is"),
            ("train.per_device_train_batch_size=3", "its train.per_device_train_batch_size is"),
            ("data.max_length=8", "its data.max_length is"),
            ("train.learning_rate=1e-5", "its train.learning_rate is"),
        ],
    )
    def test_one_of_another_run_is_refused(self, override, told, stopped, capsys):
        path, folder = stopped
        before = files(folder)
        message = fails(capsys, path, "--resume", override)
        assert "belongs to another run" in message
        assert told in message
        assert files(folder) == before

    def test_they_hold_no_pickled_code_and_no_base_weights(self, stopped):
        _, folder = stopped
        for file in (folder / "checkpoint-4").iterdir():
            if file.suffix in (".pt", ".pth"):
                with torch.serialization.safe_globals(_numpy_globals()):
                    torch.load(file, weights_only=True)
        with safe_open(folder / "checkpoint-4" / "adapter_model.safetensors", "pt") as weights:
            assert all("lora_" in name or "classifier" in name for name in weights.keys())  # noqa: SIM118


def _numpy_globals() -> list:
    import numpy as np

    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]
