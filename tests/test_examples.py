"""Every file in examples/ does what it says: a few steps through the command line, or its plan; nothing is left out."""

import json
import re
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import assets
from shoestring.cli import main
from shoestring.recipe import TechniqueInfo, known_techniques
from shoestring.testing.assets import need
from shoestring.training import RunSettings
from shoestring.training.data import PACKAGED
from shoestring.training.models import KNOWN
from shoestring.training.tasks import TASKS

FOLDER = Path(__file__).parents[1] / "examples"
FILES = sorted(FOLDER.rglob("*.yaml"))
STEPS = 2
FEW = {
    "data.max_train_rows": 8,
    "data.max_eval_rows": 2,
    "train.max_steps": STEPS,
    "train.per_device_train_batch_size": 2,
    "train.per_device_eval_batch_size": 2,
    "train.warmup_steps": 0,
    "train.logging_steps": 1,
}


def kind_of(path: Path) -> str:
    """What a file is for, as its content says: "suite" for compare, "plan" where the model has no weights, or "run"."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "recipes" in values:
        return "suite"
    return "plan" if RunSettings.load(path).model.name.startswith(KNOWN) else "run"


def of_kind(kind: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in FILES if kind_of(path) == kind]


def packaged_in(path: Path) -> set[str]:
    """The packaged models and data that a file names, or the run file that a suite is based on."""
    text = path.read_text(encoding="utf-8")
    base = yaml.safe_load(text).get("base")
    beyond = packaged_in(path.parent / base) if isinstance(base, str) else set()
    return beyond | set(re.findall(rf"{PACKAGED}([\w-]+)", text))


def commands_in(path: Path) -> list[str]:
    """The command lines in the comment that a file begins with, without what is said of them."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    return [line.removeprefix("#   ").split("   ")[0].strip() for line in comment if line.startswith("#   ")]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """In an empty folder, and packaged data is read once for all examples."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(assets, "load_data", loaded_once)


@cache
def loaded_once(name: str) -> Any:
    return assets.get(name).read(assets.data_files(name))


@pytest.fixture(scope="session")
def few_blocks(tmp_path_factory) -> Path:
    """The packaged decoder with the first of its blocks only, since a prediction takes seconds for all thirty."""
    need("smollm2")
    folder = tmp_path_factory.mktemp("few-blocks")
    whole = assets.model_folder("smollm2")
    AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", of_kind("run"))
def test_a_run_trains_and_leaves_a_report(path, tmp_path, request):
    deep = "smollm2" in packaged_in(path)
    train_a_little(path, tmp_path, {"model.name": request.getfixturevalue("few_blocks")} if deep else {})


@pytest.mark.slow
@pytest.mark.parametrize("path", [param for param in of_kind("run") if "smollm2" in packaged_in(param.values[0])])
def test_a_run_of_the_whole_decoder_trains_and_leaves_a_report(path, tmp_path):
    train_a_little(path, tmp_path, {})


def train_a_little(path: Path, folder: Path, beyond: dict[str, Any]) -> None:
    """A few steps of a run on a few rows, by the command."""
    need(*packaged_in(path))
    settings = RunSettings.load(path)
    if settings.model.quantization is not None:
        pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'shoestring[quant]'")
    few = {**FEW, "output_dir": folder / "run", **beyond}
    few |= {"data.max_length": 32} if settings.data.max_length and settings.task != "causal-lm" else {}
    few |= {"data.max_length": 64} if settings.train.get("packing") else {}  # others would lose what the loss counts
    few |= {"data.image_size": 28} if settings.data.image_size else {}
    assert main(["train", str(path), *(f"{key}={value}" for key, value in few.items())]) == 0
    report = json.loads((folder / "run" / "report.json").read_text())
    assert (report["status"], report["steps"]) == ("finished", STEPS)
    assert 0 < report["trained_parameters"] <= report["total_parameters"]
    # what reads the data cannot be predicted without it
    assert report["predicted"] or any(technique.reads_data for technique in settings.build_recipe().techniques)


@pytest.mark.parametrize("path", of_kind("plan"))
def test_a_plan_is_made_without_weights(path, capsys):
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("path", of_kind("suite"))
def test_every_recipe_of_a_suite_can_be_built(path, tmp_path):
    assert main(["compare", str(path), f"output_dir={tmp_path / 'suite'}", "--list"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", of_kind("suite"))
def test_a_suite_compares_its_recipes(path, tmp_path):
    need(*packaged_in(path))
    few = {f"base.{key}": value for key, value in FEW.items() if key != "train.max_steps"}
    few |= {"seeds": [0], "budget.steps": STEPS, "base.train.eval_steps": STEPS, "output_dir": tmp_path / "suite"}
    assert main(["compare", str(path), *(f"{key}={value}" for key, value in few.items())]) == 0
    assert (tmp_path / "suite" / "report.html").is_file()


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in FILES])
def test_a_file_says_what_it_is_for_and_how_to_run_it(path):
    text = path.read_text(encoding="utf-8")
    commands = commands_in(path)
    assert text.startswith("# ")
    assert any(str(path.relative_to(FOLDER.parent)) in command for command in commands)
    installed = {
        name for line in commands if line.startswith("shoestring assets install ") for name in line.split()[3:]
    }
    assert installed == packaged_in(path)


def test_every_task_has_an_example():
    assert {RunSettings.load(param.values[0]).task for param in of_kind("run")} == set(TASKS)


def is_packaged(info: TechniqueInfo) -> bool:
    """Whether a technique comes with a package; tests make some of their own."""
    return info.settings_class.__module__.startswith(("shoestring.", "peft."))


def test_every_kind_of_technique_has_an_example_and_so_has_a_quantised_base():
    known = {name: info for name, info in known_techniques().items() if is_packaged(info)}
    runs = [RunSettings.load(param.values[0]) for param in of_kind("run")]
    shown = {known[technique.name].kind for run in runs for technique in run.build_recipe().techniques}
    assert shown == {info.kind for info in known.values()}
    assert any(run.model.quantization is not None for run in runs)
