"""Checks on a run while it trains: every weight that should learn has a finite gradient that is not zero."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunFailed
from ..recipe import attached_to


class GradientCheck(TrainerCallback):
    """Stops a run in which something that should learn does not.

    After the first step every trainable parameter must have a gradient, free of NaN and Inf, and not all may be zero.
    One that is zero may still start late, as one factor of a LoRA pair does while the other is zero: it must have
    had another gradient after `patience_steps` steps with a learning rate above zero.
    """

    def __init__(self, patience_steps: int = 3):
        self.patience_steps = patience_steps
        self.asleep: dict[str, torch.nn.Parameter] | None = None
        self.steps_with_rate = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Look at the gradients that the optimizer is about to use."""
        if args.fp16 and not all(_finite(p) for p in model.parameters() if p.grad is not None):
            return  # a gradient scaler starts too high; it skips such steps and lowers itself
        first = self.asleep is None
        if self.asleep is None:
            idle = attached_to(model).idle_parameters()
            self.asleep = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in idle}
            self._check_first(self.asleep)
        if not self.asleep:
            return
        trained = self.asleep
        self.asleep = {name: p for name, p in trained.items() if p.grad is None or not bool(p.grad.any())}
        if first and len(self.asleep) == len(trained):
            raise RunFailed("Every gradient is zero in the first step: nothing learns. Check the labels and the loss.")
        if self.asleep and self.steps_with_rate >= self.patience_steps:
            raise RunFailed(
                f"{_named(list(self.asleep))} had no gradient but zero in {self.steps_with_rate + 1} steps: it "
                "does not learn. Leave it out of the recipe, or check that the model uses it."
            )
        self.steps_with_rate += any(group["lr"] > 0 for group in optimizer.param_groups)

    @staticmethod
    def _check_first(trained: dict[str, torch.nn.Parameter]) -> None:
        if not trained:
            raise RunFailed("No parameter is trainable: the recipe leaves nothing to learn.")
        if missing := [name for name, p in trained.items() if p.grad is None]:
            raise RunFailed(
                f"{_named(missing)} got no gradient in the first step: the loss does not depend on it. Leave it out of "
                "the recipe, or check gradient checkpointing (reentrant checkpointing needs inputs with gradients)."
            )
        if broken := [name for name, p in trained.items() if not _finite(p)]:
            raise RunFailed(f"{_named(broken)} got NaN or Inf as its gradient in the first step.")


def _finite(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
