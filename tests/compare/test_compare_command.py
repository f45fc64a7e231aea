"""`shoestring compare` as a user runs it: what it prints, writes and refuses, and with which exit code."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from results_made import made_result, of_peft, of_peft_on_images
from rich.console import Console

from shoestring.cli import main
from shoestring.cli.compare import _Screen
from shoestring.compare.suite import Suite

LORA = [{"lora": {"r": 2, "target_modules": ["query"]}}]


@pytest.fixture
def suite_file(tmp_path: Path, run_file: Callable[..., Path], review_csv: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        run = yaml.safe_load(run_file("base", data={"test": str(review_csv)}).read_text())
        del run["recipe"], run["output_dir"]
        suite = {"base": run, "recipes": {"full tuning": [], "lora": LORA}, "seeds": [0], "budget": {"steps": 2}}
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**suite, "output_dir": str(tmp_path / "out"), **changes}, sort_keys=False))
        return path

    return write


def test_a_comparison_from_a_suite_to_its_reports(
    suite_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(suite_file())
    assert main(["compare", path, "--list"]) == 0
    assert capsys.readouterr().out.count("to do") == 2
    assert main(["compare", path, "--dry-run"]) == 0
    assert "Checked 2 recipes" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "out").iterdir()] == [".lock"]
    assert main(["compare", path]) == 0
    said = capsys.readouterr().out
    assert "checking lora" in said
    assert "[1/2] full tuning, seed 0: accuracy" in said
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in said.replace("\n", "")
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file() and p.name != ".lock"} == {
        "report.html",
        "report.md",
        "report.csv",
        "comparison.json",
    }
    assert main(["compare", path]) == 0
    assert "2 of 2 runs are there already." in capsys.readouterr().out
    assert main(["compare", path, "--report", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {recipe["name"] for recipe in found["recipes"]} == {"full tuning", "lora"}
    assert found["command"] == f"shoestring compare {path}"
    assert main(["compare", path, "--list", "--json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"finished"}


def test_what_is_to_be_known_of_runs_is_told_once_and_before_them(
    suite_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    optim, note = "base.train.optim=paged_adamw_8bit", "pages nothing on a CPU; it is adamw_8bit."
    assert main(["compare", str(suite_file()), optim, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"full tuning: train.optim: paged_adamw_8bit {note}", "Checked 2 recipes: nothing is in the way."]
    assert main(["compare", str(suite_file()), optim]) == 0
    said = capsys.readouterr().out
    assert said.count(note) == 1
    assert said.index(note) < said.index("[1/2]")


def test_a_failure_ends_with_code_1_and_a_report(
    suite_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {"wild": {"recipe": [], "train": {"learning_rate": 1e30, "max_grad_norm": 0.0}}, "lora": LORA}
    assert main(["compare", str(suite_file(recipes=recipes, budget={"steps": 3})), "--no-check"]) == 1
    heard = capsys.readouterr()
    assert "wild, seed 0: failed: The loss became" in heard.out
    assert "1 of 2 runs failed; the report has the reasons" in heard.err
    assert "The loss became" in (tmp_path / "out" / "report.html").read_text()
    again = ["compare", str(tmp_path / "tiny.yaml"), "--no-check", "--retry-failed"]
    assert main(again) == 1
    heard = capsys.readouterr()
    assert "1 of 2 runs are there already." in heard.out
    assert "[1/1] wild, seed 0: failed" in heard.out


def test_the_folder_of_a_suite_is_that_of_its_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_result("lora").write(tmp_path / "out/results/lora.json")
    (tmp_path / "out/comparison.json").write_text("{}")
    assert main(["compare", str(tmp_path / "out"), "--json"]) == 0
    assert [recipe["name"] for recipe in json.loads(capsys.readouterr().out)["recipes"]] == ["lora"]


def test_differences_in_a_folder_are_told_to_the_recipe_that_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, scores in (("lora", [1.0, 0.0, 1.0, 1.0]), ("miss", [1.0, 1.0, 1.0, 1.0])):
        made_result(name, scores=scores, values={"accuracy": sum(scores) / 4}, rows="same").write(
            tmp_path / f"{name}.json"
        )
    assert main(["compare", str(tmp_path), "--baseline", "lora", "--json"]) == 0
    found = {recipe["name"]: recipe["difference"] for recipe in json.loads(capsys.readouterr().out)["recipes"]}
    assert found["lora"] is None
    assert found["miss"]["mean"] == pytest.approx(0.25)
    assert main(["compare", str(tmp_path), "--baseline", "lara"]) == 2
    assert "--baseline 'lara' is not among the recipes. Did you mean 'lora'?" in " ".join(
        capsys.readouterr().err.split()
    )


def test_results_of_peft_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    for name, accuracy in (("lora--rank8", 0.4), ("miss--default", 0.5)):
        (folder / f"{name}.json").write_text(json.dumps(of_peft(name, accuracy)))
    assert main(["compare", str(folder), "--output", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert said.index("miss--default") < said.index("lora--rank8")
    assert (tmp_path / "report" / "report.html").is_file()
    assert {path.suffix for path in folder.iterdir()} == {".json"}
    assert main(["compare", str(folder), "--quality", "forgetting", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == "forgetting"
    for path in folder.iterdir():
        path.write_text(json.dumps(of_peft_on_images(path.stem)))
    assert main(["compare", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quality"] == "dino_similarity"


def test_results_of_others_beside_a_suite(
    suite_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(of_peft("theirs", 0.99)))
    assert main(["compare", str(suite_file()), "--report", "--beside", str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in found["recipes"]] == ["theirs"]
    assert found["missing"] == 2


def test_results_of_another_task_are_refused_before_anything_runs(
    suite_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    made_result(task="causal-lm").write(other)
    path = suite_file()
    assert main(["compare", str(path), "--beside", str(other)]) == 2
    assert "Results of causal-lm cannot stand in one table" in " ".join(capsys.readouterr().err.split())
    assert not Path(yaml.safe_load(path.read_text())["output_dir"]).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{suite}", "--quality", "loss"], "--quality is for folders of results; of a suite set quality=NAME"),
        (["{suite}", "--baseline", "lora"], "--baseline is for folders of results; of a suite set baseline=NAME"),
        (
            ["{folder}", "--list"],
            "is a folder of results; settings, --dry-run, --list and --retry-failed are for suites",
        ),
        (["{folder}/none"], "There is no file"),
        (["{empty}"], "holds no results"),
        (["{suite}", "seeds=[]"], "seeds"),
        (["{suite}", "--beside", "nowhere.json"], "There is no nowhere.json"),
        (["{suite}", "--output", "{file}"], "File exists"),
        (["{suite}", "output_dir={file}"], "is a file, or lies inside one"),
    ],
)
def test_bad_input_ends_with_code_2(
    arguments: list[str],
    said: str,
    suite_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"suite": suite_file(), "folder": tmp_path / "folder", "empty": tmp_path / "empty", "file": tmp_path / "f"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "f").write_text("")
    made_result().write(tmp_path / "folder" / "a.json")
    assert main(["compare", *(argument.format(**places) for argument in arguments)]) == 2
    heard = capsys.readouterr()
    assert said in heard.err.replace("\n", " ")
    assert "checking" not in heard.out  # told before anything is loaded


def test_on_a_terminal_what_runs_is_shown_with_the_time_left(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(seeds=[0, 1]))
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=30)
    first, second, third, _ = suite.cases

    def shown() -> str:
        with console.capture() as capture:
            console.print(screen._drawn())
        return capture.get()

    with _Screen(console, suite, jobs=1) as screen:
        screen.told(("started", first))
        screen.told(("stage", first, "Loading model"))
        assert "seed 0: Loading model" in shown()
        screen.told(("step", first, 1, 2))
        assert "seed 0: step 1 of 2" in shown()
        screen.told(("finished", first, {"accuracy": 0.5, "peak_bytes": 2048.0, "step_seconds": 0.25}))
        assert "accuracy 0.5000, 2.0 KiB, 0.25 s a step" in shown()
        screen.told(("started", second))
        text = shown()
        assert "1/4" in text
        assert "s left" in text
        screen.told(("failed", second, "out of memory"))
        assert "failed: out of memory" in shown()
        screen.told(("started", third))
        assert shown().index("lora") < shown().index("full tuning")  # what runs comes first


def test_time_left_is_that_of_the_runs_which_are_left(suite_file: Callable[..., Path]) -> None:
    suite = Suite.load(suite_file(seeds=[0, 1, 2]))
    with _Screen(Console(file=io.StringIO(), width=100), suite, jobs=4) as screen:
        for case in suite.cases[:5]:
            screen.told(("started", case))
            screen.told(("finished" if case.seed else "failed", case, {} if case.seed else "bad"))
        screen.took = [400.0] * len(screen.took)
        assert len(screen.took) == 3  # what failed says nothing of how long a run takes
        assert screen._left() == "about 7 min left"


def test_names_and_reasons_are_shown_as_they_are(
    suite_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, reason = "lora [attn] [/x]", "[enforce fail at alloc.cpp:117] no memory"
    path = suite_file(recipes={name: LORA})
    suite = Suite.load(path)
    console = Console(file=io.StringIO(), force_terminal=True, width=160, height=30)
    with _Screen(console, suite, jobs=1) as screen:
        screen.told(("checking", suite.cases[0]))
        screen.told(("started", suite.cases[0]))
        screen.told(("failed", suite.cases[0], reason))
        with console.capture() as capture:
            console.print(screen._drawn())
    assert name in capture.get()
    assert reason in capture.get()
    assert main(["compare", str(path), "--list"]) == 0
    assert name in capsys.readouterr().out


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    assert "shoestring compare examples/suite.yaml" in said
    assert "--retry-failed" in said
