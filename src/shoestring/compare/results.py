"""Results of runs as JSON files: the fields of HF peft's method comparison, and ours beside them under "shoestring".

    run_info     created_at, total_time, experiment_name, peft_branch, train_config, peft_config, error_msg
    train_info   accelerator_memory_max, accelerator_memory_reserved_avg, accelerator_memory_reserved_99th (bytes; 0
                 without an accelerator), train_time, file_size, num_trainable_params, num_total_params, status, metrics
    meta_info    model_info, dataset_info, package_info, system_info, pytorch_info
    shoestring   see `Own`; absent in files of peft

A file is written once and never again. `checksum` tells whether it was edited since, `schema_version` whether this
version can read it. docs/compare.md describes every field.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import SettingError
from ..whole_files import write_text

SCHEMA_VERSION = 4
Status = Literal["success", "failed", "cancelled"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")  # peft adds fields now and then, and ours lose none of them


class RunInfo(_Part):
    """What was run. total_time: seconds, loading included. error_msg: empty if nothing went wrong."""

    created_at: str
    total_time: float
    experiment_name: str
    peft_branch: str = ""
    train_config: dict[str, Any] = Field(default_factory=dict)
    peft_config: dict[str, Any] | None = None
    error_msg: str = ""


class TrainInfo(_Part):
    """What it took: memory of the accelerator and file_size in bytes, train_time in seconds without evaluations."""

    accelerator_memory_reserved_avg: int = 0
    accelerator_memory_max: int = 0
    accelerator_memory_reserved_99th: int = 0
    train_time: float = 0.0
    file_size: int = 0
    num_trainable_params: int = 0
    num_total_params: int = 0
    status: str = "success"
    metrics: list[dict[str, Any]] = Field(default_factory=list)


class MetaInfo(_Part):
    """What it ran on."""

    model_info: dict[str, Any] | None = None
    dataset_info: dict[str, Any] | None = None
    package_info: dict[str, Any] = Field(default_factory=dict)
    system_info: dict[str, Any] = Field(default_factory=dict)
    pytorch_info: str = ""


class Own(BaseModel):
    """What peft's format has no place for.

    name, seed, digest: the recipe, the seed, and what shaped the run's numbers in short. of_all_seeds: the same without
    the seed. run_file, recipe: as YAML.
    values: figures by measure. quality: measures by split. memory: bytes by part at the peak of a step. losses: (step,
    loss). curve: (step, seconds of training, quality) of evaluations on the way. scores: of the held-out rows or
    batches in their order, higher is better; paired tests need them. weights: rows in each batch; empty where all have
    as many. rows, batches: of which rows they are, in short, and where they are of batches, of which.
    notes: what is to be said of the figures.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    task: str
    name: str
    seed: int
    digest: str
    of_all_seeds: str
    run_file: str
    recipe: str
    values: dict[str, float] = Field(default_factory=dict)
    quality: dict[str, dict[str, float]] = Field(default_factory=dict)
    memory: dict[str, int] = Field(default_factory=dict)
    losses: list[tuple[int, float]] = Field(default_factory=list)
    curve: list[tuple[int, float, float]] = Field(default_factory=list)
    scores: list[float] = Field(default_factory=list)
    weights: list[int] = Field(default_factory=list)
    rows: str = ""
    batches: str = ""
    notes: list[str] = Field(default_factory=list)
    checksum: str = ""


class Result(_Part):
    """One run, as its file holds it."""

    run_info: RunInfo
    train_info: TrainInfo
    meta_info: MetaInfo
    shoestring: Own | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without keys that a file of peft did not have."""
        return self.model_dump(mode="json", exclude_unset=self.shoestring is None)

    def write(self, path: Path) -> None:
        """Write to a new file, beside the place first.

        Raises SettingError if the file is there: no result is overwritten.
        """
        if path.exists():
            raise SettingError(f"{path} is there already, and results are not overwritten; choose another output_dir.")
        assert self.shoestring is not None
        self.shoestring.checksum = checksum(self.to_dict())
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False))

    @classmethod
    def read(cls, path: Path) -> Self:
        """The result in a file, of ours or of peft's method comparison.

        Raises SettingError naming the file: no JSON, not of this form, of another version, or edited since.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SettingError(f"{path} is no JSON file ({error}); remove it to have the run made again.") from None
        own = values.get("shoestring") if isinstance(values, dict) else None
        if isinstance(own, dict) and own.get("schema_version") != SCHEMA_VERSION:
            raise SettingError(
                f"{path} has schema_version {own.get('schema_version')}, and this version of Shoestring reads "
                f"{SCHEMA_VERSION}; use the version that wrote it, or another output_dir."
            )
        try:
            result = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise SettingError(f"{path} is not the result of a run: {where}: {first['msg']}.") from None
        if result.shoestring is not None and checksum(values) != result.shoestring.checksum:
            raise SettingError(
                f"{path} was changed since it was written (its checksum differs); a result edited by hand is no "
                "result. Remove it to have the run made again."
            )
        return result

    @property
    def name(self) -> str:
        """The recipe's name; of peft's files the experiment's."""
        return self.shoestring.name if self.shoestring else self.run_info.experiment_name


def checksum(values: dict[str, Any]) -> str:
    """Of a result's JSON values, its own checksum left out."""
    own = {key: value for key, value in values["shoestring"].items() if key != "checksum"}
    text = json.dumps({**values, "shoestring": own}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_all(folder: Path) -> list[Result]:
    """All results in a folder, in the order of their files' names.

    Raises SettingError as `Result.read` does.
    """
    return [Result.read(path) for path in sorted(folder.glob("*.json"))]


def json_schema() -> dict[str, Any]:
    """The format as JSON Schema."""
    return Result.model_json_schema()


def values_of_peft(result: Result) -> dict[str, float]:
    """The measures of a run in a file of peft's method comparison, as far as it has them.

    What it measured on test rows counts under its own name. Files of 2025 speak of cuda where later ones do of an
    accelerator.
    """
    info = result.train_info
    last = info.metrics[-1] if info.metrics else {}
    peak = info.accelerator_memory_max or (info.model_extra or {}).get("cuda_memory_max")
    found = {
        "trained_parameters": info.num_trainable_params,
        "trained_share": info.num_trainable_params / max(info.num_total_params, 1),
        "checkpoint_bytes": info.file_size,
        "gpu_peak_bytes": peak or None,
        "all_steps_seconds": info.train_time,
        **{key.removeprefix("test "): value for key, value in last.items() if key.startswith("test ")},
        **{key: last.get(key) for key in ("forgetting", "drift")},
        "tokens_a_second": _ratio(last.get("train total tokens"), info.train_time),
    }
    return finite((name, value) for name, value in found.items() if isinstance(value, int | float))


def _ratio(count: Any, seconds: float) -> float | None:
    return count / seconds if isinstance(count, int | float) and seconds else None


def finite(values: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Those that are numbers, and not infinite."""
    return {name: float(value) for name, value in values if value is not None and math.isfinite(value)}
