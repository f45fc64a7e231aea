"""The `train` section of a run file: fields of TrainingArguments (and SFTConfig), checked one by one.

transformers reads its arguments without looking at their types, so `learning_rate: fast` would fail minutes later.
The dataclass is handed in by the task: nothing here imports transformers.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from enum import Enum
from typing import Any

from shoestring.errors import SettingError, did_you_mean

# Fields that another part of the run file, or Shoestring itself, decides.
SET_ELSEWHERE = {
    "output_dir": "set output_dir at the top of the run file",
    "remove_unused_columns": "Shoestring keeps the columns that the model and the recipe need",
    "do_train": "`shoestring train` trains, and evaluates where data.validation or data.test is given",
    "do_eval": "give data.validation, and choose when with train.eval_strategy",
    "do_predict": "give data.test",
    "resume_from_checkpoint": "use `shoestring train RUN.yaml --resume`",
    "local_rank": "a run file is trained by one process; use RecipeTrainer in a script of your own",
    "parallelism_config": "a run file is trained by one process; use RecipeTrainer in a script of your own",
    "hub_token": "a token does not belong in a run file; set the environment variable HF_TOKEN",
    "save_only_model": "checkpoints hold all that --resume needs",
    "enable_jit_checkpoint": "SIGINT, as of ctrl-C, saves a checkpoint that --resume goes on from to the bit",
    "prediction_loss_only": "evaluation measures what the task is measured by",
    "eval_do_concat_batches": "evaluation measures over all rows",
    "trust_remote_code": "Shoestring runs no code that comes with a model",
    "model_init_kwargs": "write model as a mapping: {name: ..., dtype: ..., attn_implementation: ...}",
    "dataset_text_field": "set data.text",
    "max_length": "set data.max_length",
}

# Names that users know from older versions or other programs.
RENAMED = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps (below 1 it is a share of all steps)",
    "no_cuda": "use_cpu",
    "max_seq_length": "max_length, in the section data",
    "early_stopping_patience": "early_stopping_patience, at the top of the run file",
}

Rule = tuple[Callable[[Any], bool], str]
ABOVE_0: Rule = (lambda value: value > 0, "greater than 0")
AT_LEAST_0: Rule = (lambda value: value >= 0, "at least 0")
AT_LEAST_1: Rule = (lambda value: value >= 1, "at least 1")
SHARE: Rule = (lambda value: 0 <= value < 1, "at least 0 and below 1")
SEED: Rule = (lambda value: 0 <= value < 2**32, "from 0 to 4294967295")
STEPS: Rule = (lambda value: 0 < value < 1 or (value >= 1 and value == int(value)), "a whole number or a share below 1")

RANGES: dict[str, Rule] = {
    "learning_rate": ABOVE_0,
    "num_train_epochs": ABOVE_0,
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 to train for num_train_epochs"),
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "eval_accumulation_steps": AT_LEAST_1,
    "warmup_steps": (lambda value: value == 0 or STEPS[0](value), "0, a whole number of steps, or a share below 1"),
    "weight_decay": AT_LEAST_0,
    "max_grad_norm": AT_LEAST_0,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": ABOVE_0,
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": AT_LEAST_0,
    "logging_steps": STEPS,
    "eval_steps": STEPS,
    "save_steps": STEPS,
    "save_total_limit": AT_LEAST_1,
    "eval_delay": AT_LEAST_0,
    "dataloader_num_workers": AT_LEAST_0,
    "seed": SEED,
    "data_seed": SEED,
    "train_sampling_strategy": (
        lambda value: value in ("random", "sequential"),
        "random or sequential, since a resumed run would go on with other rows of groups",
    ),
}


def field_types(arguments: type) -> dict[str, Any]:
    """The annotation of every field of a dataclass, by name."""
    hints = typing.get_type_hints(arguments)
    return {item.name: hints[item.name] for item in dataclasses.fields(arguments)}


def read_train_field(arguments: type, name: str, value: Any, text: str | None = None) -> Any:
    """`value` as the field `name` of the dataclass `arguments` takes it: 1 as 1.0, "1e-3" as 0.001.

    text: how the value was written, where known: `eval_strategy: no` is false to YAML and "no" to its writer.

    Raises SettingError, without the place, if there is no such field, Shoestring sets it, or the value does not fit.
    """
    if name in SET_ELSEWHERE:
        raise SettingError(f"train.{name} cannot be set here: {SET_ELSEWHERE[name]}.")
    known = field_types(arguments)
    if name not in known:
        hint = f"It is now {RENAMED[name]}." if name in RENAMED else did_you_mean(name, known.keys() - SET_ELSEWHERE)
        raise SettingError(f"Unknown key train.{name}. {hint}")
    fits, read = _read(known[name], value, text)
    choices = next(item.metadata.get("choices") for item in dataclasses.fields(arguments) if item.name == name)
    if not fits or (choices and read is not None and read not in choices):
        written = text if text and not isinstance(value, str) else shown(value)
        if choices is None and (names := _enum_names(known[name])) and len(names) > 12:
            raise SettingError(f"train.{name} cannot be {written}. {did_you_mean(written, names)}")
        allowed = _one_of(choices) if choices else _describe(known[name])
        raise SettingError(f"train.{name} must be {allowed}, got {written}.")
    if name in RANGES and read is not None:
        in_range, words = RANGES[name]
        if not in_range(read):
            raise SettingError(f"train.{name} must be {words}, got {shown(value)}.")
    return read


def shown(value: Any) -> str:
    """A value as a user writes it, short enough for a message."""
    if value is None:
        return "nothing"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _arms(hint: Any) -> list[Any]:
    """The types of a union in the order in which they are tried: text last, and not at all where names are listed."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    arms = list(typing.get_args(hint)) if is_union else [hint]
    if any(_is_enum(arm) for arm in arms):
        arms = [arm for arm in arms if arm is not str]
    return sorted(arms, key=lambda arm: arm is str)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _enum_names(hint: Any) -> list[str]:
    return [member.value for arm in _arms(hint) if _is_enum(arm) for member in arm]


def _read(hint: Any, value: Any, text: str | None = None) -> tuple[bool, Any]:
    """Whether the value fits the annotation, and the value in its type."""
    for arm in _arms(hint):
        fits, read = _read_arm(arm, value, text)
        if fits:
            return True, read
    return False, None


def _read_arm(arm: Any, value: Any, text: str | None) -> tuple[bool, Any]:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if arm is Any:
        return True, value
    if arm in (None, type(None)):
        return value is None, None
    if arm is bool:
        return isinstance(value, bool), value
    if arm is int:
        whole = number and math.isfinite(value) and value == int(value)
        return whole, int(value) if whole else None
    if arm is float:
        try:
            read = float(value) if number or isinstance(value, str) else math.nan
        except (ValueError, OverflowError):
            read = math.nan
        return math.isfinite(read), read
    if arm is str:
        if isinstance(value, bool) or number:
            return text is not None, text
        return isinstance(value, str), value
    if _is_enum(arm):
        written = text if isinstance(value, bool) else value
        return written in [member.value for member in arm], written
    origin, inner = typing.get_origin(arm) or arm, typing.get_args(arm)
    if origin is typing.Literal:
        return any(value is option or (value == option and type(value) is type(option)) for option in inner), value
    if origin is dict:
        value_type = inner[1] if inner else Any
        fits = isinstance(value, dict) and all(_read(value_type, item)[0] for item in value.values())
        return fits, value
    if origin is list:
        return isinstance(value, list) and all(_read(inner[0] if inner else Any, item)[0] for item in value), value
    return False, None


def _describe(hint: Any) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Any: "a value"}
    parts = []
    for arm in _arms(hint):
        origin, inner = typing.get_origin(arm) or arm, typing.get_args(arm)
        if arm in (None, type(None)):
            parts.append("empty")
        elif _is_enum(arm):
            parts.append(_one_of(member.value for member in arm))
        elif origin is typing.Literal:
            parts.append(_one_of(inner))
        elif origin is list:
            parts.append(
                f"a list of {_one_of(m.value for m in inner[0])}" if inner and _is_enum(inner[0]) else "a list"
            )
        elif origin is dict:
            parts.append("a mapping")
        else:
            parts.append(words.get(arm, f"of type {getattr(arm, '__name__', arm)}"))
    parts.sort(key=lambda part: part == "empty")
    return " or ".join(parts)


def _one_of(options: typing.Iterable[Any]) -> str:
    names = [str(option).lower() if isinstance(option, bool) else str(option) for option in options]
    return f"one of {', '.join(names)}" if len(names) > 1 else names[0]
