"""Data of a run: splits from a hub id, a file of rows (`READERS`), a folder of pictures, or `packaged:NAME`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .settings import DataSettings

READERS = {".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
PACKAGED = "packaged:"


def load_splits(data: DataSettings, seed: int) -> DatasetDict:
    """The splits "train", "validation" and "test" that the settings name or that the source of `train` brings along.

    seed: for the choice of rows where max_train_rows asks for fewer; held-out rows are the same whatever it is.

    Raises SettingError naming what is missing or empty.
    """
    from datasets import DatasetDict

    found = _read(data.train, "train")
    splits = DatasetDict({name: found[name] for name in ("train", "validation", "test") if name in found})
    for name in ("validation", "test"):
        if (source := getattr(data, name)) is not None:
            splits[name] = _read(source, name)[name]
    if data.validation_share is not None:
        splits = _with_validation(splits, data.validation_share)
    for name, dataset in splits.items():
        limit = data.max_train_rows if name == "train" else data.max_eval_rows
        if len(dataset) == 0:
            raise SettingError(f"The {name} data ({getattr(data, name) or data.train}) is empty: it has no rows.")
        if limit is not None and limit < len(dataset):
            splits[name] = dataset.shuffle(seed=seed if name == "train" else 0).select(range(limit))
    return splits


def _with_validation(splits: DatasetDict, share: float) -> DatasetDict:
    """With a share of the training rows as validation data in their place.

    Raises SettingError if there is validation data already, or too few rows.
    """
    from datasets import DatasetDict

    if "validation" in splits:
        raise SettingError(
            "data.validation_share is given, but the data has a validation split; leave one of them out."
        )
    rows = len(splits["train"])
    held_out = round(share * rows)
    if not 0 < held_out < rows:
        raise SettingError(f"data.validation_share is {share}, which leaves {held_out} of {rows} rows for validation.")
    parts = splits["train"].train_test_split(held_out, seed=0)
    return DatasetDict({**splits, "train": parts["train"], "validation": parts["test"]})


def need_columns(split: str, dataset: Dataset, *names: str | None) -> None:
    """Refuse a data set without one of the columns.

    Raises SettingError with the columns there are.
    """
    for name in names:
        if name is not None and name not in dataset.column_names:
            raise SettingError(
                f"The {split} data has no column {name!r}. {did_you_mean(name, dataset.column_names)} "
                "Name yours under data."
            )


def need_texts(split: str, dataset: Dataset, *names: str | None) -> None:
    """Refuse a column with anything but texts.

    Raises SettingError with the first row of it.
    """
    for name in filter(None, names):
        row = next((i for i, value in enumerate(dataset[name]) if not isinstance(value, str)), None)
        if row is not None:
            raise SettingError(f"Row {row} of {split} holds no text in {name!r}, but {dataset[row][name]!r}.")


def _read(source: str, split: str) -> DatasetDict:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetGenerationError

    if source.startswith(PACKAGED):
        from .. import assets

        found = assets.load_data(source.removeprefix(PACKAGED))
        if split not in found:
            raise SettingError(f"{source} has no split {split!r}; it has {', '.join(found)}.")
        return found
    path = Path(source).expanduser()
    if path.suffix in READERS:
        if not path.is_file():
            raise SettingError(f"The {split} data file {source} does not exist.")
        if path.stat().st_size == 0:
            raise SettingError(f"The {split} data file {source} is empty.")
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        try:
            return DatasetDict(
                {split: load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)}
            )
        except (DatasetGenerationError, ValueError) as error:
            if "no data" in str(error):
                raise SettingError(f"The {split} data file {source} is empty: it has no rows.") from error
            raise SettingError(
                f"The {split} data file {source} cannot be read as {path.suffix[1:]}: {error}"
            ) from error
    where = str(path) if path.is_dir() else source
    try:
        found = load_dataset(where) if split == "train" else DatasetDict({split: load_dataset(where, split=split)})
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingError(
            f"The {split} data {source!r} is no hub id that can be reached, no {', '.join(READERS)} file, no folder of "
            f"pictures and no packaged:NAME. `shoestring assets list` shows the packaged data. "
            f"({type(error).__name__}: {error})"
        ) from error
    if "train" not in found and split == "train":
        raise SettingError(f"{source} has no split 'train'; it has {', '.join(found)}.")
    return found
