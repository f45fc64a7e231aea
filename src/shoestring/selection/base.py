"""Selection: which of the existing weights train. The base of methods that choose whole parameters.

A method writes `chosen`. The base freezes all else, leaves a new head and what adapters and prompts have added to
train, and puts everything back on exit, trained values aside. A recipe saves what trains.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..adapters.base import adapters_reading_weights
from ..adapters.placement import freeze_but_head, task_head
from ..errors import SettingError
from ..technique import Phase, Technique

ADDED_WEIGHTS_TRAIN = frozenset({Phase.ADAPTER, Phase.PROMPT, Phase.SIDE})


@dataclass
class Selection(Technique, ABC):
    """A technique that says which existing weights train.

    train_head: also train what stands outside of the pretrained model, such as a new classifier. Beside adapters and
        prompts the head is theirs to train.
    """

    phase: ClassVar[Phase] = Phase.SELECTION

    train_head: bool = True

    def __post_init__(self) -> None:
        self._others: tuple[Technique, ...] = ()
        self._attached = False

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Remember what stands beside it, which it leaves trained."""
        self._others = tuple(others)

    def set_task(self, peft_task_type: str) -> bool:
        """Whether a new head trains because of this technique."""
        return self.train_head and not self._others_decided()

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Train what is chosen, and of all else what others have chosen or added."""
        before = [(p, p.requires_grad) for p in model.parameters()]
        try:
            if not self._others_decided():
                freeze_but_head(model, self.train_head)
            chosen = self.chosen(model)
            check_trainable(self.name, chosen)
            for parameter in chosen.values():
                parameter.requires_grad_(True)
            self._attached = True
            yield model
        finally:
            self._attached = False
            for parameter, trained in before:
                parameter.requires_grad_(trained)

    @abstractmethod
    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that train whole, by their names in the model.

        Raises SettingError if there are none, saying what was looked for.
        """

    def _others_decided(self) -> bool:
        """Whether all that trains now does so because a technique that attached earlier wants it to."""
        return any(
            other.phase in ADDED_WEIGHTS_TRAIN or (isinstance(other, Selection) and other._attached)
            for other in self._others
        )


def refuse_layers_not_called(technique: str, model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse layers that an adapter reads the weight of without calling them, so that what hangs on them is left out.

    layers: with their names, or those of their weights, which layers may share.

    Raises SettingError naming both.
    """
    readers = adapters_reading_weights(model)
    for name, layer in layers:
        if layer in readers:
            plain = name.removesuffix(".weight").removesuffix(".base_layer")
            raise SettingError(
                f"{technique} cannot train numbers of {plain}: {readers[layer]} of the same recipe computes with its "
                "weight and does not call the layer. Leave the layer out of one of them, here by exclude_modules."
            )


def check_trainable(technique: str, chosen: dict[str, nn.Parameter]) -> None:
    """Refuse what no gradient can train."""
    for name, parameter in chosen.items():
        if not parameter.is_floating_point() or is_traceable_wrapper_subclass(parameter):
            kind = f"{type(parameter).__name__} of {str(parameter.dtype).removeprefix('torch.')}"
            raise SettingError(
                f"{technique} cannot train {name}, a {kind}: it is quantised. Leave it out, or load the model in 16 or "
                "32 bits."
            )


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Each parameter once: its name in the model, the module that holds it, and its name there."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield (f"{prefix}.{key}" if prefix else key), module, key, parameter


def pretrained_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the pretrained model, by name: without a new head, what adapters have added, and their copies."""
    head = {id(p) for p in task_head(model)}
    others: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            others.update(part for child in module.children() for part in child.modules())
        elif isinstance(module, BaseTunerLayer):
            base = set(module.get_base_layer().modules())
            others.update(part for part in module.modules() if part is not module and part not in base)
    for name, module in model.named_modules():
        if module not in others and not any(id(p) in head for p in module.parameters(recurse=False)):
            yield name, module


def settings_error(technique: str, setting: str, allowed: str, got: Any) -> SettingError:
    """The error for a setting out of range."""
    return SettingError(f"{setting} of {technique} must be {allowed}, got {got!r}.")
