"""What a rehearsal runs: models from their configuration alone, and batches in the shapes they take."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from ..errors import SettingError
from ..memory import configurations
from ..positions import positions_in, positions_of
from ..training.models import KNOWN, freeze_mask_token, options_for_images, source_of
from ..training.quantised import Quantization, quantization_config
from ..wrappers import innermost
from . import quantised

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer")
NEED_NO_GPU = ("eager", "sdpa", "flex_attention")
SIZES = ("hidden_size", "num_hidden_layers", "decoder_layers", "num_attention_heads", "vocab_size")


def configuration(name: str, revision: str | None = None) -> PretrainedConfig:
    """The configuration of a model: known:NAME, packaged:NAME, a folder, a config.json, a .gguf file or a hub id.

    Of a hub id its config.json is all that is downloaded.

    Raises SettingError if there is none, it is of no known architecture, or it leaves out sizes of the model.
    """
    from transformers import AutoConfig

    if name.startswith(KNOWN):
        return configurations.load(name.removeprefix(KNOWN))
    path = Path(name).expanduser()
    if path.suffix != ".json" or not path.is_file():
        path = Path(source_of(name))
    file = path / "config.json" if path.is_dir() else path
    try:
        if not file.is_file():
            if path.exists():
                raise SettingError(f"{path} holds no config.json, which says what the model is.")
            return AutoConfig.from_pretrained(name, **({"revision": revision} if revision else {}))
        config = AutoConfig.from_pretrained(file)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = lines[-1 if isinstance(error, StrictDataclassError) else 0].strip(" .")  # which names its check first
        raise SettingError(
            f"The configuration of {name!r} cannot be read: {reason}. Give a folder or file of a config.json, a hub "
            f"id, packaged:NAME, or one of {', '.join(KNOWN + n for n in configurations.names()[:3])}, ..."
        ) from error
    _refuse_gaps(config, file)
    return config


def _refuse_gaps(config: PretrainedConfig, file: Path) -> None:
    """Sizes that a file leaves out would silently be those of the class."""
    given = json.loads(file.read_text(encoding="utf-8"))
    part = next((key for key in ("text_config", "vision_config", "audio_config") if key in given), None)
    inner, inside = (given, config) if part is None else (given[part], getattr(config, part))
    for size in SIZES:
        own_name = inside.attribute_map.get(size, size)
        if hasattr(inside, size) and not {size, own_name} & inner.keys() and not hasattr(inside, "hidden_sizes"):
            raise SettingError(f"{file} does not say {own_name}: without it nothing can be predicted.")


def model_class(config: PretrainedConfig, auto_class: Any = None) -> type[nn.Module]:
    """The class that `auto_class` makes of a configuration, or the one it names itself.

    Raises SettingError if there is none.
    """
    import transformers

    if auto_class is not None:
        try:
            return auto_class._model_mapping[type(config)]
        except KeyError:
            raise SettingError(
                f"There is no {auto_class.__name__.removeprefix('AutoModel')} form of {config.model_type!r}."
            ) from None
    named = (config.architectures or [None])[0]
    if named is None or not hasattr(transformers, named):
        raise SettingError(
            f"The configuration of {config.model_type!r} names no architecture of transformers ({named}); give the "
            "task."
        )
    return getattr(transformers, named)


def rehearsed_attention(attention: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The attention to rehearse in place of one that needs packages and a GPU, and the rule that is told of it."""
    if attention is None or attention in NEED_NO_GPU:
        return attention, ()
    return "sdpa", (f"attention {attention}: keeps as much as torch's fused attention",)


def make_model(
    config: PretrainedConfig,
    cls: type[nn.Module],
    dtype: torch.dtype | None,
    attention: str | None = None,
    quantization: Quantization | None = None,
) -> nn.Module:
    """A model with start values, or with none under a mode without values.

    quantization: as in a run file; without, as the configuration says that its files are.
    """
    config = copy.deepcopy(config)
    options = {"attn_implementation": attention} if attention else {}
    packed = quantised.of_checkpoint(config)
    dtype = dtype or config.dtype or torch.float32
    model = cls._from_config(config, dtype=dtype, **options)  # type: ignore[attr-defined]
    if getattr(config, "scale_decoder_outputs", None) is False:  # its files hold a head of its own, as T5's do not
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    freeze_mask_token(model)
    if quantization is not None:
        if packed is not None:
            raise SettingError(f"The files of this {config.model_type!r} are quantised already; set no quantization.")
        packed = quantization_config(quantization, model, dtype)
    if packed is not None:
        model = quantised.quantise(model, packed)
    return model.train()


def make_batch(model: nn.Module, rows: int, length: int, side: int | None = None) -> Mapping[str, Any]:
    """Inputs and labels in the shapes that the model takes; sequences of full length.

    rows: sequences, or images, or recordings. length: tokens of a sequence; of the labels where inputs are audio.
    side: pixels of a side of images, in place of the configuration's.

    Raises SettingError if no batch is known, or images are no whole number of the model's patches.
    """
    config: Any = model.config
    inner = innermost(model)
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch: dict[str, Any] = {}
    main, name = inner.main_input_name, type(inner).__name__
    if main == "pixel_values":
        vision = getattr(config, "vision_config", config)
        side = side or (vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0])
        batch[main] = torch.zeros(rows, getattr(vision, "num_channels", 3), side, side)
        batch |= options_for_images(inner, side, side)
    elif main == "input_features":
        frames = 2 * config.max_source_positions  # the first layers halve them
        batch[main] = torch.zeros(rows, config.num_mel_bins, frames)
    elif main == "input_ids":
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        raise SettingError(f"{name} takes {main}, for which no batch is known.")
    whole = any(kind in name for kind in ("CausalLM", "LMHead", "ConditionalGeneration", "MaskedLM", "TokenClass"))
    batch["labels"] = ids.clone() if whole else torch.zeros(rows, dtype=torch.long)
    return batch


def longest(config: PretrainedConfig) -> int | None:
    """The most tokens the model takes; None where its configuration does not say."""
    from transformers import AutoModel

    stated = positions_in(config)
    if stated is None or type(config) not in AutoModel._model_mapping:
        return stated
    with torch.device("meta"):  # a few of its blocks, for the table of positions before them
        return positions_of(AutoModel.from_config(at_depth(config, period(config))))


def depth_of(config: PretrainedConfig) -> int:
    """Blocks of the deepest stack."""
    text: Any = config.get_text_config()
    return max((int(value) for name in DEPTHS if isinstance(value := getattr(text, name, None), int)), default=0)


def at_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """The configuration of the same model with fewer blocks in each stack."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    for name in DEPTHS:
        if isinstance(value := getattr(text, name, None), int) and value > depth:
            setattr(text, name, depth)
    for name, value in vars(text).items():
        if name in ("layer_types", "mlp_layer_types") and isinstance(value, list):
            setattr(text, name, value[:depth])
    return config


def period(config: PretrainedConfig) -> int:
    """After how many blocks their kinds repeat."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or [None]
    fits = (n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return next(fits)
