"""A parameter of which only some rows are there: its full values are elsewhere, and saved and loaded in its place."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..resizing import replace_data

ATTRIBUTE = "pruned_rows"  # of a module: its pruned parameters by name


class KeptRows:
    """Some rows of a parameter, and where its full values are.

    parameter: holds the kept rows, once `shrink` has run.
    kept: which rows, sorted, int64 on the CPU.
    full: all rows; a parameter where another module has them in use.
    holders: the modules that hold the parameter, with the name it has there.
    """

    def __init__(self, parameter: nn.Parameter, kept: Tensor, full: Tensor, holders: list[tuple[nn.Module, str]]):
        self.parameter = parameter
        self.kept = kept
        self.full = full
        self.holders = holders

    def shrink(self) -> None:
        """Put the kept rows in place of the full values; ties, names and optimizers hold the same parameter still."""
        replace_data(self.parameter, self.parameter.detach()[self.kept.to(self.parameter.device)])

    def grow(self) -> None:
        """Put the full values back, with what the kept rows have become."""
        whole, now = self.whole(), self.parameter
        in_file = whole.untyped_storage().filename is not None
        replace_data(now, whole.to(now.device, now.dtype, copy=in_file))

    @torch.no_grad()
    def whole(self) -> Tensor:
        """The full values as of now: the same tensor every time, where it was kept."""
        if not isinstance(self.full, nn.Parameter):
            self.full[self.kept.to(self.full.device)] = self.parameter.detach().to(self.full)
        return self.full.detach()

    @torch.no_grad()
    def take(self, whole: Tensor) -> Tensor:
        """The kept rows of other full values, which take the place of those here."""
        self.full.copy_(whole)
        return whole[self.kept.to(whole.device)]

    def in_state_dicts(self, undo: ExitStack) -> None:
        """Have the state dicts of the holders give and take the full values, until undone."""
        for module, name in self.holders:
            if ATTRIBUTE not in module.__dict__:
                setattr(module, ATTRIBUTE, {})
                undo.callback(delattr, module, ATTRIBUTE)
                undo.callback(module.register_state_dict_post_hook(_give_whole).remove)
                undo.callback(module.register_load_state_dict_pre_hook(_take_part).remove)
            getattr(module, ATTRIBUTE)[name] = self


def kept_at_home(values: Tensor, folder: str | None) -> Tensor:
    """Values outside of the device: in host memory, or in a file of the folder, which is gone when they are let go."""
    if values.is_meta:
        return values
    if folder is None:
        return values.cpu()
    handle, path = tempfile.mkstemp(dir=Path(folder), prefix="rows-")
    os.close(handle)
    try:
        mapped = torch.from_file(path, shared=True, size=values.numel(), dtype=values.dtype)
    finally:
        os.unlink(path)  # the mapping stays
    return mapped.view(values.shape).copy_(values)


def _give_whole(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name, rows in getattr(module, ATTRIBUTE).items():
        if prefix + name in state_dict:
            state_dict[prefix + name] = rows.whole()


def _take_part(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    for name, rows in getattr(module, ATTRIBUTE).items():
        given = state_dict.get(prefix + name)
        if given is not None and given.shape == rows.full.shape:
            state_dict[prefix + name] = rows.take(given)
