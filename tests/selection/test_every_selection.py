"""Every selection beside what runs blocks otherwise: each gradient is that of the plain model, all of which trains."""

from dataclasses import replace
from functools import partial

import pytest

from shoestring import Recipe
from shoestring.blocks import Recompute, TokenTune
from shoestring.selection import ID3, IST, SPT, BitFit, NormTuning, SparseGrad, Speft, Unfreeze
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, Step, all_training, seeded, step

SELECTIONS = {
    "bitfit": BitFit(),
    "norm_tuning": NormTuning(),
    "id3": ID3(count=90, steps=1),
    "ist": IST(active_layers=1, importance=False),
    "sparse_grad": SparseGrad(calibration_rows=8),
    "speft": Speft(count=90, calibration_rows=8),
    "spt": SPT(budget=900, r=2, calibration_rows=8),
    "unfreeze": Unfreeze(blocks=[0], norms=True),
}


@pytest.mark.parametrize("beside", [Recompute(), TokenTune(keep_fraction=1.0)], ids=lambda technique: technique.name)
@pytest.mark.parametrize("tiny", [CLASSIFIER, DECODER], ids=lambda tiny: tiny.name)
@pytest.mark.parametrize("name", SELECTIONS)
def test_gradients_are_those_of_the_plain_model(name, tiny, beside):
    selection, lora = SELECTIONS[name], [tiny.lora()] if name == "ist" else []
    if name == "bitfit" and tiny is DECODER:
        selection = BitFit(added=["o_proj", "gate_proj"])

    def first_step(*techniques, all_train: bool = False) -> Step:
        with seeded(7):
            model = Recipe(*lora, *techniques).apply(tiny.make().double(), data=tiny.data())
        return step(all_training(model), tiny.batch()) if all_train else step(model, tiny.batch(), at=0)

    alone, ours = first_step(selection), first_step(selection, beside)
    ours.assert_same_names(alone, f"{name} beside {beside.name}")
    assert ours.error(alone) < 1e-6
    if name != "sparse_grad" and selection == SELECTIONS[name]:  # others train what is no part of the plain model
        plain = named_as_in_the_model(first_step(all_train=True))
        assert named_as_in_the_model(ours).error(plain, own=[r".*\.lora_.*"] if name == "spt" else []) < 1e-6


def named_as_in_the_model(found: Step) -> Step:
    """A step of a model that peft may have wrapped."""
    plain = partial(_without, parts=("base_model.model.", ".base_layer"))
    numbers = {plain(name): (plain(weight), places) for name, (weight, places) in found.numbers.items()}
    return replace(found, gradients={plain(n): g for n, g in found.gradients.items()}, numbers=numbers)


def _without(name: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        name = name.replace(part, "")
    return name
