"""Techniques whose processes would part from each other refuse to train in several."""

import pytest
import torch

from shoestring import Recipe
from shoestring.errors import SettingError
from shoestring.optimizers import BilevelZOFO
from shoestring.pruning import LightPEFT
from shoestring.recipe import attached_to
from shoestring.selection import ID3, IST, Speft
from shoestring.technique import Moment, Technique
from shoestring.testing.tiny_models import CLASSIFIER, classifier

ALONE = {
    "id3": ID3(count=5),
    "ist": IST(importance=False, active_layers=1),
    "speft": Speft(count=5, score="random", dynamic_steps=2),
    "light_peft": LightPEFT(channel_multiple=4),
    "bilevel_zofo": BilevelZOFO(),
}


@pytest.mark.parametrize("name", ALONE)
def test_several_processes_are_refused(name, monkeypatch):
    technique: Technique = ALONE[name]
    model = Recipe(CLASSIFIER.lora(), technique).apply(classifier())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for processes in (1, 2):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda count=processes: count)
        if processes == 1:
            attached_to(model).event("on_step_begin", Moment(model, optimizer, num_steps=4))
            continue
        with pytest.raises(SettingError, match=f"^{name} .*: it trains in one process only, and here are 2"):
            attached_to(model).event("on_step_begin", Moment(model, optimizer, num_steps=4))


def test_what_was_chosen_once_may_train_in_several(monkeypatch):
    model = Recipe(Speft(count=5, score="random")).apply(classifier())
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    attached_to(model).event("on_step_begin", Moment(model, num_steps=4))
