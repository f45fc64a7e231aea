"""The ids that data sets hold: of ragged or nested rows, several columns, any kind of data set with a length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from ..errors import SettingError
from ..real_tokens import NO_LABEL

ROWS_AT_ONCE = 1000


def is_stream(rows: Any) -> bool:
    """Whether rows can only be taken as they come, perhaps without end."""
    return isinstance(rows, IterableDataset) or not hasattr(rows, "__len__")


def used_ids(splits: Mapping[str, Any], columns: Iterable[str]) -> Tensor:
    """The ids in `columns` of all splits, sorted, each once, int64.

    splits: by name, data sets of `datasets`, or lists or torch data sets of mappings with lists, arrays or tensors.
    columns: those to read; one that a split lacks is passed over, and so are values that are no sequence, such as
        class labels.

    Raises SettingError for a stream, for a split without any of the columns, and if there are no ids.
    """
    columns = list(columns)
    ids = np.zeros(0, dtype=np.int64)
    for split, rows in splits.items():
        if is_stream(rows):
            raise SettingError(
                f"embedding_pruning cannot count the ids of {split}, a stream of type {type(rows).__name__}. Give a "
                "data set with a length, or list the ids in keep_ids."
            )
        ids = np.union1d(ids, _ids_of(split, rows, columns))
    ids = ids[ids != NO_LABEL].astype(np.int64)
    if not len(ids):
        raise SettingError(f"The data ({', '.join(splits)}) holds no ids in {' or '.join(columns)}: it is empty.")
    return torch.from_numpy(ids)


def _ids_of(split: str, rows: Any, columns: list[str]) -> np.ndarray:
    found = np.zeros(0, dtype=np.int64)
    seen: set[str] = set()
    for batch in _batches(rows, columns, seen):
        found = np.union1d(found, batch)
    if seen and not seen & set(columns):
        raise SettingError(
            f"The rows of {split} have none of the columns {', '.join(columns)}, only {', '.join(sorted(seen))}: give "
            "tokenised rows, or name yours in columns of embedding_pruning."
        )
    return found


def _batches(rows: Any, columns: list[str], seen: set[str]) -> Iterator[np.ndarray]:
    """Arrays of ids; the names of all columns go into `seen`."""
    if hasattr(rows, "with_format") and getattr(rows, "format", {}).get("type") != "custom":
        seen.update(rows.column_names)
        for column in set(columns) & seen:
            for table in rows.select_columns([column]).with_format("arrow").iter(ROWS_AT_ONCE):
                yield from _flat_arrow(table.column(0))
        return
    for row in (rows[index] for index in range(len(rows))):
        if not isinstance(row, Mapping):
            raise SettingError(
                f"embedding_pruning needs rows that are mappings such as {{'input_ids': [...]}}, got "
                f"one of type {type(row).__name__}."
            )
        seen.update(row)
        for column in columns:
            yield from _flat(row.get(column))


def _flat_arrow(column: Any) -> Iterator[np.ndarray]:
    import pyarrow as pa
    import pyarrow.compute as pc

    nested = False
    while isinstance(column.type, (pa.ListType, pa.LargeListType, pa.FixedSizeListType)):
        column, nested = pc.list_flatten(column), True
    if nested and pa.types.is_integer(column.type):
        yield np.unique(column.drop_null().to_numpy())


def _flat(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, (list, tuple)) and any(isinstance(item, (list, tuple, Tensor, np.ndarray)) for item in value):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, (list, tuple, Tensor, np.ndarray)):
        array = np.asarray(value.cpu() if isinstance(value, Tensor) else value)
        if array.ndim and array.size and array.dtype.kind in "iu":
            yield np.unique(array)
