r"""Norm tuning: the scales and shifts of all norms train, and nothing else of the pretrained model.

Source   Qi et al. 2022, arXiv:2211.08682 (language models); Yermakov et al. 2025, arXiv:2503.19683 (CLIP)
Update   y = (x - mean) / std * w + b, or x / rms * w: w and b train
Shapes   w, b [hidden]
Start    the pretrained values: the model as it was
Trains   2 hidden numbers a LayerNorm, hidden an RMSNorm, and a new head
Costs    optimizer state for those alone; frozen linear layers keep no input, norms keep theirs
Differs  peft's `ln_tuning` needs the names of the norms (`target_modules`) unless it knows the model, wraps each in a
         module with a copy of it, and brings no norm of a class that the model defines along by itself. This one, under
         another name so that recipes can ask for either, finds every norm by its type or the name of its class, and
         trains it where it is: taken off, the recipe leaves what the norms learned in them. That a head on the unit
         sphere does better on data from elsewhere was not measured; transformers' classifier of CLIP reads the mean of
         its patch tokens, where the paper reads the class token
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..errors import SettingError
from ..norms import is_norm
from ..targets import Names, targeted
from ..technique import register_technique
from .base import Selection, pretrained_modules


@register_technique
@dataclass
class NormTuning(Selection):
    """The norms of any model train in place, found by their types and the names of their classes.

    target_modules: names, or a regular expression for whole names, of norms or of modules that hold some; None: all.
    exclude_modules: names or a regular expression of norms, or of modules that hold some, to leave out.

    Raises SettingError if no norm is found, or none that learns anything.
    """

    name: ClassVar[str] = "norm_tuning"

    target_modules: Names | None = None
    exclude_modules: Names | None = None

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters of the norms."""
        modules = dict(pretrained_modules(model))
        norms = {name: modules[name] for name in self._meant(modules) if is_norm(modules[name])}
        if not norms:
            raise SettingError(
                f"norm_tuning finds no norm in {type(model).__name__}, neither by type nor by the name of a class that "
                "ends in Norm, among the modules meant: change target_modules and exclude_modules."
            )
        found = {f"{name}.{key}": p for name, norm in norms.items() for key, p in norm.named_parameters(recurse=False)}
        if not found:
            raise SettingError(
                f"The {len(norms)} norms that norm_tuning finds in {type(model).__name__} ({next(iter(norms))} first) "
                "have neither scale nor shift: there is nothing to train."
            )
        return found

    def _meant(self, modules: dict[str, nn.Module]) -> list[str]:
        """The names of the modules that the settings name, and of all inside them."""
        meant = [""] if self.target_modules is None else targeted(modules, self.target_modules, None, self.name)
        left_out: Iterable[str] = []
        if self.exclude_modules is not None:
            left_out = targeted(modules, self.exclude_modules, None, self.name, setting="exclude_modules")
        return [name for name in modules if _within(name, meant) and not _within(name, left_out)]


def _within(name: str, parents: Iterable[str]) -> bool:
    """Whether a module is one of `parents` or inside one; all are inside the model, which has the empty name."""
    return any(not parent or name == parent or name.startswith(f"{parent}.") for parent in parents)
