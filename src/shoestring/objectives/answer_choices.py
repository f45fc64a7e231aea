r"""Answer choices: T-Few's losses, by which wrong answers become unlikely and the right one the likeliest of all.

Source   Liu et al. 2022, arXiv:2205.05638, NeurIPS 2022
Update   loss + unlikelihood * L_UL + length_normalised * L_LN, means over examples, of a prompt x, its right answer y
         and N wrong ones y^n of T^n tokens each;
         L_UL = - sum_n sum_t log(1 - p(y^n_t | x, y^n_<t)) / sum_n T^n
         L_LN = - log(exp b(x, y) / (exp b(x, y) + sum_n exp b(x, y^n)));  b(x, y) = (1 / T) sum_t log p(y_t | x, y_<t)
Shapes   logits [rows, tokens, vocabulary], one row for each choice of each example
Costs    1 + N rows an example in place of one, all in memory until backward. An encoder reads each example once
Differs  `loss` is the model's own: the mean over the tokens of right answers in the batch, as in the public code. There
         L_UL is log(1 - p + 0.01), its denominator the batch's, and places of padding and of right answers add
         -log(1.01) each; variant "reference" does so too. (IA)3 is peft's: rows of one batch all have the same vectors,
         so that one batch cannot hold several tasks with vectors of their own
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import SettingError
from ..fakes import has_values
from ..real_tokens import NO_LABEL
from ..technique import Moment, Phase, Technique, register_technique
from .choice_rows import (
    ChoiceRows,
    answer_targets,
    choices_taken,
    mean_log_likelihoods,
    rows_of,
    token_log_likelihoods,
)

FLOOR = 0.01
"""What the public code adds to 1 - p."""


@register_technique
@dataclass
class AnswerChoices(Technique):
    """The unlikelihood and the length-normalised loss over the answers that each example gives to choose from.

    unlikelihood, length_normalised: weights, at least 0. Both 0: wrong answers are not run.
    variant: "paper", or "reference" for the unlikelihood of the public code.

    For the task multiple-choice, or batches as `shoestring.objectives.choice_rows` describes them. Batches without
    choices are left as they are.

    Raises SettingError for other values; in a forward, if there are no logits.
    """

    name: ClassVar[str] = "answer_choices"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    claims: ClassVar[frozenset[str]] = frozenset({"the output head"})
    reads_of_batch: ClassVar[frozenset[str]] = frozenset({"choices"})

    unlikelihood: float = 1.0
    length_normalised: float = 1.0
    variant: Literal["paper", "reference"] = "paper"

    def __post_init__(self) -> None:
        for name in ("unlikelihood", "length_normalised"):
            if not getattr(self, name) >= 0:
                raise SettingError(f"{name} of answer_choices must be at least 0, got {getattr(self, name)}.")
        if self.variant not in ("paper", "reference"):
            raise SettingError(f"variant of answer_choices must be 'paper' or 'reference', got {self.variant!r}.")
        self._had_choices: bool | None = None  # None: nobody looked yet

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Take what a batch says of its choices out of what the model is given."""
        with choices_taken(model):
            yield model

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The weighted sum of both losses."""
        rows = rows_of(batch)
        if all(has_values(value) for value in batch.values() if isinstance(value, Tensor)):  # not in a rehearsal
            self._had_choices = self._had_choices or rows is not None
        if rows is None or not (self.unlikelihood or self.length_normalised):
            return None
        logits = getattr(outputs, "logits", None)
        targets = answer_targets(model, rows)
        if not isinstance(logits, Tensor) or logits.shape[:2] != targets.shape:
            shape = list(logits.shape) if isinstance(logits, Tensor) else None
            raise SettingError(
                f"answer_choices needs logits of shape {list(targets.shape)} and the vocabulary, got {shape}: leave "
                "out what makes no logits and what adds tokens to the sequence."
            )
        of_tokens = token_log_likelihoods(logits, targets)
        total = of_tokens.new_zeros(())
        if self.unlikelihood:
            loss = unlikelihood_loss if self.variant == "paper" else reference_unlikelihood_loss
            total = total + self.unlikelihood * loss(of_tokens, targets != NO_LABEL, rows)
        if self.length_normalised:
            scores = mean_log_likelihoods(of_tokens, targets)
            total = total + self.length_normalised * length_normalised_loss(scores, rows)
        return total

    def on_step_end(self, moment: Moment) -> None:
        """Say so if the first step had no choices."""
        if self._had_choices is False:
            warnings.warn(
                "answer_choices has no effect: the batches hold no answers to choose from. Use the task "
                "multiple-choice, or batches as shoestring.objectives.choice_rows describes them.",
                stacklevel=2,
            )
            self._had_choices = None


def unlikelihood_loss(
    of_tokens: Float[Tensor, "rows length"], counted: Bool[Tensor, "rows length"], rows: ChoiceRows
) -> Float[Tensor, ""]:
    """The mean over examples of - sum log(1 - p) over the tokens of its wrong answers, over their number.

    of_tokens: log p. counted: where there is a token of an answer. Examples without wrong answers have a loss of 0.
    """
    wrong = counted & ~rows.is_answer[:, None]
    terms = torch.where(wrong, log_one_minus_exp(of_tokens), 0).sum(1)
    of_example = rows.members.to(terms)
    sums, tokens = of_example @ terms, of_example @ wrong.sum(1).to(terms)
    return -(sums / tokens.clamp(min=1)).mean()


def reference_unlikelihood_loss(
    of_tokens: Float[Tensor, "rows length"], counted: Bool[Tensor, "rows length"], rows: ChoiceRows
) -> Float[Tensor, ""]:
    """As the public code has it, over the batch, with a constant for each place that holds no token of a wrong answer.

    Places: as many a row as the longest answer of the batch has tokens.
    """
    wrong = counted & ~rows.is_answer[:, None]
    terms = torch.where(wrong, (1 - of_tokens.exp() + FLOOR).log(), 0).sum()
    places, tokens = len(counted) * counted.sum(1).max(), wrong.sum()
    return -(terms + (places - tokens) * math.log(1 + FLOOR)) / tokens.clamp(min=1)


def length_normalised_loss(scores: Float[Tensor, " rows"], rows: ChoiceRows) -> Float[Tensor, ""]:
    """The mean over examples of the cross-entropy of choosing the right answer by the scores of all."""
    of_example = scores.masked_fill(~rows.members, -torch.inf)
    return (of_example.logsumexp(1) - scores[answer_rows(rows)]).mean()


def answer_rows(rows: ChoiceRows) -> Int[Tensor, " examples"]:
    """The row of the right answer of each example."""
    return (rows.members & rows.is_answer).int().argmax(1)


def log_one_minus_exp(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """log(1 - exp(x)) for x <= 0, without cancellation; x is kept below 0 by as much as its dtype can tell from it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    return torch.where(x > -math.log(2), (-x.expm1()).log(), (-x.exp()).log1p())
