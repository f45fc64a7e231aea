"""Modules of a model by the names that settings give: `target_modules` and `exclude_modules`, as in peft."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from .errors import SettingError, did_you_mean

Names = list[str] | str


def matches(name: str, wanted: Names) -> bool:
    """Whether a module is meant: by a regular expression for its whole name, or by one of several ends of it.

    A layer inside an adapter goes by the name that it has without.
    """
    name = name.removesuffix(".base_layer")
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def targeted(
    modules: Mapping[str, nn.Module],
    target_modules: Names | None,
    exclude_modules: Names | None,
    of: str,
    setting: str = "target_modules",
) -> dict[str, nn.Module]:
    """The modules that the settings of the technique `of` mean; all where they name none.

    setting: what `target_modules` is called there.

    Raises SettingError for a name that no module has.
    """
    chosen = dict(modules)
    if target_modules is not None:
        _check(modules, setting, target_modules, of)
        chosen = {name: module for name, module in chosen.items() if matches(name, target_modules)}
    if exclude_modules is not None:
        _check(modules, "exclude_modules", exclude_modules, of)
        chosen = {name: module for name, module in chosen.items() if not matches(name, exclude_modules)}
    return chosen


def _check(names: Iterable[str], setting: str, wanted: Names, of: str) -> None:
    known = list(names)
    for each in [wanted] if isinstance(wanted, str) else wanted:
        if not any(matches(name, each if isinstance(wanted, str) else [each]) for name in known):
            plain = (name.removesuffix(".base_layer") for name in known if name and not name[-1].isdigit())
            ends = {name.rpartition(".")[2] for name in plain}
            raise SettingError(f"{setting} of {of}: the model has no module {each!r}. {did_you_mean(each, ends)}")
