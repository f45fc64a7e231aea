"""Checks on a run while it trains: every weight that should learn has a finite gradient that is not zero."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunFailed
from ..recipe import attached_to
from .without_effect import without_effect

logger = logging.getLogger(__name__)


class GradientCheck(TrainerCallback):
    """Stops a run in which something that should learn does not.

    In its first step every trainable parameter must have a gradient, free of NaN and Inf, and in the first step of the
    run not all may be zero. One that is zero may still start late, as one factor of a LoRA pair does while the other is
    zero: it must have had another gradient after `patience_steps` steps with a learning rate above zero. Steps in which
    a parameter of the optimizer rests, as it does not require a gradient, do not count for it. Weights that the loss of
    the pretrained model does not depend on, whatever the recipe, are told of and left alone.
    """

    def __init__(self, patience_steps: int = 3):
        self.patience_steps = patience_steps
        self.unseen: dict[str, torch.nn.Parameter] | None = None  # rested in all steps so far
        self.asleep: dict[str, torch.nn.Parameter] = {}  # had no gradient but zero so far
        self.steps_with_rate: Counter[str] = Counter()
        self._inputs: dict[str, Any] = {}  # of the first forward, without values
        self._looking: Any = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Look at what the model is called with, once."""

        def look(module: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
            self._looking.remove()
            self._inputs = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in inputs.items()}

        if self._looking is None:
            self._looking = model.register_forward_pre_hook(look, with_kwargs=True)

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
        if self.unseen == {} and not self.asleep:
            return
        if args.fp16 and not all(_finite(p) for p in model.parameters() if p.grad is not None):
            return  # a gradient scaler starts too high; it skips such steps and lowers itself
        first = self.unseen is None
        if self.unseen is None:
            idle, held = attached_to(model).idle_parameters(), _held(optimizer)
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad or id(p) in held}
            if not trained:
                raise RunFailed("No parameter is trainable: the recipe leaves nothing to learn.")
            idle |= self._without_effect(model, [n for n, p in trained.items() if n not in idle and p.grad is None])
            self.unseen = {name: p for name, p in trained.items() if name not in idle}
        new = {name: p for name, p in self.unseen.items() if p.requires_grad}
        self._check_new(new)
        self.unseen = {name: p for name, p in self.unseen.items() if name not in new}
        self.asleep = {name: p for name, p in (self.asleep | new).items() if p.grad is None or not bool(p.grad.any())}
        if first and new and len(self.asleep) == len(new):
            raise RunFailed("Every gradient is zero in the first step: nothing learns. Check the labels and the loss.")
        awake = [name for name, p in self.asleep.items() if p.requires_grad]
        if late := [name for name in awake if self.steps_with_rate[name] >= self.patience_steps]:
            raise RunFailed(
                f"{_named(late)} had no gradient but zero in {self.steps_with_rate[late[0]] + 1} steps: it "
                "does not learn. Leave it out of the recipe, or check that the model uses it."
            )
        if any(group["lr"] > 0 for group in optimizer.param_groups):
            self.steps_with_rate.update(awake)

    def _without_effect(self, model: Any, missing: list[str]) -> set[str]:
        """Those of the parameters without a gradient that the pretrained model does not read either."""
        if not missing:
            return set()
        attached = attached_to(model)
        unread = without_effect(attached.base_model, self._inputs)
        ids = {id(p) for name, p in attached.trained_base().items() if name in unread}
        parameters = dict(model.named_parameters())
        if found := [name for name in missing if id(parameters[name]) in ids]:
            kind = type(attached.base_model).__name__
            logger.warning("%s: it stays as it is, for the loss of %s does not depend on it.", _named(found), kind)
        return set(found)

    @staticmethod
    def _check_new(trained: dict[str, torch.nn.Parameter]) -> None:
        if missing := [name for name, p in trained.items() if p.grad is None]:
            raise RunFailed(
                f"{_named(missing)} got no gradient in its first step: the loss does not depend on it. Leave it out of "
                "the recipe, or check gradient checkpointing (reentrant checkpointing needs inputs with gradients)."
            )
        if broken := [name for name, p in trained.items() if not _finite(p)]:
            raise RunFailed(f"{_named(broken)} got NaN or Inf as its gradient in its first step.")


def _held(optimizer: Any) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _finite(parameter: torch.nn.Parameter) -> bool:
    return parameter.grad is None or bool(torch.isfinite(parameter.grad).all())


def _named(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
