r"""SNELLA: kernelised sparse tuning in which layers compete for the entries that change.

Source   Shen et al. 2025, arXiv:2510.24037
Update   W' = W + V gate(|V|), V = K + a softmax(K / g, over out) + e, K the kernel of P and Q and gate of
         `sparse_kernel.py`. Of all entries of all layers v(t) may change,
             v(t) = v_T + (v_0 - v_T) (1 - t)^3, t from 0 after warm-up to 1 before the final phase
         and a layer's part of them goes by its score, mean(I U) over P + mean(I U) over Q: for each number p of them
         I is the smoothed |p dL/dp|, U the smoothed distance of |p dL/dp| from I
Shapes   W, K and V [out, in], P [2, in, r / 2], Q [2, out, r / 2], a, g and e one number each
Start    P and Q Kaiming, a = g = 1, e = 0: near W, not W itself
Trains   r (in + out) + 3 numbers a layer
Costs    as SNELL, and two numbers for each trained one, I and U
Differs  scores are updated at every step, before the optimizer moves p, and entries handed out a hundred times in a run
         (the authors' code does both at the end of each of its hundred epochs, after the optimizer)
"""

from dataclasses import dataclass
from math import floor
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..technique import Moment
from .base import register
from .sparse_kernel import SparseKernelAdapter, SparseKernelConfig, num_zero

NUM_ALLOCATIONS = 100  # in a run, where period_steps is None


class SNELLA(SparseKernelAdapter):
    """The factors P and Q of one adapter on one layer, the mix a, g, e, and how many entries it may change."""

    name = "snella"
    cannot: ClassVar = {
        "check_starts_as_the_pretrained_model": "its factors start small, not at zero, where they could not learn",
        "check_gradients_are_those_of_the_output": "what the gate lets through counts as constant in backward",
    }
    num_changed: Tensor

    def __init__(self, base: nn.Module, config: "SNELLAConfig"):
        super().__init__(base, config)
        self.mix = nn.Parameter(torch.tensor([1.0, 1.0, 0.0]))
        changed = self.num_entries - num_zero(config.start_sparsity, self.num_entries)
        self.register_buffer("num_changed", torch.tensor([changed]))

    @property
    def num_entries(self) -> int:
        """Of the layer's weight."""
        return self.size[0] * self.size[1]

    def num_zero(self) -> int:
        """All entries but those that were allotted to this layer."""
        return self.num_entries - int(self.num_changed)


@register
@dataclass(kw_only=True)
class SNELLAConfig(SparseKernelConfig):
    """SNELLA: SNELL, with more entries changed in layers where that matters more.

    sparsity: share of all entries that stay as they are in the end, 0 <= sparsity < 1; 0.3 to 0.8 in the paper.
    start_sparsity: the same at the start, in every layer; at most sparsity.
    warmup_fraction, final_fraction: shares of the run, first and last, in which the budget does not change.
    period_steps: entries are handed out every so many optimizer steps; None: a hundred times in the run.
    importance_decay, uncertainty_decay: of the two running means that scores are made of, in [0, 1).
    Further settings: see `SparseKernelConfig`.

    Raises ValueError for values out of range, and for gate="none", which leaves nothing to compete for.
    """

    method: ClassVar = SNELLA
    sparsity: float = 0.5
    start_sparsity: float = 0.0
    warmup_fraction: float = 0.0
    final_fraction: float = 0.0
    period_steps: int | None = None
    importance_decay: float = 0.85
    uncertainty_decay: float = 0.85

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = ("sparsity", "start_sparsity", "warmup_fraction", "final_fraction")
        for name in (*shares, "importance_decay", "uncertainty_decay"):
            self.check_share(name)
        if self.gate == "none":
            raise ValueError("gate of snella must be 'soft' or 'hard': with 'none' all entries change in every layer.")
        if self.start_sparsity > self.sparsity:
            raise ValueError(
                f"start_sparsity of snella must be at most sparsity, {self.sparsity}, got {self.start_sparsity}."
            )
        if self.warmup_fraction + self.final_fraction >= 1:
            raise ValueError(
                "warmup_fraction and final_fraction of snella must leave a part of the run between them, got "
                f"{self.warmup_fraction} and {self.final_fraction}."
            )
        if self.period_steps is not None and self.period_steps < 1:
            raise ValueError(f"period_steps of snella must be at least 1, got {self.period_steps}.")
        self.means: dict[str, Tensor] = {}  # I and U of each factor, [2, ...], by the factor's name

    def on_gradients(self, moment: Moment) -> None:
        """Update I and U of all factors."""
        for name, factor in factors(moment.model).items():
            if factor.grad is None:
                continue
            new = (factor.detach() * factor.grad).abs().nan_to_num_()
            means = self.means[name].to(new.device) if name in self.means else new.new_zeros(2, *new.shape)
            self.means[name] = means
            importance, uncertainty = means
            importance.lerp_(new, 1 - self.importance_decay)
            uncertainty.lerp_((new - importance).abs_(), 1 - self.uncertainty_decay)

    def on_step_end(self, moment: Moment) -> None:
        """Hand out the entries, where it is time to.

        Raises ValueError if nobody said how long the run is.
        """
        if not moment.num_steps:
            raise ValueError("snella lowers its budget over the run, and must know num_steps; none was given.")
        period = self.period_steps or max(1, moment.num_steps // NUM_ALLOCATIONS)
        if moment.step % period and moment.step < moment.num_steps:
            return
        layers = competing(moment.model)
        sizes = [layer.num_entries for layer in layers.values()]
        scores = [self.score(name) for name in layers]
        parts = allot(self.budget(moment.step / moment.num_steps, sizes), scores, sizes)
        for layer, part in zip(layers.values(), parts, strict=True):
            layer.num_changed.fill_(part)

    def score(self, layer: str) -> float:
        """mean(I U) over P + mean(I U) over Q; 0 before there was a gradient."""
        means = [self.means[name] for name in (f"{layer}.p", f"{layer}.q") if name in self.means]
        return float(sum((both[0] * both[1]).mean() for both in means))

    def budget(self, done: float, sizes: list[int]) -> int:
        """How many entries of layers of these sizes may change; done: the share of the run that is over."""
        start, end = (
            sum(size - num_zero(share, size) for size in sizes) for share in (self.start_sparsity, self.sparsity)
        )
        time = (done - self.warmup_fraction) / (1 - self.final_fraction - self.warmup_fraction)
        return end + round((start - end) * (1 - min(max(time, 0.0), 1.0)) ** 3)

    def state_dict(self) -> dict[str, Any]:
        """I and U; what was handed out is saved with the layers."""
        return dict(self.means)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take I and U back."""
        self.means = dict(state)


def competing(model: nn.Module) -> dict[str, SNELLA]:
    """The adapters that train, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SNELLA) and m.p.requires_grad}


def factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """P and Q of the adapters that train, by name."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in competing(model).items() for part in ("p", "q")}


def allot(budget: int, scores: list[float], sizes: list[int]) -> list[int]:
    """Whole numbers in proportion to the scores, none above its size: the excess goes to the others.

    They add up to the budget but for rounding down, less than one a layer. Where no layer with room has a score, the
    rest goes by size.
    """
    parts = [0.0] * len(sizes)
    left, open_ = float(budget), set(range(len(sizes)))
    while open_:
        weights: list[Any] = scores if sum(scores[i] for i in open_) > 0 else sizes
        total = sum(weights[i] for i in open_)
        full = {i for i in open_ if left * weights[i] / total >= sizes[i]}
        for i in full or open_:
            parts[i] = sizes[i] if full else left * weights[i] / total
        if not full:
            break
        left -= sum(sizes[i] for i in full)
        open_ -= full
    return [floor(part) for part in parts]
