"""Scores of weights from gradients of rows, against plain autograd."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shoestring import Ledger
from shoestring.errors import SettingError
from shoestring.selection.scores import gradient_scores
from shoestring.testing.tiny_models import classifier, decoder

CLASSES = [{"input_ids": torch.arange(i, i + 7 + i), "labels": i % 3} for i in range(4)]
TEXTS = [{"input_ids": torch.arange(i, i + 9)} for i in range(3)]


def linear_weights(model):
    return {n: p for n, p in model.named_parameters() if p.dim() == 2 and ("layer." in n or "layers." in n)}


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize(("make", "rows"), [(classifier, CLASSES), (decoder, TEXTS)])
def test_scores_are_sums_of_each_rows_gradients_and_the_model_is_as_before(make, rows, squared):
    model = make().double().train()
    plain = copy.deepcopy(model).eval()
    weights = linear_weights(model)
    for number, weight in enumerate(weights.values()):
        weight.requires_grad_(number % 2 == 0)
    first = next(iter(weights.values()))
    first.grad = torch.ones_like(first)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    scores = gradient_scores(model, weights, rows, len(rows) - 1, squared=squared)
    expected = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for row in rows[:-1]:
        ids = row["input_ids"][None]
        labels = torch.tensor([row["labels"]]) if "labels" in row else ids
        plain.zero_grad()
        plain(input_ids=ids, labels=labels).loss.backward()
        for name, total in expected.items():
            own = plain.get_parameter(name).grad
            total += own.square() if squared else own
    for name, want in expected.items():
        assert scores[name].dtype == torch.float32
        torch.testing.assert_close(scores[name].double(), want, rtol=1e-5, atol=1e-7)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert model.training
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in model.parameters() if p is not first)


def test_one_dense_gradient_is_there_at_a_time():
    config = BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=256)
    model = BertForSequenceClassification(config)
    weights = linear_weights(model)
    with Ledger(model) as ledger:
        scores = gradient_scores(model, weights, [{"input_ids": torch.arange(8), "labels": 0}], 1)
    report = ledger.report()
    on_the_host = sum(score.nbytes for score in scores.values())
    others = report.peak_bytes - report.at_peak["weights"] - report.saved_bytes - on_the_host
    assert others < on_the_host / 6


def test_what_gives_no_score_is_refused():
    model = classifier()
    weights = linear_weights(model)
    with pytest.raises(SettingError, match="on 5 rows, but there are 4"):
        gradient_scores(model, weights, CLASSES, 5)
    with pytest.raises(SettingError, match="and at least one"):
        gradient_scores(model, weights, [], 0)
    with pytest.raises(SettingError, match=r"gives no loss for calibration row 0 \(input_ids"):
        gradient_scores(model, weights, [{"input_ids": torch.arange(5)}], 1)
    spare = {"spare": torch.nn.Parameter(torch.ones(2, 2))}
    with pytest.raises(SettingError, match="No gradient of the 2 rows reached spare"):
        gradient_scores(model, weights | spare, CLASSES, 2)
    name, broken = next(iter(weights.items()))
    with torch.no_grad():
        broken[0, 0] = float("nan")
    with pytest.raises(SettingError, match=rf"The gradient of {name} holds NaN or Inf"):
        gradient_scores(model, {name: broken}, CLASSES, 1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
