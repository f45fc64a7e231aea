"""The project's own suites: together they have every method, and each really runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from shoestring.assets import cache_folder
from shoestring.cli import main
from shoestring.compare.suite import Suite
from shoestring.recipe import known_techniques
from shoestring.testing.assets import need
from shoestring.training.marked_yaml import dump_yaml, read_marked_yaml
from shoestring.training.run import training_arguments
from shoestring.training.tasks import TASKS

ROOT = Path(__file__).parents[2]
SUITES = sorted(ROOT.glob("benchmarks/suites/*.yaml"))
RATES = sorted(ROOT.glob("benchmarks/suites/rates/*.yaml"))  # learning rates for some of them
OF_PEFT = {"lora", "ia3", "ln_tuning", "vera", "prompt_tuning", "prefix_tuning", "miss", "shira"}
SHORT = ["base.data.max_train_rows=128", "base.data.max_eval_rows=16", "budget.steps=2", "seeds=[0]"]
SMOKE = ("full tuning", "lora", "bitfit", "token_tune")


def from_root(path: Path) -> str:
    return str(path.relative_to(ROOT))


def used_in(suite: Suite) -> set[str]:
    """Names of the techniques in a suite."""
    return {name for case in suite.cases for entry in case.settings.recipe for name in entry}


@pytest.mark.parametrize("path", [*SUITES, *RATES], ids=from_root)
def test_every_suite_is_read(path: Path) -> None:
    suite = Suite.load(path)
    assert suite.seeds == ((0,) if path in RATES else (0, 1, 2))
    assert path.read_text().count(f"shoestring compare {from_root(path)}") == 1  # it says how to run it


@pytest.mark.parametrize("path", [*SUITES, *RATES, *ROOT.glob("examples/suite*.yaml")], ids=from_root)
def test_the_trainer_takes_the_settings_of_every_run(path: Path) -> None:
    runs = {json.dumps(case.settings.train, sort_keys=True): case.settings for case in Suite.load(path).cases}
    for run in runs.values():
        made = training_arguments(run, TASKS[run.task](run), {"validation": ()})  # type: ignore[arg-type]
        assert made.max_steps == run.train.get("max_steps", -1)


@pytest.mark.parametrize("path", RATES, ids=lambda path: path.stem)
def test_rates_are_looked_for_with_the_recipes_that_they_are_for(path: Path) -> None:
    of_suite = {case.name: case.settings for case in Suite.load(path.parents[1] / path.name).cases}
    rates = Suite.load(path)
    assert rates.split == "validation"  # rows that the suite compares on choose nothing
    for case in rates.cases:
        name = case.name.split(", ")[0]
        assert case.settings.recipe == of_suite[name].recipe, name
        assert case.settings.data == of_suite[name].data


def test_the_suites_have_every_method_of_ours_and_those_of_peft_that_people_know() -> None:
    used: set[str] = set().union(*(used_in(Suite.load(path)) for path in SUITES))
    ours = {n for n, about in known_techniques().items() if about.settings_class.__module__.startswith("shoestring.")}
    assert ours - used == set()
    assert OF_PEFT - used == set()
    for name in ("encoder", "decoder", "image"):
        recipes = [case.settings.recipe for case in Suite.load(ROOT / f"benchmarks/suites/{name}.yaml").cases]
        assert [] in recipes  # full tuning
        assert any(entry.get("lora", {}).get("use_dora") for recipe in recipes for entry in recipe)


def run(path: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    code = main(["compare", str(path), f"output_dir={folder}", *SHORT, *overrides, "--no-check"])
    found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
    assert (code, found["failures"], found["missing"]) == (0, [], 0)
    return found


def test_a_smoke_version_of_the_encoder_suite(tmp_path: Path) -> None:
    need("minilm", "rotten-tomatoes")
    values = read_marked_yaml(ROOT / "benchmarks/suites/encoder.yaml").values
    del values["measure"]
    values["recipes"] = {name: values["recipes"][name] for name in SMOKE}
    path = tmp_path / "smoke.yaml"
    path.write_text(dump_yaml(values))
    found = run(path, tmp_path / "out")
    recipes = {recipe["name"]: recipe["values"] for recipe in found["recipes"]}
    assert set(recipes) == set(SMOKE)
    peaks = {name: values["peak_bytes"]["mean"] for name, values in recipes.items()}
    assert max(peaks, key=lambda name: peaks[name]) == "full tuning"
    assert peaks["token_tune"] < peaks["lora"]
    assert recipes["bitfit"]["trained_parameters"]["mean"] < recipes["lora"]["trained_parameters"]["mean"]
    for name in ("report.html", "report.md", "report.csv"):
        assert "bitfit" in (tmp_path / "out" / name).read_text()
    written = [path.read_text() for path in (tmp_path / "out" / "results").iterdir()]
    assert sum('"base_model_name_or_path": "packaged:minilm"' in text for text in written) == 2  # with adapters
    assert not any(str(cache_folder()) in text for text in written)


@pytest.mark.slow
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_recipe_of_every_suite_runs(path: Path, tmp_path: Path) -> None:
    need("minilm", "rotten-tomatoes", "smollm2", "gsm8k-test", "xsum", "dinov2-small", "fashion-mnist", "flan-t5-small")
    suite = Suite.load(path)
    found = run(path, tmp_path / "out")
    assert {recipe["name"] for recipe in found["recipes"]} == set(suite.names)
