"""A recipe: an ordered, printable, loadable list of techniques, attached to a model and undone again."""

import copy
import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

import pydantic
import torch
import yaml
from peft import PeftConfig, PromptLearningConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from . import activations as _activations  # noqa: F401  registers its techniques
from . import adapters as _adapters  # noqa: F401  registers our methods with peft
from . import blocks as _blocks  # noqa: F401  registers its techniques
from . import objectives as _objectives  # noqa: F401  registers its techniques
from . import optimizers as _optimizers  # noqa: F401  registers its techniques
from . import pruning as _pruning  # noqa: F401  registers its methods
from . import recipes
from . import selection as _selection  # noqa: F401  registers its techniques
from .adapters.as_technique import FILLED_BY_PEFT, PeftTechnique, described_by_peft, peft_configs
from .errors import SettingError, did_you_mean
from .fakes import has_values
from .item_count import passes_item_count
from .modes import is_aside
from .running_statistics import RunningStatistics
from .technique import TECHNIQUES, MicroBatch, Moment, Phase, Technique, sum_of
from .whole_files import read_tensors, write_tensors, write_text

if typing.TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = [
    "Attached",
    "Moment",
    "Phase",
    "Recipe",
    "Technique",
    "TechniqueInfo",
    "attached_to",
    "known_techniques",
    "load",
]

RECIPE_FILE = "recipe.yaml"
TRAINED_FILE = "trained.safetensors"
STATE_FILE, STATE_TENSORS_FILE = "techniques.json", "techniques.safetensors"


class Recipe:
    """Techniques and peft configs to train a model with, sorted by phase.

    Raises SettingError if two of them cannot go together.

    >>> from peft import LoraConfig
    >>> recipe = Recipe(LoraConfig(r=4, target_modules=["q_proj"]))
    >>> recipe
    Recipe(lora(r=4, target_modules=['q_proj']))
    """

    def __init__(self, *techniques: Technique | PeftConfig):
        for technique in techniques:
            if not isinstance(technique, (Technique, PeftConfig)):
                raise SettingError(
                    f"A recipe takes techniques and peft configs, got {technique!r} of type {type(technique).__name__}."
                )
        wrapped = [PeftTechnique(t) if isinstance(t, PeftConfig) else t for t in techniques]
        self.techniques: tuple[Technique, ...] = tuple(sorted(wrapped, key=lambda t: t.phase))
        _refuse_conflicts(self.techniques)

    def __repr__(self) -> str:
        parts = (f"{t.name}({', '.join(f'{k}={v!r}' for k, v in t.settings().items())})" for t in self.techniques)
        return f"Recipe({', '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_list() == other.to_list()

    __hash__ = None  # type: ignore[assignment]

    @property
    def exact(self) -> bool:
        """Whether every technique after the adapters leaves gradients as they were."""
        return all(t.exact for t in self.techniques if t.phase > Phase.SELECTION)

    @property
    def brings_optimizer(self) -> bool:
        """Whether a technique makes the optimizer in place of the trainer."""
        return any(type(t).make_optimizer is not Technique.make_optimizer for t in self.techniques)

    def to_list(self) -> list[dict[str, dict[str, Any]]]:
        """As a run file's `recipe` has it: `[{"lora": {"r": 8}}, ...]`."""
        return [{t.name: t.settings()} for t in self.techniques]

    def to_yaml(self) -> str:
        """As YAML text."""
        return yaml.safe_dump(self.to_list(), sort_keys=False)

    @classmethod
    def from_list(cls, entries: Iterable[Any]) -> "Recipe":
        """Build from names and settings.

        entries: each a mapping of one technique name to its settings, or a bare name.

        Raises SettingError naming the entry, the setting and what is allowed.
        """
        if isinstance(entries, (str, dict)):
            raise SettingError(f"recipe must be a list such as [{{lora: {{r: 8}}}}], got {entries!r}.")
        return cls(*(_build(index, entry) for index, entry in enumerate(entries)))

    @classmethod
    def named(cls, name: str) -> "Recipe":
        """One that comes with the package; `shoestring methods` lists them.

        Raises SettingError if there is none of that name.
        """
        return cls.from_yaml(recipes.path_of(name).read_text(encoding="utf-8"))

    @classmethod
    def from_yaml(cls, text: str) -> "Recipe":
        """Build from YAML text that `to_yaml` wrote or a user did."""
        return cls.from_list(yaml.safe_load(text) or [])

    @contextmanager
    def __call__(
        self, model: nn.Module, data: Mapping[str, Any] | None = None, processor: Any = None
    ) -> Iterator[nn.Module]:
        """Attach for the length of a with-block; yields the model to train, and undoes everything after."""
        attached = Attached(self, model, data, processor)
        try:
            yield attached.model
        finally:
            attached.detach()

    def apply(self, model: nn.Module, data: Mapping[str, Any] | None = None, processor: Any = None) -> nn.Module:
        """Attach until `remove`; returns the model to train.

        data: for techniques that depend on it, all that will be run, by split, as rows of model inputs.
        processor: the tokenizer it was made with.
        """
        return Attached(self, model, data, processor).model

    @staticmethod
    def remove(model: nn.Module) -> nn.Module:
        """Undo `apply`; returns the base model as it was, but for base weights that were trained.

        Raises ValueError if no recipe is attached to `model`.
        """
        return attached_to(model).detach()


class Attached:
    """A recipe at work on one model: its own copies of the techniques, their events, what trains, saving and undo."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        data: Mapping[str, Any] | None = None,
        processor: Any = None,
        saved: Path | None = None,
    ):
        if find_attached(model) is not None:
            raise ValueError("This model has a recipe attached already; call Recipe.remove(model) first.")
        self.recipe = recipe
        self.base_model = model
        # copies, because peft fills configs in and techniques keep state: a recipe stays what the user wrote
        self.techniques: tuple[Technique, ...] = copy.deepcopy(recipe.techniques)
        self.accumulation_steps = 1
        self.add_losses_in_forward = True  # a trainer that adds them by itself switches it off
        self.model_loss_is_used = True  # False under a trainer that computes the loss elsewhere
        self._outputs: Any = None  # of the last forward in training, for a trainer that adds the losses by itself
        self._base_parameters = dict(model.named_parameters())
        self._statistics = RunningStatistics(model)
        self._undo = ExitStack()
        self._undo.callback(_Snapshot(model).restore)
        addresses = self._addresses()
        try:
            if data is not None:
                if not isinstance(data, Mapping):
                    raise SettingError(
                        f"data must be rows by split, such as {{'train': rows}}, got a {type(data).__name__}."
                    )
                for technique in self.techniques:
                    technique.see_data(data, processor)
            if saved is not None:
                for index, technique in enumerate(self.techniques):
                    technique.see_saved(self._folder(saved, index))
            for technique in self.techniques:
                model = self._undo.enter_context(technique.attach(model))
                if technique.phase == Phase.PRUNING:  # takes weights away for its time, and brings them back itself
                    addresses = self._addresses()
            for technique in self.techniques:
                technique.on_attached(model)
            self.model = model
            self._replaced = [name for name, now in self._addresses().items() if now != addresses[name]]
            # a plain function, so that a copy of the model does not copy the recipe at work on this one
            hook = model.register_forward_hook(lambda *seen: self._add_losses(*seen), with_kwargs=True)
            self._undo.callback(hook.remove)
        except BaseException:
            self._undo.close()
            raise
        _ATTACHED[model] = ref(self)

    def _addresses(self) -> dict[str, int]:
        return {name: p.data_ptr() if has_values(p) else id(p) for name, p in self._base_parameters.items()}

    def detach(self) -> nn.Module:
        """Undo everything; returns the base model as it was, but for base weights that were trained.

        Running statistics of batch norms go back with frozen norms, and stay with trained ones.

        Raises ValueError, with the adapters gone, if one of them had put other values in place of pretrained weights.
        """
        trained = {id(p) for p in self.trained_base().values()}
        self._undo.close()
        self._statistics.go_back(trained)
        _ATTACHED.pop(self.model, None)
        if self._replaced:
            raise ValueError(
                f"{self.recipe} replaced {len(self._replaced)} pretrained weights ({self._replaced[0]} first) when it "
                "was attached: the base model is not what it was. Load it again."
            )
        return self.base_model

    def event(self, name: str, moment: Moment) -> None:
        """Call one event, such as "on_step_end", of every technique in order."""
        for technique in self.techniques:
            getattr(technique, name)(moment)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameters with optimizer options of their own, over all techniques.

        Raises SettingError if two techniques claim one parameter, or all of a group that gives way.
        """
        groups = [group for technique in self.techniques for group in technique.parameter_groups(self.model)]
        groups = [{**group, "params": list(group["params"])} for group in groups]
        firm = {id(p) for group in groups if not group.get("gives_way") for p in group["params"]}
        seen: set[int] = set()
        for group in groups:
            wanted = group["params"]
            if group.pop("gives_way", False):
                group["params"] = [p for p in wanted if id(p) not in firm]
            lost = wanted and not group["params"]
            if lost or any(id(p) in seen for p in group["params"]):
                raise SettingError(
                    "Two techniques of the recipe give one parameter optimizer options; keep one of them."
                )
            seen.update(id(p) for p in group["params"])
        return groups

    @property
    def brings_optimizer(self) -> bool:
        """Whether a technique makes the optimizer in place of the trainer."""
        return self.recipe.brings_optimizer

    def make_optimizer(self, groups: list[dict[str, Any]], arguments: "TrainingArguments") -> Optimizer | None:
        """The optimizer that a technique makes of all that trains, in `groups`; None if none does.

        Raises SettingError if two techniques make one.
        """
        made = {t.name: t.make_optimizer(self.model, groups, arguments) for t in self.techniques}
        brought = {name: optimizer for name, optimizer in made.items() if optimizer is not None}
        if len(brought) > 1:
            raise SettingError(f"{' and '.join(brought)} each bring an optimizer of their own; keep one of them.")
        return next(iter(brought.values()), None)

    @property
    def takes_steps(self) -> bool:
        """Whether a technique makes forward and backward of a step in place of the trainer."""
        return any(type(t).training_step is not Technique.training_step for t in self.techniques)

    def training_step(self, batch: MicroBatch) -> Tensor | None:
        """The loss of the first technique that makes the step in place of the trainer; None if none does."""
        losses = (technique.training_step(batch) for technique in self.techniques)
        return next((loss for loss in losses if loss is not None), None)

    @property
    def acts_before_clipping(self) -> bool:
        """Whether a technique has something to do with gradients before they are clipped."""
        return any(technique.acts_before_clipping for technique in self.techniques)

    def idle_parameters(self) -> set[str]:
        """Names of trainable parameters that may go without a gradient."""
        return set().union(*(technique.idle_parameters(self.model) for technique in self.techniques))

    def trained_base(self) -> dict[str, nn.Parameter]:
        """The base model's own parameters that train, by their names in the base model."""
        moved = {id(p) for technique in self.techniques for p in technique.trained_without_gradient(self.model)}
        return {name: p for name, p in self._base_parameters.items() if p.requires_grad or id(p) in moved}

    def save(self, folder: str | Path, *, base_weights: bool = True) -> None:
        """Write the recipe, the adapters as peft does, what of the base changes, and the techniques' own state.

        folder: made if needed; files of the same name are replaced, and removed where there is nothing to write into
            them any more. Every file is written beside its place first.
        base_weights: False where the whole model is saved there too, so that what changes of the base is left out.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for index, technique in enumerate(self.techniques):
            technique.save(self.model, self._folder(folder, index))
        trained = {name: self._to_saved(p) for name, p in self.trained_base().items()} | self._statistics.now()
        _write_or_remove(folder / TRAINED_FILE, trained if base_weights else {})
        plain_state, tensors = _split({str(i): t.state_dict() for i, t in enumerate(self.techniques)})
        write_text(folder / STATE_FILE, json.dumps(plain_state, indent=1))
        _write_or_remove(folder / STATE_TENSORS_FILE, tensors)
        text = yaml.safe_dump(
            {
                "version": 1,
                "base_model": getattr(getattr(self.base_model, "config", None), "name_or_path", "") or None,
                "recipe": self.recipe.to_list(),
                "base_weights": len(trained) if base_weights else 0,
            },
            sort_keys=False,
        )
        write_text(folder / RECIPE_FILE, text)

    def restore(self, folder: str | Path) -> None:
        """Take over everything that `save` wrote, in place.

        Raises SettingError if the folder was saved by another recipe.
        """
        folder = Path(folder)
        saved = read_recipe(folder)
        if saved != self.recipe:
            raise SettingError(f"{folder} was saved by {saved}, but the recipe here is {self.recipe}.")
        for index, technique in enumerate(self.techniques):
            technique.restore(self.model, self._folder(folder, index))
        self._restore_shared_files(folder)

    def _to_saved(self, parameter: nn.Parameter) -> Tensor:
        value = parameter.detach()
        for technique in reversed(self.techniques):
            value = technique.to_saved(parameter, value)
        return value

    def _folder(self, folder: Path, index: int) -> Path:
        """Where technique `index` keeps its files: the folder itself for the only peft config, else one of its own."""
        adapters = [i for i, t in enumerate(self.techniques) if isinstance(t, PeftTechnique)]
        return folder if adapters in ([], [index]) else folder / f"{index}-{self.techniques[index].name}"

    def _restore_shared_files(self, folder: Path) -> None:
        if not self.techniques and (folder / "config.json").exists() and not (folder / TRAINED_FILE).exists():
            raise SettingError(
                f"{folder} holds a whole model, trained with an empty recipe: load it by from_pretrained()."
            )
        if (folder / TRAINED_FILE).exists() or _read_about(folder).get("base_weights"):
            tensors, _ = read_tensors(folder / TRAINED_FILE)
            statistics = self._statistics.now()
            for name, tensor in tensors.items():  # all are looked at before the first is copied
                if name not in statistics and name not in self._base_parameters:
                    raise SettingError(f"{folder / TRAINED_FILE} holds {name!r}, which the base model does not have.")
                now = statistics[name] if name in statistics else self._to_saved(self._base_parameters[name])
                if tensor.shape != now.shape:
                    raise SettingError(
                        f"{folder / TRAINED_FILE} holds {name} as {list(tensor.shape)}, which is {list(now.shape)} in "
                        "the base model here: it was trained on another model."
                    )
            self._statistics.put(tensors)
            with torch.no_grad():
                for name in tensors.keys() - statistics.keys():
                    parameter, tensor = self._base_parameters[name], tensors[name]
                    for technique in self.techniques:
                        tensor = technique.from_saved(parameter, tensor)
                    parameter.copy_(tensor)
        try:
            state = json.loads((folder / STATE_FILE).read_text())
        except (OSError, ValueError) as error:
            raise SettingError(f"{folder / STATE_FILE} cannot be read: {error}") from error
        tensors, _ = read_tensors(folder / STATE_TENSORS_FILE) if (folder / STATE_TENSORS_FILE).exists() else ({}, {})
        for index, own in _join(state, tensors).items():
            self.techniques[int(index)].load_state_dict(own)

    def added_loss(self, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The sum of what the techniques add to the loss of one forward in training; None if nothing."""
        terms = [term for t in self.techniques if (term := t.added_loss(self.model, batch, outputs)) is not None]
        return sum_of(terms) if terms else None

    def measured(self) -> dict[str, float]:
        """What the techniques measured in forwards in evaluation since the last call, by name."""
        return {name: value for technique in self.techniques for name, value in technique.measured().items()}

    def loss_share(self) -> float:
        """Of the items that a trainer counts in a micro-batch, the share that the last forward scored."""
        return math.prod(technique.loss_share for technique in self.techniques)

    @property
    def loss_in_model(self) -> bool:
        """Whether a technique acts where the model computes its loss, so that it should."""
        return any(technique.loss_in_model for technique in self.techniques)

    def take_outputs(self) -> Any:
        """What the last forward in training returned, once, where `add_losses_in_forward` is off; else None."""
        outputs, self._outputs = self._outputs, None
        return outputs

    def _add_losses(self, model: nn.Module, args: tuple, batch: dict[str, Any], outputs: Any) -> Any:
        in_step = torch.is_grad_enabled() or (self.takes_steps and not self.add_losses_in_forward)
        if model is not self.model or not (model.training and in_step) or is_aside():
            return None
        if not self.add_losses_in_forward:
            self._outputs = outputs
            return None
        if not self.model_loss_is_used and self.loss_share() != 1:
            raise ValueError(
                "The recipe scores only a share of the tokens, but this trainer computes the loss by itself and "
                "divides it by the number of all: train with shoestring.training.recipe_sft_trainer() instead."
            )
        if (added := self.added_loss(batch, outputs)) is None:
            return None
        if getattr(outputs, "loss", None) is None or not self.model_loss_is_used:
            raise ValueError(
                "The recipe adds to the loss, but this forward returned none that the trainer uses: pass labels to the "
                "model, or train with shoestring.training.RecipeTrainer or recipe_sft_trainer(), which add to any loss."
            )
        # given the number of items of the whole accumulated batch, a model's loss is a share of it: so is what is added
        is_share = batch.get("num_items_in_batch") is not None and passes_item_count(self.base_model)
        shares = self.accumulation_steps if is_share else 1
        outputs.loss = outputs.loss + added.to(outputs.loss) / shares
        return outputs


# An `Attached` lives as long as its model, whose hook holds it: a table that held it would keep the model, too.
_ATTACHED: WeakKeyDictionary[nn.Module, ref[Attached]] = WeakKeyDictionary()


def find_attached(model: nn.Module) -> Attached | None:
    """The recipe at work on `model` or on the model inside it; None if there is none."""
    return next((_ATTACHED[m]() for m in model.modules() if m in _ATTACHED), None)


def attached_to(model: nn.Module) -> Attached:
    """The recipe at work on `model`.

    Raises ValueError if there is none.
    """
    if (attached := find_attached(model)) is None:
        raise ValueError(f"No recipe is attached to this {type(model).__name__}; call Recipe.apply(model) first.")
    return attached


def load(
    base_model: nn.Module, folder: str | Path, data: Mapping[str, Any] | None = None, processor: Any = None
) -> nn.Module:
    """The base model with the recipe and the weights that `Attached.save` wrote; undo with `Recipe.remove`.

    data, processor: as for `Recipe.apply`; without them the model is ready for any data.

    Raises SettingError if the folder holds no recipe, or one that this version cannot read.
    """
    folder = Path(folder)
    attached = Attached(read_recipe(folder), base_model, {} if data is None else data, processor, saved=folder)
    try:
        attached.restore(folder)
    except BaseException:
        attached.detach()
        raise
    return attached.model


def read_recipe(folder: Path) -> Recipe:
    """The recipe saved in a folder.

    Raises SettingError if there is none, or one that this version cannot read.
    """
    return Recipe.from_list(_read_about(folder)["recipe"])


def _read_about(folder: Path) -> dict[str, Any]:
    """What `save` wrote of the whole."""
    try:
        data = yaml.safe_load((folder / RECIPE_FILE).read_text())
    except FileNotFoundError:
        raise SettingError(f"{folder} holds no {RECIPE_FILE}: it was not saved by a recipe.") from None
    if not isinstance(data, dict) or data.get("version") != 1 or "recipe" not in data:
        raise SettingError(f"{folder / RECIPE_FILE} is damaged or of another version of this package.")
    return data


@dataclass(frozen=True)
class TechniqueInfo:
    """What there is to say about a technique before it is built.

    name: how run files call it. kind: its folder in this package, or "adapters" or "prompts" for peft's own.
    origin: "shoestring" or "peft". summary: one line. doc: the whole text. exact: None where it changes the model.
    """

    name: str
    kind: str
    origin: str
    summary: str
    settings_class: type
    doc: str
    exact: bool | None


def known_techniques() -> dict[str, TechniqueInfo]:
    """Everything a recipe can name, by name."""
    known = {}
    classes: dict[str, Any] = {**peft_configs(), **TECHNIQUES}
    for name, cls in sorted(classes.items()):
        ours = cls.__module__.split(".")[0] == __name__.split(".")[0]
        module_doc = __import__(cls.__module__, fromlist=["_"]).__doc__ or ""
        doc = module_doc if ours else (cls.__doc__ or "")
        if issubclass(cls, PeftConfig):
            kind, exact = ("prompts" if issubclass(cls, PromptLearningConfig) else "adapters"), None
        else:
            kind, exact = (cls.__module__.split(".")[-2] if ours else cls.phase.name.lower()), cls.exact
        summary = "" if ours else described_by_peft(name)
        summary = summary or next((line.strip() for line in doc.splitlines() if line.strip()), "")
        known[name] = TechniqueInfo(name, kind, "shoestring" if ours else "peft", summary, cls, doc, exact)
    return known


def _build(index: int, entry: Any) -> Technique | PeftConfig:
    where = f"recipe[{index}]"
    if isinstance(entry, (Technique, PeftConfig)):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise SettingError(
            f"{where} must be one technique with its settings, such as {{lora: {{r: 8}}}}, got {entry!r}."
        )
    ((name, settings),) = entry.items()
    known: dict[str, Any] = {**peft_configs(), **TECHNIQUES}
    if name not in known:
        raise SettingError(f"{where}: unknown technique {name!r}. {did_you_mean(str(name), known)}")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise SettingError(f"{where}.{name} must be a mapping of settings, got {settings!r}.")
    cls = known[name]
    settings = _checked_settings(cls, settings, f"{where}.{name}")
    try:
        return cls(**settings)
    except (ValueError, TypeError) as error:
        raise SettingError(f"{where}.{name}: {error}") from error


def _checked_settings(cls: type, settings: dict[str, Any], where: str) -> dict[str, Any]:
    """The settings as the dataclass `cls` takes them: "8" as 8 and "no" as false where no text is wanted.

    Raises SettingError for a name that it does not know, a value of another type, and one that is missing.
    """
    if not is_dataclass(cls):
        raise TypeError(f"{cls.__name__} must be a dataclass, so that its settings can be checked.")
    own = {f.name: f for f in fields(cls) if f.init and f.name not in FILLED_BY_PEFT}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a type that is imported for checkers only
        hints = {}
    read = dict(settings)
    for key, value in settings.items():
        if key not in own:
            raise SettingError(f"{where}: unknown setting {key!r}. {did_you_mean(str(key), own)}")
        try:
            adapter = pydantic.TypeAdapter(hints.get(key, Any), config={"arbitrary_types_allowed": True})
            found = adapter.validate_python(value)
            if isinstance(value, str) and isinstance(found, int | float):
                read[key] = found
        except pydantic.ValidationError as error:
            wanted = getattr(hints[key], "__name__", None) or str(hints[key]).replace("typing.", "")
            raise SettingError(f"{where}.{key} must be {wanted}, got {value!r} ({error.errors()[0]['msg']}).") from None
        except (pydantic.errors.PydanticUserError, TypeError):
            pass  # an annotation pydantic cannot check: the class checks its own values
    required = [
        n for n, f in own.items() if f.default is MISSING and f.default_factory is MISSING and n not in settings
    ]
    if required:
        raise SettingError(f"{where} needs the setting {required[0]!r}.")
    return read


def _refuse_conflicts(techniques: tuple[Technique, ...]) -> None:
    for phase in Phase:
        here = [t for t in techniques if t.phase == phase]
        if len(here) > 1 and any(t.alone_in_phase for t in here):
            raise SettingError(
                f"{' and '.join(t.name for t in here)} cannot be combined: at most one of them may act in the "
                f"{phase.name.lower()} phase."
            )
    names = [t.name for t in techniques]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise SettingError(f"{twice[0]} stands twice in the recipe; give it once, with all its layers.")
    claimed: dict[str, str] = {}
    for technique in techniques:
        for claim in technique.claims:
            if claim in claimed:
                raise SettingError(f"{claimed[claim]} and {technique.name} cannot be combined: both act on {claim}.")
            claimed[claim] = technique.name
    for technique in techniques:
        if technique.needs and not any(t.phase in technique.needs for t in techniques if t is not technique):
            kinds = " or ".join(sorted(phase.name.lower() for phase in technique.needs))
            raise SettingError(f"{technique.name} needs a technique of the phase {kinds} beside it in the recipe.")
    for technique in techniques:
        for other in techniques:
            for what in sorted(technique.holds & other.varies):
                raise SettingError(
                    f"{technique.name} and {other.name} cannot be combined: {other.name} changes {what} from step to "
                    f"step, which {technique.name} cannot follow. Take out one of the two."
                )
    for technique in techniques:
        technique.check_recipe([other for other in techniques if other is not technique])


class _Snapshot:
    """What attaching may change of a model: its modules, hooks, modes, new attributes and which weights train."""

    TABLES = (
        "_modules",
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
    )

    def __init__(self, model: nn.Module):
        self.parameters = [(p, p.requires_grad) for p in model.parameters()]
        self.modules = [
            (
                m,
                m.training,
                set(m.__dict__),
                {name: dict(m.__dict__[name]) for name in self.TABLES if name in m.__dict__},
            )
            for m in model.modules()
        ]

    def restore(self) -> None:
        for module, training, names, tables in self.modules:
            module.training = training
            for name in set(module.__dict__) - names:
                del module.__dict__[name]
            for name, entries in tables.items():
                table = module.__dict__[name]  # changed in place: removal handles of hooks refer to it
                if list(table.items()) != list(entries.items()):
                    table.clear()
                    table.update(entries)
        for parameter, requires_grad in self.parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = None


def _write_or_remove(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, or remove what another recipe has left there."""
    if tensors:
        write_tensors(file, tensors)
    else:
        file.unlink(missing_ok=True)


def _split(state: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Nested state as plain data, with every tensor replaced by `{"tensor": key}`, and the tensors by key."""
    out: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        path = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[path] = value.detach().contiguous()
            out[key] = {"tensor": path}
        elif isinstance(value, dict):
            out[key], inner = _split(value, f"{path}/")
            tensors.update(inner)
        else:
            out[key] = value
    return out, tensors


def _join(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_split`."""

    def joined(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if set(value) == {"tensor"} and value["tensor"] in tensors:
            return tensors[value["tensor"]]
        return {key: joined(inner) for key, inner in value.items()}

    return {key: joined(value) for key, value in state.items()}
