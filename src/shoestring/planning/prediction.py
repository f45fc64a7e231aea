"""Prediction: the peak memory of a run by part, before anything is loaded; and an estimate of the time of a step.

Method   One step of the run is rehearsed without values (rehearsal.py) and its bytes counted. What cannot be rehearsed
         is by rule, and said so in `by_rule`: how states of 8-bit and paged optimizers, and shards of several
         processes, are laid out, and kernels that run on GPUs alone.
CUDA     The bytes are those of tensors, as `torch.cuda.max_memory_allocated` counts them. What comes on top differs by
         driver and by the sizes asked for, so it is a range: the context, and blocks that the allocator holds unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ..errors import SettingError
from ..memory.devices import TimeEstimate, seconds
from ..memory.operations import Operations
from ..recipe import Recipe
from ..training.models import check_length
from ..training.quantised import Quantization, check_adapters
from ..training.tasks import TASKS, Task
from ..training.trainer import RecipeTrainer, refusals_told
from . import models, optimizers, sharding
from .rehearsal import Rehearsed, Work, rehearse

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from ..training.settings import RunSettings

CUDA_CONTEXT = (400 * 2**20, 800 * 2**20)
ALLOCATOR_SLACK = (0.0, 0.08)  # of the peak: blocks held for sizes that did not come again
PARTS = (
    "weights",
    "adapters",
    "gradients",
    "optimizer_state",
    "saved_for_backward",
    "logits_and_loss",
    "temporary",
    "inputs",
)


@dataclass(frozen=True)
class Prediction:
    """What one training step of a run will take; memory in bytes, of one process.

    model, batch, length: what it is for; rows of a micro-batch, and tokens of a sequence.
    peak_bytes, peak_step: the most, and whether loading, forward, backward, optimizer or what is between them takes it.
    parts: the peak by part; they sum to peak_bytes. by_step: the most of each step.
    paged_bytes: optimizer state that may leave the device.
    cuda_bytes: the range in which the device's own count will lie, context and slack included.
    by_rule: what of this was not rehearsed but follows a rule.
    operations: of a whole step with all its micro-batches, where they were counted. tf32: whether float32 products run
        as tf32 on a GPU that has it.
    """

    model: str
    recipe: list[dict[str, Any]]
    batch: int
    length: int
    accumulation: int
    processes: int
    peak_bytes: int
    peak_step: str
    parts: Mapping[str, int]
    by_step: Mapping[str, int]
    paged_bytes: int
    trained_parameters: int
    total_parameters: int
    by_rule: tuple[str, ...]
    operations: Operations | None = None
    tf32: bool = False

    @property
    def cuda_bytes(self) -> tuple[int, int]:
        """On a GPU: with the context and the allocator's slack, at least and at most."""
        low, high = (
            int(context + self.peak_bytes * (1 + slack))
            for context, slack in zip(CUDA_CONTEXT, ALLOCATOR_SLACK, strict=True)
        )
        return low, high

    def time_on(self, device: str) -> TimeEstimate:
        """An estimate for one step.

        Raises SettingError for an unknown device, ValueError if operations were not counted.
        """
        if self.operations is None:
            raise ValueError("The operations of this prediction were not counted; predict with count_operations=True.")
        return seconds(self.operations, device, tf32=self.tf32)

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain JSON values."""
        values = asdict(replace(self, operations=None))
        values["operations"] = self.operations.to_dict() if self.operations else None
        return {**values, "cuda_bytes": list(self.cuda_bytes), "by_rule": list(self.by_rule)}


def plan(
    run: str | Path | Mapping[str, Any] | RunSettings,
    *,
    batch: int | None = None,
    length: int | None = None,
    shards: sharding.Sharding | None = None,
) -> Prediction:
    """What a training step of a run will take, operations counted.

    run: a run file's path, what such a file holds, or settings that were read. Others as for `predict`.

    Raises SettingError as `predict` does, and for a run file with mistakes.

    >>> run = {"model": "known:smollm2-135m", "task": "causal-lm", "data": {"train": "any.jsonl", "max_length": 16}}
    >>> plan(run | {"recipe": [{"lora": {"r": 8}}]}, batch=1).trained_parameters
    460800
    """
    from ..training.settings import RunSettings

    if isinstance(run, (str, Path)):
        run = RunSettings.load(run)
    elif not isinstance(run, RunSettings):
        run = RunSettings.from_dict(dict(run))
    return predict(run, batch=batch, length=length, shards=shards, count_operations=True)


def predict(
    settings: RunSettings,
    *,
    batch: int | None = None,
    length: int | None = None,
    shards: sharding.Sharding | None = None,
    depth: int | None = None,
    count_operations: bool = False,
) -> Prediction:
    """What a run file's training step will take; nothing is loaded but the model's configuration.

    batch, length: in place of train.per_device_train_batch_size and data.max_length.
    shards: how several processes divide the model; one process holds all of it by default.
    depth: blocks in each stack, in place of all of them.

    Raises SettingError if the model is unknown, the run cannot be predicted, or its sizes are out of range.
    """
    work, sizes = work_of(settings, batch, length, depth)
    found = rehearse(work, count_operations=count_operations)
    _, rules = models.rehearsed_attention(settings.model.attn_implementation)
    return prediction_of(settings.model.name, work.recipe, sizes, found, settings.train, shards, rules)


def predict_model(
    model: str | PretrainedConfig,
    recipe: Recipe | Sequence[Any] = (),
    *,
    batch: int = 1,
    length: int = 1024,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    auto_class: Any = None,
    train: Mapping[str, Any] | None = None,
    shards: sharding.Sharding | None = None,
    count_operations: bool = False,
) -> Prediction:
    """What a step of transformers' Trainer will take, with the model's own loss.

    model: a configuration, or what names one. recipe, quantization: as in a run file. auto_class: of transformers,
    where the configuration's own architecture is not meant. train: fields of TrainingArguments. Others as in `predict`.

    Raises SettingError as `predict` does.
    """
    train = train or {}
    config = models.configuration(model) if isinstance(model, str) else model
    work = work_of_model(
        config,
        recipe,
        batch=batch,
        length=length,
        dtype=dtype,
        quantization=quantization,
        auto_class=auto_class,
        train=train,
    )
    found = rehearse(work, count_operations=count_operations)
    sizes = (batch, length, int(train.get("gradient_accumulation_steps", 1)))
    name = model if isinstance(model, str) else str(config.name_or_path or config.model_type)
    return prediction_of(name, work.recipe, sizes, found, train, shards)


def work_of(
    settings: RunSettings, batch: int | None = None, length: int | None = None, depth: int | None = None
) -> tuple[Work, tuple[int, int, int]]:
    """One step of a run file; and rows of a micro-batch, tokens of a sequence, micro-batches of a step."""
    config = models.configuration(settings.model.name, settings.model.revision)
    if depth is not None:
        config = models.at_depth(config, depth)
    task = TASKS[settings.task](settings)
    task.limit = limit = models.longest(config)
    recipe = settings.build_recipe()
    task.set_up_recipe(recipe)
    arguments = _arguments(settings, task, recipe)
    batch = arguments["per_device_train_batch_size"] if batch is None else batch
    side = _side_of_images(settings) if task.takes_images else None
    length = length or settings.data.max_length or task.argument_defaults().get("max_length") or limit or (side and 1)
    if length is None:
        raise SettingError(f"{settings.model.name} does not say how long sequences may be; set data.max_length.")
    _check_sizes(batch, length, limit)
    cls = models.model_class(config, task.auto_class())
    dtype = getattr(torch, settings.model.dtype) if settings.model.dtype else None
    attention, _ = models.rehearsed_attention(settings.model.attn_implementation)

    def make_trainer(model: Any, folder: str, callbacks: Sequence[TrainerCallback]) -> Trainer:
        with refusals_told():
            trainer = task.trainer(
                model=model,
                args=task.arguments_class()(**{**arguments, "output_dir": folder}),
                train_dataset=Dataset.from_dict({"input_ids": [[0, 0]], "labels": [[0, 0]]}),
                processing_class=two_words(),
                callbacks=list(callbacks),
            )
        return without_printing(trainer)

    work = Work(
        recipe,
        lambda: models.make_model(config, cls, dtype, attention, settings.model.quantization),
        make_trainer,
        lambda model: models.make_batch(model, batch, length, side),
    )
    return work, (batch, length, arguments["gradient_accumulation_steps"])


def _side_of_images(settings: RunSettings) -> int:
    """Pixels of a side, which nothing but the run file and files that are not read would tell.

    Raises SettingError if the run file does not say.
    """
    if settings.data.image_size is None:
        raise SettingError("What a step takes depends on the size of the images; set data.image_size.")
    return settings.data.image_size


def work_of_model(
    config: PretrainedConfig,
    recipe: Recipe | Sequence[Any] = (),
    *,
    batch: int,
    length: int,
    dtype: torch.dtype | None = None,
    quantization: Quantization | None = None,
    auto_class: Any = None,
    attention: str | None = None,
    train: Mapping[str, Any] | None = None,
) -> Work:
    """One step of RecipeTrainer on any model, with the loss that the model computes."""
    _check_sizes(batch, length, models.longest(config))
    cls = models.model_class(config, auto_class)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.from_list(recipe)
    check_adapters(quantization, recipe.techniques)

    def make_trainer(model: Any, folder: str, callbacks: Sequence[TrainerCallback]) -> Trainer:
        with refusals_told():
            arguments = TrainingArguments(**{**_of_one_step(train or {}, recipe), "output_dir": folder})
            trainer = RecipeTrainer(model=model, args=arguments, train_dataset=[0], callbacks=list(callbacks))
        return without_printing(trainer)

    return Work(
        recipe,
        lambda: models.make_model(config, cls, dtype, attention, quantization),
        make_trainer,
        lambda model: models.make_batch(model, batch, length),
    )


def _check_sizes(batch: int, length: int, limit: int | None) -> None:
    if batch < 1 or length < 1:
        raise SettingError(f"batch and length must be at least 1, got {batch} and {length}.")
    check_length(length, limit)


def prediction_of(
    model: str,
    recipe: Recipe,
    sizes: tuple[int, int, int],
    found: Rehearsed,
    train: Mapping[str, Any],
    shards: sharding.Sharding | None = None,
    told: tuple[str, ...] = (),
) -> Prediction:
    """What was rehearsed, and what follows by rule, as one prediction.

    sizes: rows of a micro-batch, tokens of a sequence, micro-batches of a step. train: fields of TrainingArguments.
    told: other rules that were used.
    """
    moments: list[tuple[str, dict[str, int]]] = []
    for phase, measured in found.memory.moments:
        parts = {part: measured.get(part, 0) for part in PARTS}
        parts["adapters"] = found.adapter_bytes
        parts["weights"] -= found.adapter_bytes
        moments.append((phase, parts))
    rules, paged = list(told), 0
    if (rule := optimizers.rule_of_run(train, recipe)) is not None:
        trained = [(rule, size) for size in found.trained_sizes]
        trained += [(rule.of_embeddings, size) for size in found.embedding_sizes]
        state = sum(each.bytes_of(size) for each, size in trained)
        paged = sum(each.paged_bytes_of(size) for each, size in trained)
        for _, parts in moments:
            parts["optimizer_state"] += state - paged
        rules.append(rule.text)
    if train.get(LIGER[0]):
        rules.append(f"{LIGER[0]}: rehearsed without its kernels, which keep less")
    if shards is not None:
        gradients = found.memory.largest["gradients"]
        moments = [(step, shards.divided(parts, found.units, gradients)) for step, parts in moments]
        paged = shards.share_of_state(paged)
        rules.append(shards.text)
    else:
        weights = found.memory.at_peak["weights"] - found.adapter_bytes
        loaded = {"weights": weights, "adapters": found.adapter_bytes, "temporary": found.largest_weight_bytes}
        moments.insert(0, ("load", dict.fromkeys(PARTS, 0) | loaded))
    by_step: dict[str, int] = {}
    for step, parts in moments:
        by_step[step] = max(by_step.get(step, 0), sum(parts.values()))
    peak_step, at_peak = max(moments, key=lambda moment: sum(moment[1].values()))
    return Prediction(
        model=model,
        recipe=recipe.to_list(),
        batch=sizes[0],
        length=sizes[1],
        accumulation=sizes[2],
        processes=shards.processes if shards else 1,
        peak_bytes=by_step[peak_step],
        peak_step=peak_step,
        parts=at_peak,
        by_step=by_step,
        paged_bytes=paged,
        trained_parameters=found.trained_parameters,
        total_parameters=found.total_parameters,
        by_rule=tuple(rules),
        operations=_in_precision(found.operations, train),
        tf32=bool(train.get("tf32")),
    )


ONLY_AROUND_TRAINING = (
    "eval_",
    "save_",
    "load_best_model",
    "push_to",
    "hub_",
    "report_to",
    "logging_",
    "log_",
    "lr_scheduler",
    "dataloader_",
)
LIGER = ("use_liger_kernel", "liger_kernel_config")
NEEDS_DEVICES = ("fsdp", "deepspeed", "ddp_", "tf32", "fp16", "torch_compile", "use_cpu", *LIGER)
ONE_STEP: Mapping[str, Any] = {
    "max_steps": 1,
    "num_train_epochs": 1,
    "warmup_steps": 0,
    "use_cpu": True,  # a trace has no device
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def _of_one_step(train: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Fields of TrainingArguments that shape one step, as it can be rehearsed on any machine."""
    left_out = (*ONLY_AROUND_TRAINING, *NEEDS_DEVICES)
    kept = {name: value for name, value in train.items() if not name.startswith(left_out)}
    if optimizers.rule_of_run(train, recipe):
        kept["optim"] = "sgd"  # which has no state: that is added by rule
    if train.get("fp16"):
        kept["bf16"] = True  # of the same size, and any processor has it
    return {**kept, **ONE_STEP}


def _in_precision(operations: Operations | None, train: Mapping[str, Any]) -> Operations | None:
    """What was counted in bfloat16 as the run computes it: in float16, with fp16."""
    if operations is None or not train.get("fp16"):
        return operations
    return operations.renamed("bfloat16", "float16")


def _arguments(settings: RunSettings, task: Task, recipe: Recipe) -> dict[str, Any]:
    """What shapes one step of the task's trainer."""
    arguments: dict[str, Any] = {
        "gradient_checkpointing": False,
        "bf16": False,
        "label_names": ["labels"],
        **task.argument_defaults(),
        **_of_one_step(settings.train, recipe),
        **task.rehearsal_arguments(),
    }
    blank = task.arguments_class()(output_dir=settings.output_dir, use_cpu=True)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        arguments.setdefault(name, getattr(blank, name))
    return arguments


def two_words() -> PreTrainedTokenizerFast:
    """A tokenizer for trainers that ask for one where no text is read."""
    made = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def without_printing(trainer: Trainer) -> Trainer:
    """The trainer without those callbacks that print."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer
