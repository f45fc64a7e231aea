"""What every technique declares and may do: its phase, its promises, its events, how it attaches and what it saves.

The kinds (adapters, blocks, selection, ...) build on this file; `recipe.py` puts techniques together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch.distributed
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import SettingError

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Phase(IntEnum):
    """The order in which techniques attach. A recipe sorts by it, so users cannot get it wrong."""

    PRUNING = 10  # what of the model is there at all
    ADAPTER = 20  # new weights in or beside layers
    PROMPT = 30  # learned vectors in the sequence
    SIDE = 40  # a small network beside the model
    SELECTION = 50  # which weights get gradients, and when
    BLOCK = 60  # how a block runs forward and backward
    RECOMPUTATION = 65  # what of a block is run again in backward instead of kept
    ACTIVATION = 70  # how a tensor kept for backward is stored
    OBJECTIVE = 80  # the loss
    OPTIMIZER = 90  # the update


@dataclass(frozen=True)
class Advised:
    """That a technique is worth trying where memory is short.

    order: lower ones are tried first, and preferred: below 20 nothing is paid, from 20 on time, from 60 on exactness.
    settings: what it is tried with.
    why: what it saves and what is paid, for the user.
    """

    order: int
    why: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """Where a training run stands when an event is called.

    model: the model in training, with the recipe attached.
    optimizer: the optimizer, or None before it is made.
    step: optimizer steps finished; 0 before and during the first.
    epoch: passes over the data, a fraction within an epoch.
    num_steps: optimizer steps of the whole run, or 0 where unknown.
    accumulation_steps: the most backwards whose gradients are summed in a step.
    rows_at_once: rows of data that a forward in training takes; 1 where unknown.
    skipped: the step that has ended was left out, as a gradient scaler does where gradients are not finite.
    """

    model: nn.Module
    optimizer: Optimizer | None = None
    step: int = 0
    epoch: float = 0.0
    num_steps: int = 0
    accumulation_steps: int = 1
    rows_at_once: int = 1
    skipped: bool = False

    @property
    def learning_rate(self) -> float:
        """The learning rate of the first parameter group; 0 without an optimizer."""
        return float(self.optimizer.param_groups[0]["lr"]) if self.optimizer is not None else 0.0


@dataclass(frozen=True)
class MicroBatch:
    """A share of a training step, for techniques that take it out of the trainer's hands.

    model: as the trainer calls it. inputs: of the model, on its device.
    loss_of: the trainer's loss of some inputs, in the modes that modules are in: of this micro-batch its share of the
        step's loss; with held_out=True of other rows, whose mean counts as much.
    backward: what the trainer does with a loss of its own.
    held_out: inputs of as many rows that the run is evaluated on, drawn with a seed; raises SettingError without any.
    """

    model: nn.Module
    inputs: dict[str, Any]
    loss_of: Callable[..., Tensor]
    backward: Callable[[Tensor], None]
    held_out: Callable[[int], dict[str, Any]]


class Events:
    """What a technique or an adapter config may do during training. Every event does nothing unless overridden."""

    def check_recipe(self, others: Sequence["Technique"]) -> None:
        """Refuse settings that cannot stand beside the recipe's other techniques; called when the recipe is built."""

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Before attaching: all data that will be run, by split, as rows of model inputs; and its tokenizer, if known.

        Not called where nobody said what the data is. Empty where any data may come, as for a model that is loaded.
        """

    @property
    def reads_data(self) -> bool:
        """Whether `see_data` does anything, so that data must be there before the recipe is attached."""
        return type(self).see_data is not Events.see_data

    @property
    def runs_model(self) -> bool:
        """Whether attaching runs the model on rows of the data, so that it had better be where it will train."""
        return False

    def see_saved(self, folder: Path) -> None:
        """Before attaching, where `restore` will follow: look at what was saved, or leave it to come."""

    def on_attached(self, model: nn.Module) -> None:
        """All techniques of the recipe are attached; refuse what they made of the model, where it does not fit."""

    def on_step_begin(self, moment: Moment) -> None:
        """Before the first forward of an optimizer step."""

    def before_clipping(self, moment: Moment) -> None:
        """All gradients of the step are there and about to be clipped; not called where nothing is clipped."""

    @property
    def acts_before_clipping(self) -> bool:
        """Whether `before_clipping` does anything, so that a trainer must call it."""
        return type(self).before_clipping is not Events.before_clipping

    def on_gradients(self, moment: Moment) -> None:
        """All gradients of the step are there; the optimizer has not run."""

    def on_step_end(self, moment: Moment) -> None:
        """After the optimizer has run and gradients are still there; `moment.step` counts the step just done."""

    def on_epoch_end(self, moment: Moment) -> None:
        """After the last step of an epoch."""

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """A scalar to add to the loss of one forward in training, or None.

        outputs: what that forward returned, with its graph; under TRL's SFTTrainer `log_probs` and no logits.
        """
        return None

    def measured(self) -> dict[str, float]:
        """What was measured in forwards in evaluation since the last call, by name; trainers report it as metrics."""
        return {}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameters with optimizer options of their own, `[{"params": [...], "lr": 1e-4}]`.

        "lr_factor" in place of "lr" is times the run's learning rate. "like": for parameters that are not the model's,
        as many of the model's, whose options they have where the group has none of its own. "gives_way": true where
        parameters stay with other techniques that give them options. "at_start": names of what was in the group before
        anything was taken out of the model, so that the optimizer of a resumed run has as many groups.
        """
        return []

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """Names of trainable parameters that may go without a gradient, such as experts nobody was routed to."""
        return set()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model's weights: tensors, numbers, strings, lists, dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; tensors arrive on the CPU."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {', '.join(sorted(state))}.")


WHICH_TRAIN, NUMBERS_HELD = "which parameters train", "which numbers trained parameters hold"


class Technique(Events):
    """One way to train in less memory or with fewer weights. Subclasses are dataclasses whose fields are the settings.

    name: how run files call it.
    phase: when it attaches.
    exact: gradients equal those without it; the contract tests hold it to that.
    alone_in_phase: no second technique of the same phase may stand beside it.
    needs: phases of which at least one other technique must be in the recipe.
    claims: parts of the model or of autograd that only one technique may act on, as plain words.
    varies: what it changes from one step to another, `WHICH_TRAIN` or `NUMBERS_HELD` or both.
    holds: what of these must stay as it is, where this one keeps a copy or a record of all that trains.
    graph_in_blocks: what blocks compute in forward is in the graph of the loss, so that a loss of it may be added.
    unscaled_gradients: it reads gradients while backward runs, so that these must not be scaled, as fp16 has it.
    loss_in_model: it acts where the model computes its loss; trainers that compute it elsewhere leave it to the model.
    brings_loss: it computes the loss itself, of inputs without labels.
    loss_over_batch: it has a loss of the rows of a micro-batch together, so that of smaller ones is another.
    reads_of_batch: what it reads of a batch beside the model's inputs, in the words of a task's `batch_extras`.
    removes: what it keeps out of memory until backward, in the words of `memory.kept.REMOVABLE`.
    advised: how the planner may propose it to users whose run does not fit; () for never.
    """

    name: ClassVar[str]
    phase: ClassVar[Phase]
    exact: ClassVar[bool] = False
    alone_in_phase: ClassVar[bool] = False
    needs: ClassVar[frozenset[Phase]] = frozenset()
    claims: ClassVar[frozenset[str]] = frozenset()
    varies: ClassVar[frozenset[str]] = frozenset()
    holds: ClassVar[frozenset[str]] = frozenset()
    graph_in_blocks: ClassVar[bool] = True
    unscaled_gradients: ClassVar[bool] = False
    loss_in_model: ClassVar[bool] = False
    brings_loss: ClassVar[bool] = False
    loss_over_batch: ClassVar[bool] = False
    reads_of_batch: ClassVar[frozenset[str]] = frozenset()
    removes: ClassVar[frozenset[str]] = frozenset()
    advised: ClassVar[tuple[Advised, ...]] = ()

    @property
    def loss_share(self) -> float:
        """Of the items that a trainer counted in a micro-batch, the share that the last forward scored.

        Items are labelled tokens. A trainer that computes the loss outside of the model, and was told the number of
        items, divides the loss by this share. Where the model computes the loss, the technique sees to it by itself.
        """
        return 1.0

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Act on `model` inside the context and leave it as it was after; yields the model to go on with."""
        yield model

    def to_saved(self, parameter: nn.Parameter, value: Tensor) -> Tensor:
        """What to save of a base weight, in the shape it has without this technique; `value` is what there is now."""
        return value

    def from_saved(self, parameter: nn.Parameter, saved: Tensor) -> Tensor:
        """The inverse of `to_saved`: what to put into `parameter`."""
        return saved

    def make_optimizer(
        self, model: nn.Module, groups: list[dict[str, Any]], arguments: "TrainingArguments"
    ) -> Optimizer | None:
        """The optimizer of the run, made in place of the trainer's; None leaves it to the trainer.

        groups: all that trains, each group with its weight_decay and the options that `parameter_groups` gave it.
        arguments: the run's; a group's own options go before them.
        """
        return None

    def training_step(self, batch: MicroBatch) -> Tensor | None:
        """Do all that a step does before the optimizer, on one micro-batch, in the trainer's place.

        The loss to report, without a graph; None leaves forward and backward to the trainer.
        """
        return None

    def trained_without_gradient(self, model: nn.Module) -> list[nn.Parameter]:
        """Weights that it changes although no gradient does, to be saved with what trains."""
        return []

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write weights of its own that neither the base model nor `state_dict` holds into `folder`."""

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read what `save` wrote into the attached model."""

    def fold(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """What it learned beside the weights, to be part of them: parameters, their names in the model, what to add.

        Called before the model is written without the recipe. After the last change the model holds no module and no
        hook of the technique, which cannot be used any more; its context then changes no weight when it ends.

        Raises SettingError where weights cannot hold what it learned, with the reason.
        """
        return iter(())

    def set_task(self, peft_task_type: str) -> bool:
        """Learn the run's task in peft's word, or "" where it has none; True if a new head then trains with it."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain data for a run file."""
        return settings_of(self)


def settings_of(config: Any, hidden: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as plain data; `hidden` names are left out."""
    if not is_dataclass(config):
        return {}
    blank = {}
    for each in fields(config):
        if each.default_factory is not None and callable(each.default_factory):
            blank[each.name] = each.default_factory()
        else:
            blank[each.name] = each.default
    changed = {f.name: plain(getattr(config, f.name)) for f in fields(config) if f.name not in hidden}
    return {name: value for name, value in changed.items() if value != plain(blank[name])}


def plain(value: Any) -> Any:
    """`value` as YAML and JSON can hold it: sets become sorted lists, tuples lists, enums and dtypes words."""
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(getattr(value, "value", value))


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, which may lie on several devices; on that of the first."""
    return torch.stack([term.to(terms[0]) for term in terms]).sum()


def refuse_several_processes(technique: str, why: str) -> None:
    """Refuse a run in which several processes train one model.

    why: what each process would do by itself.

    Raises SettingError.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (count := torch.distributed.get_world_size()) > 1:
        raise SettingError(f"{technique} {why}: it trains in one process only, and here are {count}. Start one.")


TECHNIQUES: dict[str, type[Technique]] = {}


def register_technique(cls: type[Technique]) -> type[Technique]:
    """Make a technique known to run files and the command line under its `name`; a class decorator."""
    if TECHNIQUES.get(cls.name, cls) is not cls:
        raise ValueError(f"A technique named {cls.name!r} is already registered: {TECHNIQUES[cls.name].__module__}.")
    TECHNIQUES[cls.name] = cls
    return cls
