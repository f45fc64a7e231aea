"""Files of results: what is written is read back, what was edited is refused, and peft's files are read too."""

import json
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from results_made import made_result, of_peft

from shoestring.compare.results import Result, json_schema, read_all, values_of_peft
from shoestring.compare.worker import packages
from shoestring.errors import SettingError


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    result = made_result(scores=[1.0, 0.0], losses=[(1, 0.7)], curve=[(5, 1.5, 0.6)], notes=["µ"])
    result.write(tmp_path / "a.json")
    assert Result.read(tmp_path / "a.json") == result
    assert read_all(tmp_path) == [result]
    assert not list(tmp_path.glob("*.partial"))


def test_it_has_every_field_of_pefts_method_comparison() -> None:
    theirs, ours = of_peft(), made_result().to_dict()
    for part, fields in theirs.items():
        assert fields.keys() - {"peft_worktree_is_dirty"} <= ours[part].keys(), part


def test_a_file_of_peft_is_read_and_written_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "lora--rank32.json"
    path.write_text(json.dumps(of_peft()))
    result = Result.read(path)
    assert result.to_dict() == of_peft()
    assert result.name == "lora/rank32"
    assert values_of_peft(result) == {
        "accuracy": 0.48,
        "trained_parameters": 9e6,
        "trained_share": 9 / 3200,
        "checkpoint_bytes": 36e6,
        "gpu_peak_bytes": 22e9,
        "all_steps_seconds": 900.0,
        "tokens_a_second": 5000.0,
        "forgetting": 0.05,
    }


def test_packages_stand_with_their_versions_and_the_commits_that_are_known() -> None:
    found = packages()
    assert {
        f"{name}-{part}" for name in ("torch", "peft", "transformers") for part in ("version", "commit-hash")
    } <= set(found)
    assert found["torch-commit-hash"] == torch.version.git_version
    assert found["peft-commit-hash"] is None  # from a registry


def test_no_result_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    made_result().write(path)
    before = path.read_text()
    with pytest.raises(SettingError, match="results are not overwritten"):
        made_result(seed=1).write(path)
    assert path.read_text() == before


def edited(values: dict) -> None:
    values["shoestring"]["values"]["accuracy"] = 0.99


def of_another_version(values: dict) -> None:
    values["shoestring"]["schema_version"] = 99


def without_a_field(values: dict) -> None:
    del values["run_info"]["total_time"]


def with_peft_fields_edited(values: dict) -> None:
    values["train_info"]["num_trainable_params"] = 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edited, "was changed since it was written"),
        (with_peft_fields_edited, "was changed since it was written"),
        (of_another_version, "has schema_version 99, and this version of Shoestring reads 4"),
        (without_a_field, "is not the result of a run: run_info.total_time"),
    ],
)
def test_what_is_no_result_any_more_is_refused(tmp_path: Path, change, said: str) -> None:
    path = tmp_path / "a.json"
    made_result().write(path)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(SettingError, match=said) as error:
        Result.read(path)
    assert str(path) in str(error.value)


def test_half_a_file_is_refused(tmp_path: Path) -> None:
    made_result().write(tmp_path / "a.json")
    path = tmp_path / "b.json"
    path.write_text((tmp_path / "a.json").read_text()[:100])
    with pytest.raises(SettingError, match="is no JSON file"):
        Result.read(path)


def test_the_schema_names_every_field() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == {"run_info", "train_info", "meta_info", "shoestring"}
    assert set(schema["$defs"]["Own"]["properties"]) == made_result().to_dict()["shoestring"].keys()


def test_files_are_valid_by_the_schema() -> None:
    validator = Draft202012Validator(json_schema())
    made = made_result(scores=[1.0, 0.0], losses=[(1, 0.7)], curve=[(5, 1.5, 0.6)]).to_dict()
    assert validator.is_valid(made)
    assert validator.is_valid(of_peft())
    assert not validator.is_valid({**made, "shoestring": {**made["shoestring"], "losses": [["a", 1]]}})
    del made["run_info"]
    assert not validator.is_valid(made)
