"""A peft config, peft's own or ours, as a technique of a recipe."""

import copy
import functools
import json
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, match_target_against_key
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers, get_model_conversion_mapping
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import SettingError, did_you_mean
from ..technique import NUMBERS_HELD, WHICH_TRAIN, Events, Moment, Phase, Technique, settings_of, sum_of
from ..whole_files import check_names, read_tensors, write_tensors
from ..wrappers import innermost
from .placement import task_head

# What peft fills in itself, and what names the method rather than a setting of it.
FILLED_BY_PEFT = frozenset(
    {"peft_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"}
)

PROMPT_ENCODER_FILE = "prompt_encoder.safetensors"


class PeftTechnique(Technique):
    """One peft config in a recipe. Its events are the config's own where it has any."""

    phase = Phase.ADAPTER
    wrapped: PeftModel

    def __init__(self, config: PeftConfig):
        self.config = config
        self.name = method_name(config.peft_type)  # type: ignore[misc]
        self.adapter_name = "default"
        self._names_head = False
        tuners: dict[Any, Any] = PEFT_TYPE_TO_TUNER_MAPPING
        if hasattr(tuners.get(config.peft_type), "update_and_allocate") and getattr(config, "use_asa", True):
            # a budget of ranks masks numbers; another freezes what it leaves out
            self.varies = frozenset({NUMBERS_HELD if hasattr(config, "target_r") else WHICH_TRAIN})  # type: ignore[misc]
        if config.is_prompt_learning:
            self.phase = Phase.PROMPT  # type: ignore[misc]
            self.alone_in_phase = True  # type: ignore[misc]

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[PeftModel]:
        """Wrap the model in a `PeftModel`; around one that is there already, under an adapter name of its own.

        Raises SettingError if target_modules names a module that the model does not have, or no head is found that
        it should train.
        """
        _check_targets(self.config, model)
        if self._names_head:
            self._name_head(model)
        stacked = isinstance(model, PeftModel)
        # a word that is part of no method's prefix, since peft tells adapters by it in the names of weights
        self.adapter_name = f"nested{len(model.peft_config)}" if isinstance(model, PeftModel) else "default"
        trained = [p for p in model.parameters() if p.requires_grad] if stacked else []
        switches = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, switches)]
        with warnings.catch_warnings():
            if stacked:  # peft warns of a second adapter, which is what the recipe asks for
                warnings.filterwarnings("ignore", message=".*(second time|Already found a `peft_config`).*")
            self.wrapped = get_peft_model(model, self.config, adapter_name=self.adapter_name)
        if (encoder := self._prompt_encoder) is not None:  # trainers of transformers load it before `restore` does
            encoder._load_adapter_state_dict = functools.partial(_load_what_fits, encoder)
        if self._orthogonality:  # peft adds it to a loss that the model gives, in evaluation too; we, to any
            tuner: Any = self.wrapped.base_model
            tuner.forward = functools.partial(BaseTuner.forward, tuner)
        if isinstance(model, PeftModel):  # TRL and others look there for the model inside
            self.wrapped.get_base_model = model.get_base_model  # type: ignore[method-assign]
        for parameter in trained:  # peft would leave only its newest adapter trained and active
            parameter.requires_grad_(True)
        for module, names in active:
            module._active_adapter = names
            if isinstance(module, BaseTunerLayer) and self.adapter_name in module._get_available_adapters():
                module._active_adapter = [*module.active_adapters, self.adapter_name]  # it was put beside those there
        try:
            yield self.wrapped
        finally:
            # when Python ends there is nothing to undo, and peft's progress bar would wait for its thread for ever
            if isinstance(self.wrapped.base_model, BaseTuner) and not stacked and not sys.is_finalizing():
                self.wrapped.base_model.unload()  # with the layers of every adapter stacked on this one
            del self.wrapped

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Run the model without this adapter; others, on the same layers too, stay on."""
        active = [(m, m._active_adapter) for m in self.wrapped.modules() if isinstance(m, BaseTunerLayer)]
        try:
            for layer, _ in active:
                layer._active_adapter = [name for name in layer.active_adapters if name != self.adapter_name]
            yield
        finally:
            for layer, names in active:
                layer._active_adapter = names

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as peft does; and the encoder of a prompt.

        Of that peft saves what it gives, from which its weights cannot be had back.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder, prefix=f".{self.name}-") as beside, self._ranks_uncut():
            self.wrapped.save_pretrained(beside, selected_adapters=[self.adapter_name])
            written = Path(beside) if self.adapter_name == "default" else Path(beside) / self.adapter_name
            for file in sorted(written.iterdir()):
                file.replace(folder / file.name)
        if (encoder := self._prompt_encoder) is not None:
            write_tensors(folder / PROMPT_ENCODER_FILE, encoder.state_dict())

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over the values of a saved adapter.

        Raises SettingError if the folder lacks weights of this adapter or holds others.
        """
        try:
            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise SettingError(f"{folder} holds no readable weights of {self.name}: {error}") from error
        with self._ranks_uncut():
            mine = get_peft_model_state_dict(self.wrapped, adapter_name=self.adapter_name)
        check_names(folder, weights, mine, self.name)
        if (encoder := self._prompt_encoder) is not None:
            own, _ = read_tensors(folder / PROMPT_ENCODER_FILE)
            check_names(folder / PROMPT_ENCODER_FILE, own, encoder.state_dict(), self.name)
            weights["prompt_embeddings"] = encoder.embedding.weight.detach()
        with self._ranks_uncut():
            set_peft_model_state_dict(self.wrapped, weights, adapter_name=self.adapter_name)
        if encoder is not None:
            encoder.load_state_dict(own)

    @property
    def _prompt_encoder(self) -> Any:
        """What learns a prompt by way of more than the vectors that it is; None for all else."""
        if not self.config.is_prompt_learning:
            return None
        encoder: Any = self.wrapped.prompt_encoder[self.adapter_name]
        return encoder if list(encoder.state_dict()) != ["embedding.weight"] else None

    def set_task(self, peft_task_type: str) -> bool:
        """Fill in the config's task_type where it is open, so that peft trains and saves the head.

        For a task that peft has no word for, the head is named in modules_to_save once the model is there.
        """
        if self.config.task_type is None:
            self.config.task_type = peft_task_type or None
        self._names_head = not peft_task_type
        return True

    def _name_head(self, model: nn.Module) -> None:
        """Put the names of the new head's modules into modules_to_save, beside what is there."""
        inner = innermost(model)
        head = {id(p) for p in task_head(inner)}
        names = [name for name, child in inner.named_children() if any(id(p) in head for p in child.parameters())]
        if not hasattr(self.config, "modules_to_save"):
            raise SettingError(f"{self.name} cannot train the new head of {type(inner).__name__}; use another adapter.")
        given = list(self.config.modules_to_save or [])
        if not names and not given:
            raise SettingError(
                f"{self.name} finds no new head in {type(inner).__name__} that it could train; name its modules in "
                "modules_to_save."
            )
        self.config.modules_to_save = [*given, *(name for name in names if name not in given)]

    def settings(self) -> dict[str, Any]:
        """The config's fields that differ from peft's defaults."""
        return settings_of(self.config, hidden=FILLED_BY_PEFT)

    def __repr__(self) -> str:
        return repr(self.config)

    @property
    def _events(self) -> Events:
        return self.config if isinstance(self.config, Events) else Events()

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Pass on to the config."""
        self._events.check_recipe(others)

    @property
    def reads_data(self) -> bool:
        """Whether the config does."""
        return self._events.reads_data

    @property
    def runs_model(self) -> bool:
        """Whether the config does."""
        return self._events.runs_model

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Pass on to the config."""
        self._events.see_data(splits, processor)

    def see_saved(self, folder: Path) -> None:
        """Take over which modules were saved whole beside the adapter, as a new head is; and pass on to the config."""
        file = folder / "adapter_config.json"
        if self.config.task_type is None and hasattr(self.config, "modules_to_save") and file.is_file():
            self.config.modules_to_save = json.loads(file.read_text(encoding="utf-8")).get("modules_to_save")
        if hasattr(self.config, "values_follow"):
            self.config.values_follow = True
        self._events.see_saved(folder)

    def on_attached(self, model: nn.Module) -> None:
        """Pass on to the config."""
        self._events.on_attached(model)

    def on_step_begin(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_step_begin(moment)

    def before_clipping(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.before_clipping(moment)

    @property
    def acts_before_clipping(self) -> bool:
        """Whether the config does."""
        return self._events.acts_before_clipping

    def on_gradients(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_gradients(moment)

    def on_step_end(self, moment: Moment) -> None:
        """Pass on to the config, and let peft's methods with a budget reallocate it while gradients are there."""
        self._events.on_step_end(moment)
        tuner: Any = self.wrapped.base_model
        if hasattr(type(tuner), "update_and_allocate") and not moment.skipped:  # gradients are not finite then
            tuner.update_and_allocate(moment.step)

    def on_epoch_end(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_epoch_end(moment)

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The config's own term; of AdaLoRA that which keeps its factors orthogonal."""
        if not self._orthogonality:
            return self._events.added_loss(model, batch, outputs)
        tuner: Any = self.wrapped.base_model
        pattern = re.compile(rf"\.lora_([AB])\.{re.escape(self.adapter_name)}$")
        found = [(match[1], p) for name, p in tuner.model.named_parameters() if (match := pattern.search(name))]
        factors = [p if side == "A" else p.T for side, p in found]
        apart = [torch.linalg.matrix_norm(f @ f.T - torch.eye(len(f), dtype=f.dtype, device=f.device)) for f in factors]
        return self._orthogonality * sum_of(apart) / len(apart)

    @property
    def _orthogonality(self) -> float:
        return float(getattr(self.config, "orth_reg_weight", 0.0))

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The config's own groups."""
        return self._events.parameter_groups(model)

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """The config's own names."""
        return self._events.idle_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The config's own state, and what peft's budget allocator has averaged so far."""
        state = {"config": self._events.state_dict()}
        if (allocator := self._allocator) is not None:
            state["allocator"] = _tables_of_tensors(allocator)
            state["ranks"] = {"pattern": self.config.rank_pattern}
        return {name: value for name, value in state.items() if value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand the config and the allocator their state back."""
        self._events.load_state_dict(state.get("config", {}))
        for name, table in state.get("allocator", {}).items():
            tuner: Any = self.wrapped.base_model
            here = {key: p.device for key, p in tuner.model.named_parameters()}
            setattr(self._allocator, name, {key: tensor.to(here.get(key, "cpu")) for key, tensor in table.items()})
        if "ranks" in state:
            self.config.rank_pattern = state["ranks"]["pattern"]

    @contextmanager
    def _ranks_uncut(self) -> Iterator[None]:
        """Save all ranks, also those that a budget has set to zero: a resumed run needs their shapes."""
        if self._allocator is None:
            yield
            return
        pattern, self.config.rank_pattern = self.config.rank_pattern, None
        try:
            yield
        finally:
            self.config.rank_pattern = pattern

    @property
    def _allocator(self) -> Any:
        """What methods of peft with a budget keep their averages in; None for the others."""
        return getattr(self.wrapped.base_model, "rankallocator", None) if hasattr(self, "wrapped") else None


def _load_what_fits(encoder: Any, state: Mapping[str, Tensor]) -> None:
    """As peft, where it saved the encoder's own vectors; from what a projection makes of them there is no way back."""
    if state["prompt_embeddings"].shape == encoder.embedding.weight.shape:
        type(encoder)._load_adapter_state_dict(encoder, state)


def _tables_of_tensors(holder: Any) -> dict[str, dict[str, Tensor]]:
    """The attributes that are filled mappings of names to tensors."""
    tables = {name: value for name, value in vars(holder).items() if isinstance(value, dict) and value}
    return {name: t for name, t in tables.items() if all(isinstance(value, Tensor) for value in t.values())}


def method_name(peft_type: Any) -> str:
    """How run files call a peft type: its value in lower case."""
    return str(getattr(peft_type, "value", peft_type)).lower()


def peft_configs() -> dict[str, type[PeftConfig]]:
    """Every config class peft knows, ours included, by the name run files use."""
    return {method_name(kind): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def described_by_peft(name: str) -> str:
    """The first sentence that peft says about one of its methods; empty where it says nothing."""
    docs = {method_name(kind): tuner.__doc__ for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    paragraph = " ".join((docs.get(name) or "").strip().partition("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


def _check_targets(config: PeftConfig, model: nn.Module) -> None:
    """Refuse names in target_modules that no module ends in, which peft passes over while another name matches.

    Raises SettingError with the nearest names there are.
    """
    targets = getattr(config, "target_modules", None)
    if not targets or targets in ("all-linear", DUMMY_TARGET_MODULES):
        return
    modules = [name for name, _ in model.named_modules() if name]
    if isinstance(targets, str):
        if not any(match_target_against_key(targets, name) for name in modules):
            lasts = {_last_parts(name, 1) for name in modules}
            hint = (
                f"For the modules of that name write [{targets}]." if targets in lasts else _nearest(targets, modules)
            )
            raise SettingError(
                f"target_modules of {method_name(config.peft_type)}: {targets!r}, a regular expression for whole "
                f"names, matches no module of {type(model).__name__}. {hint}"
            )
        return
    if missing := _missing(targets, modules):
        converted = copy.deepcopy(config)  # peft knows the names some mixtures of experts had in older releases
        convert_peft_config_for_transformers(converted, model, get_model_conversion_mapping(model))
        missing = _missing(converted.target_modules or [], modules)
    if missing:
        raise SettingError(
            f"target_modules of {method_name(config.peft_type)}: {type(model).__name__} has no module {missing[0]!r}. "
            f"{_nearest(missing[0], modules)}"
        )


def _missing(targets: Iterable[str], modules: list[str]) -> list[str]:
    return sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in modules))


def _nearest(target: str, modules: list[str]) -> str:
    """A sentence with the names nearest to `target`, of as many parts as it has."""
    parts = len(re.findall(r"\w+", target)) if "." in target else 1
    known = {_last_parts(name, parts) for name in modules}
    return did_you_mean(target, {name for name in known if not name.split(".")[-1].isdigit()})


def _last_parts(name: str, count: int) -> str:
    return ".".join(name.split(".")[-count:])
