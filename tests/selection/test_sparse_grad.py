"""SparseGrad: bases, the turned layer's equation and gradients, energy, memory, undo, files, refusals."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from shoestring import Ledger, Recipe, load
from shoestring.blocks import Recompute
from shoestring.errors import SettingError
from shoestring.quantisation.gradients import each_gradient
from shoestring.recipe import attached_to
from shoestring.selection import SparseGrad
from shoestring.selection.sparse_grad import FILE, Basis, Grams, Numbers, eigenvectors, feedforward_layers
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, classifier, decoder
from shoestring.training import RunSettings, train
from shoestring.training.merging import merged_model

BATCH = CLASSIFIER.batch()
DATA = CLASSIFIER.data()
ROWS = 6


def applied(base=None, data=None, **settings):
    settings = {"density": 0.05, "calibration_rows": ROWS, **settings}
    return Recipe(SparseGrad(**settings)).apply(classifier() if base is None else base, data=data or DATA)


def technique_of(model):
    (technique,) = attached_to(model).techniques
    return technique


def trained(model, steps=3, lr=0.02):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**BATCH).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def turned_layer(seed, rotate="both", size_out=7, size_in=5, count=9):
    """A layer in float64, its numbers in a random basis at random places, and U, V and S whole."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(size_in, size_out).double()
    u, v = orthogonal(size_in, generator), orthogonal(size_out, generator)
    if rotate == "narrow":
        u, v = (u, torch.eye(size_out).double()) if size_in <= size_out else (torch.eye(size_in).double(), v)
    turn_in, turn_out = rotate == "both" or size_in <= size_out, rotate == "both" or size_in > size_out
    numbers = Numbers("layer", layer, Basis(u if turn_in else None, v if turn_out else None))
    places = torch.randperm(size_out * size_in, generator=generator)[:count].sort().values
    row, column = places // size_in, places % size_in
    rows, columns = row.unique(), column.unique()
    values = torch.randn(count, generator=generator, dtype=torch.float64)
    at = torch.searchsorted(rows, row) * len(columns) + torch.searchsorted(columns, column)
    numbers.take(rows, columns, at, values)
    s = torch.zeros(size_out * size_in, dtype=torch.float64).index_put((places,), values).view(size_out, size_in)
    return layer, numbers, u, v, s


@pytest.mark.parametrize("rotate", ["both", "narrow"])
@pytest.mark.parametrize(("size_out", "size_in"), [(7, 5), (5, 8)])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_added_is_the_turned_weight_and_gradients_are_its_own(seed, rotate, size_out, size_in):
    layer, numbers, u, v, s = turned_layer(seed, rotate, size_out, size_in)
    x = torch.randn(2, 3, size_in, dtype=torch.float64, requires_grad=True)
    turned = v.T @ layer.weight @ u
    torch.testing.assert_close(layer(x) + numbers.added(x), x @ u @ (turned + s).T @ v.T + layer.bias)
    torch.testing.assert_close(numbers.change(), v @ s @ u.T)
    dy = torch.randn(2, 3, size_out, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(numbers.added(x), numbers.values, dy)
    whole = (dy.flatten(0, 1) @ v).T @ (x.flatten(0, 1) @ u)
    torch.testing.assert_close(gradient, whole[s != 0])

    def forward(x, values, bias):
        numbers.values.data = values.detach()
        core = torch.zeros(len(numbers.rows) * len(numbers.columns), dtype=torch.float64).scatter(0, numbers.at, values)
        numbers.core = lambda dtype: core.view(len(numbers.rows), -1)
        return nn.functional.linear(x, layer.weight, bias) + numbers.added(x)

    inputs = (x, numbers.values.detach().clone().requires_grad_(), layer.bias)
    assert torch.autograd.gradcheck(forward, inputs)


def test_bases_are_the_factors_of_the_tensor_of_all_gradients_up_to_signs():
    generator = torch.Generator().manual_seed(0)
    grams, gradients = Grams(), []
    for tokens in (3, 20, 4, 30):  # fewer and more than rows and columns
        x = torch.randn(tokens, 5, generator=generator, dtype=torch.float64)
        dy = torch.randn(tokens, 8, generator=generator, dtype=torch.float64)
        grams.add(x, dy)
        gradients.append(dy.T @ x)
    stacked = torch.stack(gradients)  # [k, out, in]
    u = torch.linalg.svd(stacked.permute(2, 0, 1).flatten(1)).U
    v = torch.linalg.svd(stacked.permute(1, 0, 2).flatten(1)).U
    for side, factor in (("u", u), ("v", v)):
        found = eigenvectors(grams, side, "layers")
        torch.testing.assert_close((found.T @ factor).abs(), torch.eye(len(factor)).double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("make", "case"), [(classifier, CLASSIFIER), (decoder, DECODER)])
def test_axes_are_orthogonal_and_the_start_is_the_pretrained_model_to_the_bit(make, case):
    base = make().eval()
    plain = base(**case.batch()).logits
    model = applied(base, data=case.data(), density=1.0)
    assert torch.equal(model.eval()(**case.batch()).logits, plain)
    for basis in technique_of(model)._bases.values():
        for axes in (basis.u, basis.v):
            assert (axes.T @ axes - torch.eye(axes.shape[1])).abs().max() <= 1e-5


@pytest.mark.parametrize("rotate", ["both", "narrow"])
def test_with_all_numbers_a_step_of_sgd_is_one_in_the_plain_basis(rotate):
    base = classifier().double()
    plain = copy.deepcopy(base)
    model = applied(base, density=1.0, rotate=rotate, train_head=False)
    layers = feedforward_layers(plain)
    assert len(layers) == 4
    weights = [plain.get_submodule(name).weight for name in layers]
    before = [weight.detach().clone() for weight in weights]
    trains = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trains) == sum(weight.numel() for weight in weights)
    for one, parameters in ((model, trains), (plain, weights)):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        one(**BATCH).loss.backward()
        optimizer.step()
    for name, weight, old in zip(layers, weights, before, strict=True):
        torch.testing.assert_close(technique_of(model).change(name), weight - old, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(model(**BATCH).logits, plain(**BATCH).logits, rtol=1e-6, atol=1e-9)


def test_the_numbers_are_those_of_most_energy_and_hold_more_than_as_many_of_the_plain_gradients():
    base = classifier()
    rows = SparseGrad(calibration_rows=ROWS)
    rows.see_data(DATA)
    layers = feedforward_layers(base)
    gradients = {name: [] for name in layers}
    each_gradient(
        base,
        {name: base.get_submodule(name) for name in layers},
        rows.rows_drawn(),
        ROWS,
        lambda name, x, dy: gradients[name].append(dy.T @ x),
    )
    turned_share = plain_share = whole = 0.0
    model = applied(base, density=0.01)
    everything = technique_of(applied(classifier(), density=1.0))
    for name, own in gradients.items():
        basis = everything.numbers[name].basis[0]
        energy = sum((basis.v.T @ g @ basis.u).square() for g in own)
        count = round(0.01 * energy.numel())
        best = energy.flatten().topk(count)
        numbers = technique_of(model).numbers[name]
        axes = numbers.basis[0]
        assert len(numbers.values) == count
        parts = [axes.v[:, numbers.rows].T @ g @ axes.u[:, numbers.columns] for g in own]
        captured = sum(part.square().flatten()[numbers.at].sum() for part in parts)
        torch.testing.assert_close(captured, best.values.sum(), rtol=1e-3, atol=0)
        turned_share += float(best.values.sum())
        plain_share += float(sum(g.square() for g in own).flatten().topk(count).values.sum())
        whole += float(energy.sum())
    assert turned_share > 1.5 * plain_share
    assert turned_share < whole


def test_training_changes_no_weight_and_its_changes_added_to_the_weights_give_the_same_outputs():
    base = classifier().eval()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = base(**BATCH).logits
    model = applied(base, train_head=False)
    losses = trained(model, 6)
    assert losses[-1] < losses[0]
    learned = model.eval()(**BATCH).logits
    assert not torch.allclose(learned, plain)
    technique = technique_of(model)
    with technique.switched_off():
        assert torch.equal(model(**BATCH).logits, plain)
    changes = {name: technique.change(name) for name in technique.numbers}
    Recipe.remove(model)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
    assert torch.equal(base(**BATCH).logits, plain)
    with torch.no_grad():
        for name, change in changes.items():
            base.get_submodule(name).weight += change
    torch.testing.assert_close(base(**BATCH).logits, learned, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_merged_it_is_in_weights_of_either_layout(lora):
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=32)).eval()
    names, data = set(base.state_dict()), DECODER.data()
    adapter = LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False)
    model = Recipe(*([adapter] if lora else []), SparseGrad(density=0.1, calibration_rows=3)).apply(base, data=data)
    attached = attached_to(model)
    plain = model.eval()(**DECODER.batch()).logits
    with torch.no_grad():
        for numbers in attached.techniques[-1].numbers.values():
            numbers.values.copy_(torch.linspace(-1, 1, len(numbers.values)))
    learned = model(**DECODER.batch()).logits
    assert not torch.allclose(learned, plain, atol=1e-2)
    merged = merged_model(attached)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged.eval()(**DECODER.batch()).logits, learned, rtol=1e-4, atol=1e-5)


def test_it_is_saved_and_loaded(tmp_path):
    model = applied()
    trained(model)
    attached_to(model).save(tmp_path)
    again = load(classifier(), tmp_path)
    assert torch.equal(again.eval()(**BATCH).logits, model.eval()(**BATCH).logits)
    assert trained(again, 2) == trained(model, 2)
    with pytest.raises(SettingError, match="made of another model or other targets"):
        load(decoder(), tmp_path)
    wider = BertForSequenceClassification(
        BertConfig(vocab_size=61, hidden_size=24, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4)
    )
    with pytest.raises(SettingError, match="made of another model"):
        load(wider, tmp_path)
    next(tmp_path.rglob(FILE)).write_bytes(b"no tensors")
    with pytest.raises(SettingError, match="cannot be read"):
        load(classifier(), tmp_path)


def test_layers_of_mlps_are_found_in_models_of_several_sorts():
    t5 = T5ForConditionalGeneration(T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, vocab_size=61))
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=61, n_positions=32))
    ends = {name.rpartition(".")[2] for name in feedforward_layers(decoder())}
    assert ends == {"gate_proj", "up_proj", "down_proj"}
    assert {kind.partition(" ")[0] for kind in feedforward_layers(gpt2).values()} == {
        "transformer.h.mlp.c_fc",
        "transformer.h.mlp.c_proj",
    }
    assert len(set(feedforward_layers(t5).values())) == 4
    assert len(feedforward_layers(t5)) == 8
    beside_lora = Recipe(LoraConfig(target_modules=["dense"])).apply(classifier())
    assert set(feedforward_layers(beside_lora).values()) == {
        f"base_model.model.{kind}" for kind in feedforward_layers(classifier()).values()
    }
    texts = {"train": [{"input_ids": torch.arange(7) + i} for i in range(4)]}
    model = Recipe(SparseGrad(calibration_rows=3)).apply(gpt2, data=texts)  # whose weights are [in, out]
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(n.values.grad.abs().max() > 0 for n in technique_of(model).numbers.values())


def test_with_recomputation_gradients_are_the_same():
    plain, recomputed = (
        Recipe(SparseGrad(density=0.05, calibration_rows=ROWS), *more).apply(classifier(), data=DATA).train()
        for more in ((), (Recompute(),))
    )
    for model in (plain, recomputed):
        with torch.no_grad():
            for numbers in next(t for t in attached_to(model).techniques if isinstance(t, SparseGrad)).numbers.values():
                numbers.values += 0.1
        model(**BATCH).loss.backward()
    for ours, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_memory_is_far_below_full_tuning_and_near_that_of_lora_with_as_many_numbers():
    config = BertConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=512
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    batch = {"input_ids": torch.arange(8 * 16).view(8, 16) % 99, "labels": torch.arange(8) % 2}
    data = {"train": [{"input_ids": torch.arange(9) + i, "labels": i % 2} for i in range(4)]}

    def peak(*techniques):
        model = copy.deepcopy(base)
        if techniques:
            model = Recipe(*techniques).apply(model, data=data)
        else:
            layers = feedforward_layers(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.removesuffix(".weight") in layers or "classifier" in name)
        with Ledger(model) as ledger:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            for _ in range(2):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return ledger.report().peak_bytes

    targets = r".*\.(intermediate|layer\.\d+\.output)\.dense"
    lora = peak(LoraConfig(r=1, target_modules=targets, task_type="SEQ_CLS"))
    ours = peak(SparseGrad(density=(128 + 512) / (128 * 512), calibration_rows=4))
    assert ours <= 0.76 * peak()
    assert ours <= 1.10 * lora


def test_settings_out_of_range_and_layers_it_cannot_take_are_refused():
    for settings, message in (
        ({"density": 0.0}, "density of sparse_grad must be above 0 and at most 1, got 0.0"),
        ({"density": 1.1}, "density of sparse_grad"),
        ({"rotate": "in"}, "rotate of sparse_grad must be both or narrow"),
    ):
        with pytest.raises(SettingError, match=message):
            SparseGrad(**settings)
    with pytest.raises(SettingError, match="of type Embedding; list it in exclude_modules"):
        applied(target_modules=["word_embeddings"])
    with pytest.raises(SettingError, match="has no list of equal blocks"):
        feedforward_layers(nn.Sequential(nn.Linear(2, 2)))
    assert len(technique_of(applied(target_modules=["query", "value"])).numbers) == 4
    with pytest.raises(SettingError, match="finds no linear layers of MLPs"):
        applied(exclude_modules=["dense"])
    with pytest.raises(SettingError, match="sparse_grad is calibrated on data"):
        Recipe(SparseGrad()).apply(classifier())
    with pytest.raises(SettingError, match=r"needs at least 2 gradients .* and has 1: raise calibration_rows"):
        applied(calibration_rows=1, target_modules=r".*layer\.0\.output\.dense")
    broken = classifier()
    with torch.no_grad():
        broken.bert.embeddings.word_embeddings.weight.fill_(float("inf"))
    with pytest.raises(SettingError, match="hold NaN or Inf"):
        applied(broken)
    quantised = classifier()
    layer = quantised.bert.encoder.layer[0].output.dense
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(SettingError, match=r"layer\.0\.output\.dense is quantised \(Linear\)"):
        applied(quantised)


@pytest.mark.slow
def test_a_packaged_model_learns(tmp_path):
    need("minilm", "rotten-tomatoes")
    run = {
        "model": "packaged:minilm",
        "task": "text-classification",
        "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 16, "max_eval_rows": 8},
        "recipe": [{"sparse_grad": {"calibration_rows": 8}}],
        "train": {
            "max_steps": 12,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
        },
        "output_dir": str(tmp_path / "run"),
    }
    losses = [loss for _, loss in train(RunSettings.from_dict(run)).losses]
    assert losses[-1] < 0.7 * losses[0], losses
