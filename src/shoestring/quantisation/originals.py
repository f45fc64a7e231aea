"""Weights as they were before a model was quantised, read one by one from its files."""

import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from ..errors import SettingError

PACKAGED = "packaged:"
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class OriginalWeights:
    """The weights in the safetensors files of a model.

    source: a folder, a hub id or packaged:NAME.

    Raises SettingError if there are no such files.
    """

    def __init__(self, source: str):
        self.source = source
        self._files = _files_of(source)

    def weight(self, layer: str, size: tuple[int, int], is_conv1d: bool = False) -> Float[Tensor, "out in"]:
        """The weight of the layer of that name, with `size` (out, in), on the CPU and as it is stored.

        Files may name it with more in front, or less, than the model does.

        Raises SettingError if none or several fit the name, it has another size, or it is stored quantised.
        """
        wanted = f"{layer.replace('base_model.model.', '').replace('.base_layer', '')}.weight"
        names = [n for n in self._files if n == wanted] or [n for n in self._files if _is_end_of_other(n, wanted)]
        if len(names) != 1:
            found = f"{len(names)}, {names[0]} first" if names else "none"
            raise SettingError(
                f"{self.source} should hold one original weight for {layer}, but has {found}: name files in which the "
                "layers are called as in the model, as save_pretrained writes them."
            )
        with safe_open(self._files[names[0]], "pt") as tensors:
            weight: Tensor = tensors.get_tensor(names[0])
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise SettingError(
                f"{names[0]} in {self.source} is stored as {weight.dtype}: name files from before the model was "
                "quantised."
            )
        weight = weight.T if is_conv1d else weight
        if weight.shape != size:
            raise SettingError(
                f"{names[0]} in {self.source} is {list(weight.shape)}, but {layer} is {list(size)}: these are files of "
                "another model."
            )
        return weight


def source_of_model(model: nn.Module) -> str | None:
    """Where the model says that it was loaded from."""
    config: Any = getattr(model, "config", None)
    return getattr(config, "name_or_path", None) or None


def _is_end_of_other(name: str, wanted: str) -> bool:
    return name.endswith(f".{wanted}") or wanted.endswith(f".{name}")


def _files_of(source: str) -> dict[str, str]:
    """The file of each tensor by the tensor's name."""
    if source.startswith(PACKAGED):
        from .. import assets

        source = str(assets.model_folder(source.removeprefix(PACKAGED)))
    try:
        index, whole = (
            cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in (INDEX, WHOLE)
        )
    except OSError as error:
        raise SettingError(f"Original weights cannot be read from {source}: {error}") from error
    if index is not None:
        table: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
        found = {file: cached_file(source, file) for file in set(table.values())}
        return {name: str(found[file]) for name, file in table.items()}
    if whole is None:
        raise SettingError(
            f"{source} holds no {WHOLE} with original weights; name a model folder or hub id that does, from before "
            "quantisation."
        )
    with safe_open(whole, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), str(whole))


def is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two weights are equal but for the rounding of the coarser dtype."""
    coarser = max((first.dtype, second.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(first.to(coarser), second.to(coarser))
