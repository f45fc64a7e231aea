"""The base of methods that train single numbers of weights: gradients, memory, undo, files."""

import copy
import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from shoestring import Ledger, Recipe, load
from shoestring.adapters import HUTConfig, PaCAConfig, TLoRAConfig
from shoestring.errors import SettingError
from shoestring.fakes import Valueless, without_values
from shoestring.recipe import attached_to
from shoestring.selection import ID3, SPT, SparseGrad, Speft, Unfreeze
from shoestring.selection.sparse import FILE, HOLDER, SparseSelection, top_places
from shoestring.technique import TECHNIQUES, Moment
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, classifier, decoder
from shoestring.whole_files import read_tensors, write_tensors

BATCH = {"input_ids": torch.arange(26).view(2, 13), "labels": torch.tensor([0, 2])}
TEXT = {"input_ids": torch.arange(26).view(2, 13), "labels": torch.arange(26).view(2, 13)}


@dataclass
class Largest(SparseSelection):
    """The largest numbers of all weights."""

    name: ClassVar[str] = "largest"
    count: int = 50

    def places(self, model, weights):
        return top_places({name: weight.abs() for name, weight in weights.items()}, self.count)


def dense_gradients(model, batch, names):
    """Of plain training, in a copy of the model."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if name in names}


def entries_of(model):
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, SparseSelection))
    return technique.entries


@pytest.mark.parametrize(("make", "batch"), [(classifier, BATCH), (decoder, TEXT)])
def test_gradients_are_those_of_the_dense_weights_at_the_places(make, batch):
    base = make().double()
    names = {n for n, p in base.named_parameters() if p.dim() == 2 and ("layer." in n or "layers." in n)}
    expected = dense_gradients(base, batch, names)
    model = Recipe(Largest(count=120)).apply(base)
    entries = entries_of(model)
    assert entries.keys() == names
    model(**batch).loss.backward()
    assert sum(len(e.places) for e in entries.values()) == 120
    for name, own in entries.items():
        if len(own.places):
            want = expected[name].flatten()[own.places.long()]
            torch.testing.assert_close(own.values.grad, want, rtol=1e-12, atol=1e-14)
    assert not any(p.grad is not None for n, p in model.named_parameters() if HOLDER not in n and "classifier" not in n)


def test_training_equals_that_of_dense_weights_under_a_mask_and_nothing_else_changes():
    base = classifier()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    reference = copy.deepcopy(base)
    model = Recipe(Largest(count=70, train_head=False)).apply(base)
    places = {name: e.places.long() for name, e in entries_of(model).items()}
    values = [e.values for e in entries_of(model).values()]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(v) for v in values}
    ours = torch.optim.Adam(values, lr=1e-2)
    theirs = torch.optim.Adam([p for n, p in reference.named_parameters() if n in places], lr=1e-2)
    for _ in range(5):
        for one, optimizer in ((model, ours), (reference, theirs)):
            optimizer.zero_grad()
            one(**BATCH).loss.backward()
            if one is reference:
                for name, parameter in reference.named_parameters():
                    if name in places:
                        mask = torch.zeros(parameter.numel()).index_fill(0, places[name], 1).view_as(parameter)
                        parameter.grad *= mask
            optimizer.step()
    trained = model(**BATCH).logits
    torch.testing.assert_close(trained, reference(**BATCH).logits, rtol=1e-6, atol=1e-6)
    for name, parameter in base.named_parameters():
        if name in places:
            changed = (parameter != before[name]).flatten().nonzero()[:, 0]
            assert set(changed.tolist()) <= set(places[name].tolist())
        elif HOLDER not in name:
            assert torch.equal(parameter, before[name])
    Recipe.remove(model)
    assert {n for n, _ in base.named_parameters()} == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_what_an_optimizer_does_behind_autograds_back_is_written_at_the_end_of_the_step():
    model = Recipe(Largest()).apply(classifier())
    entries = next(e for e in entries_of(model).values() if len(e.places))
    entries.values.data.add_(1)
    attached_to(model).event("on_step_end", Moment(model, step=1))
    assert torch.equal(entries.taken(), entries.values.detach())


def test_it_is_saved_as_places_and_values_and_loaded_switched_off_and_on(tmp_path, monkeypatch):
    base = classifier()
    plain = base.eval()(**BATCH).logits
    model = Recipe(Largest()).apply(base)
    for entries in entries_of(model).values():
        with torch.no_grad():
            entries.values.add_(0.5)
    trained = model(**BATCH).logits
    assert not torch.equal(trained, plain)
    attached_to(model).save(tmp_path)
    with attached_to(model).techniques[0].switched_off():
        assert torch.equal(model(**BATCH).logits, plain)
    assert torch.equal(model(**BATCH).logits, trained)
    monkeypatch.setitem(TECHNIQUES, "largest", Largest)
    again = load(classifier().eval(), tmp_path)
    assert torch.equal(again(**BATCH).logits, trained)
    assert (tmp_path / FILE).stat().st_size < 50 * 8 + 1200  # and names and shapes
    with pytest.raises(SettingError, match="made of another model"):
        load(decoder(), tmp_path)
    tensors, texts = read_tensors(tmp_path / FILE)
    write_tensors(tmp_path / FILE, tensors | {"values": tensors["values"][1:]}, weights=texts["weights"])
    with pytest.raises(SettingError, match=r"is damaged: it has 50 places and 49 values, and counts of 50"):
        load(classifier(), tmp_path)


@pytest.mark.parametrize("density", [0.001, 0.01])
def test_at_the_size_of_bert_base_a_file_is_one_percent_larger_than_its_numbers_and_places_at_most(density, tmp_path):
    @dataclass
    class Share:
        """Entries without a weight that has values."""

        weight: list[torch.Tensor]

        def learned(self) -> tuple[torch.Tensor, torch.Tensor]:
            count = round(density * self.weight[0].numel())
            return torch.arange(count, dtype=torch.int32), torch.randn(count)

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    technique = Largest()
    weights = {name: p for name, (_, p) in technique.candidates(model.requires_grad_(False)).items()}
    technique.entries = {name: Share([weight]) for name, weight in weights.items()}
    technique.save(model, tmp_path)
    count = sum(round(density * weight.numel()) for weight in weights.values())
    assert len(weights) == 12 * 6
    assert 1 < (tmp_path / FILE).stat().st_size / (8 * count) < 1.01


@pytest.mark.parametrize("shape", [(64, 24), (24, 40)], ids=["wider", "as many numbers"])
def test_a_file_of_a_model_of_other_shapes_is_refused_and_changes_nothing(shape, tmp_path, monkeypatch):
    monkeypatch.setitem(TECHNIQUES, "largest", Largest)
    attached_to(Recipe(Largest()).apply(classifier())).save(tmp_path)
    other = classifier()
    other.bert.encoder.layer[1].intermediate.dense.weight = torch.nn.Parameter(torch.randn(shape))
    before = {name: p.detach().clone() for name, p in other.named_parameters()}
    told = rf"layer\.1\.intermediate\.dense\.weight had the shape \(40, 24\) there, and has \({shape[0]}, {shape[1]}\)"
    with pytest.raises(SettingError, match=told):
        load(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_without_targets_only_linear_layers_are_chosen_from():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = Recipe(Largest()).apply(T5ForConditionalGeneration(T5Config(**sizes)))
    assert {name.split(".")[-2] for name in entries_of(model)} == {"q", "k", "v", "o", "wi", "wo"}
    Recipe.remove(model)
    named = Recipe(Largest(target_modules=["relative_attention_bias"])).apply(model)
    assert len(entries_of(named)) == 2


@pytest.mark.parametrize(
    "technique",
    [
        Largest(),
        ID3(count=5, target_modules=["query"]),
        Speft(count=5, score="magnitude", target_modules=["query"]),
        SPT(budget=200, calibration_rows=4, target_modules=["query"]),
    ],
    ids=lambda technique: technique.name,
)
def test_a_quantised_weight_is_refused_by_name(technique):
    model = classifier()
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = torch.nn.Parameter(query.weight.to(torch.int8), requires_grad=False)
    told = rf"{technique.name} cannot train bert\.encoder\.layer\.1\.attention\.self\.query\.weight, .* it is quantised"
    with pytest.raises(SettingError, match=told):
        Recipe(technique).apply(model, data=CLASSIFIER.data())
    assert query.weight.dtype == torch.int8


@pytest.mark.parametrize(
    "technique",
    [
        ID3(count=5, target_modules=["intermediate_act_fn"]),
        Speft(count=5, target_modules=["intermediate_act_fn"], calibration_rows=4),
        SPT(target_modules=["intermediate_act_fn"], calibration_rows=4),
    ],
    ids=lambda technique: technique.name,
)
def test_modules_without_weights_are_refused(technique):
    told = f"{technique.name} finds no weights to choose from in BertForSequenceClassification: name modules that have"
    with pytest.raises(SettingError, match=told):
        Recipe(technique).apply(classifier(), data=CLASSIFIER.data())


@pytest.mark.parametrize(
    ("technique", "told"),
    [
        (ID3(count=5), "All weights that id3 chooses from train whole by another technique of the recipe"),
        (Speft(count=5, score="magnitude"), r"speft would train single numbers of .*, which trains whole by another"),
        (SPT(budget=200, calibration_rows=4), r"spt would train single numbers of .*, which trains whole by another"),
    ],
    ids=lambda part: getattr(part, "name", ""),
)
def test_weights_that_another_technique_trains_whole_are_refused(technique, told):
    with pytest.raises(SettingError, match=told):
        Recipe(technique, Unfreeze(blocks=[0, 1])).apply(classifier(), data=CLASSIFIER.data())
    if isinstance(technique, ID3):  # which chooses from the others, where there are some
        Recipe(technique, Unfreeze(blocks=[0])).apply(classifier())


def test_a_copy_of_the_model_trains_its_own_values():
    model = Recipe(Largest()).apply(classifier())
    other = copy.deepcopy(model)
    other(**BATCH).loss.backward()
    assert all(e.values.grad is None for e in entries_of(model).values())
    assert any(p.grad is not None for n, p in other.named_parameters() if HOLDER in n)


def test_values_are_kept_in_32_bits_beside_weights_in_16():
    model = Recipe(Largest()).apply(classifier().bfloat16())
    optimizer = torch.optim.SGD([e.values for e in entries_of(model).values()], lr=1e-5)
    model(**BATCH).loss.backward()
    first = [e.values.detach().clone() for e in entries_of(model).values()]
    optimizer.step()
    assert all(e.values.dtype == torch.float32 for e in entries_of(model).values())
    assert any(not torch.equal(a, e.values) for a, e in zip(first, entries_of(model).values(), strict=True))


def test_beside_lora_it_trains_weights_of_the_base_and_lora_stays_trained():
    recipe = Recipe(LoraConfig(r=2, target_modules=["query"]), Largest(target_modules=["value.weight", "value"]))
    with pytest.raises(SettingError, match=r"no module 'value\.weight'"):
        recipe.apply(classifier())
    model = Recipe(LoraConfig(r=2, target_modules=["query"]), Largest(target_modules=["value"])).apply(classifier())
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lora_A" in n for n in names)
    assert any(HOLDER in n for n in names)
    model(**BATCH).loss.backward()


def test_it_runs_without_values_and_keeps_no_dense_gradient():
    with Valueless() as mode:
        model = Recipe(Fixed()).apply(without_values(classifier(), mode))
        model(**{name: mode.from_tensor(value) for name, value in BATCH.items()}).loss.backward()
        assert all(e.values.grad.shape == (3,) for e in entries_of(model).values())
    config = BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=256)
    base = BertForSequenceClassification(config)
    ids = torch.arange(8).view(1, 8)
    model = Recipe(Largest(count=100, train_head=False)).apply(base)
    with Ledger(model) as ledger:
        model(input_ids=ids, labels=torch.tensor([0])).loss.backward()
    blocks = sum(p.numel() * 4 for n, p in base.named_parameters() if ".layer." in n and p.dim() == 2)
    report = ledger.report()
    assert report.peak_bytes - report.at_peak["weights"] - report.saved_bytes < blocks / 6


@dataclass
class Fixed(SparseSelection):
    """The first numbers of each weight."""

    name: ClassVar[str] = "fixed"

    def places(self, model, weights):
        return {name: torch.arange(3) for name in weights}


def test_the_largest_scores_are_found_over_all_weights_and_of_equal_ones_the_first():
    scores = {"a": torch.tensor([[1.0, 5.0], [3.0, 3.0]]), "b": torch.tensor([3.0, 4.0])}
    assert {n: p.tolist() for n, p in top_places(scores, 3).items()} == {"a": [1, 2], "b": [1]}
    assert {n: p.tolist() for n, p in top_places(scores, 6).items()} == {"a": [0, 1, 2, 3], "b": [0, 1]}
    for seed in range(5):
        many = {str(i): torch.randint(9, (7, i + 1), generator=torch.Generator().manual_seed(seed)) for i in range(4)}
        whole = torch.cat([m.flatten() for m in many.values()])
        want = whole.sort(descending=True, stable=True).indices[:11].sort().values.tolist()
        start, got = 0, []
        for name, place in top_places(many, 11).items():
            got += [start + p for p in place.tolist()]
            start += many[name].numel()
        assert got == want
    with pytest.raises(ValueError, match="7 numbers were to be chosen of 6"):
        top_places(scores, 7)
    with pytest.raises(ValueError, match="hold NaN"):
        top_places({"a": torch.tensor([float("nan")])}, 1)


@pytest.mark.parametrize(
    "technique", [Speft(density=0.1, score="magnitude"), SparseGrad(density=0.1, calibration_rows=3)]
)
@pytest.mark.parametrize("adapter", [PaCAConfig, HUTConfig, TLoRAConfig])
def test_numbers_of_layers_that_an_adapter_does_not_call_are_refused(adapter, technique):
    config = adapter(r=2, target_modules=["up_proj"])
    with pytest.raises(SettingError, match=rf"{technique.name} .*up_proj: {adapter.method.name} of the same recipe"):
        Recipe(config, technique).apply(decoder(), data=DECODER.data())
    elsewhere = dataclasses.replace(technique, exclude_modules=["up_proj"])
    with Recipe(config, elsewhere)(decoder(), data=DECODER.data()) as model:
        model.train()(**DECODER.batch()).loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
