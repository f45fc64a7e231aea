r"""SPEFT: a fixed number of single weights train, those that a score of the pretrained model says matter most.

Source   Liu, Tian, Zhao et al. 2024, arXiv:2412.13488; the mask of FISH is Sung, Nair, Raffel 2021, arXiv:2111.09839,
         that of PaFi Liao, Meng, Monz 2023, arXiv:2305.16742
Code     github.com/0-ml/speft (no licence file), read for its scores, nothing copied
Update   places = the `count` largest scores over all weights (scope="global") or in each one ("local"), with g the mean
         gradient of the loss over rows of data
         gradient |g|     snip |g W|    force -g W    taylor (g W)^2    fisher mean over rows of g_row^2 (FISH)
         grasp -(H g) W, H the loss's second derivative                 synflow |W dR/d|W|| without data
         magnitude |W|    small_magnitude -|W| (PaFi)                   random uniform
Shapes   W of any shape, places and values [n] a weight
Start    values = W[places], so step 0 is the pretrained model, to the bit
Trains   `count` numbers, or density times all numbers to choose from
Costs    16 bytes a number with AdamW; the input of every layer with one, and one dense gradient at a time in backward;
         before training `calibration_rows` steps without optimizer, and the scores of all weights on the host
Differs  the weights' own numbers train, not a difference to them, so that weight decay acts on them
         rows are scored one by one, so `fisher` squares gradients of single rows; in the paper's code of batches too
         grasp takes the largest -(H g) W, as the paper's list of scores has it; without temperature, and H g is a
         difference of gradients
         synflow runs one token: softmax of one number is 1, and queries and keys score 0; norms still divide by what
         comes in, only their weights are taken by size
         dynamic: a number that is left keeps what it has learned, as in the paper; moments of numbers that stay are
         kept, where the paper has new ones for all
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import SettingError
from ..fakes import has_values
from ..precision import without_autocast
from ..quantisation.calibration import Calibrated
from ..resizing import replace_data
from ..technique import NUMBERS_HELD, Moment, refuse_several_processes, register_technique
from .base import settings_error
from .optimizer_state import carry_state, check_by_number
from .scores import curvature_scores, flow_scores, gradient_scores
from .sparse import Entries, SparseSelection, top_places

Score = Literal[
    "gradient", "snip", "force", "taylor", "fisher", "grasp", "synflow", "magnitude", "small_magnitude", "random"
]
Scope = Literal["global", "local"]
OF_DATA = frozenset({"gradient", "snip", "force", "taylor", "fisher", "grasp"})

OF_GRADIENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gradient": lambda g, w: g.abs(),
    "snip": lambda g, w: (g * w).abs(),
    "force": lambda g, w: -g * w,
    "taylor": lambda g, w: (g * w).square(),
    "fisher": lambda g, w: g,
    "grasp": lambda h, w: -h * w,
    "synflow": lambda g, w: (g * w).abs(),
}
"""Scores from a weight and its gradient; of fisher from the squared one, of grasp from H g, of synflow from dR/d|W|."""

OF_WEIGHT: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs, "small_magnitude": lambda w: -w.abs()}


@register_technique
@dataclass(kw_only=True)
class Speft(Calibrated, SparseSelection):
    """Train the single weights with the largest scores.

    density: share of the numbers to choose from that train, 0 < density <= 1. count: how many, in its place.
    score: gradient, snip, force, taylor, fisher, grasp: of data; synflow, magnitude, small_magnitude, random: without.
    scope: global: the best of all weights together; local: of each weight, as many as its size asks for.
    dynamic_steps: choose anew every so many optimizer steps; None: once.
    seed: of random scores.
    target_modules, exclude_modules: whose weights may be chosen from; None: the linear layers in the model's blocks.
    calibration_rows, calibration_max_tokens, calibration_seed: how many rows, cut to how many tokens, which ones.
    train_head: also train what stands outside of the pretrained model, such as a new classifier.

    Raises SettingError for settings out of range.
    """

    name: ClassVar[str] = "speft"

    density: float | None = None
    count: int | None = None
    score: Score = "gradient"
    scope: Scope = "global"
    dynamic_steps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.density is None) == (self.count is None):
            raise SettingError(
                f"speft takes either density or count, got density={self.density!r} and count={self.count!r}."
            )
        if self.density is not None and not 0 < self.density <= 1:
            raise settings_error(self.name, "density", "above 0 and at most 1", self.density)
        if self.count is not None and self.count < 1:
            raise settings_error(self.name, "count", "at least 1", self.count)
        if self.score not in get_args(Score):
            raise settings_error(self.name, "score", "one of " + ", ".join(get_args(Score)), self.score)
        if self.scope not in get_args(Scope):
            raise settings_error(self.name, "scope", "global or local", self.scope)
        if self.dynamic_steps is not None and self.dynamic_steps < 1:
            raise settings_error(self.name, "dynamic_steps", "at least 1, or None", self.dynamic_steps)
        if self.dynamic_steps is not None:
            self.varies = frozenset({NUMBERS_HELD})  # type: ignore[misc]
        self._steps_scored = 0

    @property
    def reads_data(self) -> bool:
        """Whether the score is one of data."""
        return self.score in OF_DATA

    def on_attached(self, model: nn.Module) -> None:
        """Keep the rows if they are scored again."""
        rows = self._rows
        super().on_attached(model)
        if self.dynamic_steps is not None:
            self._rows = rows

    def places(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Int[Tensor, " n"]]:
        """The places with the best scores.

        Raises SettingError if there are fewer numbers than wanted, or scores are NaN or Inf.
        """
        counts = self._counts({name: weight.numel() for name, weight in weights.items()})
        if not all(has_values(weight) for weight in weights.values()):
            return {name: torch.arange(count) for name, count in counts.items()}
        scores = self._scores(model, weights)
        for name, score in scores.items():
            if not score.isfinite().all():
                raise SettingError(f"The scores of {name} hold NaN or Inf: check the model's weights.")
        if self.scope == "global":
            return top_places(scores, sum(counts.values()))
        return {
            name: top_places({name: scores[name]}, count)[name] if count else torch.empty(0, dtype=torch.int64)
            for name, count in counts.items()
        }

    def make_entries(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"]) -> Entries:
        """Such as can move, where places are chosen anew."""
        return (Entries if self.dynamic_steps is None else MovingEntries)(name, weight, places)

    def on_step_begin(self, moment: Moment) -> None:
        """Refuse optimizers and processes that cannot follow numbers that move."""
        if self.dynamic_steps is not None:
            refuse_several_processes(self.name, "with dynamic_steps chooses anew for itself")
            check_by_number(moment.optimizer, self.name)

    def on_step_end(self, moment: Moment) -> None:
        """Write the values; every so many steps, choose anew."""
        super().on_step_end(moment)
        if self.dynamic_steps is None or moment.step % self.dynamic_steps or moment.step == moment.num_steps:
            return
        if not all(has_values(entries.values) for entries in self.entries.values()):
            return
        self._steps_scored = moment.step
        with without_autocast(moment.model):  # as the first choice, which is made before training
            chosen = self.places(moment.model, {name: entries.weight[0] for name, entries in self.entries.items()})
        for name, entries in self.entries.items():
            if isinstance(entries, MovingEntries):
                entries.move(chosen[name], moment.optimizer)

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """The entries that have no place now, and may have some later."""
        empty = {id(entries.values) for entries in self.entries.values() if not len(entries.values)}
        return {name for name, p in model.named_parameters() if id(p) in empty}

    def state_dict(self) -> dict[str, Any]:
        """The places that were left, which are saved with those that train."""
        moving = {name: e for name, e in self.entries.items() if isinstance(e, MovingEntries)}
        return {"left": {name: entries.left.clone() for name, entries in moving.items()}} if moving else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Leave those places again."""
        for name, left in state.get("left", {}).items():
            entries = self.entries[name]
            if isinstance(entries, MovingEntries):
                places, _ = entries.learned()
                entries.move(places[~torch.isin(places, left.to(places))])

    def _counts(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """How many numbers of each weight are chosen; with scope="global" only their sum counts.

        Raises SettingError if that is none, or more than there are.
        """
        total = sum(sizes.values())
        if self.density is not None and self.scope == "local":
            counts = {name: round(self.density * size) for name, size in sizes.items()}
        else:
            wanted = round(self.density * total) if self.density is not None else self.count or 0
            if wanted > total:
                raise SettingError(
                    f"count of speft is {wanted}, but the {len(sizes)} weights to choose from have {total} numbers: "
                    "lower it, or name more modules in target_modules."
                )
            ends = [0]
            for size in sizes.values():
                ends.append(ends[-1] + size)
            ends = [wanted * end // total for end in ends]
            counts = {name: ends[i + 1] - ends[i] for i, name in enumerate(sizes)}
        if not sum(counts.values()):
            raise SettingError(f"density of speft is {self.density}, which is none of {total} numbers: raise it.")
        return counts

    def _scores(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """The score of every number of every weight, on the host."""
        if self.score == "random":
            generator = torch.Generator().manual_seed(self.seed + self._steps_scored)
            return {name: torch.rand(weight.shape, generator=generator) for name, weight in weights.items()}
        if self.score in OF_WEIGHT:
            return {name: OF_WEIGHT[self.score](_on_host(weight)) for name, weight in weights.items()}
        if self.score == "synflow":
            gradients = flow_scores(model, weights)
        else:
            rows, number, most = self.rows_drawn(), self.calibration_rows, self.calibration_max_tokens
            if self.score == "grasp":
                gradients = curvature_scores(model, weights, rows, number, max_tokens=most)
            else:
                squared = self.score == "fisher"
                gradients = gradient_scores(model, weights, rows, number, max_tokens=most, squared=squared)
        of = OF_GRADIENT[self.score]
        return {name: of(gradients.pop(name), _on_host(weight)) for name, weight in weights.items()}


class MovingEntries(Entries):
    """Chosen numbers of one weight whose places change while they train.

    left: the places that trained before and do not now; their numbers keep what they have learned.
    """

    moves = True
    left: Int[Tensor, " m"]
    left_values: Float[Tensor, " m"]
    left_originals: Float[Tensor, " m"]

    def __init__(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"]):
        super().__init__(name, weight, places)
        for part, like in (("left", self.places), ("left_values", self.values), ("left_originals", self.originals)):
            self.register_buffer(part, like.detach()[:0].clone(), persistent=False)

    def move(self, places: Int[Tensor, " n"], optimizer: Optimizer | None = None) -> None:
        """Train the numbers at other places from now on, each from what it is in the weight.

        The optimizer's state moves with the numbers that stay, and is 0 for others.
        """
        self.write(always=True)
        places = places.to(self.places)
        known, values = self.learned()
        originals = torch.cat([self.originals, self.left_originals])
        at, found = _positions(known, places)
        new_values, new_originals = (self.taken(places=places).to(all_.dtype) for all_ in (values, originals))
        new_values[found], new_originals[found] = values[at[found]], originals[at[found]]
        stay = found & (at < len(self.places))
        if optimizer is not None:
            carry_state(optimizer, self.values, len(self.places), torch.where(stay, at, -1), Speft.name)
        gone = ~torch.isin(known, places)
        self.left, self.left_values, self.left_originals = known[gone], values[gone], originals[gone]
        self.places, self.originals = places, new_originals
        self.values.grad = None
        replace_data(self.values, new_values)
        self.write(always=True)

    def learned(self) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """Those that train, then those that were left."""
        places, values = super().learned()
        return torch.cat([places, self.left]), torch.cat([values, self.left_values])

    def switch(self, on: bool) -> None:
        """Also of the numbers that were left."""
        super().switch(on)
        self.put(self.left_values if on else self.left_originals, self.left)

    def settle(self) -> None:
        """Also those that were left."""
        super().settle()
        self.left_originals = self.taken(places=self.left)

    def leave(self) -> None:
        """Also at the places that were left."""
        super().leave()
        self.put(self.left_originals, self.left)

    def replace(self, places: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Take other places, and leave none."""
        self.put(self.left_originals, self.left)
        super().replace(places, values)
        self.left, self.left_values, self.left_originals = self.left[:0], self.left_values[:0], self.left_originals[:0]


def _positions(known: Int[Tensor, " m"], wanted: Int[Tensor, " n"]) -> tuple[Int[Tensor, " n"], Bool[Tensor, " n"]]:
    """Where each of the wanted stands in `known`, and whether it does."""
    if not len(known):
        return torch.zeros_like(wanted, dtype=torch.int64), torch.zeros_like(wanted, dtype=torch.bool)
    order = known.argsort()
    at = torch.searchsorted(known[order], wanted).clamp(max=len(known) - 1)
    return order[at], known[order[at]] == wanted


def _on_host(weight: nn.Parameter) -> Tensor:
    return weight.detach().float().cpu()
