"""Batches of answers to choose from: one row for each choice of each example, and what a model thinks of them.

A batch holds what the model takes, for every row, and three entries beside it: `choice_labels`, the ids of the row's
answer (as `labels` are, but for wrong answers too, which have no `labels`); `example`, the number of the example that
the row belongs to; and `is_answer`, whether the row is the right answer of its example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SettingError
from ..fakes import has_values
from ..forwards import forward_replaced
from ..precision import at_least_float32
from ..real_tokens import NO_LABEL, first_rows, members
from .base import labelled_rows

ENTRIES = ("choice_labels", "example", "is_answer")


@dataclass(frozen=True)
class ChoiceRows:
    """What a batch says of its rows beside the model's inputs.

    Raises SettingError if an example has no right answer, or more than one.
    """

    choice_labels: Int[Tensor, "rows tokens"]
    example: Int[Tensor, " rows"]
    is_answer: Bool[Tensor, " rows"]

    def __post_init__(self) -> None:
        if not len(self.choice_labels) == len(self.example) == len(self.is_answer):
            raise SettingError(
                f"{', '.join(ENTRIES)} of a batch must have one entry a row, got {len(self.choice_labels)}, "
                f"{len(self.example)} and {len(self.is_answer)}."
            )
        if has_values(self.example) and not (self.members & self.is_answer).sum(1).eq(1).all():
            raise SettingError("Every example of a batch with choices must have one row with is_answer, and one only.")

    @property
    def members(self) -> Bool[Tensor, "examples rows"]:
        """Which rows belong to which example."""
        return members(self.example)


def rows_of(batch: Mapping[str, Any]) -> ChoiceRows | None:
    """The three entries of a batch; None if it has none of them."""
    return ChoiceRows(*(batch[name] for name in ENTRIES)) if all(batch.get(n) is not None for n in ENTRIES) else None


def take_rows(batch: MutableMapping[str, Any]) -> ChoiceRows | None:
    """As `rows_of`, and out of the batch, which then is what the model takes."""
    rows = rows_of(batch)
    for name in ENTRIES:
        batch.pop(name, None)
    return rows


def only_answers(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of the right answers alone, as the model takes them."""
    batch = dict(batch)
    rows = take_rows(batch)
    return batch if rows is None else {name: value[rows.is_answer] for name, value in batch.items()}


@contextmanager
def encoded_once(model: nn.Module, rows: ChoiceRows) -> Iterator[None]:
    """Inside, an encoder beside a decoder reads each example once, whose output serves all its rows."""
    owner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if owner is None or not owner.config.is_encoder_decoder:
        yield
        return
    first = first_rows(rows.example)

    def forward(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def of_examples(value: Any) -> Any:
            whole = isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(rows.example)
            return value[first] if whole else value

        encoded = plain(*map(of_examples, args), **{name: of_examples(value) for name, value in kwargs.items()})
        encoded.last_hidden_state = encoded.last_hidden_state[rows.example]
        return encoded

    with forward_replaced(owner.get_encoder(), forward):
        yield


@contextmanager
def choices_taken(model: nn.Module) -> Iterator[None]:
    """Inside, `model` takes batches with their three entries, and its encoder reads each example once."""

    def forward(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        rows = take_rows(kwargs)
        if rows is None:
            return plain(*args, **kwargs)
        with encoded_once(module, rows):
            return plain(*args, **kwargs)

    with forward_replaced(model, forward):
        yield


def token_log_likelihoods(
    logits: Float[Tensor, "rows length vocabulary"], targets: Int[Tensor, "rows length"]
) -> Float[Tensor, "rows length"]:
    """log p of each target, in float32 or wider; 0 where there is none (-100)."""
    chosen = labelled_rows(targets.flatten(), NO_LABEL)
    of_chosen = logits.flatten(0, 1)[chosen]
    wide = at_least_float32(of_chosen)
    found = -F.cross_entropy(wide, targets.flatten()[chosen], reduction="none")
    return wide.new_zeros(targets.numel()).index_put((chosen,), found).view(targets.shape)


def answer_targets(model: nn.Module, rows: ChoiceRows) -> Int[Tensor, "rows length"]:
    """What each row of logits is to predict of its answer; -100 elsewhere. A decoder alone predicts the next token."""
    owner = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    labels = rows.choice_labels
    return labels if owner.config.is_encoder_decoder else F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def mean_log_likelihoods(
    of_tokens: Float[Tensor, "rows length"], targets: Int[Tensor, "rows length"]
) -> Float[Tensor, " rows"]:
    """The mean over the tokens of each answer: its length-normalised log-likelihood."""
    return of_tokens.sum(1) / (targets != NO_LABEL).sum(1).clamp(min=1)


def ranked_first(scores: Float[Tensor, " rows"], rows: ChoiceRows) -> tuple[Tensor, Tensor]:
    """For each example the number of its choice with the highest score, and that of the right one."""
    members = rows.members
    order = members.int().cumsum(1) - 1  # of a row among those of its example
    best = scores.masked_fill(~members, -torch.inf).argmax(1, keepdim=True)
    right = (members & rows.is_answer).int().argmax(1, keepdim=True)
    return order.gather(1, best).squeeze(1), order.gather(1, right).squeeze(1)
