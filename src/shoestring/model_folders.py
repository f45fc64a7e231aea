"""Folders of models that differ from what their config says: one file of tensors, one that describes the differences.

Tensors that several modules share are written once. config.json and generation_config.json are those of transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from .errors import SettingError
from .whole_files import read_tensors


@dataclass(frozen=True)
class ModelFolder:
    """What the two files are called, which version of them is written, and by which function, for messages."""

    tensors_file: str
    description_file: str
    version: int
    written_by: str

    def write(self, model: nn.Module, folder: str | Path, description: dict[str, Any]) -> None:
        """Write all of the model, and beside it how it differs from its config."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors, tied = _once(model.state_dict(keep_vars=True))
        if isinstance(model, PreTrainedModel):
            model.config.save_pretrained(folder)
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(folder)
        save_file(tensors, folder / self.tensors_file, metadata={"format": "pt"})
        written = {"version": self.version, **description, "tied": tied}
        (folder / self.description_file).write_text(json.dumps(written, indent=1) + "\n")

    def describe(self, folder: str | Path) -> dict[str, Any]:
        """What `write` was given, with the names of tied tensors.

        Raises SettingError if the folder holds no such model.
        """
        path = Path(folder) / self.description_file
        try:
            description: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise SettingError(
                f"{folder} holds no {self.description_file}: it was not written by {self.written_by}."
            ) from None
        except ValueError as error:
            raise SettingError(f"{path} is damaged: {error}") from error
        if description.get("version") != self.version:
            raise SettingError(f"{path} is of version {description.get('version')!r}, which this package cannot read.")
        return description

    def empty_model(self, model_class: Any, folder: str | Path) -> nn.Module:
        """The model as its config says, without values.

        model_class: a model class of transformers, or one of its Auto classes.
        """
        folder = Path(folder)
        self.describe(folder)
        config = AutoConfig.from_pretrained(folder)
        make = getattr(model_class, "from_config", None) or model_class._from_config
        with init_empty_weights():  # buffers that are not saved get their values
            model: nn.Module = make(config)
        if isinstance(model, PreTrainedModel) and (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def fill(self, model: nn.Module, folder: str | Path) -> None:
        """Put the tensors of the folder in place of those of the model, whose modules are as they are to be.

        Raises SettingError if they do not fit.
        """
        folder = Path(folder)
        tied = self.describe(folder)["tied"]
        tensors, _ = read_tensors(folder / self.tensors_file)
        try:
            model.load_state_dict(tensors | {alias: tensors[name] for alias, name in tied.items()}, assign=True)
        except (RuntimeError, ValueError) as error:
            raise SettingError(f"{folder} does not fit this {type(model).__name__}: {error}") from error
        for alias, name in tied.items():
            parent, _, last = alias.rpartition(".")
            setattr(model.get_submodule(parent), last, _tensor(model, name))


def _once(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that are there under another name before, and what these others are called."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in state.items():
        if (first := names.setdefault(id(tensor), name)) == name:
            tensors[name] = tensor.detach().contiguous()
        else:
            tied[name] = first
    return tensors, tied


def _tensor(model: nn.Module, name: str) -> Any:
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)
