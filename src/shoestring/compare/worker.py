"""One run of a suite, in a process of its own: training as `shoestring train` does it, and what else is measured."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from ..errors import RunFailed, SettingError
from ..quiet import quiet_libraries
from ..recipe import Recipe
from ..technique import plain
from ..training.marked_yaml import dump_yaml
from ..training.observe import StepTimes
from ..training.report import Report
from ..training.run import Ready, prepare, shortened, train, versions
from ..training.settings import RunSettings
from .extras import Extra
from .results import SCHEMA_VERSION, MetaInfo, Own, Result, RunInfo, TrainInfo, finite
from .suite import Budget, Case

TRIAL_STEPS, WARM_UP = 8, 3  # to time steps by, for a budget in seconds
Tell = Callable[[tuple[Any, ...]], None]


@dataclass(frozen=True)
class Order:
    """What a process is to do.

    quality, target: of the suite. jobs: how many such processes run at a time. fits_only: only prepare the runs, and
    say of each what is wrong with it.
    """

    cases: tuple[Case, ...]
    budget: Budget | None
    extras: tuple[Extra, ...]
    folder: str
    split: str | None
    quality: str
    target: float | None
    keep_weights: bool
    jobs: int = 1
    threads: int | None = None
    fits_only: bool = False


def work(order: Order, connection: Connection) -> None:
    """The whole of a process. Sends ("stage", text), ("step", number, of), and at the end of each run ("done", case,
    result as JSON values) or ("failed", case, reason); of runs that fit ("fits", case, notes).
    """
    if hasattr(os, "setsid"):
        os.setsid()  # ctrl-C is for the one who started this process, and who ends it
    log = Path(order.folder, f"{order.cases[0].file}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:  # warnings and progress bars of libraries, which would break into a live table
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    if order.threads is not None:
        torch.set_num_threads(order.threads)
    for case in order.cases:
        try:
            if order.fits_only:
                connection.send(("fits", case.digest, check(case, order)))
            else:
                connection.send(("done", case.digest, run_case(case, order, connection.send).to_dict()))
        except (SettingError, RunFailed) as error:
            connection.send(("failed", case.digest, str(error)))
        except Exception as error:
            traceback.print_exc()
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            text = (str(error).strip().splitlines() or ["no message"])[0]
            connection.send(("failed", case.digest, f"unexpected {type(error).__name__}: {text} ({place})"))
    connection.close()


def _end_with_parent() -> None:
    """A run whose starter was killed would go on for nobody."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check(case: Case, order: Order) -> tuple[str, ...]:
    """Load data and model and attach the recipe, as the run will, and give what to know of it; nothing is trained.

    Raises SettingError for what does not fit together.
    """
    folder = Path(order.folder) / f".{case.file}"
    try:
        fields = {**case.settings.train, "push_to_hub": False}  # or the trainer makes the repository
        ready = prepare(case.settings.model_copy(update={"output_dir": str(folder), "train": fields}))
        split = scored_split(ready.data, order.split)
        if split is None and order.quality in ready.task.measures:
            raise SettingError(
                f"there are no held-out rows to measure {order.quality} on; name some as data.test or data.validation, "
                "or set data.validation_share."
            )
        if order.target is not None and str(ready.trainer.args.eval_strategy.value) == "no":
            raise SettingError(
                "target needs evaluations on the way, and there is no validation data; name some as data.validation, "
                "or set data.validation_share."
            )
        for extra in order.extras:
            extra.split = split
            extra.before(ready)
        _steps_of(order.budget, ready, case.settings)
        with suppress(ValueError):  # peft replaces weights for some adapters
            Recipe.remove(ready.attached.model)
        return ready.notes
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run_case(case: Case, order: Order, tell: Tell) -> Result:
    """Train and measure one run.

    Raises SettingError and RunFailed as `train` does.
    """
    began, created = time.monotonic(), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = case.settings.model_copy(update={"output_dir": str(Path(order.folder) / case.file)})
    seconds_a_step = _seconds_a_step(settings) if order.budget is not None and order.budget.seconds else None
    watch = _Watch(tell)
    prepared: list[Ready] = []

    def on_ready(ready: Ready) -> None:
        prepared.append(ready)
        steps = _steps_of(order.budget, ready, settings, seconds_a_step=seconds_a_step)
        if steps is not None:
            ready.trainer.args.max_steps = steps
        for extra in order.extras:
            tell(("stage", f"{extra.name} before"))
            extra.split = scored_split(ready.data, order.split)
            with ready.trainer.accelerator.autocast():
                extra.before(ready)
        watch.follow(ready)

    report = train(
        settings, overwrite=True, callbacks=[watch], say=lambda text: tell(("stage", text)), on_ready=on_ready
    )
    (ready,) = prepared
    split = scored_split(report.quality, order.split)
    values = _values(report, ready, watch, split)
    notes: list[str] = []
    for extra in sorted(order.extras, key=lambda extra: extra.alters_model):
        tell(("stage", extra.name))
        try:
            # a merged model's forward is not the one that training has wrapped
            with ready.trainer.accelerator.autocast():
                values |= finite(extra.after(ready).items())
        except Exception as error:  # a finished training is worth more than one more figure
            traceback.print_exc()
            notes.append(f"{extra.name} could not be measured: {error}")
        notes += extra.notes
    result = _result(case, settings, report, ready, watch, values, split or "", notes)
    result.meta_info.system_info |= {"threads": str(torch.get_num_threads()), "runs at a time": str(order.jobs)}
    result.run_info.created_at, result.run_info.total_time = created, time.monotonic() - began
    if not order.keep_weights:
        shutil.rmtree(settings.output_dir, ignore_errors=True)
    return result


def _steps_of(
    budget: Budget | None, ready: Ready, settings: RunSettings, *, seconds_a_step: float | None = None
) -> int | None:
    """Optimizer steps for a budget in tokens, or in seconds where it is known what a step takes; None otherwise."""
    if budget is None or budget.steps is not None:
        return None
    if budget.seconds is not None:
        return max(1, round(budget.seconds / seconds_a_step)) if seconds_a_step else None
    rows: Any = ready.trainer.train_dataset
    if "input_ids" not in (rows.column_names or ()):
        raise SettingError(f"budget.tokens: the training data of {settings.task} has no tokens; give steps or seconds.")
    mean = statistics.fmean(map(len, rows["input_ids"]))
    arguments = ready.trainer.args
    a_step = mean * arguments.train_batch_size * arguments.gradient_accumulation_steps
    return max(1, round((budget.tokens or 0) / a_step))


def _seconds_a_step(settings: RunSettings) -> float:
    """Median seconds of a few steps, in a process of their own, whose memory is not the run's.

    Raises SettingError and RunFailed as `train` does, and RunFailed if the process is ended.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_trial_process) as pool:
        try:
            return pool.submit(_trial, settings, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise RunFailed(
                "The steps that a budget of seconds is counted by were cut off; the system may have run out of memory."
            ) from None


def _trial_process() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()


def _trial(settings: RunSettings, threads: int) -> float:
    times = _Seconds()
    folder = f"{settings.output_dir}-trial"
    torch.set_num_threads(threads)
    try:
        ready = prepare(shortened(settings, TRIAL_STEPS, folder), callbacks=[times])
        ready.trainer.train()
        with suppress(ValueError):
            Recipe.remove(ready.attached.model)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return statistics.median(times.seconds[WARM_UP:])


class _Seconds(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


class _Watch(TrainerCallback):
    """What happens in a run: steps, evaluations on the way, scores of the last one, and memory of the accelerator.

    scores: of the last evaluation of each split. weights, scored: where a score is of a batch, the rows in each, and a
    digest of their tokens and labels.
    """

    def __init__(self, tell: Tell):
        self.curve: list[tuple[int, float, float]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.scores: dict[str, list[float]] = {}
        self.weights: dict[str, list[int]] = {}
        self.scored: dict[str, Any] = {}
        self.reserved: list[int] = []
        self._tell = tell
        self._times: StepTimes | None = None
        self._metric = ""

    def follow(self, ready: Ready) -> None:
        """Note what the trainer's evaluations give row by row, by the split they are of."""
        trainer: Any = ready.trainer
        self._times = next(c for c in trainer.callback_handler.callbacks if isinstance(c, StepTimes))
        self._metric = f"eval_{ready.task.metric}"
        evaluate, step, split = trainer.evaluate, trainer.prediction_step, ["eval"]

        def evaluating(*args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
            split[0] = metric_key_prefix
            self.scores[metric_key_prefix], self.weights[metric_key_prefix] = [], []
            self.scored[metric_key_prefix] = hashlib.sha256()
            return evaluate(*args, metric_key_prefix=metric_key_prefix, **kwargs)

        def predicting(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss, predictions, labels = step(model, inputs, *args, **kwargs)
            found = ready.task.scores(loss, predictions, labels)
            self.scores[split[0]] += found
            if not ready.task.scores_rows:
                self.weights[split[0]] += [find_batch_size(inputs) or 1] * len(found)
                self.scored[split[0]].update(_tokens_in(inputs))
            return loss, predictions, labels

        trainer.evaluate, trainer.prediction_step = evaluating, predicting

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of the step."""
        self._tell(("step", state.global_step, state.max_steps))
        if torch.cuda.is_available():
            self.reserved.append(torch.cuda.memory_reserved())

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keep a point of the curve."""
        if metrics is not None and self._metric in metrics and self._times is not None:
            seconds = self.all_seconds(state.global_step)
            if seconds is not None:
                self.curve.append((state.global_step, seconds, float(metrics[self._metric])))
            self.evaluations.append({"step": state.global_step, "train time": seconds, **metrics})

    @property
    def seconds(self) -> list[float]:
        """Of each step, but for those that were counted by the ledger."""
        return self._times.seconds if self._times is not None else []

    def all_seconds(self, steps: int) -> float | None:
        """Of all steps, where those that the ledger slowed count as a mean one."""
        return steps * statistics.fmean(self.seconds) if self.seconds else None


def scored_split(splits: Any, wanted: str | None) -> str | None:
    """The split that runs are compared on: "test" where there is one, as "validation" may have chosen the weights.

    Raises SettingError if another one is wanted that is not there.
    """
    if wanted is not None and wanted not in splits:
        raise SettingError(f"split: this run has no {wanted} data; name it as data.{wanted}.")
    return wanted or next((name for name in ("test", "validation") if name in splits), None)


def _values(report: Report, ready: Ready, watch: _Watch, split: str | None) -> dict[str, float]:
    """The figures of every run."""
    memory = _most_memory(report)
    largest = memory.get("largest", {})
    qualities = report.quality.get(split or "", {})
    cuda = torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None
    values = finite(
        {
            **qualities,
            "trained_parameters": report.trained_parameters,
            "trained_share": report.trained_parameters / report.total_parameters,
            "checkpoint_bytes": _weights_in(Path(report.saved["weights"])) if "weights" in report.saved else None,
            "peak_bytes": memory.get("peak_bytes"),
            "last_step_bytes": (report.memory_at_end or {}).get("peak_bytes"),
            "kept_bytes": memory.get("saved_bytes"),
            "weights_bytes": largest.get("weights"),
            "gradients_bytes": largest.get("gradients"),
            "optimizer_bytes": largest.get("optimizer_state"),
            "process_peak_bytes": report.process_peak_bytes,
            "gpu_peak_bytes": cuda,
            "step_seconds": report.step_seconds,
            "step_seconds_p90": _percentile(watch.seconds, 0.9),
            "train_seconds": report.train_seconds,
            "all_steps_seconds": watch.all_seconds(report.steps),
            "tokens_a_second": report.tokens_a_second,
            "trained_in_backbone": _trained_in_backbone(ready),
        }.items()
    )
    return values


def _most_memory(report: Report) -> dict[str, Any]:
    """That of the steps looked at which took most."""
    found = [memory for memory in (report.memory, report.memory_at_end) if memory is not None]
    return max(found, key=lambda memory: memory["peak_bytes"], default={})


def _percentile(values: list[float], share: float) -> float | None:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def _weights_in(folder: Path) -> int:
    """Bytes of the tensors' files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def _trained_in_backbone(ready: Ready) -> int:
    """Trained numbers but for those of the head, as V-PETL Bench counts them."""
    base: Any = ready.attached.base_model
    inside = {id(p) for p in getattr(base, "base_model", base).parameters()}
    head = {id(p) for p in base.parameters()} - inside
    return sum(p.numel() for p in ready.attached.model.parameters() if p.requires_grad and id(p) not in head)


def _tokens_in(batch: Mapping[str, Any]) -> bytes:
    """What the loss of a batch depends on beside the model and the rows: their number, tokens cut, labels left out."""
    held = [batch[name].cpu() for name in ("input_ids", "labels") if name in batch]
    texts = [repr(tuple(tensor.shape)).encode() + tensor.long().numpy().tobytes() for tensor in held]
    return b"".join(texts) or repr(find_batch_size(batch)).encode()


def _rows_in_short(ready: Ready, split: str) -> str:
    """A digest of the rows of a split; of pictures and sounds in it what they are, and not where their files lie."""
    if split not in ready.data:
        return ""
    digest = hashlib.sha256()
    for batch in ready.data[split].with_format("arrow").iter(1000):
        for name in sorted(batch.column_names):
            values = batch[name].to_pylist()
            held = [value["bytes"] if isinstance(value, dict) and value.get("bytes") else value for value in values]
            digest.update(repr((name, held)).encode())
    return digest.hexdigest()[:16]


def _result(
    case: Case,
    settings: RunSettings,
    report: Report,
    ready: Ready,
    watch: _Watch,
    values: dict[str, float],
    split: str,
    notes: list[str],
) -> Result:
    """The run in the fields of its file."""
    scores, weights = watch.scores.get(split, []), watch.weights.get(split, [])
    own = Own(
        schema_version=SCHEMA_VERSION,
        task=settings.task,
        name=case.name,
        seed=case.seed,
        digest=case.digest,
        of_all_seeds=case.of_all_seeds,
        run_file=_as_run(case.settings, f"runs/{case.file}", ready.trainer.args.max_steps).to_yaml(),
        recipe=dump_yaml(case.settings.recipe),
        values=values,
        quality={part: finite(found.items()) for part, found in report.quality.items()},
        memory=_most_memory(report).get("at_peak", {}),
        losses=[(step, loss) for step, loss in report.losses if math.isfinite(loss)],
        curve=[point for point in watch.curve if math.isfinite(point[2])],
        scores=scores if all(map(math.isfinite, scores)) else [],
        weights=weights if len(set(weights)) > 1 else [],
        rows=_rows_in_short(ready, split),
        batches=watch.scored[split].hexdigest()[:16] if weights else "",
        notes=notes,
    )
    last = report.losses[-1][1] if report.losses else None
    final: dict[str, float | None] = {
        f"{part} {name}": value for part, found in report.quality.items() for name, value in found.items()
    }
    ways = [_as_peft(entry, ready.task.metric) for entry in watch.evaluations]
    final |= {"step": report.steps, "train loss": last, "train samples": report.steps * _rows_a_step(ready)}
    if report.tokens_a_second and watch.seconds:
        final["train total tokens"] = round(report.tokens_a_second * values["all_steps_seconds"])
    if "forgetting" in values:
        final["forgetting"] = values["forgetting"]
    metrics = [{key: _finite_or_none(value) for key, value in entry.items()} for entry in (*ways, final)]
    return Result(
        run_info=RunInfo(
            created_at="",
            total_time=0.0,
            experiment_name=f"{case.name}/seed{case.seed}",
            train_config=_train_config(settings, ready),
            peft_config=_peft_config(ready, settings.model.name),
        ),
        train_info=TrainInfo(
            accelerator_memory_reserved_avg=round(statistics.fmean(watch.reserved)) if watch.reserved else 0,
            accelerator_memory_max=int(values.get("gpu_peak_bytes", 0)),
            accelerator_memory_reserved_99th=int(_percentile([*map(float, watch.reserved)], 0.99) or 0),
            train_time=values.get("all_steps_seconds", 0.0),
            file_size=int(values.get("checkpoint_bytes", 0)),
            num_trainable_params=report.trained_parameters,
            num_total_params=report.total_parameters,
            metrics=metrics,
        ),
        meta_info=MetaInfo(
            model_info={"name": settings.model.name, "revision": settings.model.revision},
            dataset_info={
                "train": settings.data.train,
                "validation": settings.data.validation,
                "test": settings.data.test,
            },
            package_info=packages(),
            system_info=machine(),
            pytorch_info=torch.__config__.show(),
        ),
        shoestring=own,
    )


def _finite_or_none(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def _as_run(settings: RunSettings, output_dir: str, max_steps: int) -> RunSettings:
    """The run for `shoestring train`: with the steps that a budget in tokens or seconds has come to."""
    train = {**settings.train, "max_steps": max_steps} if max_steps > 0 else settings.train
    return settings.model_copy(update={"output_dir": output_dir, "train": train})


def _as_peft(entry: dict[str, Any], metric: str) -> dict[str, Any]:
    """An evaluation on the way, in the words of peft's method comparison."""
    return {
        "step": entry["step"],
        f"valid {metric}": entry.get(f"eval_{metric}"),
        "train time": entry["train time"],
        "eval time": entry.get("eval_runtime"),
    }


def _rows_a_step(ready: Ready) -> int:
    arguments = ready.trainer.args
    return int(arguments.train_batch_size * arguments.gradient_accumulation_steps)


def _train_config(settings: RunSettings, ready: Ready) -> dict[str, Any]:
    """The run in the words of peft's method comparison."""
    arguments: Any = ready.trainer.args
    return {
        "model_id": settings.model.name,
        "dtype": settings.model.dtype,
        "max_seq_length": settings.data.max_length,
        "batch_size": arguments.per_device_train_batch_size,
        "batch_size_eval": arguments.per_device_eval_batch_size,
        "max_steps": ready.trainer.state.max_steps,
        "eval_steps": arguments.eval_steps,
        "compile": arguments.torch_compile,
        "use_gc": arguments.gradient_checkpointing,
        "seed": arguments.seed,
        "grad_norm_clip": arguments.max_grad_norm,
        "optimizer_type": str(getattr(arguments.optim, "value", arguments.optim)),
        "optimizer_kwargs": {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay},
        "lr_scheduler": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "use_amp": arguments.bf16 or arguments.fp16,
        "attn_implementation": settings.model.attn_implementation,
    }


def _peft_config(ready: Ready, model: str) -> dict[str, Any] | None:
    """Of the first adapter, where one is in the recipe. model: as the run file names it, not where it lies."""
    configs = getattr(ready.attached.model, "peft_config", None)
    if not configs:
        return None
    return {**plain(next(iter(configs.values())).to_dict()), "base_model_name_or_path": model}


def packages() -> dict[str, str | None]:
    """Versions, and the commits of what was installed from a repository, in the words of peft's method comparison."""
    found: dict[str, str | None] = {}
    for name, version in versions().items():
        found |= {f"{name}-version": version, f"{name}-commit-hash": None if name == "python" else _commit(name)}
    return found | {"torch-commit-hash": str(torch.version.git_version)}


def _commit(package: str) -> str | None:
    """Of a package that was installed from a repository, or from a checkout that its code still stands in."""
    try:
        origin = json.loads(metadata.distribution(package).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    if "vcs_info" in origin:
        return str(origin["vcs_info"].get("commit_id"))
    folder = url2pathname(urlparse(origin.get("url", "")).path)
    spec = find_spec(package)
    if (
        spec is None
        or not origin.get("dir_info", {}).get("editable")
        or not Path(spec.origin or "").is_relative_to(folder)
    ):
        return None
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return None


def machine() -> dict[str, str]:
    """What the run ran on, in the words of peft's method comparison."""
    found = platform.uname()
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A"
    return {
        "system": found.system,
        "release": found.release,
        "version": found.version,
        "machine": found.machine,
        "processor": _processor() or found.processor,
        "cores": str(os.cpu_count()),
        "accelerator": accelerator,
    }


def _processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
