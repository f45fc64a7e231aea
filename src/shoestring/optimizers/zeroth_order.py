r"""MeZO: trains with forwards alone, along noise that a seed draws again.

Source   Malladi et al. 2023, arXiv:2305.17333
Update   c = (L(W + eps z) - L(W - eps z)) / (2 eps), z ~ N(0, 1) from a seed; W <- W - rate (c z + decay W)
         with several directions, the mean of c z over them
Trains   whatever requires gradients: adapters, a selection, or the whole model
Costs    two forwards a step and direction, without dropout; nothing is kept for backward, no gradients, no optimizer
         state. Noise is drawn four times in parts of 4 MB. Many more steps than with gradients
Differs  by default, adapters and weights in bfloat16 are restored from a copy, to the bit; weights in float32 by adding
         back, to the last bit. Updates in bfloat16 are rounded at random. A step whose loss is no number is skipped
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from ..errors import RunFailed, SettingError
from ..modes import quiet
from ..technique import NUMBERS_HELD, WHICH_TRAIN, MicroBatch, Moment, Phase, Technique, register_technique
from .seeded_noise import BringBack, check_weights, chosen_way_back, losses_at, seeds_of, warn_of_dropout
from .step_log import StepLog

if TYPE_CHECKING:
    from transformers import TrainingArguments

MOST_SKIPPED = 10
SAVES_FOR_BACKWARD = frozenset({Phase.RECOMPUTATION, Phase.ACTIVATION})
CHOOSE_WEIGHTS = frozenset({Phase.ADAPTER, Phase.PROMPT, Phase.SIDE, Phase.SELECTION})


@register_technique
@dataclass
class ZerothOrder(Technique):
    """Every step is two forwards and no backward; what trains moves along random directions.

    eps: how far weights move for a forward. 1e-3 for whole models, 1e-2 for LoRA, 1e-1 for prompts is a start.
    num_directions: directions a step, each two forwards; their updates are averaged.
    bring_back: how weights come back after a forward. "copy": from a copy, exactly; "host_copy": from one in the host's
        memory; "add_back": the noise is taken away again, without a copy, and a number may be off by its last bit.
        None: "copy" where copies are below 2 % of the model, or weights are in bfloat16; "add_back" elsewhere.
    seed: of all directions of the run.

    Raises SettingError if eps is not positive or num_directions is below 1; on attaching, for weights that are
    quantised or in float16.
    """

    name: ClassVar[str] = "zeroth_order"
    phase: ClassVar[Phase] = Phase.OPTIMIZER
    claims: ClassVar[frozenset[str]] = frozenset({"the optimizer", "the training step"})
    holds: ClassVar[frozenset[str]] = frozenset({WHICH_TRAIN, NUMBERS_HELD})  # its record says nothing of such changes
    removes: ClassVar[frozenset[str]] = frozenset({"everything kept"})

    eps: float = 1e-3
    num_directions: int = 1
    bring_back: BringBack | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise SettingError(f"eps of zeroth_order must be positive, got {self.eps}.")
        if self.num_directions < 1:
            raise SettingError(f"num_directions of zeroth_order must be at least 1, got {self.num_directions}.")
        self.log = StepLog()
        self._others: tuple[Technique, ...] = ()
        self._optimizer: SeededSGD | None = None
        self._way_back: BringBack = "copy"
        self._step = 0
        self._last_loss: float | None = None

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Remember what stands beside it: some of these say what trains."""
        self._others = tuple(others)
        for other in others:
            if other.phase in SAVES_FOR_BACKWARD and other.removes:
                warnings.warn(f"{other.name} has no effect beside zeroth_order, which keeps nothing for backward.")

    def on_attached(self, model: nn.Module) -> None:
        """Look at what trains, and where nothing says what does, at all that should."""
        parameters = dict(model.named_parameters())
        if any(other.phase in CHOOSE_WEIGHTS for other in self._others):
            parameters = {name: p for name, p in parameters.items() if p.requires_grad}
        check_weights(parameters, self.name)
        trained = [p for p in parameters.values() if p.requires_grad]
        if not trained:
            raise SettingError("zeroth_order finds nothing that trains: add adapters, or do not freeze all weights.")
        self._way_back = chosen_way_back(self.bring_back, trained, model, self.name)
        warn_of_dropout(model, self.name, "is off in its forwards and has no effect")

    def make_optimizer(
        self, model: nn.Module, groups: list[dict[str, Any]], arguments: "TrainingArguments"
    ) -> Optimizer:
        """What makes the updates, with the learning rates of the run's schedule."""
        if arguments.optim not in (type(arguments).default_optim, "adamw_torch", "sgd"):
            warnings.warn(f"zeroth_order brings its own optimizer: optim={arguments.optim} has no effect.")
        if arguments.fp16:
            raise SettingError("zeroth_order has no gradients for train.fp16 to scale; use bf16, or neither.")
        weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        given = {id(p) for group in groups for p in group["params"]}
        if arguments.fsdp or arguments.deepspeed or any(id(p) not in given for p in weights.values()):
            raise SettingError("zeroth_order moves whole weights: train without FSDP and DeepSpeed, which cut them.")
        groups = [group for group in groups if group["params"]]
        self._optimizer = SeededSGD(groups, arguments.learning_rate, arguments.weight_decay, weights, self.log)
        return self._optimizer

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """All: nothing has a gradient."""
        return {name for name, p in model.named_parameters() if p.requires_grad}

    def on_step_begin(self, moment: Moment) -> None:
        """Note which step it is, from which the directions follow."""
        self._step = moment.step

    def training_step(self, batch: MicroBatch) -> Tensor:
        """The mean of the losses at both ends of each direction; slopes go to the optimizer."""
        optimizer = self._optimizer
        if optimizer is None:
            raise SettingError("zeroth_order has made no optimizer: let the trainer make it, in place of giving one.")
        seeds, losses, slopes = seeds_of(self.seed, self._step, self.num_directions), [], []
        weights = list(optimizer.weights.values())
        with quiet(batch.model):
            for seed in seeds:
                up, down = losses_at(
                    weights, seed, [self.eps, -self.eps], lambda: batch.loss_of(batch.inputs), self._way_back
                )
                slopes.append((float(up) - float(down)) / (2 * self.eps))
                losses += [up, down]
        optimizer.add(seeds, slopes)
        loss = torch.stack(losses).mean()
        if math.isfinite(value := float(loss)):
            self._last_loss = value
        elif self._last_loss is not None:  # the step will be skipped; nothing but the log sees this
            loss = loss.new_tensor(self._last_loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The last loss that was a number."""
        return {} if self._last_loss is None else {"last_loss": self._last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over."""
        self._last_loss = state.get("last_loss")

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the record of steps, which `replay` makes again; weights are saved beside it as in any run."""
        self.log.save(folder)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Go on with a record."""
        self.log.take_over(StepLog.load(folder))


class SeededSGD(Optimizer):
    """SGD along seeded noise, of which it is given slopes; there are no gradients.

    weights: all that trains, in the order in which noise is drawn. log: makes the steps and writes them down.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        weights: dict[str, nn.Parameter],
        log: StepLog,
    ):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.weights = weights
        self.log = log
        self.seeds: list[int] = []
        self.slopes: list[float] = []
        self.skipped = 0
        of_group = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        decays = [float(group["weight_decay"]) for group in self.param_groups]
        log.describe(weights, [of_group[id(p)] for p in weights.values()], decays)

    def add(self, seeds: list[int], slopes: list[float]) -> None:
        """Add the slopes of a micro-batch to those of the step."""
        before = self.slopes if self.seeds else [0.0] * len(slopes)
        self.seeds, self.slopes = seeds, [a + b for a, b in zip(before, slopes, strict=True)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the step; without slopes, do nothing.

        Raises RunFailed after many steps in a row whose loss was no number.
        """
        if not self.seeds:
            return
        weights = list(self.weights.values())
        slopes, seeds = mean_of_processes(self.slopes, weights[0].device), self.seeds
        self.seeds, self.slopes = [], []
        if not all(map(math.isfinite, slopes)):
            self.skipped += 1
            warnings.warn("zeroth_order skips a step whose loss is no number; weights are what they were.")
            if self.skipped >= MOST_SKIPPED:
                raise RunFailed(
                    f"The loss was no number in {self.skipped} steps in a row: lower eps of zeroth_order, or the "
                    "learning rate."
                )
            return
        self.skipped = 0
        self.log.take(weights, seeds, slopes, [float(group["lr"]) for group in self.param_groups])


def mean_of_processes(slopes: list[float], device: torch.device) -> list[float]:
    """Slopes in float32, as they are written down; with several processes, the mean of theirs."""
    found = torch.tensor(slopes, dtype=torch.float32)
    if distributed.is_available() and distributed.is_initialized():
        found = found.to(device)
        distributed.all_reduce(found)
        found = found / distributed.get_world_size()
    return [float(slope) for slope in found.cpu()]
