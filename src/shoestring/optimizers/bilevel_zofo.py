r"""Bilevel ZOFO: adapters learn by gradients in an inner loop, the backbone by forwards alone in an outer one.

Source   Shirkavand et al. 2025, arXiv:2502.03604
Update   h(W, p) = [F(W, p) + penalty (G(W, p) - G(W, s))] / (1 + penalty)
         inner    s <- the run's optimizer on dG(W, s)/ds, for inner_steps steps
         outer    p <- the same on dh/dp; W <- W - backbone_lr c z, c = (h(W + eps z) - h(W - eps z)) / (2 eps)
Shapes   F a loss on held-out rows, G on those of the step; p and s two copies of what the recipe's adapters train
Start    p = s = the adapters' own start
Trains   p, and all of the backbone or some of its modules. Evaluation, saving and export use W and p
Costs    those of the adapters, with one more copy of them and its optimizer state; no gradient or state of W. An outer
         step runs two backwards through the adapters and six forwards without any
Differs  h is normalised, so that the learning rate of W does not depend on the penalty; two-sided differences by
         default (the authors' code is one-sided); W is moved as the noise is drawn again, where theirs fills the
         gradients of all weights and runs Adam on them
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..modes import quiet
from ..selection.base import pretrained_modules
from ..targets import Names, targeted
from ..technique import NUMBERS_HELD, MicroBatch, Moment, Phase, Technique, refuse_several_processes, register_technique
from ..wrappers import innermost
from .seeded_noise import BringBack, check_weights, chosen_way_back, losses_at, seeds_of, warn_of_dropout
from .step_log import StepLog


@register_technique
@dataclass
class BilevelZOFO(Technique):
    """Steps of the adapters by gradients, and after every `inner_steps` of them one that moves the backbone too.

    inner_steps: steps of s before each outer one; 10 to 50.
    penalty: how much p is held to do as well as s on the training rows; 0 leaves the held-out loss alone.
    backbone_lr: learning rate of W, under the run's schedule; 0 leaves W as it is.
    outer_lr: learning rate of p, under the schedule too; None: the run's, as s has it.
    eps: how far W moves for a forward. two_sided: differences around W; or else from W on, with half the forwards.
    target_modules: names, or a regular expression for whole names, of modules whose weights are W; None: all.
    exclude_modules: names or a regular expression of modules to leave out.
    bring_back: how W comes back after a forward, as in `zeroth_order`.
    seed: of all directions and of the held-out rows drawn.

    Raises SettingError for settings out of range, without adapters or prompts in the recipe, for weights that are
    quantised or in float16; and in the first step, if the run has no held-out rows.
    """

    name: ClassVar[str] = "bilevel_zofo"
    phase: ClassVar[Phase] = Phase.OPTIMIZER
    needs: ClassVar[frozenset[Phase]] = frozenset({Phase.ADAPTER, Phase.PROMPT})
    claims: ClassVar[frozenset[str]] = frozenset({"the training step"})
    holds: ClassVar[frozenset[str]] = frozenset({NUMBERS_HELD})  # of which it has two copies

    inner_steps: int = 30
    penalty: float = 10.0
    backbone_lr: float = 1e-6
    outer_lr: float | None = None
    eps: float = 1e-3
    two_sided: bool = True
    target_modules: Names | None = None
    exclude_modules: Names | None = None
    bring_back: BringBack | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for setting, allowed, good in (
            ("inner_steps", "at least 1", self.inner_steps >= 1),
            ("penalty", "a number of at least 0", 0 <= self.penalty < math.inf),
            ("backbone_lr", "a number of at least 0", 0 <= self.backbone_lr < math.inf),
            ("outer_lr", "a number of at least 0", 0 <= (self.outer_lr or 0) < math.inf),
            ("eps", "positive", 0 < self.eps < math.inf),
        ):
            if not good:
                raise SettingError(f"{setting} of bilevel_zofo must be {allowed}, got {getattr(self, setting)}.")
        self.log = StepLog()
        self.backbone: dict[str, nn.Parameter] = {}
        self.outer: dict[str, nn.Parameter] = {}  # p, which are the adapters' own weights
        self.inner: dict[str, nn.Parameter] = {}  # s, made when the optimizer is
        self._saved_inner: dict[str, Tensor] = {}
        self._way_back: BringBack = "copy"
        self._step = 0
        self._num_seen = 0  # micro-batches of this step
        self._knows_rows = False
        self._slope: float | None = None

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse an optimizer of another technique, which would know only one of the copies."""
        for other in others:
            if type(other).make_optimizer is not Technique.make_optimizer:
                raise SettingError(
                    f"bilevel_zofo and {other.name} cannot be combined: {other.name} brings an optimizer that would "
                    "not know the inner copy of the adapters."
                )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Leave nothing behind but the backbone, trained."""
        try:
            yield model
        finally:
            self.backbone, self.outer, self.inner = {}, {}, {}

    def on_attached(self, model: nn.Module) -> None:
        """Find the backbone, and the adapters, which are what trains by gradients."""
        modules = {name: module for name, module in pretrained_modules(innermost(model)) if name}
        chosen = targeted(modules, self.target_modules, self.exclude_modules, self.name).values()
        meant = {id(p) for module in chosen for p in module.parameters(recurse=False)}
        self.outer = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.backbone = {n: p for n, p in model.named_parameters() if id(p) in meant and not p.requires_grad}
        if not self.outer or not self.backbone:
            what = "adapters or prompts that train" if not self.outer else "frozen weights to move"
            raise SettingError(f"bilevel_zofo finds no {what} in {type(innermost(model)).__name__}.")
        check_weights(self.backbone, self.name)
        self._way_back = chosen_way_back(self.bring_back, list(self.backbone.values()), model, self.name)
        if self.backbone_lr:
            told = "is off in the forwards that move the backbone, and acts in those that train the adapters"
            warn_of_dropout(model, self.name, told)
        self.log.describe(self.backbone, [0] * len(self.backbone), [0.0])

    def trained_without_gradient(self, model: nn.Module) -> list[nn.Parameter]:
        """The backbone."""
        return list(self.backbone.values())

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The inner copy, with the options of the outer one, which has its own learning rate if it is set."""
        if not self.inner:
            start = self._saved_inner or self.outer
            self.inner = {name: nn.Parameter(start[name].detach().clone().to(p)) for name, p in self.outer.items()}
        inner, outer = list(self.inner.values()), list(self.outer.values())
        if self.outer_lr is None:
            return [{"params": inner, "like": outer}]
        return [{"params": inner, "like": outer, "lr_factor": 1.0}, {"params": outer, "lr": self.outer_lr}]

    @property
    def is_outer(self) -> bool:
        """Whether this step is an outer one."""
        return (self._step + 1) % (self.inner_steps + 1) == 0

    def on_step_begin(self, moment: Moment) -> None:
        """Note which step it is."""
        refuse_several_processes(self.name, "draws held-out rows and moves the backbone for itself")
        self._step, self._num_seen = moment.step, 0

    def training_step(self, batch: MicroBatch) -> Tensor:
        """An inner or an outer step, but for the optimizer's part; the loss is one of training rows."""
        if not self.inner:
            raise SettingError("bilevel_zofo gives the optimizer a copy of the adapters: let the trainer make it.")
        seed = seeds_of(self.seed, self._step, 1)[0]
        if self.is_outer or not self._knows_rows:  # a run that has none is refused before its first step
            held_out = batch.held_out(seed + self._num_seen)
            self._knows_rows = True
        self._num_seen += 1
        if self.is_outer:
            loss = self._gradient_of_outer(batch, held_out)
            if self.backbone_lr:
                self._slope = (self._slope or 0.0) + self._slope_of_backbone(batch, held_out, seed)
            return loss
        with self._inner_copy():
            loss = batch.loss_of(batch.inputs)
            batch.backward(loss)
        return loss.detach()

    def _gradient_of_outer(self, batch: MicroBatch, held_out: dict[str, Any]) -> Tensor:
        """dh/dp, one graph after the other; the loss on training rows, where there is a penalty."""
        loss = batch.loss_of(held_out, held_out=True)
        batch.backward(loss / (1 + self.penalty))
        if self.penalty:
            loss = batch.loss_of(batch.inputs)
            batch.backward(loss * (self.penalty / (1 + self.penalty)))
        return loss.detach()

    def _slope_of_backbone(self, batch: MicroBatch, held_out: dict[str, Any], seed: int) -> float:
        """c, by forwards alone."""

        def height() -> Tensor:
            above = batch.loss_of(held_out, held_out=True)
            if self.penalty:
                above = above + self.penalty * batch.loss_of(batch.inputs)
                with self._inner_copy():
                    above = above - self.penalty * batch.loss_of(batch.inputs)
            return above / (1 + self.penalty)

        ends = [self.eps, -self.eps] if self.two_sided else [self.eps, 0.0]
        with quiet(batch.model):
            up, down = losses_at(list(self.backbone.values()), seed, ends, height, self._way_back)
        return (float(up) - float(down)) / (ends[0] - ends[1])

    @contextmanager
    def _inner_copy(self) -> Iterator[None]:
        """The adapters with the values of s."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.outer.items():
            value = p.clone()
            p.copy_(self.inner[name])
            self.inner[name].copy_(value)

    def on_gradients(self, moment: Moment) -> None:
        """In an inner step, gradients are those of s."""
        if self.inner and not self.is_outer:
            for name, p in self.outer.items():
                self.inner[name].grad, p.grad = p.grad, None

    def on_step_end(self, moment: Moment) -> None:
        """Move the backbone; without a step, if its slope is no number."""
        for s in self.inner.values():
            s.grad = None
        slope, self._slope = self._slope, None
        if slope is None:
            return
        if not math.isfinite(slope):
            warnings.warn("bilevel_zofo leaves the backbone as it is in a step whose loss is no number.")
            return
        group = moment.optimizer.param_groups[0] if moment.optimizer is not None else {}
        schedule = group["lr"] / group["initial_lr"] if group.get("initial_lr") else 1.0
        rounded = float(torch.tensor(slope, dtype=torch.float32))  # as it is written down
        weights = list(self.backbone.values())
        self.log.take(weights, seeds_of(self.seed, self._step, 1), [rounded], [self.backbone_lr * schedule])

    def state_dict(self) -> dict[str, Any]:
        """The inner copy."""
        return {"inner": {name: s.detach() for name, s in self.inner.items()}} if self.inner else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it over, now or when it is made."""
        self._saved_inner = state.get("inner", {})
        with torch.no_grad():
            for name, s in self.inner.items():
                s.copy_(self._saved_inner[name])

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the record of the backbone's steps; its weights are saved beside it."""
        self.log.save(folder)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Go on with a record."""
        self.log.take_over(StepLog.load(folder))
