"""The model as it was before training, run in the place of the model in training, without a second copy of it.

Method   Adapters that leave the pretrained weights alone are switched off for one forward. Of adapters that took a part
         of the pretrained weight out of it when they started (PiSSA and its like: the base layer holds the residual),
         the start values are kept and put in; so are those of all else that trains. No dropout, no gradients.
Costs    Kept: r (in + out) numbers a layer of PiSSA, and what else trains but adapters. One forward, whose activations
         go as it runs, while those of the model in training are there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..errors import SettingError
from ..fakes import has_values
from ..modes import in_eval_mode

TAKES_A_PART = ("pissa", "olora", "corda", "lora_ga")
"""How the ways of peft to start LoRA begin that subtract the start of the product from the pretrained weight."""


class FrozenTeacher:
    """What `model` gave before training; made when its adapters are in place and no step was made.

    Raises SettingError if an adapter's start has rounded the pretrained weights.
    """

    def __init__(self, model: nn.Module, name: str):
        self.name = name
        taking = _adapters_that_take_a_part(model, name)
        self.switched: list[Any] = []  # adapters that are out of effect in the forward
        idle: set[int] = set()
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                adapters: list[Any] = [module.get_submodule(table) for table in module.adapter_layer_names]
                if not any(taking.intersection(table.keys()) for table in adapters):
                    self.switched.append(module)
                    idle.update(id(p) for table in adapters for p in table.parameters())
        trained = {id(p): p for p in model.parameters() if p.requires_grad and id(p) not in idle}
        self.places = [
            (module, name, id(p))
            for module in model.modules()
            for name, p in module._parameters.items()
            if id(p) in trained
        ]
        self.kept = {key: p.detach().clone() for key, p in trained.items()}

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """`model` is the one before training, in evaluation mode and without gradients; then all is as it was.

        Raises SettingError if a weight has another shape than when this was made, as when it was sharded.
        """
        switches = [(layer, layer._disable_adapters) for layer in self.switched]
        places = [(m, name, m._parameters.get(name), self._start(key, m, name)) for m, name, key in self.places]
        try:
            for layer, _ in switches:
                layer._disable_adapters = True
            for module, name, _, start in places:
                module._parameters[name] = start  # type: ignore[assignment]  # autograd holds on to the parameter itself
            with torch.no_grad(), in_eval_mode(model):
                yield
        finally:
            for module, name, parameter, _ in places:
                module._parameters[name] = parameter
            for layer, before in switches:
                layer._disable_adapters = before

    def _start(self, key: int, module: nn.Module, name: str) -> Tensor:
        """The kept values for one parameter, on the device where it is now."""
        now: Any = module._parameters.get(name)
        shape, before = None if now is None else list(now.shape), list(self.kept[key].shape)
        if shape != before:
            raise SettingError(
                f"{self.name} keeps the start of {name} in {type(module).__name__}, of shape {before}, but its shape "
                f"is {shape} now: train without sharded weights (FSDP, ZeRO-3)."
            )
        if has_values(self.kept[key]) and not has_values(now):  # a model that is only planned from here on
            self.kept[key] = now.detach().clone()
        elif self.kept[key].device != now.device:
            self.kept[key] = self.kept[key].to(now.device)
        return self.kept[key]


def _adapters_that_take_a_part(model: nn.Module, name: str) -> set[str]:
    """Names of the adapters whose base layers do not hold the pretrained weight."""
    taking = set()
    for module in model.modules():
        for adapter, config in module.peft_config.items() if isinstance(module, PeftModel) else ():
            start = str(getattr(config, "init_lora_weights", "")).lower()
            if start == "loftq":
                raise SettingError(
                    f"{name} needs the pretrained model, but init_lora_weights='loftq' has rounded its weights; use "
                    "'pissa' or the default."
                )
            if start.startswith(TAKES_A_PART):
                taking.add(adapter)
    return taking
