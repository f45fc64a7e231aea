"""The shape annotations of adapters are checked in these tests, and settings keep their own messages."""

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import nn

from shoestring.adapters import HUT, HUTConfig


def test_a_weight_of_the_wrong_shape_fails_by_name():
    hut = HUT(nn.Linear(5, 3), HUTConfig(r=2))
    weight = torch.randn(3, 5)
    assert hut.new_weight(weight).shape == (3, 5)
    with pytest.raises(TypeCheckError, match="new_weight"):
        hut.new_weight(torch.randn(5))


def test_settings_keep_their_own_messages():
    with pytest.raises(ValueError, match="form of hut must be 'residual' or 'literal', got 'bad'"):
        HUTConfig(form="bad")
