"""Positions: a row as long as is said runs, a longer one does not, and every stage goes by the same number."""

from types import SimpleNamespace

import pytest
import torch
import transformers as t

from shoestring.adapters import HUTConfig
from shoestring.planning import models
from shoestring.positions import positions_of
from shoestring.quantisation.calibration import input_moments
from shoestring.quantisation.gradients import batches_of, loss_of
from shoestring.recipe import Recipe
from shoestring.training.models import max_positions

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
LONGEST = 32


def roberta():
    return t.RobertaForSequenceClassification(t.RobertaConfig(**SIZES, max_position_embeddings=LONGEST + 2))


def bert():
    return t.BertForSequenceClassification(t.BertConfig(**SIZES, max_position_embeddings=LONGEST))


@pytest.mark.parametrize("make", [roberta, bert])
def test_a_row_may_be_as_long_as_is_said_and_no_longer(make):
    model = make()
    assert positions_of(model) == LONGEST
    assert positions_of(Recipe(HUTConfig(r=2, target_modules=["query"])).apply(model)) == LONGEST
    model(input_ids=torch.full((1, LONGEST), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, LONGEST + 1), 5))


@pytest.mark.parametrize("make", [roberta, bert])
def test_calibration_cuts_rows_to_it(make):
    model, row = make(), {"input_ids": [5] * 40, "attention_mask": [1] * 40, "labels": 1}
    (name, layer) = next((name, module) for name, module in model.named_modules() if name.endswith("query"))
    assert input_moments(model, {name: layer}, [row], 1)[name].count == LONGEST
    assert loss_of(model, row, 0, None).isfinite()
    assert batches_of(model, [row], 1)[0][0]["input_ids"].shape == (1, LONGEST)


@pytest.mark.parametrize("make", [roberta, bert])
def test_runs_and_plans_go_by_it(make):
    model = make()
    assert max_positions(model, SimpleNamespace()) == LONGEST
    assert max_positions(model, SimpleNamespace(model_max_length=20)) == 20
    assert models.longest(model.config) == LONGEST
    assert models.longest(t.T5Config()) is None
