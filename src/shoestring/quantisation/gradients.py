r"""Calibration by gradients: which columns of a weight the loss depends on, from rows of data, before anything trains.

Update   score_i = sum over rows of || dL/dW[:, i] ||^2, with dL/dW = dY^T X
Shapes   X [tokens, in], Y [tokens, out], W [out, in], score [in]
Costs    a step of full training without its optimizer once a row; one dense [out, in] gradient at a time
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingError
from ..fakes import has_values
from ..modes import in_eval_mode
from ..precision import wide_dtype
from ..real_tokens import NO_LABEL
from ..wrappers import innermost
from .calibration import SECONDS_BEFORE_A_BAR, in_one_batch, inputs_of


def column_gradients(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    *,
    max_tokens: int | None = None,
) -> dict[str, Float[Tensor, " in"]]:
    """The score of each input of `layers`, by name, over the first `num_rows` rows.

    layers: linear modules in the model, quantised or not; a layer that runs twice in a forward counts each time.
    rows: model inputs of one row each, with their labels; for a causal language model those are its own inputs where
        there are no others.

    Raises SettingError for a row without a loss, and naming a layer that no gradient reached or whose is NaN or Inf.
    """
    scores: dict[str, Tensor] = {}

    def add(name: str, x: Float[Tensor, "tokens in"], dy: Float[Tensor, "tokens out"]) -> None:
        scores[name] = scores.get(name, 0) + (dy.T @ x).square_().sum(0)

    each_gradient(model, layers, rows, num_rows, add, max_tokens=max_tokens)
    for name in layers:
        if not scores[name].isfinite().all():
            raise SettingError(f"The gradient of {name} holds NaN or Inf: check the model's weights and the rows.")
    return scores


def each_gradient(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    take: Callable[[str, Tensor, Tensor], None],
    *,
    max_tokens: int | None = None,
) -> None:
    """Call `take` with the two factors of dL/dW = dY^T X, in float32 or wider, for each of `layers` and each row.

    take: gets the layer's name, X [tokens, in] and dY [tokens, out]; several times where a layer runs several times.

    Raises SettingError for a row without a loss, and naming a layer that no gradient reached.
    """
    reached = set()

    def flat(name: str, x: Tensor, dy: Tensor) -> None:
        reached.add(name)
        wide = wide_dtype(x.dtype)
        take(name, x.flatten(0, -2).to(wide), dy.flatten(0, -2).to(wide))

    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(in_eval_mode(model))
        undo.enter_context(all_frozen(model))
        for name, layer in layers.items():
            undo.callback(layer.register_forward_hook(_watching(name, flat)).remove)
        for index in tqdm(range(num_rows), desc="Gradients", unit="row", delay=SECONDS_BEFORE_A_BAR, leave=False):
            loss_of(model, rows[index], index, max_tokens).backward()
    for name in layers:
        if name not in reached:
            raise SettingError(
                f"No gradient of the {num_rows} calibration rows reached {name}: leave it out of the layers, or give "
                "rows that use it."
            )


def _watching(name: str, add: Callable[[str, Tensor, Tensor], None]) -> Any:
    """A forward hook that has `add` called in backward, and lets the graph begin where there is none before."""

    def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach()
        y = y if y.requires_grad else y.detach().requires_grad_()
        y.register_hook(lambda dy: add(name, x, dy))
        return y

    return hook


@contextmanager
def all_frozen(model: nn.Module) -> Iterator[None]:
    """No parameter trains, and those that did train again after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def loss_of(model: nn.Module, row: Mapping[str, Any], index: int, max_tokens: int | None) -> Tensor:
    """The model's loss of one row of inputs with labels, or of a decoder's inputs alone.

    Raises SettingError with the row's `index` if there is none, or no label is left that it counts.
    """
    return _loss(model, _labelled(model, row, index, max_tokens), index)


def batches_of(model: nn.Module, rows: Sequence[Mapping[str, Any]], at_once: int) -> list[tuple[dict[str, Any], int]]:
    """Inputs for `loss_of_batches`, of `at_once` rows where these make a batch, each with the number of its rows.

    Raises SettingError as `loss_of`.
    """
    inputs = [_labelled(model, row, index, None) for index, row in enumerate(rows)]
    batches: list[tuple[dict[str, Any], int]] = []
    for start in range(0, len(inputs), at_once):
        part = inputs[start : start + at_once]
        joined = in_one_batch(model, part)
        batches += [(row, 1) for row in part] if joined is None else [(joined, len(part))]
    return batches


def loss_of_batches(model: nn.Module, batches: Sequence[tuple[dict[str, Any], int]]) -> float:
    """The mean of the model's losses of batches, each counted by its rows.

    Raises SettingError for a batch without a loss.
    """
    losses = [_loss(model, inputs, index).double() * count for index, (inputs, count) in enumerate(batches)]
    return float(torch.stack(losses).sum()) / sum(count for _, count in batches)


def _labelled(model: nn.Module, row: Mapping[str, Any], index: int, max_tokens: int | None) -> dict[str, Any]:
    """What to call the model with for a loss; a decoder's inputs are its labels where there are no others."""
    if "labels" not in row and "label" in row:
        row = {**row, "labels": row["label"]}
    inputs = inputs_of(model, row, index, max_tokens, with_labels=True)
    inner = innermost(model)
    if "labels" not in inputs and getattr(inner, "can_generate", lambda: False)():
        if "input_ids" not in inputs or inner.config.is_encoder_decoder:
            raise _no_loss(model, inputs, index)
        inputs["labels"] = inputs["input_ids"]
    _check_labels(inputs.get("labels"), index, max_tokens)
    return inputs


def _loss(model: nn.Module, inputs: dict[str, Any], index: int) -> Tensor:
    loss: Tensor | None = getattr(model(**inputs), "loss", None)
    if loss is None:
        raise _no_loss(model, inputs, index)
    return loss


def _no_loss(model: nn.Module, inputs: dict[str, Any], index: int) -> SettingError:
    return SettingError(
        f"{type(model).__name__} gives no loss for calibration row {index} ({', '.join(inputs)}): give rows "
        "with labels, or choose by something else than gradients."
    )


def _check_labels(labels: Tensor | None, index: int, max_tokens: int | None) -> None:
    """Refuse a row whose labels are all cut off, of which the loss is a NaN."""
    if labels is None or labels.is_floating_point() or not has_values(labels) or bool((labels != NO_LABEL).any()):
        return
    where = "" if max_tokens is None else f" among its first {max_tokens} tokens"
    raise SettingError(
        f"Calibration row {index} has no label that the loss counts{where}: raise calibration_max_tokens, or give rows "
        "with labels."
    )
