"""Scores of weights from gradients of rows, against plain autograd."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from shoestring import Ledger
from shoestring.errors import SettingError
from shoestring.selection.scores import curvature_scores, flow_scores, gradient_scores
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("make", "rows"), [(classifier, CLASSES), (decoder, TEXTS)])
def test_curvature_is_the_second_derivative_times_the_mean_gradient(make, rows, dtype):
    model = make(attn_implementation="eager").to(dtype).eval()
    weights = linear_weights(model)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    found = curvature_scores(model, weights, rows, len(rows))
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())

    plain = copy.deepcopy(model).double()
    plain_weights = [plain.get_parameter(name) for name in weights]
    loss = 0
    for row in rows:
        ids = row["input_ids"][None]
        labels = torch.tensor([row["labels"]]) if "labels" in row else ids
        loss = loss + plain(input_ids=ids, labels=labels).loss / len(rows)
    gradients = torch.autograd.grad(loss, plain_weights, create_graph=True)
    product = sum((g * g.detach()).sum() for g in gradients)
    expected = dict(zip(weights, torch.autograd.grad(product, plain_weights), strict=True))
    error = sum((found[name] - want).square().sum() for name, want in expected.items()) ** 0.5
    assert error < 1e-2 * sum(want.square().sum() for want in expected.values()) ** 0.5


def test_curvature_is_refused_for_weights_in_16_bits():
    model = classifier().bfloat16()
    with pytest.raises(SettingError, match="steps of bfloat16 are too wide"):
        curvature_scores(model, linear_weights(model), CLASSES, 2)


class Perceptron(nn.Module):
    """W2 gelu(W1 x), on embeddings."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(3, 5)
        self.first, self.act, self.second = nn.Linear(5, 7, bias=False), nn.GELU(), nn.Linear(7, 2, bias=False)
        self.config = SimpleNamespace(is_encoder_decoder=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.second(self.act(self.first(inputs_embeds))),)


@pytest.mark.parametrize("seed", range(3))
def test_flow_is_that_of_sizes_through_a_linear_model(seed):
    model = Perceptron(seed)
    with torch.no_grad():
        model.first.weight[0, 0] = -0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = flow_scores(model, {"first": model.first.weight, "second": model.second.weight})
    torch.testing.assert_close(found["first"], model.second.weight.abs().sum(0)[:, None].expand(7, 5))
    torch.testing.assert_close(found["second"], model.first.weight.abs().sum(1).expand(2, 7))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter.signbit(), before[name].signbit())
    assert not model.act._forward_hooks


@pytest.mark.parametrize("make", [classifier, decoder])
def test_flow_reaches_values_and_not_queries(make):
    model = make()
    scores = flow_scores(model, linear_weights(model))
    for name, score in scores.items():
        assert (score.abs().max() > 1e-6) != any(part in name for part in ("q_proj", "k_proj", "query", "key")), name


def test_flow_is_refused_for_models_without_embeddings():
    class Plain(nn.Linear):
        pass

    with pytest.raises(SettingError, match="Plain takes none: choose another score"):
        flow_scores(Plain(2, 2), {})
