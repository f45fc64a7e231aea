"""Models that pruning has made smaller: written with their adapters merged, and read by themselves.

    save_pruned(trained, "folder")
    model = load_pruned(AutoModelForCausalLM, "folder")

Files    pruned.safetensors: all tensors, tied ones once; pruned.json: by layer the sizes, by module the head counts, in
         which the model differs from its config; config.json and generation_config.json of transformers
Costs    writing makes a copy of the pruned model, which is merged; loading makes no weight of the sizes of the config
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..adapters.coupled import layer_at
from ..errors import SettingError
from ..model_folders import ModelFolder
from ..resizing import resize, rows_first
from ..technique import Phase
from .light_peft import LightPEFT

FILES = ModelFolder("pruned.safetensors", "pruned.json", version=1, written_by="save_pruned")


def save_pruned(model: nn.Module, folder: str | Path) -> None:
    """Write a model that `light_peft` has pruned, as one of its own: small layers, with the adapters merged into them.

    model: with the recipe attached; it stays as it is.

    Raises SettingError if it is not pruned, or if something on it cannot be part of its weights.
    """
    from ..recipe import attached_to

    attached = attached_to(model)
    pruning = next((t for t in attached.techniques if isinstance(t, LightPEFT)), None)
    if pruning is None or not pruning.is_pruned:
        raise SettingError(
            "save_pruned writes models that light_peft has pruned, and this one is whole: train with it for more than "
            "estimation_steps."
        )
    for technique in attached.techniques:
        if technique is not pruning and technique.phase in (Phase.PRUNING, Phase.PROMPT, Phase.SIDE):
            raise SettingError(
                f"{technique.name} cannot be part of a pruned model's weights: keep the run's own folder, and load it "
                "with shoestring.recipe.load()."
            )
    smaller = _merged(attached.model)
    layers = {}
    for units in pruning.units:
        for name in units.layers:
            layers[name] = list(rows_first(smaller.get_submodule(name)).shape)
    counts = {name: found for units in pruning.units for name, found in units.counts().items()}
    FILES.write(smaller, folder, {"layers": layers, "counts": counts})


def load_pruned(model_class: Any, folder: str | Path) -> nn.Module:
    """The model that `save_pruned` wrote, in eval mode on the CPU.

    model_class: a model class of transformers, or one of its Auto classes.

    Raises SettingError if the folder holds no such model, or one of another class.
    """
    model, description = FILES.empty_model(model_class, folder), FILES.describe(folder)
    try:
        for name, (rows, columns) in description["layers"].items():
            _set_size(layer_at(model, name), rows, columns)
        for name, attributes in description["counts"].items():
            for attribute, value in attributes.items():
                setattr(model.get_submodule(name), attribute, value)
    except AttributeError as error:
        raise SettingError(f"{folder} does not fit this {type(model).__name__}: {error}") from error
    FILES.fill(model, folder)
    return model.eval()


def _merged(model: nn.Module) -> nn.Module:
    """A copy of the model inside, with its adapters merged in."""
    copied: Any = copy.deepcopy(model)
    wrappers = [module for module in copied.modules() if isinstance(module, PeftModel)]
    if not wrappers:
        return copied
    if len(wrappers) > 1:
        raise SettingError("Adapters of several methods cannot be merged; save_pruned takes models with one.")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="A.* already merged|Already .* were merged")
            merged: nn.Module = copied.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise SettingError(
            f"The adapters cannot be part of a pruned model's weights: {error} Keep the run's own folder, and load it "
            "with shoestring.recipe.load()."
        ) from error
    return merged


def _set_size(layer: Any, rows: int, columns: int) -> None:
    """Give an empty linear layer another size."""
    shape = (columns, rows) if isinstance(layer, Conv1D) else (rows, columns)
    layer.weight = nn.Parameter(torch.empty(shape, device="meta", dtype=layer.weight.dtype))
    if layer.bias is not None:
        layer.bias = nn.Parameter(torch.empty(rows, device="meta", dtype=layer.bias.dtype))
    resize(layer)
