"""Models with layers stored in few bits: made of trained adapters, written to a folder, and read for inference.

    model = pack_model(trained)                                  adapters become layers with packed codes
    save_packed(model, "folder")
    model = load_packed(AutoModelForCausalLM, "folder")          or read_packed(model, "folder") for any module

Files    packed.safetensors: all tensors, tied ones once; packed.json: which layers are packed, and the names of tied
         tensors; config.json and generation_config.json of models of transformers
Costs    packing goes layer by layer, so that what a layer had is freed before the next; loading makes no weight of the
         model as it was
"""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SettingError
from ..model_folders import ModelFolder

TENSORS_FILE, LAYERS_FILE = "packed.safetensors", "packed.json"
FILES = ModelFolder(TENSORS_FILE, LAYERS_FILE, version=1, written_by="save_packed")


class PackedLayer(Protocol):
    """What a layer must have to be stored: its tensors are its state, and all else are its settings."""

    in_features: int
    out_features: int

    def settings(self) -> dict[str, Any]:
        """Plain data that `from_settings` builds the layer from."""

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "PackedLayer":
        """A layer of these settings whose values are to be loaded."""


LAYERS: dict[str, type[Any]] = {}
Layer = TypeVar("Layer", bound=type[nn.Module])


def packed_layer(kind: str) -> Callable[[Layer], Layer]:
    """Make a class of layers known under the name by which files call it; a class decorator."""

    def register(cls: Layer) -> Layer:
        if LAYERS.setdefault(kind, cls) is not cls:
            raise ValueError(f"Packed layers of the kind {kind!r} are already registered: {LAYERS[kind].__module__}.")
        return cls

    return register


def pack_model(model: nn.Module) -> nn.Module:
    """The base model, in place, with packed layers where adapters have such a form; all other adapters are merged.

    model: one with adapters, as peft or a recipe made it. What is packed can not be trained on or taken back.

    Raises ValueError if there is no such adapter, one is not in effect, or others cannot be merged.
    """
    packable = [name for name, module in model.named_modules() if getattr(module, "is_packable", False)]
    if not packable:
        raise ValueError(
            f"{type(model).__name__} has no layer to pack: no adapter on it has a form in packed integers. Methods "
            "that have one say so in their documentation."
        )
    wrappers = [module for module in model.modules() if isinstance(module, PeftModel)]
    _check_others_can_merge(model, wrappers)
    for name in packable:
        layer: Any = model.get_submodule(name)
        try:
            packed = layer.packed_layer()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        del layer
        model.set_submodule(name, packed.train(model.training))
    if not wrappers:
        return model
    merged: Any = wrappers[-1].merge_and_unload()  # the innermost holds the layers of all
    return merged


def _check_others_can_merge(model: nn.Module, wrappers: list[PeftModel]) -> None:
    if any(wrapper.active_peft_config.is_prompt_learning for wrapper in wrappers):
        raise ValueError("Learned prompts are no part of a layer, and would be lost: train without them to pack.")
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(getattr(module, "base_layer", None), BaseTunerLayer):
            raise ValueError(f"{name} has adapters of two kinds, one over the other, of which only one can be merged.")


def save_packed(model: nn.Module, folder: str | Path) -> None:
    """Write a model with packed layers.

    Raises ValueError if it has none, or adapters are still on it.
    """
    layers: dict[str, Any] = dict(packed_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layer; call pack_model first.")
    if adapted := [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]:
        raise ValueError(f"{adapted[0]} still has an adapter, which would be lost; call pack_model first.")
    described = {name: {"kind": _kind(layer), **layer.settings()} for name, layer in layers.items()}
    FILES.write(model, folder, {"layers": described})


def load_packed(model_class: Any, folder: str | Path) -> nn.Module:
    """The model that `save_packed` wrote, in eval mode on the CPU.

    model_class: a model class of transformers, or one of its Auto classes.

    Raises SettingError if the folder holds no such model, or one of another class.
    """
    return read_packed(FILES.empty_model(model_class, folder), folder).eval()


def read_packed(model: nn.Module, folder: str | Path) -> nn.Module:
    """`model`, of the architecture of the one that was saved, with the layers and values of the folder.

    model: its weights may be on the meta device; they are not kept.

    Raises SettingError if the folder does not fit the model.
    """
    for name, settings in FILES.describe(folder)["layers"].items():
        _replace(model, name, dict(settings), Path(folder))
    FILES.fill(model, folder)
    return model


def packed_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every packed layer of the model with its name."""
    kinds = tuple(LAYERS.values())
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def _kind(layer: nn.Module) -> str:
    return next(kind for kind, cls in LAYERS.items() if type(layer) is cls)


def _replace(model: nn.Module, name: str, settings: dict[str, Any], folder: Path) -> None:
    """Put an empty packed layer where the model has a linear one of the same sizes."""
    importlib.import_module("..recipe", __package__)  # all methods, which may bring layers of their own
    if (kind := settings.pop("kind")) not in LAYERS:
        raise SettingError(f"{folder}: {name} is a layer of the unknown kind {kind!r}. Known: {', '.join(LAYERS)}.")
    try:
        there = model.get_submodule(name)
    except AttributeError:
        raise SettingError(f"{folder} holds the layer {name}, which {type(model).__name__} does not have.") from None
    layer = LAYERS[kind].from_settings(settings)
    sizes = (layer.out_features, layer.in_features)
    weight: Tensor | None = getattr(there, "weight", None)
    found = None if weight is None else tuple(weight.T.shape if isinstance(there, Conv1D) else weight.shape)
    if found != sizes:
        raise SettingError(f"{folder}: {name} has sizes {sizes}, but in this {type(model).__name__} {found}.")
    model.set_submodule(name, layer)
