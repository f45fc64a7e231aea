"""A peft config, peft's own or ours, as a technique of a recipe."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import SettingError
from ..technique import Events, Moment, Phase, Technique, settings_of

# What peft fills in itself, and what names the method rather than a setting of it.
FILLED_BY_PEFT = frozenset(
    {"peft_type", "base_model_name_or_path", "inference_mode", "revision", "auto_mapping", "peft_version"}
)


class PeftTechnique(Technique):
    """One peft config in a recipe. Its events are the config's own where it has any."""

    phase = Phase.ADAPTER
    wrapped: PeftModel

    def __init__(self, config: PeftConfig):
        self.config = config
        self.name = method_name(config.peft_type)  # type: ignore[misc]
        self.adapter_name = "default"
        if config.is_prompt_learning:
            self.phase = Phase.PROMPT  # type: ignore[misc]
            self.alone_in_phase = True  # type: ignore[misc]

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[PeftModel]:
        """Wrap the model in a `PeftModel`; around one that is there already, under an adapter name of its own."""
        stacked = isinstance(model, PeftModel)
        # a word that is part of no method's prefix, since peft tells adapters by it in the names of weights
        self.adapter_name = f"nested{len(model.peft_config)}" if stacked else "default"
        trained = [p for p in model.parameters() if p.requires_grad] if stacked else []
        switches = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        active = [(m, m._active_adapter) for m in model.modules() if isinstance(m, switches)]
        with warnings.catch_warnings():
            if stacked:  # peft warns of a second adapter, which is what the recipe asks for
                warnings.filterwarnings("ignore", message=".*(second time|Already found a `peft_config`).*")
            self.wrapped = get_peft_model(model, self.config, adapter_name=self.adapter_name)
        for parameter in trained:  # peft would leave only its newest adapter trained and active
            parameter.requires_grad_(True)
        for module, names in active:
            module._active_adapter = names
        try:
            yield self.wrapped
        finally:
            if isinstance(self.wrapped.base_model, BaseTuner) and not stacked:
                self.wrapped.base_model.unload()  # with the layers of every adapter stacked on this one
            del self.wrapped

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as peft does."""
        with TemporaryDirectory(dir=folder.parent, prefix=f".{self.name}-") as beside:
            self.wrapped.save_pretrained(beside, selected_adapters=[self.adapter_name])
            written = Path(beside) if self.adapter_name == "default" else Path(beside) / self.adapter_name
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(written.iterdir()):
                file.replace(folder / file.name)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over the values of a saved adapter.

        Raises SettingError if the folder lacks weights of this adapter or holds others.
        """
        try:
            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise SettingError(f"{folder} holds no readable weights of {self.name}: {error}") from error
        mine = get_peft_model_state_dict(self.wrapped, adapter_name=self.adapter_name)
        for names, what in ((set(mine) - set(weights), "lacks"), (set(weights) - set(mine), "holds the foreign")):
            if names:
                raise SettingError(f"{folder} {what} {sorted(names)[0]} ({len(names)} in all) for {self.name}.")
        set_peft_model_state_dict(self.wrapped, weights, adapter_name=self.adapter_name)

    def set_task(self, peft_task_type: str) -> bool:
        """Fill in the config's task_type where it is open, so that peft trains and saves the head."""
        if self.config.task_type is None:
            self.config.task_type = peft_task_type
        return True

    def settings(self) -> dict[str, Any]:
        """The config's fields that differ from peft's defaults."""
        return settings_of(self.config, hidden=FILLED_BY_PEFT)

    def __repr__(self) -> str:
        return repr(self.config)

    @property
    def _events(self) -> Events:
        return self.config if isinstance(self.config, Events) else Events()

    def on_step_begin(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_step_begin(moment)

    def on_gradients(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_gradients(moment)

    def on_step_end(self, moment: Moment) -> None:
        """Pass on to the config, and let peft's methods with a budget reallocate it while gradients are there."""
        self._events.on_step_end(moment)
        tuner: Any = self.wrapped.base_model
        if hasattr(type(tuner), "update_and_allocate"):
            tuner.update_and_allocate(moment.step)

    def on_epoch_end(self, moment: Moment) -> None:
        """Pass on to the config."""
        self._events.on_epoch_end(moment)

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """The config's own term."""
        return self._events.added_loss(model, batch, outputs)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The config's own groups."""
        return self._events.parameter_groups(model)

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """The config's own names."""
        return self._events.idle_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The config's own state."""
        return self._events.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Hand the config its state back."""
        self._events.load_state_dict(state)


def method_name(peft_type: Any) -> str:
    """How run files call a peft type: its value in lower case."""
    return str(getattr(peft_type, "value", peft_type)).lower()


def peft_configs() -> dict[str, type[PeftConfig]]:
    """Every config class peft knows, ours included, by the name run files use."""
    return {method_name(kind): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
