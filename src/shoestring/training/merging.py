"""Merging: what a run learned put into the weights of its base, written as a model that transformers loads.

Method   The adapters of a run are attached to its base in the dtype of its products and merged there layer by layer,
         each in float32 for as long as that takes; so is what other techniques have learned beside weights, which
         `Technique.fold` gives. Where the base was packed, the values that its layers have once unpacked are put there
         first: they are what the adapters were trained on, and not those of the original files.
Error    The merged weight is rounded to the dtype, and, if packed again, to the levels of that form. Both is measured:
         each layer against the merged weight in float32, and the logits on rows of the run's training data against
         those of the model that was trained.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from ..adapters.base import is_quantised
from ..errors import SettingError
from ..modes import in_eval_mode
from ..precision import wide_dtype
from ..recipe import Attached, Recipe, attached_to, load, read_recipe
from ..technique import Phase
from ..whole_files import write_text
from . import output
from .data import load_splits
from .models import load_pretrained
from .quantised import keep_training_layout
from .settings import RunSettings
from .tasks import TASKS, Task

if TYPE_CHECKING:
    from datasets import DatasetDict

REPORT = "merge.json"
DTYPES = ("float32", "bfloat16", "float16")
OTHER_FUNCTION = 1e-2  # of the logits' norm; the same weights give the same logits but for rounding
PROBE_ROWS = 4


@dataclass(frozen=True)
class LayerError:
    """What became of one layer's weight: norms over the norm of the merged weight in float32.

    change: of what is added to the base. error: of what the written weight is off. Where error is as large as
    change, what the adapter learned is lost.
    """

    name: str
    change: float
    error: float


@dataclass(frozen=True)
class Merged:
    """What was written.

    quantization: the packed form, None for a model in `dtype`. layers: those to whose weights something was added.
    logits_error: norm of the difference between its logits and those of the trained model, over the norm of the latter.
    logits_change: the same between the base without the adapter and the trained model.
    agreement: share of positions at which it has the same largest logit as the trained model.
    """

    folder: str
    dtype: str
    quantization: str | None
    layers: tuple[LayerError, ...]
    logits_error: float
    logits_change: float
    agreement: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return asdict(self)


def merge(
    run: str | Path,
    folder: str | Path,
    *,
    requantise: bool = False,
    dtype: str | None = None,
    overrides: tuple[str, ...] = (),
    say: Callable[[str], None] = lambda text: None,
) -> Merged:
    """Merge what the finished run in the folder `run` learned into its base, and write the model to `folder`.

    requantise: pack the merged model again as the run packed its base, in place of writing it in a floating dtype.
    dtype: of the weights that are written, such as "float32"; by default that of the run's base.
    overrides: settings put over those of the run, such as where its data is now.

    Raises SettingError if there is no finished run, if its recipe cannot be merged, or if `folder` is there already.
    """
    run, folder = Path(run), Path(folder)
    settings = _settings_of(run, overrides)
    recipe = _checked(settings, requantise, dtype)
    if folder.exists():
        raise SettingError(f"--output {folder} is there already; name a new folder.")
    final = run / output.FINAL
    task = TASKS[settings.task](settings)
    task.set_up_recipe(recipe)
    say(f"Loading data {settings.data.train}")
    seed = int(settings.train.get("seed", 42))
    data = load_splits(settings.data, seed)
    say(f"Loading model {settings.model.name}")
    set_seed(seed)  # a new head that did not train starts as it did in the run
    model, processor = task.load(data)
    form = getattr(torch, dtype) if dtype else model.dtype
    probe = _probe(task, data, model, processor)
    whole = model
    if settings.model.quantization is not None or form != model.dtype:
        whole, _ = TASKS[settings.task](_in_full(settings, form)).load(data)
        take_over(whole, model)
    base, own = logits_of(model, probe), set(whole.state_dict())
    trained = _attached(model, final, settings)
    expected = logits_of(trained.model, probe)
    if whole is not model:
        del trained, model
        trained = _attached(whole, final, settings)
    say("Merging")
    layers = [*fold(trained), *merge_layers(trained.model)]
    merged = _without_wrappers(trained)
    _check_own(merged, own)
    beside = folder.with_name(f".{folder.name}-in-progress")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        merged.save_pretrained(beside)
        processor.save_pretrained(beside)
        say("Loading what is written, to compare")
        found = _logits_of_folder(beside, task, probe)
        _check_function(found, logits_of(merged, probe), recipe)
        if requantise:
            say(f"Packing as {settings.model.quantization}")
            packed = _packed_again(beside, task, settings, form)
            layers = [_error_of_packing(layer, merged, packed) for layer in layers]
            shutil.rmtree(beside)
            packed.save_pretrained(beside)
            processor.save_pretrained(beside)
            del packed
            found = _logits_of_folder(beside, task, probe)
        report = Merged(
            folder=str(folder),
            dtype=str(form).removeprefix("torch."),
            quantization=settings.model.quantization if requantise else None,
            layers=tuple(layers),
            logits_error=_share(found - expected, expected),
            logits_change=_share(expected - base, expected),
            agreement=float((found.argmax(-1) == expected.argmax(-1)).double().mean()),
        )
        write_text(beside / REPORT, json.dumps(report.to_dict(), indent=1))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return report


def merged_model(trained: Attached) -> Any:
    """The model with what the recipe learned merged into its weights; `trained` cannot be used after.

    Raises SettingError where something cannot be merged; what came before it in the model is merged then.
    """
    check_mergeable(trained.recipe)
    if any(map(is_quantised, trained.model.modules())):
        raise SettingError("its base is packed")
    for _ in (*fold(trained), *merge_layers(trained.model)):
        pass
    return _without_wrappers(trained)


def _without_wrappers(trained: Attached) -> Any:
    """The model once all its layers are merged."""
    if (wrapper := _outermost_adapters(trained.model)) is None:
        return trained.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A.* already merged|Already .* were merged")
        return wrapper.merge_and_unload()  # takes the wrappers away, and puts new heads in their places


def fold(trained: Attached) -> Iterator[LayerError]:
    """Add to weights what techniques have learned beside them, in float32 or wider; the techniques are off then.

    Raises SettingError for what no weight can hold.
    """
    for technique in reversed(trained.techniques):
        for name, parameter, change in technique.fold(trained.model):
            wide = wide_dtype(parameter.dtype)
            exact = parameter.detach().to(wide) + change.detach().to(wide)
            with torch.no_grad():
                parameter.copy_(exact)
            short = name.removeprefix("base_model.model.").rpartition(".")[0].removesuffix(".base_layer")
            yield LayerError(short, _share(change, exact), _share(parameter.detach() - exact, exact))


def merge_layers(model: nn.Module) -> Iterator[LayerError]:
    """Merge every adapter of `model` into its layer, in float32; the layer is in its own dtype again after.

    model: with adapters of peft or of this package on layers that are not packed. Their wrappers stay.

    Raises SettingError, naming the layer, for an adapter that cannot be merged.
    """
    wrapper = _outermost_adapters(model)
    if wrapper is not None and hasattr(wrapper.base_model, "_check_merge_allowed"):
        try:
            wrapper.base_model._check_merge_allowed()
        except ValueError as error:
            raise SettingError(f"This run cannot be merged: {error}") from error
    layers: list[tuple[str, Any]] = [
        (name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    for name, layer in layers:
        base = layer.get_base_layer()
        short = name.removeprefix("base_model.model.")
        dtype = next(base.parameters()).dtype
        before = getattr(base, "weight", None)
        before = None if before is None else before.detach().float()
        base.to(wide_dtype(dtype))
        try:
            layer.merge(safe_merge=True)
        except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
            raise SettingError(f"{short} cannot be merged: {error}") from error
        base = layer.get_base_layer()
        exact = base.weight.detach().clone()
        base.to(dtype)
        if before is not None:
            yield LayerError(short, _share(exact - before, exact), _share(base.weight.detach() - exact, exact))


def _outermost_adapters(model: nn.Module) -> Any:
    """The outermost `PeftModel` in a model, which an objective may have put something around; None without one."""
    return next((module for module in model.modules() if isinstance(module, PeftModel)), None)


def take_over(whole: nn.Module, model: nn.Module) -> None:
    """Give `whole` the weights of `model`, of the same class, of which some layers are packed: those unpacked."""
    quantisation = get_quantization_kwargs(model)
    backends = {name: resolve_quantization_backend(layer, **quantisation) for name, layer in model.named_modules()}
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            holder, _, own = name.rpartition(".")
            if own == "weight" and (backend := backends[holder]) is not None:
                values = backend.get_base_weight(model.get_submodule(holder))
                values = values.T if isinstance(whole.get_submodule(holder), Conv1D) else values
            else:
                values = model.get_parameter(name)
            parameter.copy_(values)


def logits_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of tokens that are no padding, one a row, in float32 and without dropout.

    Of a model without a head, its last hidden states.
    """
    device = next(model.parameters()).device
    with torch.no_grad(), in_eval_mode(model):
        outputs = model(**{n: v.to(device) if isinstance(v, Tensor) else v for n, v in inputs.items()})
    values = (outputs.logits if "logits" in outputs else outputs.last_hidden_state).float().cpu()
    if values.dim() == 3:
        return values[inputs["attention_mask"].bool()] if "attention_mask" in inputs else values.flatten(0, 1)
    return values


def _settings_of(run: Path, overrides: tuple[str, ...]) -> RunSettings:
    if not (run / output.SETTINGS).is_file() or not (run / output.FINAL).is_dir():
        raise SettingError(
            f"{run} holds no finished run ({output.SETTINGS} and {output.FINAL}/); give the output_dir of one."
        )
    return RunSettings.load(run / output.SETTINGS, overrides)


def _checked(settings: RunSettings, requantise: bool, dtype: str | None) -> Recipe:
    """The recipe, if it can be merged at all.

    Raises SettingError.
    """
    recipe = settings.build_recipe()
    if dtype not in (None, *DTYPES):
        raise SettingError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    if requantise and dtype is not None:
        raise SettingError("--requantise writes packed weights and --dtype others; give one of them.")
    if requantise and settings.model.quantization is None:
        raise SettingError("--requantise packs as the run's base was packed, and this run has no model.quantization.")
    check_mergeable(recipe)
    return recipe


def check_mergeable(recipe: Recipe) -> None:
    """Refuse recipes of which not all that they learn are changes of weights.

    Raises SettingError.
    """
    for technique in recipe.techniques:
        if technique.phase in (Phase.PROMPT, Phase.PRUNING):
            what = "learned vectors in the sequence" if technique.phase == Phase.PROMPT else "weights of its own"
            raise SettingError(
                f"{technique.name} cannot be merged: it puts {what} in the model, which no model of transformers "
                "holds. Load the run with shoestring.recipe.load() instead."
            )
    adapters = [technique.name for technique in recipe.techniques if technique.phase == Phase.ADAPTER]
    if len(adapters) > 1:
        raise SettingError(f"Recipes of one adapter can be merged; this run has {' and '.join(adapters)}.")


def _in_full(settings: RunSettings, dtype: torch.dtype) -> RunSettings:
    plain = {"quantization": None, "dtype": str(dtype).removeprefix("torch.")}
    return settings.model_copy(update={"model": settings.model.model_copy(update=plain)})


def _attached(model: Any, final: Path, settings: RunSettings) -> Attached:
    if getattr(model.config, "quantization_config", None) is not None and settings.model.quantization is None:
        raise SettingError(
            f"The files of {settings.model.name} are packed; merge into a base that a run packs itself, with "
            "model.quantization."
        )
    try:
        if not read_recipe(final).techniques:  # the folder is a whole model
            return attached_to(Recipe().apply(type(model).from_pretrained(final, dtype=model.dtype)))
        return attached_to(load(model, final))
    except (OSError, SafetensorError) as error:
        raise SettingError(f"{final} cannot be read: {error}") from error


def _probe(task: Task, data: DatasetDict, model: Any, processor: Any) -> dict[str, Any]:
    """Rows of the training data as one batch."""
    few = type(data)({"train": data["train"].select(range(min(PROBE_ROWS, len(data["train"]))))})
    return task.probe(few, model, processor)


def _logits_of_folder(folder: Path, task: Task, probe: dict[str, Any]) -> Tensor:
    written = task.auto_class().from_pretrained(folder)
    keep_training_layout(written)
    return logits_of(written, probe)


def _check_function(found: Tensor, expected: Tensor, recipe: Recipe) -> None:
    """Refuse recipes of which more than weights is left at inference, such as another order of blocks.

    expected: from the merged weights with the recipe's other techniques still at work.
    """
    if _share(found - expected, expected) > OTHER_FUNCTION:
        others = [technique.name for technique in recipe.techniques if technique.phase != Phase.ADAPTER]
        raise SettingError(
            f"This run cannot be merged: {' or '.join(others) or 'its recipe'} changes what the model computes beside "
            "its weights. Load the run with shoestring.recipe.load() instead."
        )


def _check_own(merged: nn.Module, own: set[str]) -> None:
    """Refuse recipes that leave tensors in the model that its class has no place for, such as further biases.

    own: the names of those that it had before the recipe.
    """
    if added := sorted(merged.state_dict().keys() - own):
        raise SettingError(
            f"This run cannot be merged: its recipe has added {added[0]} ({len(added)} in all) to "
            f"{type(merged).__name__}, which has no place for it in its files. Load the run with "
            "shoestring.recipe.load() instead."
        )


def _packed_again(folder: Path, task: Task, settings: RunSettings, dtype: torch.dtype) -> Any:
    again = {"name": str(folder.resolve()), "dtype": str(dtype).removeprefix("torch."), "revision": None}
    return load_pretrained(settings.model.model_copy(update=again), task.auto_class())[0]


def _error_of_packing(layer: LayerError, merged: nn.Module, packed: nn.Module) -> LayerError:
    """The same layer with the error of its packed weight, where it is packed."""
    here, there = packed.get_submodule(layer.name), merged.get_submodule(layer.name)
    if (backend := resolve_quantization_backend(here, **get_quantization_kwargs(packed))) is None:
        return layer
    wanted = there.get_parameter("weight").detach().float()
    values = backend.get_base_weight(here).float().to(wanted.device)  # some are packed on the GPU, wherever they were
    values = values.T if isinstance(there, Conv1D) else values
    return LayerError(layer.name, layer.change, _share(values - wanted, wanted))


def _share(part: Tensor, of: Tensor) -> float:
    return float(part.float().norm() / of.norm()) if of.norm() > 0 else 0.0
