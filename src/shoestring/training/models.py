"""Pretrained models of a run: from a hub id, a folder, a GGUF file, or `packaged:NAME`."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.placement import task_head
from ..errors import SettingError
from ..positions import positions_of
from .data import PACKAGED
from .quantised import keep_training_layout, quantization_config

if TYPE_CHECKING:
    from .settings import ModelSettings

KNOWN = "known:"  # and the name of a configuration that comes with the package


def load_pretrained(
    model: ModelSettings, auto_class: Any, processor_class: Any = None, **config: Any
) -> tuple[Any, Any]:
    """The model as `auto_class` makes it, and its tokenizer or processor.

    A head for another number of classes than the configuration's gets out of the way of a new one, with a warning.

    processor_class: what loads the latter; AutoTokenizer by default.
    config: settings of the model's configuration, such as num_labels.

    Raises SettingError if it is not there, is of another kind than the task needs, or cannot be quantised.
    """
    import torch
    from transformers import AutoTokenizer

    source = source_of(model.name)
    files = {"revision": model.revision} if model.revision else {}
    options: dict[str, Any] = {"attn_implementation": model.attn_implementation} if model.attn_implementation else {}
    if model.dtype is not None:
        options["dtype"] = getattr(torch, model.dtype)
    try:
        processor = (processor_class or AutoTokenizer).from_pretrained(source, **files)
        if model.quantization is not None:
            options |= _quantised(model, auto_class, source, {**files, **config})
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded, info = auto_class.from_pretrained(source, **files, **options, **config)
    except SettingError:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(f"The model {model.name!r} cannot be loaded with {auto_class.__name__}: {reason}") from error
    _check_sizes(model.name, loaded, info["mismatched_keys"])
    keep_training_layout(loaded)
    freeze_mask_token(loaded)
    return loaded, processor


def _check_sizes(name: str, model: Any, others: Iterable[tuple[str, Sequence[int], Sequence[int]]]) -> None:
    """Refuse files whose weights have other sizes than the configuration says, but for those of a head.

    others: the names of such weights, their shapes in the files and in the model.

    Raises SettingError.
    """
    head = {id(p) for p in task_head(model)}
    for key, in_files, in_model in sorted(others):
        if id(model.get_parameter_or_buffer(key)) not in head:
            raise SettingError(
                f"The files of {name} do not fit their configuration: {key} has the shape {list(in_files)} there, and "
                f"{list(in_model)} in {type(model).__name__}. Use a whole copy of the model."
            )
    if others:
        classes, wanted = (shape[0] for shape in next(iter(others))[1:])
        warnings.warn(
            f"The head of {name} tells {classes} classes apart, and the training data has {wanted}: the model gets a "
            "new one."
        )


def _quantised(model: ModelSettings, auto_class: Any, source: str, config: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is given to pack the weights."""
    import torch
    from transformers import AutoConfig

    assert model.quantization is not None
    made = AutoConfig.from_pretrained(source, **config)
    if getattr(made, "quantization_config", None) is not None:
        raise SettingError(f"The files of {model.name} are quantised already; leave model.quantization out.")
    dtype = getattr(torch, model.dtype) if model.dtype else made.dtype or torch.float32
    with torch.device("meta"):
        structure = auto_class.from_config(made)
    return {"dtype": dtype, "quantization_config": quantization_config(model.quantization, structure, dtype)}


def source_of(name: str) -> str:
    """The folder or hub id that `from_pretrained` reads.

    Raises SettingError if a file or folder is named that is not there.
    """
    if name.startswith(KNOWN):
        raise SettingError(
            f"{name} is a configuration without weights, to plan with; to train, give a hub id, a folder or "
            "packaged:NAME."
        )
    if name.startswith(PACKAGED):
        from .. import assets

        return str(assets.model_folder(name.removeprefix(PACKAGED)))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SettingError(f"The model file {name} does not exist.")
        return str(_opened_gguf(path.resolve()))
    if name.startswith((".", "/", "~")) and not path.is_dir():
        raise SettingError(f"The model folder {name} does not exist.")
    return str(path) if path.is_dir() else name


def _opened_gguf(file: Path) -> Path:
    """The GGUF file as an ordinary model folder in the user's cache, made when first asked for."""
    from ..assets import cache, gguf

    seen = file.stat()
    made_from = {"file": str(file), "bytes": seen.st_size, "changed": seen.st_mtime_ns}
    name = f"gguf-{hashlib.sha256(str(file).encode()).hexdigest()[:16]}"
    folder = cache.cache_folder() / "models" / name
    with cache.locked(name):
        if not cache.is_whole(folder, made_from):
            with cache.folder_written_whole(folder, made_from) as new:
                gguf.convert(file, new)
    return folder


def freeze_mask_token(model: Any) -> None:
    """Freeze what stands for hidden patches in encoders of images: no loss here depends on it."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "mask_token":
            parameter.requires_grad_(False)


def options_for_images(model: Any, height: int, width: int) -> dict[str, Any]:
    """What a model has to be told with images of this size, where its positions are for another.

    Raises SettingError if the images are no whole number of its patches, for the rest would not be seen.
    """
    from torch import nn

    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is not None and first.kernel_size == first.stride:
        rows, columns = first.kernel_size
        if height % rows or width % columns:
            fits = height - height % rows, height - height % rows + rows
            raise SettingError(
                f"This model cuts images into patches of {rows} x {columns} pixels, and images of {height} x {width} "
                f"are no whole number of them; set data.image_size to {' or '.join(str(n) for n in fits if n)}."
            )
    vision = getattr(model.config, "vision_config", model.config)
    interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    own = getattr(vision, "image_size", None)
    fixed = own is None or (height, width) == (tuple(own) if isinstance(own, (list, tuple)) else (own, own))
    return {"interpolate_pos_encoding": True} if interpolates and not fixed else {}


def max_positions(model: Any, tokenizer: Any) -> int | None:
    """The most tokens the model takes, special ones included; None where it says nothing."""
    limits = positions_of(model), getattr(tokenizer, "model_max_length", None)
    return min((n for n in limits if n is not None and 0 < n < 10**7), default=None)


def check_length(length: int | None, positions: int | None) -> None:
    """Refuse examples longer than the model's positions.

    Raises SettingError.
    """
    if length is not None and positions is not None and length > positions:
        raise SettingError(f"data.max_length must be at most {positions}, the positions of this model, got {length}.")
