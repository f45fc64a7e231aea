"""What selections of whole parameters share: what they train keeps its values when the recipe is taken off."""

import pytest
import torch

from shoestring import Recipe
from shoestring.selection import BitFit, NormTuning, Unfreeze
from shoestring.testing.tiny_models import CLASSIFIER, classifier


@pytest.mark.parametrize("technique", [BitFit(), NormTuning(), Unfreeze()], ids=lambda each: each.name)
def test_taken_off_what_trained_keeps_its_values_and_all_else_is_as_it_was(technique):
    base, start = classifier(), dict(classifier().named_parameters())
    model = Recipe(technique).apply(base)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any(not name.startswith("classifier") for name in trained)
    assert trained.keys() < start.keys()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        model(**CLASSIFIER.batch()).loss.backward()
        optimizer.step()
    learned = {name: p.detach().clone() for name, p in trained.items()}
    after = dict(Recipe.remove(model).named_parameters())
    assert after.keys() == start.keys()
    for name, parameter in after.items():
        assert torch.equal(parameter, learned.get(name, start[name])), name
        assert torch.equal(parameter, start[name]) == (name not in trained), name
        assert parameter.requires_grad
