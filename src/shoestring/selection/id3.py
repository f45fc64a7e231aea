r"""ID3: single numbers of weights start to train step by step, each time those that the gradients of that step ask for.

Source   Agarwal, Ramesh, Sengupta, Chakraborty 2025, arXiv:2408.14470
Update   at step t of T: u_t = floor(B (t + 1) / T) - floor(B t / T) numbers more, those of the largest
         |g| / (|w| + epsilon)^exponent among all that do not train yet, over all weights together. They take part in
         the same step; then clipping and the optimizer see those that train and no others
Shapes   B numbers in all, g = dL/dw dense
Start    nothing trains: the model as it was
Trains   B numbers from step T on, (T + 1) / (2 T) of B on average before
Costs    16 B bytes for places, values and AdamW's moments. Until step T a dense gradient a weight is made in backward,
         looked at and let go. Where it comes in parts it is summed in float32 until it is whole: to the end of the
         block's backward for a module that runs several times, to the end of the step with gradient accumulation,
         which then keeps as much as full training. From step T on, weights without a chosen number get no gradient
Differs  numbers that do not train stay as they are, bit by bit, also under weight decay (the authors' do not); u_t
         may be 0 where B < T; equal scores are settled by order, so that runs repeat and B is met exactly
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar
from weakref import ref

import torch
from jaxtyping import Float, Int
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SettingError
from ..fakes import has_values
from ..modes import in_backward
from ..precision import wide_dtype
from ..resizing import replace_data
from ..technique import NUMBERS_HELD, Moment, Phase, Technique, refuse_several_processes, register_technique
from .base import named_parameters, settings_error
from .optimizer_state import carry_state, check_by_number
from .sparse import Entries, SparseSelection

STRATEGIES = ("increment", "static", "repeat")
DENSITY = 0.001


class Contest:
    """The best numbers of one step, over all weights: what is offered weight by weight is cut to those at once.

    wanted: how many; 0: none are looked for. whole_step: gradients of several backwards are summed first.
    """

    def __init__(self) -> None:
        self.open(0)

    def open(self, wanted: int, whole_step: bool = False) -> None:
        """Begin anew."""
        self.wanted, self.whole_step, self.spoiled = wanted, whole_step, False
        self._held: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def offer(self, order: int, scores: Float[Tensor, " n"], gradients: Float[Tensor, " n"]) -> None:
        """Let the numbers of weight `order` take part; scores of -inf are out of it."""
        best = best_places(scores, self.wanted)
        self._held[order] = (scores[best], best, gradients[best])
        if sum(len(places) for _, places, _ in self._held.values()) > 2 * self.wanted:
            self._cut()

    def close(self) -> dict[int, tuple[Int[Tensor, " m"], Float[Tensor, " m"]]]:
        """The places and gradients of the best, by weight; of equal scores the first. Nothing if one was no number."""
        self._cut()
        best = {} if self.spoiled else {order: held[1:] for order, held in self._held.items()}
        self.open(0)
        return best

    def _cut(self) -> None:
        orders = sorted(self._held)
        if not orders:
            return
        scores = torch.cat([self._held[order][0].cpu() for order in orders])
        best, start = best_places(scores, self.wanted), 0
        for order in orders:
            size = len(self._held[order][0])
            own = best[(best >= start) & (best < start + size)] - start
            own = own.to(self._held[order][0].device)
            self._held[order] = tuple(part[own] for part in self._held[order])  # type: ignore[assignment]
            start += size


def best_places(scores: Float[Tensor, " n"], count: int) -> Int[Tensor, " m"]:
    """The places of the `count` largest scores above -inf, sorted; of equal ones the first."""
    count = min(count, len(scores))
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    least = scores.topk(count).values[-1]
    if least == -math.inf:
        return (scores > least).nonzero()[:, 0]
    above = (scores > least).nonzero()[:, 0]
    equal = (scores == least).nonzero()[: count - len(above), 0]
    return torch.cat([above, equal]).sort().values


class Growing(Entries):
    """The chosen numbers of one weight, and a look at its dense gradient for more of them."""

    moves = True

    def __init__(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"], method: "ID3"):
        super().__init__(name, weight, places)
        self.method = method
        self.waits = False  # for the end of the step, however many gradients come
        self.begin_step(0)

    @property
    def trains(self) -> bool:
        """Whether a gradient is of use: for numbers that train, or to look for some."""
        return len(self.places) > 0 or not self.method.finished

    def begin_step(self, order: int) -> None:
        """Forget what was left of the step before. order: of the weight among all."""
        self.order = order
        self.calls = 0  # forwards of the weight's modules whose gradient is to come
        self.parts = 0  # gradients that came
        self.offered = False
        self.dense: Tensor | None = None  # their sum, while more are to come
        self.selected: Tensor | None = None  # which of the places train in this step; None: all

    def count_call(self, module: nn.Module, args: Any) -> None:
        """Before a forward of a module that holds the weight; what is run again in backward was counted before."""
        if not in_backward() and (module.training or torch.is_grad_enabled()):
            self.calls += 1

    def on_gradient(self, dense: Tensor) -> None:
        """Offer the numbers as soon as the gradient is whole; until then keep its sum."""
        contest = self.method.contest
        if not contest.wanted or not has_values(dense):
            return
        if self.offered:
            raise RuntimeError(
                f"{self.name} got one more gradient after all had come that its forwards in this step announced: id3 "
                "cannot tell when it is whole. For gradient accumulation give Moment its accumulation_steps."
            )
        self.parts += 1
        if self.parts >= self.calls and not (contest.whole_step or self.waits):
            self.offer(dense if self.dense is None else self.dense.add_(dense))
        else:
            self.dense = dense.to(self.values.dtype, copy=True) if self.dense is None else self.dense.add_(dense)

    def offer(self, dense: Tensor) -> None:
        """Let all numbers that may be chosen take part in the step's contest."""
        self.offered, self.dense = True, None
        scores = self.method.scores(self.weight[0].detach(), dense).flatten()
        self.method.contest.spoiled |= not bool(scores.max().isfinite())
        if self.method.strategy != "repeat":
            scores[self.places.long()] = -math.inf
        self.method.contest.offer(self.order, scores, dense.flatten())

    def take_gradient(self, weight: nn.Parameter) -> None:
        """Where the weight has a gradient of its own: move it from there to the values."""
        dense, weight.grad = weight.grad, None
        assert dense is not None  # this is called when it has just been summed up
        self.on_gradient(dense)
        own = self.taken(dense).to(self.values.dtype)
        self.values.grad = own if self.values.grad is None else self.values.grad.add_(own)

    def finish_step(self) -> None:
        """Offer what has come, where less came than was announced or all was waited for."""
        if self.dense is not None:
            self.offer(self.dense)

    @torch.no_grad()
    def take(self, places: Int[Tensor, " m"], gradients: Float[Tensor, " m"], optimizer: Optimizer | None) -> None:
        """Have the numbers at `places`, whose gradients these are, train from this step on, beside those that do."""
        old = self.places.long()
        new = ~torch.isin(places, old)
        merged, order = torch.cat([old, places[new]]).sort()
        sources = torch.where(order < len(old), order, -1)
        gradient = self.values.grad if self.values.grad is not None else self.values.new_zeros(len(old))
        own, values = self.taken(places=places[new]), self.values.detach()
        self.places = merged.to(self.places)
        self.originals = torch.cat([self.originals, own])[order]
        replace_data(self.values, torch.cat([values, own.to(values.dtype)])[order])
        self.values.grad = torch.cat([gradient, gradients[new].to(values.dtype)])[order]
        if optimizer is not None:
            carry_state(optimizer, self.values, len(old), sources, self.method.name)

    @torch.no_grad()
    def select(self, places: Int[Tensor, " m"]) -> None:
        """Have only the numbers at these of the places train in this step."""
        self.selected = torch.isin(self.places.long(), places)
        self._before = self.values.detach().clone()
        if self.values.grad is not None:
            self.values.grad[~self.selected] = 0

    @torch.no_grad()
    def undo_unselected(self) -> None:
        """Put back numbers that the optimizer has moved though they were not to train in this step."""
        if self.selected is not None:
            self.values[~self.selected] = self._before[~self.selected]
            del self._before


@register_technique
@dataclass
class ID3(SparseSelection):
    """Single numbers of weights start to train step by step, as the gradients of each step ask for them.

    count: how many in all, at least 1; density: the share of the numbers to choose from, in its place.
    steps: over how many optimizer steps they start, at least 1; None: over all of the run.
    exponent: how much a large weight counts against a number; 0: gradients alone decide, negative: in its favour.
    epsilon: added to the weights' sizes, above 0.
    strategy: "increment"; "static": all at the first step, for good; "repeat": as many in every step, chosen anew.
    of: "weights" of the pretrained model; "adapters": of what adapters beside it have added, which then trains there
        alone.
    vectors: choose also from biases and the weights of norms, which get no weight decay under RecipeTrainer.

    Raises SettingError for settings out of range, and when attached if there are fewer numbers than are to train.
    """

    name: ClassVar[str] = "id3"
    varies: ClassVar[frozenset[str]] = frozenset({NUMBERS_HELD})
    unscaled_gradients: ClassVar[bool] = True

    count: int | None = None
    density: float | None = None
    steps: int | None = None
    exponent: float = 1.0
    epsilon: float = 0.1
    strategy: str = "increment"
    of: str = "weights"
    vectors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.contest = Contest()
        self.budget = 0
        self.updates = 0
        if self.count is not None and self.density is not None:
            raise SettingError("count and density of id3 say the same in two ways: give one of them.")
        for name in ("count", "steps"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < 1):
                raise settings_error(self.name, name, "at least 1", value)
        if self.density is not None and not 0 < self.density <= 1:
            raise settings_error(self.name, "density", "above 0 and at most 1", self.density)
        if not self.epsilon > 0:
            raise settings_error(self.name, "epsilon", "above 0", self.epsilon)
        if not math.isfinite(self.exponent):
            raise settings_error(self.name, "exponent", "a finite number", self.exponent)
        if self.strategy not in STRATEGIES:
            raise settings_error(self.name, "strategy", f"one of {', '.join(STRATEGIES)}", self.strategy)
        if self.of not in ("weights", "adapters"):
            raise settings_error(self.name, "of", "'weights' or 'adapters'", self.of)

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse to choose from adapters where there are none."""
        super().check_recipe(others)
        if self.of == "adapters" and not any(other.phase == Phase.ADAPTER for other in others):
            raise SettingError("id3 of adapters needs an adapter beside it in the recipe, such as lora.")

    @property
    def chosen_count(self) -> int:
        """How many numbers have started to train."""
        return sum(len(entries.places) for entries in self.entries.values())

    @property
    def finished(self) -> bool:
        """Whether no number is to start any more."""
        return self.strategy != "repeat" and 0 < self.budget <= self.chosen_count

    def scores(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """|g| / (|w| + epsilon)^exponent in float32 or wider."""
        wide = wide_dtype(weight.dtype)
        factor = weight.to(wide, copy=True).abs_().add_(self.epsilon).pow_(-self.exponent)
        return factor.mul_(gradient).abs_()  # one tensor of the weight's size, however it is computed

    def places(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Int[Tensor, " n"]]:
        """None to begin with; where there are no values, as at the end: spread evenly."""
        if all(has_values(weight) for weight in weights.values()):
            return {}
        share = self.budget / sum(weight.numel() for weight in weights.values())
        return {name: torch.arange(math.ceil(share * weight.numel())) for name, weight in weights.items()}

    def make_entries(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"]) -> Growing:
        """With a look at the weight's gradients."""
        return Growing(name, weight, places, self)

    def may_choose(self, module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
        """Matrices; vectors on request."""
        return (self.vectors and parameter.dim() < 2) or super().may_choose(module, key, parameter)

    def candidates(self, model: nn.Module) -> dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]]:
        """The weights to choose from: the base model's, or those that adapters train.

        Raises SettingError if there are fewer numbers than are to train, or none.
        """
        found = super().candidates(model) if self.of == "weights" else self._adapter_weights(model)
        size = sum(parameter.numel() for _, parameter in found.values())
        self.budget = max(round((self.density or DENSITY) * size), 1) if self.count is None else self.count
        if self.budget > size:
            raise SettingError(f"count of id3 is {self.budget}, but there are only {size} numbers to choose from.")
        return found

    def _adapter_weights(self, model: nn.Module) -> dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]]:
        if self.target_modules is not None or self.exclude_modules is not None:
            raise SettingError(
                "target_modules and exclude_modules of id3 say nothing with of: adapters: it chooses from all that the "
                "adapters train. Set the adapter's own target_modules."
            )
        heads = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        whole = {id(p) for module in heads for p in module.parameters()}
        found: dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]] = {
            name: ([], parameter)
            for name, _, _, parameter in named_parameters(model)
            if parameter.requires_grad and id(parameter) not in whole
        }
        if not found:
            raise SettingError("id3 of adapters finds no trained weight of an adapter to choose from.")
        return found

    def _show_to_modules(self, undo: ExitStack, holders: Mapping[str, list[tuple[nn.Module, str]]]) -> None:
        """See gradients where modules read weights; of adapters, which are read in many ways, where they arrive."""
        if self.of == "weights":
            super()._show_to_modules(undo, holders)
        for name, entries in self.entries.items():
            assert isinstance(entries, Growing)
            for module, _ in holders[name]:
                undo.callback(module.register_forward_pre_hook(entries.count_call).remove)
            if self.of == "adapters":
                undo.callback(entries.leave)
                entries.waits = True
                weight = entries.weight[0].requires_grad_(True)
                undo.callback(weight.register_post_accumulate_grad_hook(partial(_hand_over, ref(entries))).remove)

    def on_attached(self, model: nn.Module) -> None:
        """Leave weights that others train whole to them.

        Raises SettingError if these are all.
        """
        if self.of == "weights" and all(entries.weight[0].requires_grad for entries in self.entries.values()):
            raise SettingError(
                "All weights that id3 chooses from train whole by another technique of the recipe: take one of the two "
                "out, or name other modules in target_modules."
            )

    @property
    def _growing(self) -> list[Growing]:
        return [entries for entries in self.entries.values() if isinstance(entries, Growing)]

    def on_step_begin(self, moment: Moment) -> None:
        """Look for the numbers of this step in the gradients that are to come."""
        refuse_several_processes(self.name, "chooses by the gradients of one process")
        check_by_number(moment.optimizer, self.name)
        for order, entries in enumerate(self._growing):
            entries.begin_step(order)
        valueless = not all(has_values(entries.values) for entries in self._growing)
        wanted = 0 if valueless else self._wanted(moment)
        self.contest.open(wanted, whole_step=moment.accumulation_steps > 1)

    def _wanted(self, moment: Moment) -> int:
        """How many numbers to look for in the step that begins."""
        if self.strategy == "repeat":
            return self.budget
        due = self.budget
        if self.strategy == "increment":
            steps = self.steps or moment.num_steps
            if steps < 1:
                raise SettingError(
                    "The run does not say how many steps it has, over which id3 is to spread its numbers: set steps."
                )
            due = self.budget * min(moment.step + 1, steps) // steps
        return max(due - self.chosen_count, 0)

    def before_clipping(self, moment: Moment) -> None:
        """Let the chosen numbers train from this step on, so that what is clipped is the gradient of all that do."""
        if not self.contest.wanted:
            return
        growing = self._growing
        for entries in growing:
            entries.finish_step()
        if not any(entries.offered for entries in growing):
            raise SettingError("No gradient reached any of the weights that id3 chooses from: nothing can train.")
        best = self.contest.close()
        for order, (places, gradients) in best.items():
            growing[order].take(places, gradients, moment.optimizer)
        if self.strategy == "repeat" and best:
            for order, entries in enumerate(growing):
                entries.select(best[order][0] if order in best else entries.places[:0])

    def on_gradients(self, moment: Moment) -> None:
        """The same where nothing is clipped."""
        self.before_clipping(moment)

    def on_step_end(self, moment: Moment) -> None:
        """Count the updates, and write them into the weights."""
        for entries in self._growing:
            self.updates += len(entries.places) if entries.selected is None else int(entries.selected.sum())
            entries.undo_unselected()
        super().on_step_end(moment)

    def measured(self) -> dict[str, float]:
        """The numbers that train by now, and the updates of single numbers made so far."""
        return {"id3_numbers": self.chosen_count, "id3_updates": self.updates}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Numbers of biases and norms, without weight decay, as Trainer has such weights where they train whole."""
        spared = [entries.values for entries in self.entries.values() if entries.weight[0].dim() < 2]
        return [{"params": spared, "weight_decay": 0.0}] if spared and self.vectors else []

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """Weights without a chosen number so far, and adapters' own tensors, which train by what is chosen of them."""
        idle = {id(entries.values) for entries in self._growing if not len(entries.places)}
        if self.of == "adapters":
            idle |= {id(entries.weight[0]) for entries in self._growing}
        return {name for name, parameter in model.named_parameters() if id(parameter) in idle}

    def state_dict(self) -> dict[str, Any]:
        """The updates so far."""
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.updates = state["updates"]


def _hand_over(entries: ref[Growing], weight: nn.Parameter) -> None:
    """Let the entries take the gradient of their weight, whose hooks Python's garbage collector does not look into."""
    if (found := entries()) is not None:
        found.take_gradient(weight)
