"""Methods whose papers train models of images learn on the packaged one."""

from typing import Any

import pytest
import torch
from transformers import AutoModel

from shoestring import Recipe, assets
from shoestring.testing.adapters import trainable
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import seeded

LAYERS = {"target_modules": ["q_proj", "v_proj", "fc1"], "layers_to_transform": [0, 11]}


@pytest.mark.parametrize(("method", "settings"), [("nera", {"r": 2}), ("tlora", {"r": 4})])
def test_it_learns_and_every_part_of_it_moves(method: str, settings: dict[str, Any]):
    need("dinov2-small")
    base = AutoModel.from_pretrained(assets.model_folder("dinov2-small"), dtype=torch.float32)
    with seeded(0):
        model = Recipe.from_list([{method: {**settings, **LAYERS}}]).apply(base).train()
        images = torch.randn(2, 3, 56, 56)
        wanted = torch.randn(2, base.config.hidden_size)
    own = trainable(model)
    before = {name: p.detach().clone() for name, p in own.items()}
    optimizer = torch.optim.Adam(own.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (model(pixel_values=images).pooler_output - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0], losses
    still = [name for name, p in own.items() if torch.equal(p, before[name])]
    assert own
    assert not still
