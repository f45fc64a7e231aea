r"""Calibration: second moments of what layers get as input, from rows of data, without gradients.

Update   total = sum over real tokens of x^T x, so that ||D X^T||_F^2 = trace(D total D^T) for any D [out, in]
Shapes   x [1, in], total [in, in] in double precision
Costs    the model's forward once a row, and 2 in^2 operations a token and layer; 8 in^2 bytes a layer until it is used
"""

import inspect
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingError
from ..modes import in_eval_mode
from ..positions import positions_of
from ..real_tokens import NO_LABEL
from ..technique import Events
from ..wrappers import innermost

LABELS = frozenset({"label", "labels", "label_ids", "start_positions", "end_positions", "next_sentence_label"})
SECONDS_BEFORE_A_BAR = 5
BYTES_AT_ONCE = 4 << 30  # of moments; for more layers the rows are run again


@dataclass
class Moments:
    """total: sum of x^T x over all tokens. count: how many tokens that were."""

    total: Float[Tensor, "in in"]
    count: int


def input_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    *,
    max_tokens: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Moments]:
    """The moments of the inputs of `layers`, by name, over the first `num_rows` rows.

    layers: modules in the model that get [*, in] as their first argument.
    rows: model inputs of one row each, as lists, arrays or tensors. Columns that the model does not take and labels
        are passed over. Each row is run by itself, without its padding (attention_mask 0, in labels -100).
    max_tokens: longer rows are cut; rows are never longer than the positions that the model has.

    Raises SettingError for too few rows, and naming a layer that no token reached or whose input is NaN or Inf.
    """
    if len(rows) < num_rows:
        raise SettingError(
            f"Calibration on {num_rows} rows needs as many, but the data has only {len(rows)}: give more rows or ask "
            "for fewer."
        )
    sums = _Sums(dtype)
    with ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        undo.enter_context(in_eval_mode(model))
        for name, layer in layers.items():
            undo.callback(layer.register_forward_pre_hook(sums.hook(name), with_kwargs=True).remove)
        for index in tqdm(range(num_rows), desc="Calibration", unit="row", delay=SECONDS_BEFORE_A_BAR, leave=False):
            sums.start_row(index)
            model(**inputs_of(model, rows[index], index, max_tokens))
    if missing := [name for name in layers if name not in sums.moments]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise SettingError(
            f"No token of the {num_rows} calibration rows reached {missing[0]}{more}: leave it out of the layers, or "
            "give rows that use it."
        )
    return sums.moments


def moments_in_parts(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    *,
    max_tokens: int | None = None,
    most_bytes: int = BYTES_AT_ONCE,
) -> Iterator[tuple[str, Moments]]:
    """As `input_moments`, layer by layer; the rows are run again for every so many layers as fill `most_bytes`."""
    for part in _parts(layers, most_bytes):
        moments = input_moments(model, part, rows, num_rows, max_tokens=max_tokens)
        for name in part:
            yield name, moments.pop(name)


def training_rows(splits: Mapping[str, Any], method: str, setting: str, count: int, otherwise: str = "") -> Any:
    """The split "train", to draw rows from. otherwise: what needs no data, for errors.

    Raises SettingError, naming the setting that wants so many, if it is no data set of at least `count` rows.
    """
    rows = splits.get("train")
    if rows is None or not hasattr(rows, "__len__"):
        got = f"a stream of type {type(rows).__name__}" if rows is not None else f"only {', '.join(splits)}"
        raise SettingError(f"{method} draws rows of the split 'train', a data set with a length; got {got}.{otherwise}")
    if len(rows) < count:
        raise SettingError(
            f"{setting} of {method} is {count}, but the training data has only {len(rows)} rows: lower {setting} or "
            f"give more data.{otherwise}"
        )
    return rows


@dataclass(kw_only=True)
class Calibrated(Events):
    """What a config has whose start is calibrated on data; stands before `AdapterConfig` among its bases.

    The data are rows of the split "train" of what a recipe is attached with; `shoestring train` gives its own. With
    peft alone, call `config.see_data({"train": rows})` before the adapter is made.

    calibration_rows: how many rows are drawn from the data, 1 <= calibration_rows.
    calibration_max_tokens: rows longer than this are cut.
    calibration_seed: which rows are drawn.

    Raises SettingError for values below 1.
    """

    values_follow = False

    calibration_rows: int = 128
    calibration_max_tokens: int = 2048
    calibration_seed: int = 0

    def __post_init__(self) -> None:
        getattr(super(), "__post_init__", lambda: None)()
        for name in ("calibration_rows", "calibration_max_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SettingError(f"{name} of {self._method} must be a whole number of at least 1, got {value!r}.")
        self._rows: list[Mapping[str, Any]] | None = None

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Draw the rows, where data is read. Empty splits mean that values are about to be loaded.

        Raises SettingError if there are splits, but none called "train" with as many rows as are wanted.
        """
        if not splits:
            self.values_follow = True
        if not splits or not self.reads_data:
            return
        rows = training_rows(splits, self._method, "calibration_rows", self.calibration_rows)
        drawn = random.Random(self.calibration_seed).sample(range(len(rows)), self.calibration_rows)
        self._rows = [rows[index] for index in sorted(drawn)]

    def see_saved(self, folder: Path) -> None:
        """What was calibrated is about to be loaded."""
        super().see_saved(folder)
        self.values_follow = True

    @property
    def runs_model(self) -> bool:
        """Whether it is calibrated on data."""
        return self.reads_data

    @property
    def _method(self) -> str:
        """The method's name, also of an adapter's config."""
        method: Any = getattr(self, "method", self)
        return str(method.name)

    def on_attached(self, model: nn.Module) -> None:
        """Let go of the rows."""
        self._rows = None
        super().on_attached(model)

    def moments(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, Moments]]:
        """The moments of the inputs of `layers` over the rows that were drawn, layer by layer.

        Raises SettingError if no data was seen.
        """
        count, length = self.calibration_rows, self.calibration_max_tokens
        return moments_in_parts(model, layers, self.rows_drawn(), count, max_tokens=length)

    def rows_drawn(self) -> list[Mapping[str, Any]]:
        """The rows to calibrate on.

        Raises SettingError if no data was seen.
        """
        if self._rows is None:
            raise SettingError(
                f"{self._method} is calibrated on data when it is attached, and has seen none: train with a run "
                "file, attach with recipe.apply(model, data={'train': rows}), or call config.see_data({'train': rows}) "
                "first."
            )
        return self._rows


class _Sums:
    """The moments so far, and the hooks that add to them."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.moments: dict[str, Moments] = {}
        self.start_row(0)

    def start_row(self, index: int) -> None:
        self._row = index
        self._last: tuple[Any, int, Tensor | None] = (None, 0, None)

    def hook(self, name: str) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._add(name, args[0] if args else next(iter(kwargs.values())))

        return add

    def _add(self, name: str, x: Tensor) -> None:
        product = self._product(name, x)
        if name in self.moments:
            self.moments[name].total += product
            self.moments[name].count += x.shape[:-1].numel()
        else:
            self.moments[name] = Moments(product.clone(), x.shape[:-1].numel())

    def _product(self, name: str, x: Tensor) -> Tensor:
        """x^T x, computed once where several layers in a row get the same x."""
        last, version, product = self._last
        if product is None or last is not x or version != x._version:
            flat = x.detach().reshape(-1, x.shape[-1]).to(self.dtype)
            product = flat.T @ flat
            if not product.isfinite().all():
                raise SettingError(
                    f"The input of {name} holds NaN or Inf at calibration row {self._row}: check the model's weights "
                    "and dtype and this row, or draw others."
                )
            self._last = x, x._version, product
        return product


def inputs_of(
    model: nn.Module, row: Mapping[str, Any], index: int, max_tokens: int | None, with_labels: bool = False
) -> dict[str, Any]:
    """What to call the model with: one row as a batch of one, without padding, on the model's device.

    Raises SettingError with the row's `index` if nothing is left of it.
    """
    inner = innermost(model)
    accepted = inspect.signature(inner.forward).parameters
    config = getattr(inner, "config", None)
    two_sides = getattr(config, "is_encoder_decoder", False)
    labels = with_labels or (two_sides and row.get("decoder_input_ids") is None)
    wanted = {name for name in accepted if name not in LABELS or (labels and name == "labels")}
    columns = {name: _as_tensor(value) for name, value in row.items() if name in wanted and value is not None}
    if not columns:
        raise SettingError(
            f"Calibration row {index} has none of the inputs of {type(inner).__name__}, only {', '.join(row)}; give "
            f"tokenised rows, with {getattr(inner, 'main_input_name', next(iter(accepted)))}."
        )
    lengths = [max_tokens, positions_of(inner)]
    columns = _without_padding(columns, two_sides)
    columns = _cut(columns, min((n for n in lengths if n), default=None))
    if empty := [name for name, column in columns.items() if not column.numel()]:
        raise SettingError(f"{empty[0]} of calibration row {index} is empty or all padding; give other rows.")
    floating = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs: dict[str, Any] = {
        name: column[None].to(floating.device, floating.dtype if column.is_floating_point() else None)
        for name, column in columns.items()
    }
    return {**inputs, "use_cache": False} if "use_cache" in accepted else inputs


def in_one_batch(model: nn.Module, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What `inputs_of` gives for several rows as one batch, padded on the right; None where they make no batch."""
    inner = innermost(model)
    if any(row.keys() != rows[0].keys() for row in rows):
        return None
    if "attention_mask" not in rows[0] and len({row["input_ids"].shape for row in rows if "input_ids" in row}) > 1:
        if "attention_mask" not in inspect.signature(inner.forward).parameters:
            return None
        rows = [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in rows]
    padding = max(getattr(getattr(inner, "config", None), "pad_token_id", None) or 0, 0)
    batch = dict(rows[0])
    for name in (name for name, value in batch.items() if isinstance(value, Tensor)):
        columns = [row[name] for row in rows]
        if len({column.shape for column in columns}) > 1:
            if any(column.dim() != 2 or column.is_floating_point() for column in columns):
                return None
            fill = NO_LABEL if name == "labels" else padding if name.endswith("input_ids") else 0
            longest = max(column.shape[1] for column in columns)
            columns = [nn.functional.pad(column, (0, longest - column.shape[1]), value=fill) for column in columns]
        batch[name] = torch.cat(columns)
    return batch


def _as_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))


def _without_padding(columns: dict[str, Tensor], two_sides: bool) -> dict[str, Tensor]:
    kept = {}
    for name, column in columns.items():
        of_decoder = name.startswith("decoder_") or (name == "labels" and two_sides)
        mask = columns.get("decoder_attention_mask" if of_decoder else "attention_mask")
        if name == "labels" and two_sides and "decoder_input_ids" not in columns:
            column = column[column != NO_LABEL]
        elif mask is not None and mask.dim() == 1 and column.shape[:1] == mask.shape and _is_tokens(name, column):
            column = column[mask != 0]
        kept[name] = column
    return kept


def _is_tokens(name: str, column: Tensor) -> bool:
    return column.dim() == 1 or name.endswith("inputs_embeds")


def _cut(columns: dict[str, Tensor], length: int | None) -> dict[str, Tensor]:
    """Columns of one number a token, cut; raw sound is none of them."""
    return {
        name: column[:length] if column.dim() == 1 and not column.is_floating_point() else column
        for name, column in columns.items()
    }


def _parts(layers: Mapping[str, nn.Module], most_bytes: int) -> Iterable[dict[str, nn.Module]]:
    """Layers in order, as many at once as have moments of `most_bytes`, and one at least."""
    part: dict[str, nn.Module] = {}
    size = 0
    for name, layer in layers.items():
        own = 8 * _num_inputs(layer) ** 2
        if part and size + own > most_bytes:
            yield part
            part, size = {}, 0
        part[name] = layer
        size += own
    if part:
        yield part


def _num_inputs(layer: Any) -> int:
    """Of a linear layer; transformers' Conv1D keeps them as the rows of its weight."""
    return layer.in_features if hasattr(layer, "in_features") else layer.weight.shape[0]
