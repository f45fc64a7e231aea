"""The run file: one YAML file is one run, read into typed settings and checked before anything is loaded.

    model: packaged:minilm
    task: text-classification
    data: {train: packaged:rotten-tomatoes, text: text, label: label}
    recipe:
      - lora: {r: 8, target_modules: all-linear}
    train: {num_train_epochs: 1, learning_rate: 1e-3, seed: 0}
    output_dir: runs/first

An error names the file, the line, the key, what is allowed, what came, and the nearest known name. All problems of a
file are told at once. Nothing is taken from the environment, and nothing is filled in from elsewhere.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shoestring import recipes
from shoestring.errors import SettingError, did_you_mean

from .explained import Problem, Sections, explain, told
from .marked_yaml import KeyPath, MarkedYaml, dump_yaml, parse_marked_yaml, read_marked_yaml
from .overrides import apply_override
from .quantised import NO_TRAINING, Quantization, check_adapters
from .train_fields import field_types, read_train_field, shown

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from shoestring.recipe import Recipe


class _Section(BaseModel):
    # strict: "8" is no number and 1 is not true; the loader has given each scalar its type already.
    model_config = ConfigDict(extra="forbid", strict=True, validate_assignment=True)


class ModelSettings(_Section):
    """The pretrained model. In the run file a name alone is enough: `model: packaged:minilm`."""

    name: str = Field(min_length=1, description="hub id, folder, .gguf file, or packaged:NAME")
    revision: str | None = Field(None, min_length=1, description="branch, tag or commit of a hub id")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="type of the frozen weights; empty: as the model was saved"
    )
    attn_implementation: str | None = Field(
        None, min_length=1, description="attention of transformers, such as sdpa or eager; empty: its choice"
    )
    quantization: Quantization | None = Field(
        None,
        description="pack the frozen weights of linear layers: nf4 (4 bit), int8 or torchao-int8; empty: as saved",
    )

    @field_validator("quantization", mode="before")
    @classmethod
    def _can_train(cls, value: Any) -> Any:
        if isinstance(value, str) and value in NO_TRAINING:
            raise ValueError(NO_TRAINING[value])
        return value


class DataSettings(_Section):
    """Where the examples are, and the columns they are in. A task reads the columns it needs and no others."""

    train: str = Field(
        min_length=1,
        description="hub id, .csv, .tsv, .json, .jsonl or .parquet file, folder of pictures, or packaged:NAME",
    )
    validation: str | None = Field(None, min_length=1, description="as train; looked at during training")
    validation_share: float | None = Field(
        None, gt=0, lt=1, description="of the training rows, held out for validation; the same ones with every seed"
    )
    test: str | None = Field(None, min_length=1, description="as train; looked at once, at the end")
    text: str = Field("text", min_length=1, description="column of the text")
    text_pair: str | None = Field(None, min_length=1, description="column of a second text, read together with text")
    image: str = Field("image", min_length=1, description="column of a picture")
    image_size: int | None = Field(
        None, ge=1, description="pixels a side that pictures are brought to; empty: as the model's processor does"
    )
    label: str = Field("label", min_length=1, description="column of the class, as name or number")
    prompt: str = Field("prompt", min_length=1, description="column of what is given; no loss on it")
    completion: str = Field("completion", min_length=1, description="column of what follows the prompt")
    template: str | None = Field(
        None, min_length=1, description="what is given, with {column} for values; in place of prompt, for choices"
    )
    choices: str | list[str] = Field(
        "choices", min_length=1, description="column of the answers to choose from, or a list of them for all rows"
    )
    chat: bool = Field(False, description="write prompt and completion as turns of the model's chat template")
    messages: str = Field("messages", min_length=1, description="column of a chat: a list of {role, content}")
    max_length: int | None = Field(
        None,
        ge=1,
        description="tokens kept of an example; empty: all the model takes, of causal-lm at most 1,024",
    )
    max_train_rows: int | None = Field(None, ge=1, description="train on this many rows; empty: all")
    max_eval_rows: int | None = Field(None, ge=1, description="evaluate on this many rows of each set; empty: all")


class RunSettings(_Section):
    """A run, checked. Make one with `load` (from a file) or `from_dict`; both check `train` and `recipe` as well."""

    model: ModelSettings = Field(description="hub id, folder, .gguf file, or packaged:NAME")
    task: str = Field(description="what is learned, such as text-classification or causal-lm")
    data: DataSettings = Field(description="at least {train: ...}")
    recipe: list[dict[str, dict[str, Any]]] = Field(
        default_factory=list, description="techniques with their settings, in any order; empty: full fine-tuning"
    )
    train: dict[str, Any] = Field(default_factory=dict, description="fields of transformers' TrainingArguments")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a better one; empty: never"
    )
    output_dir: str = Field(min_length=1, description="folder for checkpoints, adapters and the report")

    @field_validator("model", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("output_dir")
    @classmethod
    def _home_folder(cls, value: str) -> str:
        return os.path.expanduser(value)

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """The settings in the file at `path`, with `key=value` overrides put over them.

        output_dir is runs/NAME for NAME.yaml where the file does not say.

        Raises SettingError with all problems found, each with file and line.
        """
        path = Path(path)
        run = read_marked_yaml(path)
        if run.values is None:
            raise SettingError(f"{path} is empty; a run file has at least model, task and data.")
        if not isinstance(run.values, dict):
            kind = "a list" if isinstance(run.values, list) else f"only {shown(run.values)}"
            raise SettingError(f"{path} must hold keys with values (model: ..., task: ..., data: ...), but is {kind}.")
        _expand_recipe(run, path.parent)
        for override in overrides:
            _expand_model(run)
            apply_override(run, override)
            _expand_recipe(run, path.parent)
        if run.values.get("output_dir") is None:
            run.values["output_dir"] = f"runs/{path.stem}"
        return cls._checked(run)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings in a mapping of the same form as the file.

        Raises SettingError with all problems found.
        """
        # A copy through YAML holds plain values only, and shares nothing with the caller's.
        run = parse_marked_yaml(dump_yaml(values), "run settings", lines=False)
        if not isinstance(run.values, dict):
            raise SettingError(f"Run settings must be a dict with model, task and data, got {shown(run.values)}.")
        run.values.setdefault("output_dir", "runs/run")
        return cls.from_marked(run, Path())

    @classmethod
    def from_marked(cls, run: MarkedYaml, folder: Path) -> Self:
        """The settings in what was read of a file or put together from several; output_dir must be there.

        folder: where recipes named by file are looked for first.

        Raises SettingError with all problems found.
        """
        _expand_recipe(run, folder)
        return cls._checked(run)

    @classmethod
    def _checked(cls, run: MarkedYaml) -> Self:
        for section in ("recipe", "train"):
            if run.values.get(section) is None:  # `train:` with nothing after it
                run.values.pop(section, None)
        problems: list[Problem] = []
        settings = None
        try:
            settings = cls.model_validate(run.values)
        except ValidationError as error:
            sections: Sections = {(): cls, ("model",): ModelSettings, ("data",): DataSettings}
            problems += [explain(found, run, sections, _known_elsewhere) for found in error.errors()]
        problems += _check_task(run)
        train, train_problems = _check_train(run)
        problems += train_problems + _check_recipe(run)
        if problems or settings is None:
            raise SettingError(told(problems, run.source))
        settings.train = train
        return settings

    def build_recipe(self) -> "Recipe":
        """The recipe, its techniques made from their settings.

        Raises SettingError, naming entry and field.
        """
        from shoestring.recipe import Recipe

        return Recipe.from_list(self.recipe)

    def training_arguments(self, **own: Any) -> "TrainingArguments":
        """The arguments for the trainer of this task: `train`, and `own` over it.

        Raises SettingError where transformers refuses them, such as fp16 together with bf16.
        """
        try:
            return _arguments_class(self.task)(**{"output_dir": self.output_dir, **self.train, **own})
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise SettingError(f"The settings under train do not go together: {error}") from error

    def to_yaml(self) -> str:
        """The settings with all defaults, as a run file; loading it gives equal settings.

        Equal but for recipe files, which are written out, and a leading ~, which is resolved.
        """
        values = self.model_dump(exclude_none=True)
        values["train"], values["recipe"] = self.train, self.recipe  # there None may be meant
        if values["model"].keys() == {"name"}:
            values["model"] = values["model"]["name"]
        return dump_yaml(values)


def _expand_model(run: MarkedYaml) -> None:
    """Turn `model: NAME` into `model: {name: NAME}`, so that model.dtype=... can be set over it."""
    if isinstance(run.values.get("model"), str):
        place = run.place(("model",))
        run.values["model"] = {"name": run.values["model"]}
        run.places["model", "name"] = place


def _expand_recipe(run: MarkedYaml, folder: Path) -> None:
    """Put the list of a recipe's file in place of its name, and `{name: {}}` in place of a bare technique.

    A name is that of a file, of a recipe that comes with the package, or of one technique.

    folder: where the run file is; a recipe file is looked for there, then in the current folder.
    """
    recipe = run.values.get("recipe") if isinstance(run.values, dict) else None
    if isinstance(recipe, str):
        is_file = recipe.endswith((".yaml", ".yml")) or os.sep in recipe
        if is_file or recipe in recipes.names():
            path = Path(recipe).expanduser() if is_file else recipes.path_of(recipe)
            inner = read_marked_yaml(folder / path if (folder / path).exists() else path)
            if isinstance(inner.values, dict) and inner.values.keys() == {"recipe"}:
                inner = inner.below("recipe")
            if not isinstance(inner.values, list):
                raise SettingError(f"{inner.source} must hold a list of techniques (- lora: {{r: 8}}).")
            run.replace(("recipe",), inner)
        else:
            run.values["recipe"] = [recipe]
    recipe = run.values.get("recipe") if isinstance(run.values, dict) else None
    if isinstance(recipe, list):
        for index, entry in enumerate(recipe):
            if isinstance(entry, str):
                recipe[index] = {entry: {}}
            elif isinstance(entry, dict):
                recipe[index] = {name: {} if settings is None else settings for name, settings in entry.items()}


def _arguments_class(task: Any) -> "type[TrainingArguments]":
    """The dataclass whose fields `train` may hold.

    Raises KeyError if there is no such task, SettingError if it needs a package that is not installed.
    """
    from .tasks import TASKS

    return TASKS[task if isinstance(task, str) else ""].arguments_class()


def _check_task(run: MarkedYaml) -> list[Problem]:
    from .tasks import TASKS

    task = run.values.get("task")
    if not isinstance(task, str) or task in TASKS:
        return []  # of the wrong type or missing: told already
    return [(run.place(("task",)), f"Unknown task {task!r}. {did_you_mean(task, TASKS)}")]


def _check_train(run: MarkedYaml) -> tuple[dict[str, Any], list[Problem]]:
    """The fields of `train` in their types, and what is wrong with them."""
    train = run.values.get("train")
    if not isinstance(train, dict):
        return {}, []
    try:
        arguments = _arguments_class(run.values.get("task"))
    except SettingError as error:
        return {}, [(run.place(("task",)), str(error))]
    except KeyError:
        return {}, []  # which fields there are depends on the task, which is unknown
    read, problems = {}, []
    for name, value in train.items():
        place = run.place(("train", name))
        try:
            read[name] = read_train_field(arguments, str(name), value, place.text)
        except SettingError as error:
            problems.append((place, str(error)))
    warmup, steps = read.get("warmup_steps", 0), read.get("max_steps", -1)
    if 0 < steps < warmup:
        message = f"train.warmup_steps must be at most train.max_steps, {steps}, got {shown(train['warmup_steps'])}."
        problems.append((run.place(("train", "warmup_steps")), message))
    return read, problems


def _check_recipe(run: MarkedYaml) -> list[Problem]:
    """What the recipe itself finds wrong, at the line of the entry."""
    recipe = run.values.get("recipe")
    if not recipe:
        return _check_quantization(run)
    if not isinstance(recipe, list) or not all(_is_entry(entry) for entry in recipe):
        return []  # of the wrong form: told already
    problems = []
    for index, entry in enumerate(recipe):
        if len(entry) != 1:
            message = f"recipe.{index} must name one technique, got {len(entry)}; begin each with '- '."
            problems.append((run.place(("recipe", index)), message))
    if problems:
        return problems
    from shoestring.recipe import Recipe

    try:
        return _check_quantization(run, Recipe.from_list(recipe))
    except SettingError as error:
        return [(run.place(_blamed(str(error))), str(error))]


def _check_quantization(run: MarkedYaml, recipe: "Recipe | None" = None) -> list[Problem]:
    """Whether there is something that trains where the weights cannot."""
    model = run.values.get("model")
    kind = model.get("quantization") if isinstance(model, dict) else None
    try:
        if kind in get_args(Quantization):
            check_adapters(kind, recipe.techniques if recipe else ())
    except SettingError as error:
        return [(run.place(("model", "quantization")), str(error))]
    return []


def _blamed(message: str) -> KeyPath:
    """The path in the run file that a message of the recipe is about: `recipe[0].lora: unknown setting 'rr'`."""
    entry = re.match(r"recipe\[(\d+)\](?:\.(\w+))?(?:\.(\w+))?", message)
    if entry is None:
        return ("recipe",)
    names = [name for name in (entry[2], entry[3]) if name]
    unknown = re.search(r"unknown setting '([^']*)'", message)
    return ("recipe", int(entry[1]), *names, *([unknown[1]] if unknown and len(names) == 1 else []))


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(settings, dict) for settings in entry.values())


def _known_elsewhere(path: KeyPath) -> str:
    """Where an unknown key at the top belongs."""
    from transformers import TrainingArguments

    name = str(path[-1])
    if len(path) == 1 and name in DataSettings.model_fields:
        return f"It belongs under data: data.{name}."
    if len(path) == 1 and name in field_types(TrainingArguments):
        return f"It belongs under train: train.{name}."
    return ""
