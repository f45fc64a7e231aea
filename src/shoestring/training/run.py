"""A run from a run file to its report: data, model, recipe, training, and what comes of it."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import is_liger_kernel_available

from .. import __version__
from ..errors import RunFailed, SettingError, out_of_memory
from ..memory import KeptReport, MemoryReport
from ..recipe import Attached, Recipe, attached_to
from ..technique import Technique, plain
from ..whole_files import write_text
from . import checkpoints, output
from .callback import refuse_copies
from .checks import GradientCheck
from .data import load_splits
from .low_bit_optimizers import check_optimizer, note_on
from .observe import AtFirstStep, StepMemory, StepShape, StepTimes, StopWhenAsked
from .quantised import numbers_in
from .report import Report, median
from .tasks import TASKS, Task
from .trainer import refusals_told

if TYPE_CHECKING:
    from datasets import DatasetDict

    from .settings import RunSettings

LOOKING_AT_QUALITY = ("reduce_lr_on_plateau", "greedy")  # schedules that go by evaluations


@dataclass(frozen=True)
class Ready:
    """A run that is ready to train.

    notes: what to know of it that is no error.
    """

    settings: RunSettings
    task: Task
    data: DatasetDict
    attached: Attached
    trainer: Trainer
    notes: tuple[str, ...] = ()


def train(
    settings: RunSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    say: Callable[[str], None] = lambda text: None,
    on_ready: Callable[[Ready], None] = lambda ready: None,
    predict: Callable[[RunSettings, StepShape], dict[str, Any]] | None = None,
) -> Report:
    """Train as the settings say; leaves checkpoints, the trained weights and report.json in their output_dir.

    resume: go on from the newest whole checkpoint. overwrite: throw away a run that is there.
    callbacks: of transformers' Trainer, for progress and the like. say: told of each stage and of damaged checkpoints.
    on_ready: called once before the first step. predict: what the measured step should have taken, given the settings
    and its largest micro-batch; called after training, for the report.

    Raises SettingError for what the user must change, before anything is written, and RunFailed if training fails.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingError(
            "A run file is trained by one process so far, but WORLD_SIZE is above 1. For several processes, use "
            "RecipeTrainer in a script of your own."
        )
    folder = Path(settings.output_dir)
    with output.output_folder(folder, resume=resume, overwrite=overwrite), ExitStack() as stack:
        checkpoint = None
        if resume:
            checkpoint, problems = checkpoints.find(folder, identity(settings))
            for problem in problems:
                say(problem)
            say(f"Going on from {checkpoint}." if checkpoint else f"{folder} holds no checkpoint yet; starting over.")
        memory, stop = StepMemory(), StopWhenAsked()
        times = StepTimes(memory)
        watching = [stop, memory, times, GradientCheck(), *callbacks]
        before = _quality_before(folder, settings) if checkpoint else {}
        to_evaluate = settings.train.get("eval_on_start", False) and not before  # what the checkpoint then replaces
        ready = prepare(settings, say=say, callbacks=watching, checkpoint=None if to_evaluate else checkpoint)
        on_ready(ready)
        try:
            if not resume:
                ready.trainer.add_callback(AtFirstStep(stack.enter_context(output.new_run(folder))))
            shutil.rmtree(folder / checkpoints.BESIDE, ignore_errors=True)
            write_text(folder / output.SETTINGS, settings.to_yaml())
            if to_evaluate:
                with _no_weights_cast(ready.trainer.args):
                    before = {f"{split}, before": found for split, found in evaluate(ready, say).items()}
                write_text(folder / output.BEFORE, json.dumps({"test": _test_data(settings), "quality": before}))
                set_seed(ready.trainer.args.seed)
            with stop.listening():
                result = ready.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            interrupted = stop.asked and ready.trainer.state.global_step < ready.trainer.state.max_steps
            saved = {"checkpoints": str(folder)}
            if not interrupted:
                saved["weights"] = str(_save_final(ready, folder))
            quality = before | ({} if interrupted else evaluate(ready, say))
            report = Report(
                status="interrupted" if interrupted else "finished",
                steps=ready.trainer.state.global_step,
                quality=quality,
                trained_parameters=sum(p.numel() for p in ready.attached.model.parameters() if p.requires_grad),
                total_parameters=sum(map(numbers_in, ready.attached.model.parameters())),
                memory=memory.report.to_dict() if memory.report else None,
                memory_at_end=memory.at_end.to_dict() if memory.at_end else None,
                process_peak_bytes=process_peak_bytes(),
                step_seconds=median(times.seconds),
                train_seconds=float(result.metrics["train_runtime"]),
                tokens_a_second=times.tokens / sum(times.seconds) if times.tokens else None,
                saved=saved,
                settings=settings.to_yaml(),
                versions=versions(),
                losses=[(row["step"], row["loss"]) for row in ready.trainer.state.log_history if "loss" in row],
                measured_batch=memory.shape.to_dict() if memory.shape else None,
                predicted=_predicted(predict, settings, memory, say),
                classes=list(ready.task.classes.names) if ready.task.classes else None,
            )
            if report.status == "finished":
                report.write(folder / output.REPORT)
            return report
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RunFailed):
                raise
            raise _failure(error, folder) from error
        finally:
            memory.abandon()


def _quality_before(folder: Path, settings: RunSettings) -> dict[str, dict[str, float]]:
    """What was evaluated before the first step of the run in a folder; empty if nothing was, or on other test data."""
    try:
        found = json.loads((folder / output.BEFORE).read_text())
        return dict(found["quality"]) if found["test"] == _test_data(settings) else {}
    except (OSError, ValueError, KeyError, TypeError):  # none, or none that this version has written
        return {}


def _test_data(settings: RunSettings) -> list[Any]:
    """The test data, which may change between a run and its resume, with its size where it is a file."""
    source = settings.data.test
    return [source, Path(source).stat().st_size if source is not None and Path(source).is_file() else None]


def _predicted(
    predict: Callable[[RunSettings, StepShape], dict[str, Any]] | None,
    settings: RunSettings,
    memory: StepMemory,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """The prediction for the measured step; None where there is none, which is no reason for a run to fail."""
    if predict is None or memory.report is None or memory.shape is None:
        return None
    try:
        return predict(settings, memory.shape)
    except Exception as error:  # a finished run is worth more than its comparison
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        say(f"No prediction beside the measured memory: {reason}")
        return None


def prepare(
    settings: RunSettings,
    *,
    say: Callable[[str], None] = lambda text: None,
    callbacks: Sequence[TrainerCallback] = (),
    checkpoint: Path | None = None,
) -> Ready:
    """Load data and model, attach the recipe and make the trainer; nothing is trained or written.

    checkpoint: what the trainer will restore, so that techniques need not start or choose by data what it holds.

    Raises SettingError naming what does not fit together.
    """
    task = TASKS[settings.task](settings)
    recipe = settings.build_recipe()
    task.set_up_recipe(recipe)
    notes = [_try_machine(settings)]
    seed = int(settings.train.get("seed", 42))
    say(f"Loading data {settings.data.train}")
    data = load_splits(settings.data, seed)
    for split, dataset in data.items():
        task.check_columns(split, dataset)
    say(f"Loading model {settings.model.name}")
    set_seed(seed)  # a new head, then adapters, take their start values from it
    model, processor = task.load(data)
    data = task.prepare(data, model, processor)
    arguments = training_arguments(settings, task, data)
    notes.append(_note_on_bfloat16(model, arguments))
    told: tuple[str, ...] = tuple(filter(None, notes))
    for note in told:
        say(note)
    set_seed(seed)
    reads_data = any(technique.reads_data for technique in recipe.techniques)
    if any(technique.runs_model for technique in recipe.techniques):
        move_ahead(model, arguments)
    model = _attach(recipe, model, task.model_inputs(data, processor) if reads_data else None, processor, checkpoint)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.dtype == torch.float16:
            raise SettingError(
                f"{name} would train in float16, whose range is too small for updates; set model.dtype to float32 or "
                "bfloat16, or train.fp16 with a float32 model."
            )
    if any(parameter.dtype == torch.bfloat16 for parameter in trained.values()):
        told += (
            "Weights train in bfloat16, where an update below about 1/256 of a number is rounded away: with small "
            "learning rates, set model.dtype to float32 and train.bf16 to true.",
        )
        say(told[-1])
    try:
        with refusals_told():
            trainer = task.trainer(
                model=model,
                args=arguments,
                train_dataset=data["train"],
                eval_dataset=data.get("validation"),
                processing_class=processor,
                callbacks=list(callbacks),
                run_identity=identity(settings),
            )
            if settings.early_stopping_patience is not None:
                trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    except SettingError:
        Recipe.remove(model)
        raise
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return Ready(settings, task, data, attached_to(model), trainer, told)


def _try_machine(settings: RunSettings) -> str | None:
    """Refuse an optimizer, kernels or GPUs that do not run here, before anything is loaded.

    What to know of the optimizer, or None.
    """
    chosen = {name: settings.train[name] for name in ("optim", "optim_args") if name in settings.train}
    use_cpu = settings.train.get("use_cpu", not torch.cuda.is_available())
    arguments = TrainingArguments(output_dir=settings.output_dir, use_cpu=use_cpu, **chosen)
    if not settings.train.get("deepspeed"):  # which takes one GPU a process by itself
        refuse_copies(arguments)
    if settings.train.get("use_liger_kernel") and not is_liger_kernel_available():
        raise SettingError(
            "train.use_liger_kernel needs the package liger-kernel, which is not installed here: install it, or leave "
            "the setting out."
        )
    check_optimizer(arguments)
    return note_on(arguments)


def _note_on_bfloat16(model: torch.nn.Module, arguments: TrainingArguments) -> str | None:
    """What to know before training in bfloat16 on a processor that may have to emulate it; None elsewhere."""
    weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    if arguments.device.type != "cpu" or not (weights or arguments.bf16):
        return None
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    way = "set model.dtype to float32" if weights else "leave out train.bf16"
    return f"Without AVX-512, as here, bfloat16 can take many times as long as float32. To train in float32, {way}."


def measure(
    settings: RunSettings, *, module_depth: int | None = None, say: Callable[[str], None] = print
) -> MemoryReport:
    """Run two real steps and count the second with the ledger; nothing is written.

    module_depth: also say which modules keep what for backward, their names cut after this many parts.
    """
    memory = StepMemory(module_depth)
    _two_steps(settings, memory, say)
    assert memory.report is not None
    return memory.report


def explain_memory(
    settings: RunSettings, *, module_depth: int | None = None, say: Callable[[str], None] = print
) -> tuple[MemoryReport, KeptReport]:
    """As `measure`, and also why each tensor is kept for backward."""
    memory = StepMemory(module_depth, explain=True)
    _two_steps(settings, memory, say)
    assert memory.report is not None
    assert memory.kept is not None
    return memory.report, memory.kept


def _two_steps(settings: RunSettings, memory: StepMemory, say: Callable[[str], None]) -> None:
    with TemporaryDirectory() as folder:  # a trainer makes its output folder when it is made
        ready = prepare(shortened(settings, 2, folder), say=say, callbacks=[memory])
        try:
            ready.trainer.train()
        finally:
            memory.abandon()
    if memory.report is None:
        raise SettingError("measure needs a step of training data; lower the batch size or add rows.")


def shortened(settings: RunSettings, max_steps: int, folder: str) -> RunSettings:
    """The run cut to a few training steps, which leave nothing outside of `folder`: no reports, no hub repository."""
    short = {
        "max_steps": max_steps,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "push_to_hub": False,
    }
    train = {key: value for key, value in settings.train.items() if key != "load_best_model_at_end"} | short
    if train.get("lr_scheduler_type") in LOOKING_AT_QUALITY:  # of which nothing is seen in so few steps
        train = {key: value for key, value in train.items() if not key.startswith("lr_scheduler")}
    return settings.model_copy(update={"output_dir": folder, "train": train, "early_stopping_patience": None})


# What changes neither the weights nor the losses of a run.
NO_PART_OF_IDENTITY = ("logging", "log_", "report_to", "run_name", "save_total_limit", "disable_tqdm", "eval_on_start")


def identity(settings: RunSettings) -> dict[str, Any]:
    """What a checkpoint and a run must agree on for the one to go on with the other: all that shapes the numbers."""
    sources = (settings.model.name, settings.data.train, settings.data.validation)
    return {
        "task": settings.task,
        "recipe": settings.build_recipe().to_list(),
        **{f"model.{key}": value for key, value in settings.model.model_dump().items()},
        **{f"data.{key}": value for key, value in settings.data.model_dump(exclude={"test"}).items()},
        **{f"train.{k}": plain(v) for k, v in settings.train.items() if not k.startswith(NO_PART_OF_IDENTITY)},
        **{f"size of {s}": Path(s).stat().st_size for s in sources if s is not None and Path(s).is_file()},
    }


def training_arguments(settings: RunSettings, task: Task, data: DatasetDict) -> Any:
    """The trainer's arguments: the user's, over defaults that suit a run whose data has or lacks a validation split."""
    defaults: dict[str, Any] = {
        "logging_steps": 10,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    given = dict(settings.train)
    if given.get("metric_for_best_model", "") is None:  # `metric_for_best_model:` with nothing after it
        del given["metric_for_best_model"]
    if "validation" in data and settings.train.get("eval_strategy") != "no":
        strategy = settings.train.get("eval_strategy", "epoch")
        defaults |= {"eval_strategy": strategy, "save_strategy": strategy, "metric_for_best_model": task.metric}
        best = given.get("metric_for_best_model", task.metric).removeprefix("eval_")
        logged = [name for name in task.measures if name not in task.derived]
        techniques = settings.build_recipe().techniques
        if best not in logged and all(type(each).measured is Technique.measured for each in techniques):
            raise SettingError(
                f"train.metric_for_best_model must be one of {', '.join(logged)}, which {task.name} evaluates by: no "
                f"technique of the recipe measures {best!r}."
            )
        higher = task.higher_is_better if best == task.metric else not best.endswith("loss")
        defaults["greater_is_better"] = higher
        if given.get("lr_scheduler_type") in LOOKING_AT_QUALITY:  # which else take less for better, whatever it is
            mode = "max" if given.get("greater_is_better", higher) else "min"
            own = given.get("lr_scheduler_kwargs") or {}
            given["lr_scheduler_kwargs"] = {"mode": mode, **(json.loads(own) if isinstance(own, str) else own)}
        if settings.train.get("save_strategy", strategy) == strategy:
            defaults["load_best_model_at_end"] = True
            steps = settings.train.get("eval_steps") or settings.train.get("logging_steps", defaults["logging_steps"])
            defaults["save_steps"] = steps  # what was evaluated must be there to be the best
    elif "validation" in data and settings.early_stopping_patience is not None:
        raise SettingError("early_stopping_patience needs evaluations; set train.eval_strategy to epoch or steps.")
    elif "validation" in data:
        defaults["eval_strategy"] = "no"
    elif settings.train.get("eval_strategy", "no") != "no":
        raise SettingError("train.eval_strategy needs a validation split; name one as data.validation.")
    elif settings.early_stopping_patience is not None:
        raise SettingError("early_stopping_patience needs a validation split; name one as data.validation.")
    defaults |= task.argument_defaults()
    return settings.training_arguments(
        **{**defaults, **given, "output_dir": settings.output_dir, "eval_on_start": False}
    )


def evaluate(ready: Ready, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Quality on each held-out split, "validation" and "test", as far as the data has them."""
    quality = {}
    for split in ("validation", "test"):
        if split in ready.data:
            say(f"Evaluating on {split}")
            dataset = None if split == "validation" else ready.data[split]  # None: as the trainer has prepared it
            metrics = ready.trainer.evaluate(dataset, metric_key_prefix=split)
            quality[split] = ready.task.quality(metrics, split)
    return quality


@contextmanager
def _no_weights_cast(arguments: TrainingArguments) -> Iterator[None]:
    """Evaluate as during training: with these fields the trainer would cast the weights, and train what is left."""
    asked = {name: getattr(arguments, name) for name in ("bf16_full_eval", "fp16_full_eval")}
    try:
        for name in asked:
            setattr(arguments, name, False)
        yield
    finally:
        for name, value in asked.items():
            setattr(arguments, name, value)


def process_peak_bytes() -> int:
    """The largest resident size of this process so far; kilobytes on Linux, bytes on macOS, say the systems."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """What the run ran on."""
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
    found = {name: _version(name) for name in names}
    return {"shoestring": __version__, "python": platform.python_version(), **{k: v for k, v in found.items() if v}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def move_ahead(model: Any, arguments: TrainingArguments) -> None:
    """Move the model to the device where the trainer would move it later, so that calibration does not run on the CPU.

    Models that were placed when they were loaded, or will be cut into pieces, stay where they are.
    """
    is_placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
    if not (is_placed or arguments.fsdp or arguments.deepspeed or arguments.device.type == "cpu"):
        model.to(arguments.device)


def _attach(recipe: Recipe, model: Any, data: DatasetDict | None, processor: Any, saved: Path | None) -> Any:
    try:
        return Attached(recipe, model, data, processor, saved).model
    except (ValueError, TypeError, NotImplementedError) as error:
        raise SettingError(f"The recipe does not fit the model: {error}") from error


def _save_final(ready: Ready, folder: Path) -> Path:
    """Write the trained weights beside their place, then rename."""
    final, beside = folder / output.FINAL, folder / f".{output.FINAL}-in-progress"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        ready.trainer.save_model(str(beside))
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def _failure(error: Exception, folder: Path) -> Exception:
    """What to raise for an error in the middle of a run."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text
    if full or "PytorchStreamWriter failed" in text:  # all that torch.save says of a full disk
        return RunFailed(
            f"The disk is full: writing to {folder} failed. Checkpoints that are there are whole; make room and go on "
            "with --resume."
        )
    if isinstance(error, PermissionError):
        return RunFailed(
            f"No permission any more to write to {error.filename or folder}; go on with --resume once there is."
        )
    if out_of_memory(error):
        where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
        return RunFailed(
            f"The {where} ran out of memory ({text.splitlines()[0]}). Lower train.per_device_train_batch_size or "
            "data.max_length, or set train.gradient_checkpointing: true."
        )
    return error
