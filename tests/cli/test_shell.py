"""The command line: exit codes, one message for an error, JSON for programs, and `shoestring methods`."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import shoestring
from shoestring import Recipe, recipes
from shoestring.adapters.hut import HUTConfig
from shoestring.cli import app, main
from shoestring.cli.methods import read_labels, read_settings
from shoestring.errors import RunFailed, SettingError
from shoestring.recipe import known_techniques

OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def shoestring_process(*arguments: str) -> subprocess.CompletedProcess:
    """The installed command, as a user runs it."""
    command = Path(sys.executable).with_name("shoestring")
    return subprocess.run([command, *arguments], capture_output=True, text=True, env=OFFLINE, timeout=120)


@pytest.fixture
def command():
    """Register a command `fail` that raises the given error, for one test."""
    before = list(app.registered_commands)

    def command(error: BaseException) -> None:
        def fail(as_json: bool = typer.Option(False, "--json")) -> None:
            raise error

        app.command()(fail)

    yield command
    app.registered_commands[:] = before


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (SettingError("r must be at least 1, got 0."), 2, "r must be at least 1, got 0."),
            (FileNotFoundError(2, "No such file or directory", "x.csv"), 2, "No such file or directory: x.csv"),
            (PermissionError(13, "Permission denied", "runs"), 2, "Permission denied: runs"),
            (FileExistsError("runs/first is in use."), 2, "runs/first is in use."),
            (RunFailed("The loss is NaN at step 3."), 1, "The loss is NaN at step 3."),
            (OSError(28, "No space left on device", "runs/a"), 1, "No space left on device: runs/a"),
            (
                ZeroDivisionError("by 0\nmore"),
                1,
                "unexpected ZeroDivisionError: by 0 (run again with --debug to see where)",
            ),
            (RuntimeError(), 1, "unexpected RuntimeError: no message (run again with --debug to see where)"),
            (KeyboardInterrupt(), 130, "interrupted"),
            (typer.Abort(), 130, "interrupted"),
        ],
    )
    def test_an_error_is_one_message_and_an_exit_code(self, command, capsys, error, code, message):
        command(error)
        assert main(["fail"]) == code
        out, err = capsys.readouterr()
        assert (out, err.strip()) == ("", f"error: {message}")

    def test_with_json_an_error_is_json_on_stdout(self, command, capsys):
        command(SettingError("r must be at least 1, got 0."))
        assert main(["fail", "--json"]) == 2
        out, err = capsys.readouterr()
        assert json.loads(out) == {"error": "r must be at least 1, got 0.", "kind": "SettingError"}
        assert err == ""

    def test_ctrl_c_with_json_is_json_too(self, command, capsys):
        command(KeyboardInterrupt())
        assert main(["fail", "--json"]) == 130
        assert json.loads(capsys.readouterr().out)["kind"] == "KeyboardInterrupt"

    @pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
    def test_debug_shows_the_traceback_before_the_message(self, command, capsys, arguments):
        command(ZeroDivisionError("by 0"))
        assert main(arguments) == 1
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.strip().splitlines()[-1].startswith("error: unexpected ZeroDivisionError: by 0")

    def test_an_exit_code_that_a_command_chooses_is_kept(self, command):
        command(typer.Exit(7))
        assert main(["fail"]) == 7

    def test_after_two_dashes_nothing_is_an_option_of_the_shell(self, capsys):
        assert main(["methods", "--", "--debug"]) == 2
        err = capsys.readouterr().err
        assert "Unknown method '--debug'" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["method"], "error: No such command 'method'. Did you mean 'methods'? See shoestring --help."),
            (["assets"], "error: A command is missing. See shoestring assets --help."),
            (["methods", "--jsn"], "error: No such option: --jsn (Possible options: --json). See shoestring methods"),
            (["methods", "a", "b"], "error: Got unexpected extra argument(s) (b). See shoestring methods --help."),
            (["methods", "--kind"], "error: Option '--kind' requires an argument."),
        ],
    )
    def test_a_wrong_command_line_names_what_is_wrong_and_where_help_is(self, capsys, arguments, message):
        assert main(arguments) == 2
        assert capsys.readouterr().err.startswith(message)


class TestHelp:
    def test_without_a_command_the_help_is_printed(self):
        alone, asked = CliRunner().invoke(app, []), CliRunner().invoke(app, ["--help"])
        assert alone.exit_code == asked.exit_code == 0
        assert "methods" in alone.stdout
        assert alone.stdout.split() == asked.stdout.split()

    def test_every_command_has_examples_in_its_help(self):
        group = typer.main.get_command(app)
        assert "methods" in group.commands
        for name in group.commands:
            result = CliRunner().invoke(app, [name, "--help"], terminal_width=100)
            assert result.exit_code == 0
            assert f"shoestring {name}" in result.stdout.split("Examples")[1], name

    def test_the_version_is_that_of_the_package(self):
        assert CliRunner().invoke(app, ["--version"]).stdout == f"shoestring {shoestring.__version__}\n"

    def test_help_imports_neither_torch_nor_transformers(self):
        code = (
            "import sys; from shoestring.cli import main; main(['--help']); main(['methods', '--help']); "
            "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=OFFLINE, timeout=60)
        assert result.stdout.splitlines()[-1] == "[]"


class TestProcess:
    def test_an_unknown_method_ends_with_2_one_line_and_no_traceback(self):
        result = shoestring_process("methods", "hutt")
        assert result.returncode == 2
        assert result.stderr.splitlines() == ["error: Unknown method 'hutt'. Did you mean 'hut'?"]
        assert result.stdout == ""

    def test_a_table_is_printed_without_noise_of_other_packages(self):
        result = shoestring_process("methods", "--kind", "adapters")
        assert result.returncode == 0
        assert result.stderr == ""
        assert "lora" in result.stdout

    def test_a_reader_that_ends_early_leaves_no_traceback(self):
        command = f"{Path(sys.executable).with_name('shoestring')} methods lora | head -n 1"
        result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=OFFLINE, timeout=120)
        assert len(result.stdout.splitlines()) == 1
        assert "Traceback" not in result.stderr

    def test_ctrl_c_ends_with_130_and_no_traceback(self):
        # a process started in the background is told to ignore SIGINT, and hands that on to its children
        code = """
import signal, sys, time
from shoestring.cli import app, main

signal.signal(signal.SIGINT, signal.default_int_handler)

@app.command()
def wait():
    print("waiting", flush=True)
    time.sleep(60)

sys.exit(main(["wait"]))
"""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=OFFLINE
        )
        assert process.stdout.readline() == "waiting\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130
        assert err == "error: interrupted\n"


class TestMethods:
    def run(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["methods", *arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return result.stdout

    def test_the_table_has_every_technique_a_recipe_knows(self):
        rows = [line.split()[0] for line in self.run().splitlines() if line and not line.startswith(" ")]
        assert set(known_techniques()) <= set(rows)

    def test_json_has_every_technique_with_the_same_keys(self):
        listed = json.loads(self.run("--json"))
        assert {row["name"] for row in listed} == set(known_techniques())
        keys = {"name", "kind", "origin", "summary", "source", "trains", "exact", "composes"}
        assert all(row.keys() == keys for row in listed)
        assert next(row for row in listed if row["name"] == "hut")["source"].endswith("arXiv:2409.13501")

    def test_a_kind_selects_its_techniques_only(self):
        kinds = {row["kind"] for row in json.loads(self.run("--kind", "prompts", "--json"))}
        assert kinds == {"prompts"}

    def test_one_method_of_ours_shows_its_docstring_and_settings(self):
        shown = self.run("hut")
        for label in ("Source", "Update", "Shapes", "Start", "Trains", "Costs", "Differs"):
            assert f"\n{label} " in shown
        assert "inner size of A B" in shown

    def test_one_method_of_peft_shows_its_config_and_settings(self):
        lora = json.loads(self.run("lora", "--json"))
        assert "LoraModel" in lora["doc"]
        settings = {item["name"]: item for item in lora["settings"]}
        assert settings["r"]["type"] == "int"
        assert settings["r"]["default"] == "8"
        assert settings["target_modules"]["type"] in ("list[str] | str | None", "str | list[str] | None")
        assert "module names" in settings["target_modules"]["doc"]
        assert not settings.keys() & {"peft_type", "inference_mode", "base_model_name_or_path"}

    def test_names_are_found_in_any_case_and_with_dashes(self):
        assert self.run("S2-LoRA") == self.run("s2_lora")

    @pytest.mark.parametrize("name", recipes.names())
    def test_a_recipe_by_name_is_shown_with_what_is_in_it(self, name):
        purpose, text = recipes.parts(name)
        shown = self.run(name)
        assert shown.startswith(f"{name}   a recipe")
        assert " ".join(purpose.split()) in " ".join(shown.split())
        assert Recipe.from_yaml(text) == Recipe.named(name)
        assert all(line in shown for line in text.splitlines())
        rows = {line.split()[0] for line in shown.partition("\ntechnique")[2].splitlines()[1:] if line[:1] > " "}
        assert rows == {technique.name for technique in Recipe.named(name).techniques}

    def test_a_recipe_as_json_is_data(self):
        found = json.loads(self.run("exact_small", "--json"))
        assert (found["name"], found["kind"], found["exact"]) == ("exact_small", "recipe", True)
        assert found["summary"] == found["doc"].splitlines()[0] == recipes.summary("exact_small")
        assert Recipe.from_list(found["recipe"]) == Recipe.from_yaml(found["yaml"]) == Recipe.named("exact_small")
        assert [row["name"] for row in found["techniques"]] == ["lora", "token_windows", "chunked_loss"]
        assert found["techniques"][0]["summary"].startswith("Creates Low Rank Adapter (LoRA) model")

    def test_recipes_are_found_in_any_case_and_are_of_no_kind(self, capsys):
        assert self.run("T_FEW") == self.run("t-few")
        assert main(["methods", "qlora", "--kind", "adapters"]) == 2
        assert "Unknown method 'qlora' of kind adapters." in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["loar"], "Unknown method 'loar'. Did you mean 'lora'"),
            (["exact_smal"], "Unknown method 'exact_smal'. Did you mean 'exact_small'"),
            (["hut", "--kind", "prompts"], "Unknown method 'hut' of kind prompts."),
            (["--kind", "adapter"], "Unknown kind 'adapter'. Did you mean 'adapters'?"),
        ],
    )
    def test_unknown_names_give_the_nearest(self, capsys, arguments, message):
        assert main(["methods", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")

    def test_every_method_can_be_shown(self):
        for name in known_techniques():
            assert name in self.run(name)

    def test_labels_join_their_continuation_lines_and_leave_prose_alone(self):
        doc = """Title.

        Source   Somebody 2024
        Costs    one tensor,
                 kept for backward
        Start values are read from the weights.
            Indented prose.
        """
        assert read_labels(doc) == {"Source": "Somebody 2024", "Costs": "one tensor, kept for backward"}

    def test_settings_documented_in_a_base_class_are_found(self):
        settings = {item["name"]: item for item in read_settings(HUTConfig)}
        assert settings["r"]["doc"].startswith("inner size")
        assert settings["target_modules"]["doc"]
