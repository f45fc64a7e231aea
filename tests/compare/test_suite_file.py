"""Suite files: what they expand to, what makes a run another one, and all mistakes at once."""

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoestring.assets import CATALOGUE
from shoestring.compare.suite import Case, Suite
from shoestring.errors import SettingError

LORA = [{"lora": {"r": 4, "target_modules": ["query"]}}]


def suite_of(**changes: Any) -> dict[str, Any]:
    made = {
        "base": {
            "model": "packaged:minilm",
            "task": "text-classification",
            "data": {"train": "packaged:rotten-tomatoes", "max_length": 16},
            "train": {"num_train_epochs": 2, "learning_rate": 1e-3},
        },
        "recipes": {"full tuning": [], "lora": LORA},
        "seeds": [0, 1],
        "budget": {"steps": 3},
    }
    return {key: value for key, value in {**made, **changes}.items() if value is not None}


def refusal(**changes: Any) -> str:
    with pytest.raises(SettingError) as error:
        Suite.from_dict(suite_of(**changes))
    return str(error.value)


def test_a_suite_is_one_run_for_each_recipe_and_seed() -> None:
    suite = Suite.from_dict(suite_of())
    assert [(case.name, case.seed) for case in suite.cases] == [
        ("full tuning", 0),
        ("full tuning", 1),
        ("lora", 0),
        ("lora", 1),
    ]
    assert [case.settings.train["seed"] for case in suite.cases] == [0, 1, 0, 1]
    assert all(case.settings.train["max_steps"] == 3 for case in suite.cases)
    assert all("num_train_epochs" not in case.settings.train for case in suite.cases)  # the budget is in its place
    assert suite.cases[2].settings.recipe == LORA
    assert (suite.baseline, suite.quality, suite.output_dir) == ("full tuning", "accuracy", "comparisons/suite")


def test_a_recipe_brings_sections_of_its_own() -> None:
    own = {"recipe": LORA, "train": {"learning_rate": 5e-4}, "data": {"max_length": 8}, "model": {"dtype": "bfloat16"}}
    suite = Suite.from_dict(suite_of(recipes={"plain": LORA, "own": own}, seeds=[0]))
    plain, other = (case.settings for case in suite.cases)
    assert (plain.train["learning_rate"], other.train["learning_rate"]) == (1e-3, 5e-4)
    assert (plain.data.max_length, other.data.max_length) == (16, 8)
    assert (plain.model.dtype, other.model.dtype) == (None, "bfloat16")
    assert other.model.name == "packaged:minilm"
    assert other.data.train == plain.data.train


def test_a_grid_is_a_recipe_for_each_point() -> None:
    grid = {"recipe.lora.r": [2, 8], "train.learning_rate": [1e-3, 0.02]}
    suite = Suite.from_dict(suite_of(recipes={"lora": {"recipe": LORA, "grid": grid}}, seeds=[0]))
    found = {case.name: case.settings for case in suite.cases}
    assert list(found) == [
        "lora, r=2, learning_rate=0.001",
        "lora, r=2, learning_rate=0.02",
        "lora, r=8, learning_rate=0.001",
        "lora, r=8, learning_rate=0.02",
    ]
    last = found["lora, r=8, learning_rate=0.02"]
    assert last.recipe == [{"lora": {"r": 8, "target_modules": ["query"]}}]
    assert last.train["learning_rate"] == 0.02


def test_the_base_may_be_a_run_file(tmp_path: Path) -> None:
    run = {**suite_of()["base"], "recipe": LORA, "output_dir": "runs/elsewhere"}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(run))
    path = tmp_path / "ranks.yaml"
    path.write_text(yaml.safe_dump(suite_of(base="first.yaml")))
    suite = Suite.load(path, ("seeds=[7]", "budget.steps=5"))
    assert (suite.name, suite.output_dir) == ("ranks", "comparisons/ranks")
    assert [case.seed for case in suite.cases] == [7, 7]
    assert {case.settings.train["max_steps"] for case in suite.cases} == {5}
    assert suite.cases[0].settings.recipe == []


def test_examples_are_suites() -> None:
    examples = Path(__file__).parents[2].glob("examples/*.yaml")
    suites = [path for path in examples if "recipes" in yaml.safe_load(path.read_text())]
    assert suites
    for path in suites:
        assert Suite.load(path).cases


@pytest.mark.parametrize("page", ["docs/compare.md", "src/shoestring/compare/suite.py"])
def test_the_suite_that_a_page_shows_is_one(page: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    text = (root / page).read_text()
    if page.endswith(".md"):
        [shown] = re.findall(r"```yaml\n(base:.*?)```", text, re.DOTALL)
    else:
        shown = textwrap.dedent(text[text.index("    base:") : text.index("A recipe is what")])
    (tmp_path / "first.yaml").write_text((root / "examples/first.yaml").read_text())
    (tmp_path / "suite.yaml").write_text(shown)
    names = {case.name for case in Suite.load(tmp_path / "suite.yaml").cases}
    assert {"full tuning", "lora"} < names
    assert len(names) == 6


def test_the_digest_is_of_what_shapes_the_run(tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text,label\ngood,1\n")

    def digest(**changes: Any) -> str:
        base = {**suite_of()["base"], "data": {"train": str(data)}}
        made = {"recipes": {"one": LORA}, "seeds": [0], "base": base, **changes}
        return Suite.from_dict(suite_of(**made)).cases[0].digest

    first = digest()
    assert digest(output_dir="elsewhere") == digest(baseline="one") == first
    explicit = [{"lora": {"r": 4, "target_modules": ["query"], "lora_dropout": 0.0}}]  # the default, written down
    assert digest(recipes={"other name": explicit}) == first
    others = [
        digest(recipes={"one": [{"lora": {"r": 5, "target_modules": ["query"]}}]}),
        digest(seeds=[1]),
        digest(budget={"steps": 4}),
        digest(measure=["latency"]),
        digest(split="validation"),
        digest(base={**suite_of()["base"], "data": {"train": str(data), "max_length": 4}}),
    ]
    options = tmp_path / "options.json"
    options.write_text("{}")
    base = {**suite_of()["base"], "data": {"train": str(data)}, "train": {"accelerator_config": str(options)}}
    others.append(digest(base=base))
    options.write_text('{"split_batches": true}')
    others.append(digest(base=base))
    data.write_text("text,label\nbad,0\n")
    assert len({first, *others, digest()}) == 10


def test_the_digest_is_of_what_folders_and_the_data_of_measures_hold(tmp_path: Path) -> None:
    model, general = tmp_path / "model", tmp_path / "general.jsonl"
    model.mkdir()
    (model / "config.json").write_text("{}")
    general.write_text('{"text": "one"}\n')
    base = {**suite_of()["base"], "model": str(model), "task": "causal-lm"}

    def case() -> Case:
        return Suite.from_dict(suite_of(base=base, measure=[{"forgetting": {"data": str(general)}}])).cases[0]

    digests = [case().digest]
    (model / "config.json").write_text("[]")  # of the same size
    digests.append(case().digest)
    general.write_text('{"text": "two"}\n')
    digests += [case().digest, case().digest]
    assert len(set(digests)) == 3


def test_seeds_of_a_recipe_share_what_is_not_the_seed() -> None:
    cases = Suite.from_dict(suite_of(recipes={"one": LORA, "two": []}, seeds=[0, 1])).cases
    assert len({case.digest for case in cases}) == 4
    assert len({(case.name, case.of_all_seeds) for case in cases}) == len({case.of_all_seeds for case in cases}) == 2


def test_the_digest_is_of_what_a_packaged_asset_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest() -> str:
        base = {**suite_of()["base"], "data": {"train": "packaged:rotten-tomatoes"}}
        return Suite.from_dict(suite_of(base=base)).cases[0].digest

    first = digest()
    asset = CATALOGUE["rotten-tomatoes"]
    assert digest() == first
    others = (replace(asset.files[0], sha256="0" * 64), *asset.files[1:])
    monkeypatch.setitem(CATALOGUE, "rotten-tomatoes", replace(asset, files=others))
    assert digest() != first


def test_files_of_runs_have_names_that_every_system_takes() -> None:
    suite = Suite.from_dict(suite_of(recipes={"LoRA: r=8 / µ 100 %": LORA}, seeds=[3]))
    assert suite.cases[0].file == f"LoRA-r=8-100--seed3--{suite.cases[0].digest[:10]}"
    long = Suite.from_dict(suite_of(recipes={"one, target_modules=" + "query " * 100: LORA}))
    assert len({case.file for case in long.cases}) == len(long.cases)
    assert max(len(case.file) for case in long.cases) < 130


def test_a_section_with_nothing_in_it_takes_nothing_away() -> None:
    empty = {"recipe": LORA, "train": None, "data": None, "model": None}
    one, two = Suite.from_dict(suite_of(recipes={"one": empty, "two": LORA}, seeds=[0])).cases
    assert one.digest == two.digest
    bare = {**suite_of()["base"], "train": None}
    for case in Suite.from_dict(suite_of(base=bare, recipes={"one": empty, "two": LORA})).cases:
        assert case.settings.train["max_steps"] == 3


def test_all_mistakes_of_all_recipes_are_told_at_once(tmp_path: Path) -> None:
    recipes = {
        "typo": [{"loraa": {"r": 4}}],
        "range": {"recipe": LORA, "train": {"learning_rate": -1}},
        "good": LORA,
        "unknown": {"recipe": LORA, "trian": {}},
        "none": {"train": {}},
        "grid": {"recipe": LORA, "grid": {"recipe.lora.r": 4}},
        "conflict": [{"token_tune": {"keep_fraction": 0.3}}, {"token_windows": {}}],
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(suite_of(recipes=recipes), sort_keys=False))
    with pytest.raises(SettingError) as error:
        Suite.load(path)
    text = str(error.value)
    assert text.startswith(f"6 problems in {path}")
    for part in (
        "typo: ",
        "Did you mean 'lora'",
        "learning_rate must be greater than 0, got -1",
        "unknown key 'trian'. Did you mean 'train'?",
        "recipes.none has no recipe; give one, [] for full fine-tuning.",
        "recipes.grid.grid must be a mapping from settings to lists of values",
        "conflict: ",
    ):
        assert part in text, part
    assert "good" not in text
    assert "line 1" in text  # each has its line


def test_a_mistake_of_the_base_is_told_once() -> None:
    text = refusal(base={**suite_of()["base"], "task": "text-clasification"})
    assert text.count("Did you mean 'text-classification'") == 1
    assert text.startswith("full tuning, lora: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": None}, "base is missing: a run file, or what it holds"),
        ({"recipes": {}}, "recipes"),
        ({"recipe": LORA}, "Unknown key recipe. Did you mean 'recipes'?"),
        ({"seeds": []}, "seeds"),
        ({"split": "train"}, "split must be one of validation, test, got 'train'"),
        ({"seeds": [1, 1]}, "seeds must be different whole numbers from 0"),
        ({"budget": {"steps": 3, "seconds": 4.0}}, "give one of steps, seconds and tokens; 2 are given"),
        ({"budget": {"steps": 0}}, "budget.steps must be at least 1, got 0"),
        ({"baseline": "lroa"}, "baseline 'lroa' is none. Did you mean 'lora'?"),
        ({"quality": "acuracy"}, "quality 'acuracy' is no measure of text-classification. Did you mean 'accuracy'?"),
        ({"measure": ["latncy"]}, "Did you mean 'latency'?"),
        ({"measure": ["latency", {"latency": {}}]}, "measure names something twice"),
        ({"measure": [{"latency": {"repeats": 0}}]}, "measure.latency: repeats must be at least 1, got 0"),
        ({"measure": [{"forgetting": {}}]}, "measure.forgetting: data is missing"),
        ({"measure": [{"forgetting": {"data": "a.jsonl"}}]}, "text-classification does not train"),
        (
            {"measure": ["generation"]},
            "measure.generation: it is for language models, which text-classification does not train",
        ),
        ({"base": {**suite_of()["base"], "output_dir": "x"}}, "the base run has output_dir, which each recipe brings"),
        (
            {"target": 0.8, "base": {**suite_of()["base"], "train": {"eval_strategy": "no"}}},
            "target needs evaluations on the way",
        ),
        ({"target": 0.8, "quality": "f1_macro"}, "target is told for accuracy"),
        ({"quality": "majority_class"}, "quality 'majority_class' ranks nothing: which way is better is unknown"),
        (
            {"recipes": {"one": {"recipe": LORA, "grid": {"train.num_train_epochs": [1, 3]}}}, "budget": {"steps": 3}},
            "recipes.one sets train.num_train_epochs, which the budget decides",
        ),
        (
            {"recipes": {"one": {"recipe": LORA, "train": {"max_steps": 4}}}, "budget": {"tokens": 3}},
            "recipes.one sets train.max_steps, which the budget decides",
        ),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in refusal(**changes)


def test_tokens_are_no_budget_of_pictures() -> None:
    base = {"model": "packaged:dinov2-small", "task": "image-pretraining", "data": {"train": "pictures"}}
    recipes = {"mae": [{"masked_autoencoder": {}}]}
    assert "image-pretraining has no tokens; give steps or seconds" in refusal(
        base=base, recipes=recipes, budget={"tokens": 100}
    )


def test_a_file_that_is_no_suite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text("- lora\n")
    with pytest.raises(SettingError, match="a suite has at least base and recipes"):
        Suite.load(path)
    path.write_text(yaml.safe_dump(suite_of(base="not-there.yaml")))
    with pytest.raises(SettingError, match=r"There is no file not-there\.yaml"):
        Suite.load(path)
