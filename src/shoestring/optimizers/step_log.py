r"""The record of zeroth-order steps: a seed and a slope each, from which a fresh base is trained again.

Update   W <- W - rate (slope / directions) z(seed) - rate decay W, for each line of the record in order
Costs    8 bytes a step and direction; 8 a step and group of weights while the learning rate changes
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..whole_files import read_tensors, write_tensors
from .seeded_noise import update

FILE = "zeroth_order_steps.safetensors"


@dataclass
class StepLog:
    """What zeroth-order steps did to some weights.

    names: of the weights, in the order in which noise is drawn. groups: for each, the index of its learning rate.
    decays: the weight decay of each group. device: the kind that drew the noise; empty before the first step.
    seeds, slopes: of each step, one a direction. rates: of each step, one a group.
    """

    names: Sequence[str] = ()
    shapes: Sequence[Sequence[int]] = ()
    groups: Sequence[int] = ()
    decays: Sequence[float] = ()
    device: str = ""
    seeds: list[list[int]] = field(default_factory=list)
    slopes: list[list[float]] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)

    def describe(self, weights: Mapping[str, Tensor], groups: Sequence[int], decays: Sequence[float]) -> None:
        """Say which weights the steps are of; steps that are there already must be of the same ones.

        Raises SettingError if they are of others.
        """
        shapes = [list(weight.shape) for weight in weights.values()]
        if self.seeds and (list(self.names), list(self.shapes)) != (list(weights), shapes):
            raise SettingError(_of_another_model(self.names, weights))
        self.names, self.shapes, self.groups, self.decays = list(weights), shapes, list(groups), list(decays)

    def take_over(self, other: "StepLog") -> None:
        """Become equal to another record, for those who hold this one."""
        for each in fields(other):
            setattr(self, each.name, getattr(other, each.name))

    def take(self, weights: Sequence[Tensor], seeds: list[int], slopes: list[float], rates: list[float]) -> None:
        """Make one step, and write it down.

        Raises SettingError if the steps before were made on a device of another kind.
        """
        self.device = self.device or weights[0].device.type
        self._check_device(weights)
        self.seeds.append(seeds)
        self.slopes.append(slopes)
        self.rates.append(rates)
        self._make(weights, len(self.seeds) - 1)

    def replay(self, weights: Mapping[str, Tensor]) -> None:
        """Make all steps, on weights as they were before the first.

        Raises SettingError if they are other weights, or on a device of another kind.
        """
        shapes = [list(weight.shape) for weight in weights.values()]
        if list(weights) != list(self.names) or shapes != list(self.shapes):
            raise SettingError(_of_another_model(self.names, weights))
        self._check_device(weights.values())
        for step in range(len(self.seeds)):
            self._make(list(weights.values()), step)

    def _check_device(self, weights: Iterable[Tensor]) -> None:
        here = {weight.device.type for weight in weights}
        if self.device and here - {self.device}:
            raise SettingError(
                f"The zeroth-order steps were made on {self.device}, and noise is another on "
                f"{' and '.join(sorted(here))}: move the model to {self.device}."
            )

    def _make(self, weights: Sequence[Tensor], step: int) -> None:
        rates = [self.rates[step][group] for group in self.groups]
        decays = [self.decays[group] for group in self.groups]
        of_step = zip(self.seeds[step], self.slopes[step], strict=True)
        for direction, (seed, slope) in enumerate(of_step):
            # once a step, with the first direction
            update(weights, seed, rates, slope / len(self.seeds[step]), decays if direction == 0 else ())

    def save(self, folder: Path) -> None:
        """Write the record; learning rates once where they never change."""
        constant = all(rates == self.rates[0] for rates in self.rates)
        tensors = {
            "seeds": torch.tensor(self.seeds, dtype=torch.int32),
            "slopes": torch.tensor(self.slopes, dtype=torch.float32),
            "rates": torch.tensor(self.rates[:1] if constant else self.rates, dtype=torch.float64),
        }
        names = ("names", "shapes", "groups", "decays", "device")
        about = json.dumps({name: getattr(self, name) for name in names})
        write_tensors(folder / FILE, tensors, about=about)

    @classmethod
    def load(cls, folder: Path) -> "StepLog":
        """Read what `save` wrote.

        Raises SettingError if it is missing or damaged.
        """
        tensors, texts = read_tensors(folder / FILE)
        try:
            about = json.loads(texts["about"])
            seeds, slopes, rates = (tensors[name].tolist() for name in ("seeds", "slopes", "rates"))
        except (KeyError, ValueError) as error:
            raise SettingError(f"{folder / FILE}, the record of zeroth-order steps, cannot be read: {error}") from error
        return cls(**about, seeds=seeds, slopes=slopes, rates=rates * len(seeds) if len(rates) == 1 else rates)


def replay(model: nn.Module, folder: str | Path) -> None:
    """Train a fresh base again from the record in `folder`, in place and to the bit, without data or forwards.

    model: as it was before training, with the same recipe attached where that gives weights other names.

    Raises SettingError if it has not the weights that were trained, or is on another kind of device.
    """
    log = StepLog.load(Path(folder))
    parameters = dict(model.named_parameters())
    if missing := [name for name in log.names if name not in parameters]:
        raise SettingError(f"The steps in {folder} trained {missing[0]}, which {type(model).__name__} does not have.")
    log.replay({name: parameters[name] for name in log.names})


def _of_another_model(names: Sequence[str], weights: Mapping[str, Tensor]) -> str:
    odd = sorted(set(names) ^ set(weights))
    what = f"{odd[0]} is in one only" if odd else "weights have another order or other shapes"
    return f"The zeroth-order steps were made on another model: {what}. Use the model they were made on."
