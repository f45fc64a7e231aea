"""A trainer for answers to choose from: trains on what the recipe reads of them, evaluates by ranking all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..objectives.choice_rows import (
    answer_targets,
    choices_taken,
    mean_log_likelihoods,
    only_answers,
    ranked_first,
    rows_of,
    token_log_likelihoods,
)
from .trainer import RecipeTrainer


class ChoiceTrainer(RecipeTrainer):
    """RecipeTrainer for batches as `shoestring.objectives.choice_rows` describes them."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As ever; wrong answers are left out where no technique reads them."""
        wanted = any("choices" in technique.reads_of_batch for technique in self.attached.techniques)
        inputs = inputs if wanted else only_answers(inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of right answers; for each example the choice with the highest score, and the right one."""
        inputs = self._prepare_inputs(inputs)
        rows = rows_of(inputs)
        assert rows is not None
        with torch.no_grad(), self.compute_loss_context_manager(), choices_taken(self.attached.model):
            outputs = model(**inputs)
        if prediction_loss_only:
            return outputs.loss, None, None
        targets = answer_targets(model, rows)
        scores = mean_log_likelihoods(token_log_likelihoods(outputs.logits, targets), targets)
        return outputs.loss, *ranked_first(scores, rows)


def rank_accuracy(prediction: Any) -> dict[str, float]:
    """The share of examples whose right answer ranks first, in [0, 1]."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}
