r"""Noise that a seed draws again: weights are moved along it, back, and later for good, and it is never kept.

Shapes   one weight, of any shape, at a time; noise z of its size, in parts of at most `PART` numbers
Costs    one part in float32; drawing z takes as long as reading some numbers from memory, on each visit

A draw depends on the kind of device: what a GPU draws from a seed is not what a CPU draws from it.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..draws import undrawn
from ..errors import SettingError
from ..fakes import has_values
from ..modes import dropouts
from ..precision import wide_dtype

PART = 2**20
SEEDS_APART = 0x9E3779B1
DTYPES = (torch.float32, torch.float64, torch.bfloat16)

BringBack = Literal["add_back", "copy", "host_copy"]


def check_weights(weights: Mapping[str, nn.Parameter], technique: str) -> None:
    """Raise SettingError, with the name, for a weight that noise cannot be added to."""
    for name, weight in weights.items():
        dtype = str(weight.dtype).removeprefix("torch.")
        if not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
            raise SettingError(
                f"{technique} would move {name}, a {type(weight).__name__} of {dtype}, which is quantised or holds no "
                "real numbers: train adapters or a selection of weights, or load the model in 16 or 32 bits."
            )
        if weight.dtype not in DTYPES:
            raise SettingError(
                f"{technique} would move {name} in {dtype}, whose range is too small for updates; set model.dtype to "
                "float32 or bfloat16."
            )
        if has_values(weight) and not weight.is_contiguous():
            raise SettingError(f"{technique} moves weights that are contiguous, but {name} is not: make it so.")


def seed_on(number: int, seed: int) -> int:
    """The seed on the first device, 0, and others that weights lie on: with one for all, each would draw the same."""
    return seed + number * SEEDS_APART


def drawn(weights: Sequence[Tensor], seed: int) -> Iterator[tuple[int, Tensor, Tensor, torch.Generator | None]]:
    """Each part of the weights in order, with its noise: the weight's index, a flat view, z, and what drew it.

    weights: in the same order, and on devices of the same kind, whenever z is to be the same.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for index, weight in enumerate(weights):
        generator = None
        if has_values(weight):
            if weight.device not in generators:
                own = seed_on(len(generators), seed)
                generators[weight.device] = torch.Generator(weight.device).manual_seed(own)
            generator = generators[weight.device]
        dtype = wide_dtype(weight.dtype)
        flat = weight.detach().view(-1)
        for start in range(0, flat.numel(), PART):
            part = flat[start : start + PART]
            noise = torch.randn(len(part), dtype=dtype, device=part.device, generator=generator)
            yield index, part, noise, generator


@torch.no_grad()
def add_noise(weights: Sequence[Tensor], seed: int, scale: float) -> None:
    """weight += scale z, in place."""
    for _, part, noise, generator in drawn(weights, seed):
        _add(part, noise.mul_(scale), generator)


@torch.no_grad()
def update(
    weights: Sequence[Tensor], seed: int, rates: Sequence[float], slope: float, decays: Sequence[float] = ()
) -> None:
    """weight -= rate slope z + rate decay weight, in place, with a rate and a decay for each weight; no decays: 0."""
    for index, part, noise, generator in drawn(weights, seed):
        noise.mul_(-rates[index] * slope)
        if decays and (shrink := rates[index] * decays[index]):
            noise.add_(part, alpha=-shrink)
        _add(part, noise, generator)


def _add(part: Float[Tensor, " n"], change: Float[Tensor, " n"], generator: torch.Generator | None) -> None:
    """part += change; in 16 bits rounded at random, up or down, so that small changes count on average."""
    if part.dtype != torch.bfloat16:
        part.add_(change)
        return
    # bfloat16 is the upper half of float32: a random lower half, added, carries as often as it should
    bits = change.add_(part).view(torch.int32)
    bits.add_(torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator))
    part.copy_(bits.bitwise_and_(-(2**16)).view(torch.float32))


@dataclass
class Walk:
    """Weights on their way along the noise of one seed: `go(scale)` brings them to start + scale z, `go(0)` back.

    bring_back: "add_back" undoes a move by the opposite one: each number may be off by its last bit afterwards.
        "copy" keeps the start beside the weights and "host_copy" in the memory of the host; both are exact.
    """

    weights: Sequence[Tensor]
    seed: int
    bring_back: BringBack = "add_back"
    at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        device = torch.device("cpu") if self.bring_back == "host_copy" else None
        copied = () if self.bring_back == "add_back" else self.weights
        self.start = [weight.detach().to(device or weight.device, copy=True) for weight in copied]

    @torch.no_grad()
    def go(self, scale: float) -> None:
        """Move the weights, in place."""
        if self.start and self.at != 0:
            for weight, start in zip(self.weights, self.start, strict=True):
                weight.copy_(start)
            self.at = 0.0
        if scale != self.at:
            add_noise(self.weights, self.seed, scale - self.at)
        self.at = scale


def losses_at(
    weights: Sequence[Tensor], seed: int, scales: Sequence[float], loss: Callable[[], Tensor], bring_back: BringBack
) -> list[Tensor]:
    """The loss at start + scale z for each scale; the weights are back at the start afterwards, whatever happens.

    What a loss draws at random is the same for each scale, and counts once.
    """
    walk = Walk(weights, seed, bring_back)
    devices = {weight.device for weight in weights if has_values(weight)}
    try:
        found = []
        for index, scale in enumerate(scales):
            walk.go(scale)
            with undrawn(devices) if index + 1 < len(scales) else nullcontext():
                found.append(loss().detach())
        return found
    finally:
        walk.go(0.0)


def seeds_of(seed: int, step: int, count: int) -> list[int]:
    """Seeds of 31 bits for the directions of one step.

    >>> seeds_of(0, 0, 2) == seeds_of(0, 0, 3)[:2] != seeds_of(0, 1, 2)
    True
    """
    draw = random.Random(f"{seed} {step}")
    return [draw.getrandbits(31) for _ in range(count)]


def chosen_way_back(wanted: BringBack | None, weights: Sequence[Tensor], model: nn.Module, technique: str) -> BringBack:
    """What was set; else a copy where it is small beside the model or weights have 16 bits, and adding back elsewhere.

    Raises SettingError for adding back in 16 bits, which would move weights by far more than updates do.
    """
    narrow = any(weight.dtype == torch.bfloat16 for weight in weights)
    if wanted == "add_back" and narrow:
        raise SettingError(
            f"{technique} cannot bring weights in bfloat16 back by adding, as rounding would change them: set "
            "bring_back to copy or host_copy, or load the model in float32, which takes no more memory than a copy."
        )
    return wanted or ("copy" if narrow or is_small(weights, model) else "add_back")


def warn_of_dropout(model: nn.Module, technique: str, told: str) -> None:
    """Warn once where the model has dropout, which `quiet` switches off. told: what becomes of it."""
    if shares := dropouts(model):
        name, share = next(iter(shares.items()))
        warnings.warn(
            f"{technique} compares losses of one batch: the dropout of {len(shares)} modules, {name} ({share:g}) "
            f"first, {told}."
        )


def is_small(weights: Sequence[Tensor], model: nn.Module) -> bool:
    """Whether a copy of the weights is at most a fiftieth of the model."""
    return 50 * sum(weight.nbytes for weight in weights) <= sum(p.nbytes for p in model.parameters())
