r"""Parameter groups: optimizer options of their own for some of what trains, by name or by what it is.

Source   Groups of torch's optimizers; a factor for B of LoRA: Hayou et al. 2024, arXiv:2402.12354 (LoRA+)
Update   rate_g(t) = lr_g s(t), with s the run's schedule and lr_g = lr_factor_g lr where a factor is given
Trains   what trains without it
Costs    nothing
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..adapters.placement import task_head
from ..errors import SettingError, did_you_mean
from ..norms import is_norm
from ..technique import Phase, Technique, register_technique
from ..wrappers import innermost

SELECTS = ("names", "kind")
NO_OPTIONS = frozenset({"params", "initial_lr", "like", "at_start", "gives_way"})
KINDS = ("adapters", "biases", "embeddings", "head", "norms")


@register_technique
@dataclass
class ParameterGroups(Technique):
    """Gives parts of what trains learning rates, weight decay and other optimizer options of their own.

    groups: each says which parameters it is of, and at least one option.
        names: a regular expression for whole names of parameters, or a list of names or of parts between dots, such as
            "lora_B" or "layers.0.mlp". Names are those of the model with the recipe attached.
        kind: in place of names: adapters, biases, embeddings, norms, or head (what is outside of the pretrained model).
        lr: a learning rate; lr_factor: in its place, one times the run's. The run's schedule acts on both.
        weight_decay, betas, eps and the like: whatever the run's optimizer has.

    A group without weight_decay has the run's, biases and norms without any. What other techniques give options is in
    no group. Raises SettingError for settings out of range; on attaching, for a group that nothing is in and a
    parameter in two; when the optimizer is made, for an option that it does not have.
    """

    name: ClassVar[str] = "parameter_groups"
    phase: ClassVar[Phase] = Phase.OPTIMIZER
    claims: ClassVar[frozenset[str]] = frozenset({"the groups of parameters"})
    exact: ClassVar[bool] = True

    groups: list[dict[str, Any]]

    def __post_init__(self) -> None:
        if not self.groups:
            raise SettingError("groups of parameter_groups must hold at least one group, got none.")
        for index, group in enumerate(self.groups):
            _check(f"groups[{index}] of parameter_groups", group)
        self._at_start: list[list[str]] = []  # names

    def on_attached(self, model: nn.Module) -> None:
        """Refuse groups that do not fit the model before anything is trained, and before a resumed run prunes it.

        Raises SettingError if nothing that trains is in a group, or one parameter is in two.
        """
        made = self.parameter_groups(model)
        for index, group in enumerate(made):
            if not group["params"]:
                raise SettingError(_nothing_in(index, self.groups[index], model))
        names = {id(p): name for name, p in model.named_parameters()}
        self._at_start = [[names[id(p)] for p in group["params"]] for group in made]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters of each group with its options.

        Raises SettingError if one parameter is in two.
        """
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        of_parameter: dict[str, int] = {}
        made: list[dict[str, Any]] = []
        for index, group in enumerate(self.groups):
            names = _chosen(model, trained, group)
            if twice := [name for name in names if name in of_parameter]:
                raise SettingError(
                    f"{twice[0]} is in groups[{of_parameter[twice[0]]}] and in groups[{index}] of parameter_groups: "
                    "name it in one of them."
                )
            of_parameter.update(dict.fromkeys(names, index))
            options = {key: value for key, value in group.items() if key not in SELECTS}
            made.append({"params": [trained[name] for name in names], "gives_way": True, **options})
        for group, at_start in zip(made, self._at_start, strict=False):
            group["at_start"] = at_start
        return made


def _check(where: str, group: Mapping[str, Any]) -> None:
    """Refuse a group whose settings cannot be right, whatever the model and the optimizer."""
    if len([key for key in SELECTS if key in group]) != 1:
        raise SettingError(f"{where} must have either names or kind, got {', '.join(sorted(group)) or 'nothing'}.")
    if "kind" in group and group["kind"] not in KINDS:
        raise SettingError(f"{where}: there is no kind {group['kind']!r}. {did_you_mean(str(group['kind']), KINDS)}")
    wanted = group.get("names", "-")
    listed = isinstance(wanted, list) and all(isinstance(each, str) and each for each in wanted)
    if not wanted or not (listed or isinstance(wanted, str)):
        raise SettingError(f"{where}: names must be a regular expression or a list of names, got {wanted!r}.")
    if isinstance(wanted, str):
        try:
            re.compile(wanted)
        except re.error as error:
            raise SettingError(f"{where}: names {wanted!r} is no regular expression: {error}.") from None
    options = group.keys() - set(SELECTS)
    if not options:
        raise SettingError(
            f"{where} sets nothing; give lr, lr_factor, weight_decay or another option, or leave it out."
        )
    if ours := sorted(NO_OPTIONS & options):
        raise SettingError(f"{where}: {ours[0]} is not for users to set.")
    if {"lr", "lr_factor"} <= options:
        raise SettingError(f"{where} has lr and lr_factor; keep one of them.")
    for key in ("lr", "lr_factor", "weight_decay"):
        value = group.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise SettingError(f"{key} in {where} must be a number of at least 0, got {value!r}.")


def _chosen(model: nn.Module, among: Mapping[str, nn.Parameter], group: Mapping[str, Any]) -> list[str]:
    """The names of those parameters that a group means."""
    if "kind" in group:
        meant = _of_kind(model, group["kind"])
        return [name for name, parameter in among.items() if id(parameter) in meant]
    wanted = group["names"]
    if isinstance(wanted, str):
        return [name for name in among if re.fullmatch(wanted, name)]
    return [name for name in among if any(_is_part(each, name) for each in wanted)]


def _is_part(wanted: str, name: str) -> bool:
    """Whether a name holds some words, whole ones between dots."""
    return f".{wanted}." in f".{name}."


def _of_kind(model: nn.Module, kind: str) -> set[int]:
    """The identities of the model's parameters of one kind."""
    if kind == "biases":
        return {id(p) for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if kind == "head":
        return {id(p) for p in task_head(innermost(model))} - _of_kind(model, "adapters")
    if kind == "embeddings":
        return _ids(module for module in model.modules() if isinstance(module, nn.Embedding))
    if kind == "norms":
        return _ids(filter(is_norm, model.modules()))
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    found = [getattr(layer, name, None) for layer in layers for name in layer.adapter_layer_names]
    return _ids(part for part in found if isinstance(part, nn.Module)) | {
        id(part) for part in found if isinstance(part, nn.Parameter)
    }


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _nothing_in(index: int, group: Mapping[str, Any], model: nn.Module) -> str:
    """What to say of a group without parameters."""
    what = f"kind {group['kind']}" if "kind" in group else f"names {group['names']!r}"
    where = f"groups[{index}] of parameter_groups, {what},"
    if frozen := _chosen(model, dict(model.named_parameters()), group):
        return f"{where} fits frozen parameters only, {frozen[0]} first: give options to what trains."
    shown = ", ".join([name for name, p in model.named_parameters() if p.requires_grad][:3])
    return f"{where} fits no parameter of {type(model).__name__}. What trains is called {shown} and so on."
