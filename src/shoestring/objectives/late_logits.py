"""Logits after a training forward that made none, from what its backbone gave; the blocks do not run again.

TRL's SFTTrainer calls a head of its own that returns log-probabilities of the labels. What it reads, the output of the
backbone with its graph, is noted here, and the model's own forward is run with that in the backbone's place: so logits
are scaled and capped as the model does it, and no file of a model is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..forwards import forward_replaced
from ..modes import in_training, is_counted


@dataclass
class _Noted:
    """The output of the backbone in the last training forward, and the dtype autocast had there; None where off."""

    outputs: Any
    autocast: torch.dtype | None


class LateLogits:
    """Notes what the backbone of `owner` gives in training forwards while it is `noting`, until it is taken."""

    def __init__(self, owner: PreTrainedModel):
        self.owner = owner
        self.backbone: nn.Module | None = owner.base_model if owner.base_model is not owner else None
        self._noted: _Noted | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note outputs inside."""
        if self.backbone is None:
            yield
            return
        # a function, so that a copy of the model does not copy this
        hook = self.backbone.register_forward_hook(lambda module, _, outputs: self._note(module, outputs))
        try:
            yield
        finally:
            hook.remove()
            self.forget()

    def _note(self, module: nn.Module, outputs: Any) -> None:
        if module is self.backbone and in_training(module) and is_counted():
            kind = self.owner.device.type
            self._noted = _Noted(outputs, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)

    def forget(self) -> None:
        """Let go of what was noted."""
        self._noted = None

    def take(self, inputs: dict[str, Any]) -> Tensor | None:
        """The logits of the last training forward, with its graph, once; None if there was none.

        inputs: those of that forward, without labels.
        """
        if self._noted is None:
            return None
        noted, self._noted = self._noted, None

        def as_noted(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return noted.outputs

        assert self.backbone is not None
        autocast = torch.autocast(self.owner.device.type, dtype=noted.autocast, enabled=noted.autocast is not None)
        with forward_replaced(self.backbone, as_noted), autocast:
            logits: Tensor = self.owner(**inputs).logits
        self.forget()
        return logits
