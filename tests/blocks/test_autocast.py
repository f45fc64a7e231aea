"""Backward in the dtypes of forward: adapters that compute in float32 do so in it too, also where autocast is on."""

import pytest
import torch
from torch import Tensor, nn

from shoestring.adapters import QWHA, HUTConfig, L4QConfig, QWHAConfig, SNELLConfig
from shoestring.blocks import Reversible, TokenWindows
from shoestring.recipe import Recipe
from shoestring.testing.tiny_models import DECODER, seeded

ADAPTERS = {
    "l4q": lambda: L4QConfig(group_size=4, target_modules="all-linear"),
    "qwha": lambda: QWHAConfig(r=2, init="zero", target_modules="all-linear", init_weights=False),
    "hut": lambda: HUTConfig(target_modules="all-linear", init_weights=False),
    "snell": lambda: SNELLConfig(target_modules="all-linear", init_weights=False),
}
TECHNIQUES = {
    "token_windows": (TokenWindows(window_tokens=4), None),
    "reversible": (Reversible(), Reversible(reversible_layers=0)),
}


@pytest.fixture(autouse=True)
def by_tokens(monkeypatch):
    monkeypatch.setattr(QWHA, "prefers_tokens", lambda self, num_tokens: True)


def model_with(adapter: str, *techniques) -> nn.Module:
    with seeded(2):
        return (
            Recipe(ADAPTERS[adapter](), *(one for one in techniques if one is not None)).apply(DECODER.make()).train()
        )


def gradients(model: nn.Module, inside: bool = False) -> dict[str, Tensor]:
    """Those of the adapter in a forward under autocast. inside: backward is called there too."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**DECODER.batch()).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], wanted: dict[str, Tensor], part: str = "") -> float:
    """Of the gradients whose names hold `part`, the length of the difference as a share."""
    assert found.keys() == wanted.keys()
    both = [torch.cat([g[name].flatten() for name in wanted if part in name]) for g in (found, wanted)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("adapter", ["l4q", "qwha"])
def test_blocks_run_again_have_the_gradients_of_blocks_that_are_not(adapter, technique):
    ours, plain = (gradients(model_with(adapter, one)) for one in TECHNIQUES[technique])
    assert error(ours, plain) < 0.01
    if adapter == "l4q":
        assert error(ours, plain, ".log_step") < 0.01


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_backward_inside_autocast_gives_the_gradients_of_one_outside(adapter):
    model = model_with(adapter)
    outside = gradients(model)
    model.zero_grad()
    assert error(gradients(model, inside=True), outside) < 1e-6
