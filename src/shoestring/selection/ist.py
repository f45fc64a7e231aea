r"""IST: at each step only some blocks have their adapters trained, and which ones is learned.

Source   Yao et al. 2024, arXiv:2410.11772 (Findings of EMNLP 2024)
Update   each step trains N_u of L blocks, drawn without replacement with weights sigmoid(-I); every `period` steps, for
         `num_draws` different sets S_k of N_v blocks, drawn with weights sigmoid(I), on one batch of rows:
         l_k = the loss with y = base(x) + suppression (adapted(x) - base(x)) at the adapted layers of S_k
         r_k = exp(-l_k) - mean of exp(-l),    I_i += rate r_k p_i (1 - p_i) for i in S_k, p = sigmoid(I) of before
Shapes   I [L], one number a block; high where adapters matter little
Start    I = 0: all blocks are drawn alike
Trains   what the adapters train; of a block that rests nothing, so that its weights and the optimizer's state of them
         stay as they are, bit by bit
Costs    a step keeps activations from the lowest block that trains upwards, and of blocks above it that rest no inputs
         of adapters: memory varies from step to step, and is at most that of adapters in all blocks. The optimizer's
         state comes to be that of all blocks. Learning I takes num_draws forwards of reward_rows rows every `period`
         steps, in micro-batches of the run's size and without gradients
Differs  suppression interpolates the output of an adapted layer, which is the same as scaling LoRA's product and works
         for every adapter without touching a setting of it; of DoRA and others that change the weight's norm it scales
         the whole change. The loss of a reward's rows is the mean of those of their micro-batches, by rows
"""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..adapters.placement import place_in_stack
from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..modes import in_eval_mode
from ..quantisation.calibration import training_rows
from ..quantisation.gradients import batches_of, loss_of_batches
from ..technique import WHICH_TRAIN, Moment, Phase, Technique, refuse_several_processes, register_technique
from .base import settings_error

TRIES = 100  # to draw a set that was not drawn yet, before the first such one in order is taken


@register_technique
@dataclass(kw_only=True)
class IST(Technique):
    """Trains the adapters of some blocks at a time: those that a learned score of importance makes likely.

    The data is what the recipe is attached with, `recipe.apply(model, data={"train": rows})`; `shoestring train` gives
    its own. Only adapters rest: a head, or norms that train for another reason, train at each step.

    active_layers: how many blocks train at each step, as a count or as a share of those with adapters.
    importance: learn which; False: all blocks are drawn alike (RST), and no data is needed.
    period: steps from one update of the scores to the next.
    suppressed_layers: how many blocks are suppressed at once, as a count or a share.
    suppression: what is left of their adapters' effect, 0 <= suppression < 1.
    num_draws: different sets of suppressed blocks an update.
    reward_rows: rows of training data that an update looks at.
    rate: step size of the scores.
    seed: of all draws.

    Raises SettingError if a setting is out of range; on attaching, if the counts do not fit the number of blocks, if no
    block has adapters that train, or if blocks share weights of adapters.
    """

    name: ClassVar[str] = "ist"
    phase: ClassVar[Phase] = Phase.SELECTION
    needs: ClassVar[frozenset[Phase]] = frozenset({Phase.ADAPTER})
    varies: ClassVar[frozenset[str]] = frozenset({WHICH_TRAIN})

    active_layers: int | float = 0.25
    importance: bool = True
    period: int = 10
    suppressed_layers: int | float = 0.5
    suppression: float = 0.25
    num_draws: int = 3
    reward_rows: int = 16
    rate: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in ("active_layers", "suppressed_layers"):
            value = getattr(self, setting)
            if not (isinstance(value, int) and value >= 1) and not (isinstance(value, float) and 0 < value <= 1):
                raise settings_error("ist", setting, "a count of at least 1 or a share above 0 and at most 1.0", value)
        for setting in ("period", "reward_rows"):
            if getattr(self, setting) < 1:
                raise settings_error("ist", setting, "at least 1", getattr(self, setting))
        if self.num_draws < 2:
            raise settings_error("ist", "num_draws", "at least 2, as rewards are compared", self.num_draws)
        if not 0 <= self.suppression < 1:
            raise settings_error("ist", "suppression", "at least 0 and below 1", self.suppression)
        if not self.rate > 0:
            raise settings_error("ist", "rate", "above 0", self.rate)
        self.blocks: list[AdaptedBlock] = []
        self.scores: list[float] = []
        self._random = random.Random(self.seed)
        self._rows: Any = None

    @property
    def reads_data(self) -> bool:
        """Whether scores are learned."""
        return self.importance

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Remember the training rows, to draw from.

        Raises SettingError if there are splits, but none called "train" with as many rows as are wanted.
        """
        if not splits or not self.importance:
            return
        self._rows = training_rows(
            splits, self.name, "reward_rows", self.reward_rows, " With importance: false none are needed."
        )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """All adapters train but within a step, from `on_step_begin` to `on_step_end`."""
        try:
            yield model
        finally:
            self._wake(range(len(self.blocks)))
            self.blocks, self._rows = [], None

    def on_attached(self, model: nn.Module) -> None:
        """Find the blocks, now that all that trains does."""
        self.blocks = adapted_blocks(model)
        count = len(self.blocks)
        self._num_active = self._number("active_layers", count)
        self.scores, self._random = [0.0] * count, random.Random(self.seed)
        if self.importance:
            self._num_suppressed = self._number("suppressed_layers", count)
            if (sets := math.comb(count, self._num_suppressed)) < self.num_draws:
                raise SettingError(
                    f"num_draws of ist is {self.num_draws}, but there are only {sets} different sets of "
                    f"{self._num_suppressed} of the {count} blocks with adapters: lower it, or set suppressed_layers "
                    "or importance: false."
                )

    def _number(self, setting: str, count: int) -> int:
        """What a setting means for so many blocks."""
        value = getattr(self, setting)
        number = value if isinstance(value, int) else int(value * count)
        if not 1 <= number <= count:
            raise SettingError(
                f"{setting} of ist is {value}, which makes {number} of the {count} blocks with adapters: it must be "
                f"from 1 to {count}."
            )
        return number

    def on_step_begin(self, moment: Moment) -> None:
        """Update the scores where it is time, and draw the blocks that train in this step."""
        refuse_several_processes(self.name, "draws blocks and measures rewards for itself")
        if not all(has_values(p) for p in self.blocks[0].parameters):
            self._wake(range(self._num_active))  # the lowest blocks: the most memory that a step may take
            return
        if self.importance:
            if self._rows is None:
                raise SettingError(
                    "ist learns from data, and has seen none: train with a run file, attach with "
                    "recipe.apply(model, data={'train': rows}), or set importance: false."
                )
            if moment.step and moment.step % self.period == 0:
                self.learn(moment.model, moment.rows_at_once)
        self._wake(self._drawn([sigmoid(-score) for score in self.scores], self._num_active))

    def on_step_end(self, moment: Moment) -> None:
        """Between steps all adapters train, as they did before the first."""
        self._wake(range(len(self.blocks)))

    def _wake(self, active: Sequence[int]) -> None:
        """Have the adapters of these blocks train, and no other."""
        for index, block in enumerate(self.blocks):
            for parameter in block.parameters:
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None  # zeros would have optimizers move it by its momentum

    def active(self) -> list[int]:
        """The blocks whose adapters train now, by index."""
        return [index for index, block in enumerate(self.blocks) if block.parameters[0].requires_grad]

    def importance_by_block(self) -> dict[str, float]:
        """The scores; low where adapters matter much."""
        return {block.name: score for block, score in zip(self.blocks, self.scores, strict=True)}

    def learn(self, model: nn.Module, rows_at_once: int = 1) -> None:
        """One update of the scores, on rows drawn from the data; a forward takes `rows_at_once` of them.

        Raises RunFailed if a loss is no number.
        """
        rows = [self._rows[index] for index in self._random.sample(range(len(self._rows)), self.reward_rows)]
        batches, sets = batches_of(model, rows, rows_at_once), self._drawn_sets()
        losses = [self._loss(model, batches, suppressed) for suppressed in sets]
        if not all(map(math.isfinite, losses)):
            raise RunFailed(f"ist measured losses of {losses} with adapters suppressed: the model gives NaN or Inf.")
        self.scores = updated(self.scores, sets, losses, self.rate)

    def _loss(
        self, model: nn.Module, batches: Sequence[tuple[dict[str, Any], int]], suppressed: Sequence[int]
    ) -> float:
        """The loss of the reward's rows with the adapters of these blocks suppressed, without dropout."""
        with torch.no_grad(), in_eval_mode(model), self.suppressed(suppressed):
            return loss_of_batches(model, batches)

    @contextmanager
    def suppressed(self, chosen: Sequence[int]) -> Iterator[None]:
        """Run the model with less of the adapters of these blocks."""
        with ExitStack() as undo:
            for index in chosen:
                for name, module in self.blocks[index].modules.items():
                    hook = partial(_less, name, self.suppression)
                    undo.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _drawn(self, weights: Sequence[float], count: int) -> list[int]:
        """So many different blocks, each as if drawn in turn with these weights from those that are left; sorted."""
        waits = [-math.log(1 - self._random.random()) / max(weight, 1e-300) for weight in weights]
        return sorted(sorted(range(len(waits)), key=waits.__getitem__)[:count])

    def _drawn_sets(self) -> list[list[int]]:
        """Different sets of blocks to suppress."""
        weights = [sigmoid(score) for score in self.scores]
        sets: list[list[int]] = []
        for _ in range(self.num_draws):
            drawn = (self._drawn(weights, self._num_suppressed) for _ in range(TRIES))
            in_order = (list(each) for each in combinations(range(len(weights)), self._num_suppressed))
            found = next((each for each in drawn if each not in sets), None)
            sets.append(found if found is not None else next(each for each in in_order if each not in sets))
        return sets

    def state_dict(self) -> dict[str, Any]:
        """The scores, and where the draws are."""
        version, numbers, spare = self._random.getstate()
        return {"scores": list(self.scores), "random": [version, list(numbers), spare]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over scores and draws.

        Raises SettingError if the scores are those of other blocks.
        """
        if len(state["scores"]) != len(self.blocks):
            raise SettingError(
                f"The saved scores of ist are those of {len(state['scores'])} blocks, but {len(self.blocks)} have "
                "adapters here."
            )
        self.scores = list(state["scores"])
        version, numbers, spare = state["random"]
        self._random.setstate((version, tuple(numbers), spare))


@dataclass(frozen=True)
class AdaptedBlock:
    """A block with adapters. modules: the adapted layers by name. parameters: what of their adapters trains."""

    name: str
    modules: dict[str, nn.Module] = field(default_factory=dict)
    parameters: list[nn.Parameter] = field(default_factory=list)


def adapted_blocks(model: nn.Module) -> list[AdaptedBlock]:
    """The blocks of a model in which adapters train, in its order.

    Raises SettingError if there are none, or one cannot rest without another.
    """
    blocks: dict[tuple[str, int], AdaptedBlock] = {}
    owners: dict[int, AdaptedBlock] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or name.startswith(inside):
            continue
        inside = (*inside, f"{name}.")
        place = place_in_stack(model, name)
        layer: Any = module
        base = {id(p) for p in layer.get_base_layer().parameters()}
        trained = [p for p in layer.parameters() if p.requires_grad and id(p) not in base]
        if place is None or not trained:
            continue
        if hasattr(layer, "lora_E"):
            raise SettingError(
                f"ist leaves blocks that rest without gradients, by which the adapter of {name} shares out its ranks: "
                "take lora in place of adalora."
            )
        stack, index, _ = place
        block = blocks.setdefault((stack, index), AdaptedBlock(f"{stack}.{index}"))
        if any(owners.setdefault(id(p), block) is not block for p in trained):
            raise SettingError(
                f"ist lets blocks rest one by one, but {block.name} shares weights of its adapters with another block: "
                "take a method whose layers have weights of their own, such as lora."
            )
        block.modules[name] = layer
        block.parameters.extend(p for p in trained if all(p is not own for own in block.parameters))
    _refuse_shared(model)
    if not blocks:
        raise SettingError(
            f"ist finds no block of {type(model).__name__} with adapters that train: it needs lora or another method "
            "that adapts layers inside of a list of blocks."
        )
    return list(blocks.values())


def _refuse_shared(model: nn.Module) -> None:
    """Refuse weights that train and that a tuner holds for all of its layers."""
    for tuner in model.modules():
        if isinstance(tuner, BaseTuner):
            of_model = {id(p) for p in tuner.model.parameters()}
            for name, parameter in tuner.named_parameters():
                if parameter.requires_grad and id(parameter) not in of_model:
                    raise SettingError(
                        f"ist lets blocks rest one by one, but {name} trains for all of them together: take a method "
                        "whose layers have weights of their own, such as lora."
                    )


def updated(
    scores: Sequence[float], sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float
) -> list[float]:
    """The scores after one update.

    sets: the blocks that were suppressed in each draw. losses: with them suppressed.
    """
    rewards = [math.exp(-loss) for loss in losses]
    mean = sum(rewards) / len(rewards)
    slopes = [sigmoid(score) * sigmoid(-score) for score in scores]
    new = list(scores)
    for suppressed, reward in zip(sets, rewards, strict=True):
        for index in suppressed:
            new[index] += rate * (reward - mean) * slopes[index]
    return new


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)), for any x."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _less(name: str, suppression: float, module: Any, args: Any, kwargs: dict[str, Any], y: Any) -> Tensor:
    """A forward hook: the adapted layer's output, moved towards that of the layer without adapters."""
    if not isinstance(y, Tensor):
        raise SettingError(
            f"ist cannot suppress the adapters on {name}, whose output is a {type(y).__name__} and not one tensor: "
            "leave that layer out of target_modules, or set importance: false."
        )
    base: Tensor = module.get_base_layer()(*args, **kwargs)
    return base + suppression * (y - base)
