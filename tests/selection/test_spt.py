"""SPT: which tensors train how within a budget, step 0, gradients, memory, saving without data, and merging."""

import copy
import json
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Dinov2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from packaged import reviews
from shoestring import Ledger, Recipe, assets, load
from shoestring.errors import SettingError
from shoestring.fakes import Valueless, without_values
from shoestring.recipe import attached_to
from shoestring.selection.spt import SPT, Candidate, Route
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, classifier, decoder, seeded

WIDTH, INNER, DEPTH, CLASSES = 24, 40, 2, 3
ROWS = 8


def vit(**settings: Any) -> nn.Module:
    with seeded(0):
        config = ViTConfig(
            **{
                "hidden_size": WIDTH,
                "intermediate_size": INNER,
                "num_hidden_layers": DEPTH,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
                "num_labels": CLASSES,
                **settings,
            }
        )
        model = ViTForImageClassification(config)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        return model


def images(count: int = ROWS, size: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=generator), "labels": torch.tensor(i % CLASSES)}
        for i in range(count)
    ]


def stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


MODELS: Mapping[str, tuple[Any, list[dict[str, Tensor]], dict[str, Tensor]]] = {
    "vit": (vit, images(), stacked(images())),
    "decoder": (decoder, DECODER.rows(count=ROWS), DECODER.batch(samples=ROWS)),
    "encoder": (classifier, CLASSIFIER.rows(count=ROWS), CLASSIFIER.batch(samples=ROWS)),
}


def spt(**settings: Any) -> SPT:
    return SPT(**{"budget": 900, "r": 2, "calibration_rows": ROWS, **settings})


def applied(name: str = "vit", *beside: Any, seed: int = 3, **settings: Any) -> nn.Module:
    make, rows, _ = MODELS[name]
    with seeded(seed):
        return Recipe(*beside, spt(**settings)).apply(make(), data={"train": rows})


def spt_of(model: nn.Module) -> SPT:
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, SPT))
    return technique


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def kinds(technique: SPT) -> set[str]:
    return {route.kind for route in technique.routes.values()}


# 1: budget and routes


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [400, 900, 1500])
def test_what_trains_is_within_the_budget_and_near_it(name, budget):
    model = applied(name, budget=budget)
    routes = spt_of(model).routes
    head = sum(p.numel() for n, p in trained(model).items() if "classifier" in n or "score" in n)
    counted = sum(p.numel() for p in trained(model).values()) - head
    token = WIDTH if name == "vit" else 0
    assert counted == sum(route.trained for route in routes.values()) + token
    assert counted <= budget
    step = 2 * (WIDTH + INNER)  # the largest module, which is what one more number may add
    assert counted > min(0.95 * budget, budget - step)


@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
def test_routes_are_those_of_sensitivities_found_plainly(structured):
    make, rows, _ = MODELS["vit"]
    model = applied("vit", structured=structured, budget=1200)
    plain, scores = make().eval(), {}
    for row in rows:
        plain.zero_grad()
        plain(pixel_values=row["pixel_values"][None], labels=row["labels"][None]).loss.backward()
        for n, p in plain.named_parameters():
            if ".layers." in n or ".layer." in n:
                scores[n] = scores.get(n, 0) + p.grad.square()
    everything = torch.cat([s.flatten() for s in scores.values()]).sort(descending=True).values

    def route(name: str, score: Tensor, least: float) -> Route:
        m = int((score >= least).sum())
        if score.dim() == 1:
            whole = m >= 0.2 * len(score) and m > 0
            return Route("vector" if whole else "frozen", m, len(score) if whole else 0)
        out, inputs = score.shape
        size = 2 * (out + inputs) if structured == "lora" else 2 * 2 * out + 2 + out
        if m == 0:
            return Route("frozen", 0, 0)
        return Route("structured", m, size) if m >= 0.1 * size else Route("sparse", m, m)

    best = None
    for tau in range(1, len(everything)):
        tried = {name: route(name, score, float(everything[tau - 1])) for name, score in scores.items()}
        if sum(r.trained for r in tried.values()) + WIDTH <= 1200:
            best = tried
        else:
            break
    routes = spt_of(model).routes
    assert routes == best
    assert kinds(spt_of(model)) == {"structured", "sparse", "vector", "frozen"}
    for name, entries in spt_of(model).entries.items():
        expected = scores[name].flatten().topk(routes[name].members).indices.sort().values
        assert torch.equal(entries.places.long(), expected)


def test_the_routing_is_reported_and_the_same_each_time(caplog):
    with caplog.at_level(logging.INFO, "shoestring.selection.spt"):
        first, second = applied(budget=1200), applied(budget=1200, seed=9)
    assert spt_of(first).routes == spt_of(second).routes
    table = spt_of(first).routing_table()
    assert table in caplog.text
    name, route = next((n, r) for n, r in spt_of(first).routes.items() if r.kind == "sparse")
    assert f"{name}: sparse, m = {route.members}, {route.trained} train" in table
    assert table.startswith(f"spt trains {sum(r.trained for r in spt_of(first).routes.values())} numbers of ")


def test_a_share_of_the_numbers_is_as_good_as_a_count():
    total = sum(p.numel() for n, p in vit().named_parameters() if ".layers." in n or ".layer." in n)
    assert spt_of(applied(budget=0.05)).routes == spt_of(applied(budget=int(0.05 * total))).routes


# 4: the ends of the sweep


def test_with_all_numbers_chosen_every_tensor_trains_in_full_and_with_none_only_head_and_class_token():
    technique = spt()
    assert technique.route(Candidate(960, 128), 960) == Route("structured", 960, 128)
    assert technique.route(Candidate(40, None), 40) == Route("vector", 40, 40)
    assert technique.route(Candidate(960, 128), 0) == Route("frozen", 0, 0)
    assert technique.route(Candidate(960, 128), 12) == Route("sparse", 12, 12)
    assert technique.route(Candidate(960, 128), 13) == Route("structured", 13, 128)
    assert technique.route(Candidate(41, None), 8) == Route("frozen", 8, 0)
    assert technique.route(Candidate(41, None), 9) == Route("vector", 9, 41)
    assert kinds(spt_of(applied(budget=1.0))) == {"structured", "vector"}
    least = applied(budget=WIDTH)
    assert kinds(spt_of(least)) == {"frozen"}
    assert {n.rpartition(".")[2] for n in trained(least)} == {"cls_token", "weight", "bias"}
    assert all("classifier" in n or "cls_token" in n for n in trained(least))


# 2: step 0 and merging


@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", MODELS)
def test_step_0_is_the_pretrained_model(name, structured):
    make, _, batch = MODELS[name]
    expected = make().eval()(**batch).logits
    model = applied(name, structured=structured, budget=1500).eval()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-6, atol=1e-6)


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 4, lr: float = 0.01) -> list[float]:
    optimizer = torch.optim.AdamW(trained(model).values(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    for technique in attached_to(model).techniques:
        for entries in getattr(technique, "entries", {}).values():
            entries.write(always=True)
    return losses


def train_all(model: nn.Module, batch: dict[str, Tensor], steps: int = 4, lr: float = 0.01) -> list[float]:
    """As `train`; raises AssertionError if something that trains has not moved."""
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    losses = train(model, batch, steps, lr)
    still = [name for name, p in trained(model).items() if torch.equal(p, start[name])]
    assert not still, f"{still[0]} trains, but has not moved"
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_merged_it_computes_the_same(name):
    batch = MODELS[name][2]
    model = applied(name, budget=1500)
    assert {"structured", "sparse", "vector"} <= kinds(spt_of(model))
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    unmerged = model.eval()(**batch).logits
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, unmerged, rtol=1e-5, atol=1e-5)
    assert not any("lora" in n for n, _ in merged.named_modules())


# 3: gradients


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_dense_weights_at_the_places_of_lora_and_of_whole_vectors(name):
    make, rows, batch = MODELS[name]
    with seeded(3):
        model = Recipe(spt(budget=1500)).apply(make().double(), data={"train": rows})
    batch = {n: v.double() if v.is_floating_point() else v for n, v in batch.items()}
    model(**batch).loss.backward()
    plain = make().double().train()
    plain(**batch).loss.backward()
    dense = {n: p.grad for n, p in plain.named_parameters()}
    for n, entries in spt_of(model).entries.items():
        expected = dense[n].flatten()[entries.places.long()]
        torch.testing.assert_close(entries.values.grad, expected, rtol=1e-9, atol=1e-12)
    for n, route in spt_of(model).routes.items():
        layer = f"base_model.model.{n}".removesuffix(".weight")
        if route.kind == "vector":
            owner = f"base_model.model.{n}"
            found = [p for m, p in model.named_parameters() if m.replace(".base_layer", "") == owner]
            torch.testing.assert_close(found[0].grad, dense[n], rtol=1e-9, atol=1e-12)
        if route.kind == "structured":
            lora: Any = model.get_submodule(layer)
            a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
            torch.testing.assert_close(b.grad, dense[n] @ a.T, rtol=1e-9, atol=1e-12)
            assert not a.grad.any()
            assert lora.scaling == {"default": 1.0}


class OneLayer(nn.Module):
    """A wide linear layer in a list of blocks, whose output is its loss."""

    def __init__(self, width: int):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        loss = (self.blocks[0](x) - 1).square().mean()
        return type("Output", (), {"loss": loss})()


def test_backward_of_a_hundred_thousand_numbers_makes_no_table_of_their_pairs():
    width, count = 512, 100_000
    rows = [{"x": torch.randn(width), "labels": torch.zeros(1)} for _ in range(2)]
    with seeded(0):
        technique = SPT(budget=count, structured_fraction=1.0, r=512, calibration_rows=2)
        model = Recipe(technique).apply(OneLayer(width), data={"train": rows})
    (entries,) = spt_of(model).entries.values()
    assert count * 0.99 < len(entries.places) <= count
    with Ledger(model) as ledger:
        model(torch.randn(7, width)).loss.backward()
    report = ledger.report()
    dense = 4 * width * width
    assert report.peak_bytes - report.at_peak["weights"] < 2 * dense + 5 * 8 * count


# 5: memory


def wide() -> nn.Module:
    return vit(hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, image_size=64)


def peak(model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    optimizer = torch.optim.AdamW(trained(model).values())
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with Ledger(model, optimizer) as ledger:
        model(**batch).loss.backward()
        optimizer.step()
    return ledger.report().peak_bytes, ledger.report().saved_bytes


@pytest.mark.parametrize("r", [8, 1], ids=["mostly modules", "mostly single numbers"])
def test_training_takes_hardly_more_memory_than_lora_of_the_same_budget(r):
    targets = [n for n, m in wide().named_modules() if isinstance(m, nn.Linear) and "classifier" not in n]
    lora = Recipe(LoraConfig(r=r, target_modules=targets, task_type="FEATURE_EXTRACTION")).apply(wide())
    budget = sum(p.numel() for p in trained(lora).values())
    rows = images(8, 64)
    model = Recipe(SPT(budget=budget, calibration_rows=4)).apply(wide(), data={"train": rows})
    kinds = Counter(route.kind for route in spt_of(model).routes.values())
    assert kinds["structured"] > 10 if r == 8 else kinds["sparse"] > max(8, 2 * kinds["structured"]), kinds
    batch = stacked(rows)
    ours, theirs = peak(model, batch), peak(lora, batch)
    assert ours[0] <= 1.15 * theirs[0], f"{ours} and {theirs}"


def test_scoring_takes_no_more_than_a_step_of_one_row_and_four_bytes_a_number():
    model, rows = wide(), images(2, 64)
    batch = stacked(rows[:1])
    with Ledger(model) as ledger:
        model(**batch).loss.backward()
    whole = ledger.report().peak_bytes
    model.zero_grad()
    numbers = sum(p.numel() for p in model.parameters())
    with Ledger(model) as ledger:
        Recipe.remove(Recipe(SPT(calibration_rows=2)).apply(model, data={"train": rows}))
    largest = max(p.numel() for p in model.parameters())
    assert ledger.report().peak_bytes <= whole + 4 * numbers + 16 * largest


@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", MODELS)
def test_what_does_not_train_stays_bit_by_bit_under_weight_decay_and_taken_off_all_but_what_trains_whole(
    name, structured
):
    make, rows, batch = MODELS[name]
    with seeded(3):
        base = make()
        start, named = dict(make().named_parameters()), dict(base.named_parameters())
        model = Recipe(spt(budget=1500, structured=structured)).apply(base, data={"train": rows})
    technique, whole = spt_of(model), {n for n, p in named.items() if p.requires_grad}
    assert any(route.kind == "structured" for route in technique.routes.values())
    places = {n: entries.places.long() for n, entries in technique.entries.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        attached_to(model).event("on_step_end", Moment(model, optimizer))
        optimizer.zero_grad()
    for n, p in named.items():
        changed = (p != start[n]).flatten()
        if n in whole:
            assert changed.all(), n
        else:
            assert set(changed.nonzero()[:, 0].tolist()) == set(places.get(n, torch.empty(0)).tolist()), n
    trained = {n: named[n].detach().clone() for n in whole}
    after = dict(Recipe.remove(model).named_parameters())
    assert after.keys() == start.keys()
    for n, p in after.items():
        assert torch.equal(p, trained.get(n, start[n])), n


@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", MODELS)
def test_switched_off_it_is_the_pretrained_model_with_the_trained_head(name, structured):
    make, _, batch = MODELS[name]
    model = applied(name, structured=structured, budget=1500)
    assert {"structured", "vector"} <= kinds(spt_of(model))
    train_all(model, batch, lr=0.05)
    plain, learned = make().eval(), model.eval()(**batch).logits
    if name != "decoder":  # whose head is no new one
        plain.classifier.load_state_dict(attached_to(model).base_model.classifier.state_dict())
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    with spt_of(model).switched_off():
        assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model(**batch).logits, learned)
    assert not torch.allclose(learned, plain(**batch).logits, atol=1e-3)
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n][0]), n
        assert p.requires_grad == before[n][1], n


def test_switched_off_it_leaves_another_adapter_on_the_same_layers_on():
    batch = MODELS["decoder"][2]
    model = applied("decoder", DECODER.lora(target_modules=["q_proj", "v_proj"]), budget=2000).eval()
    train_all(model, batch, lr=0.05)
    plain = decoder().eval()(**batch).logits
    with spt_of(model).switched_off():
        with_lora = model(**batch).logits
        for n, p in model.named_parameters():
            if "lora_B.default" in n:
                p.data.zero_()
        assert torch.equal(model(**batch).logits, plain)
    assert not torch.allclose(with_lora, plain, atol=1e-3)


# saving


@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
@pytest.mark.parametrize("name", ["vit", "decoder"])
def test_it_is_saved_and_loaded_without_data(name, structured, tmp_path):
    make, _, batch = MODELS[name]
    model = applied(name, structured=structured, budget=1500)
    train(model, batch)
    expected = model.eval()(**batch).logits
    attached_to(model).save(tmp_path)
    again = load(make().eval(), tmp_path)
    assert torch.equal(again.eval()(**batch).logits, expected)
    assert spt_of(again).routes == spt_of(model).routes
    assert set(json.loads((tmp_path / "routing.json").read_text())) == set(spt_of(model).routes)
    resumed = applied(name, structured=structured, budget=1500, seed=11)
    attached_to(resumed).restore(tmp_path)
    assert torch.equal(resumed.eval()(**batch).logits, expected)
    other = applied(name, structured=structured, budget=1000)
    with pytest.raises(SettingError, match=r"recipe here is"):
        attached_to(other).restore(tmp_path)
    assert [n for n, _ in Recipe.remove(model).named_parameters()] == [n for n, _ in make().named_parameters()]


def test_without_a_matrix_of_single_numbers_it_is_saved_too(tmp_path):
    _, _, batch = MODELS["encoder"]
    model = applied("encoder", structured_fraction=0.001)
    assert "structured" in kinds(spt_of(model))
    assert "sparse" not in kinds(spt_of(model))
    train(model, batch)
    attached_to(model).save(tmp_path)
    again = load(classifier().eval(), tmp_path)
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    batch = MODELS["encoder"][2]
    whole, stopped = applied("encoder", budget=1500).eval(), applied("encoder", budget=1500).eval()

    def go_on(model: nn.Module, steps: int) -> list[float]:
        optimizer, losses = torch.optim.SGD(trained(model).values(), lr=0.1), []
        for _ in range(steps):
            model(**batch).loss.backward()
            optimizer.step()
            losses.append(float(model(**batch).loss.detach()))
            optimizer.zero_grad()
        return losses

    losses = go_on(whole, 4)
    go_on(stopped, 2)
    attached_to(stopped).save(tmp_path)
    again = applied("encoder", budget=1500, seed=5).eval()
    attached_to(again).restore(tmp_path)
    assert go_on(again, 2) == losses[2:]
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_files_of_other_data_or_another_model_are_refused(tmp_path):
    attached_to(applied(budget=1200)).save(tmp_path)
    rows = copy.deepcopy(images())
    for row in rows:
        row["pixel_values"] = row["pixel_values"].flip(0) * 3
    other = Recipe(spt(budget=1200)).apply(vit(), data={"train": rows})
    with pytest.raises(SettingError, match="has other routes than the model here"):
        attached_to(other).restore(tmp_path)
    loaded = load(vit(), tmp_path, data={"train": rows})  # with data too, the routes are those that were saved
    assert spt_of(loaded).routes == spt_of(applied(budget=1200)).routes
    with pytest.raises(SettingError, match=r"made of another model or other targets: .* is not here"):
        load(vit(num_hidden_layers=1), tmp_path)
    (tmp_path / "routing.json").write_text("{")
    with pytest.raises(SettingError, match=r"routing\.json, which spt has saved, cannot be read"):
        load(vit(), tmp_path)


def test_it_runs_beside_lora_which_stays_trained():
    model = applied("decoder", DECODER.lora(target_modules=["q_proj", "v_proj"]), budget=2000)
    names = trained(model)
    assert any("q_proj.lora_A.default" in n for n in names)
    assert any("nested1" in n for n in names)
    losses = train(model, MODELS["decoder"][2])
    assert losses[-1] < losses[0]
    assert all(p.grad is None for p in model.parameters())


def test_its_lora_learns_on_layers_that_have_lora():
    model = applied("decoder", DECODER.lora(target_modules=["q_proj", "v_proj"]), budget=2000)
    train_all(model, MODELS["decoder"][2])


def test_it_is_planned_without_values_as_if_all_tensors_were_alike():
    with Valueless() as mode:
        model = Recipe(spt(budget=1500)).apply(without_values(vit(), mode))
        batch = {n: mode.from_tensor(v) for n, v in MODELS["vit"][2].items()}
        model(**batch).loss.backward()
    assert 1300 < sum(p.numel() for n, p in trained(model).items() if "classifier" not in n) <= 1500


# 7: refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget of spt must be a count of at least 1 or a share"),
        ({"budget": 1.5}, "budget of spt must be"),
        ({"structured": "hut"}, "structured of spt must be lora or bottleneck, got 'hut'"),
        ({"r": 0}, "r of spt must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout of spt"),
        ({"structured_fraction": 0.0}, r"structured_fraction of spt must be above 0 and at most 1, got 0\.0"),
        ({"vector_fraction": -1.0}, "vector_fraction of spt"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        SPT(**settings)


def test_budgets_into_which_nothing_fits_are_refused():
    with pytest.raises(SettingError, match=f"budget of spt is 5, less than the {WIDTH} numbers of the class token"):
        applied(budget=5)
    assert not [n for n in trained(applied(budget=50, train_class_token=False)) if "cls_token" in n]
    with pytest.raises(SettingError, match="budget of spt is 5, into which nothing fits: raise it"):
        applied(budget=5, structured_fraction=0.005, train_class_token=False)  # one number asks for all of a module


def test_missing_data_labels_and_rows_are_refused():
    with pytest.raises(SettingError, match="spt is calibrated on data when it is attached, and has seen none"):
        Recipe(spt()).apply(vit())
    with pytest.raises(SettingError, match="training data has only 0 rows"):
        Recipe(spt()).apply(vit(), data={"train": []})
    unlabelled = [{"pixel_values": row["pixel_values"]} for row in images()]
    with pytest.raises(SettingError, match="gives no loss for calibration row 0"):
        Recipe(spt()).apply(vit(), data={"train": unlabelled})


def test_layers_that_are_neither_linear_nor_vectors_are_refused_by_name():
    with pytest.raises(SettingError, match="target_modules names a Conv2d, whose weight is of shape"):
        applied(target_modules=["projection"])


# real models


@pytest.mark.slow
@pytest.mark.parametrize("structured", ["lora", "bottleneck"])
def test_a_packaged_vision_transformer_learns_clothes_from_a_few_pictures(structured):
    need("dinov2-small", "fashion-mnist")
    folder = assets.model_folder("dinov2-small")
    rows = []
    for row in assets.load_data("fashion-mnist")["train"].select(range(16)):
        picture = torch.tensor(np.asarray(row["image"]), dtype=torch.float32)[None, None] / 255
        pixels = nn.functional.interpolate(picture, (56, 56))[0].expand(3, -1, -1)  # 16 patches
        rows.append({"pixel_values": pixels, "labels": torch.tensor(row["label"])})
    with seeded(0):
        base = Dinov2ForImageClassification.from_pretrained(folder, num_labels=10)
        recipe = Recipe(SPT(budget=150_000, structured=structured, calibration_rows=16))
        model = recipe.apply(base, data={"train": rows})
    assert {"structured", "sparse", "vector", "frozen"} == kinds(spt_of(model))
    counted = sum(p.numel() for n, p in trained(model).items() if "classifier" not in n)
    assert 0.95 * 150_000 < counted <= 150_000
    losses = train_all(model, stacked(rows), steps=5, lr=1e-3)
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_a_packaged_text_model_learns_reviews():
    need("minilm")
    folder = assets.model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = reviews(16)
    rows = [{**tokenizer(row["text"]), "labels": row["label"]} for row in data]
    with seeded(0):
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        model = Recipe(SPT(budget=0.01, calibration_rows=16)).apply(base, data={"train": rows}).train(False)
    assert {"structured", "vector"} <= kinds(spt_of(model))
    batch = {
        **tokenizer(data["text"][:8], return_tensors="pt", padding=True),
        "labels": torch.tensor(data["label"][:8]),
    }
    losses = train_all(model, batch, steps=5, lr=2e-3)
    assert losses[-1] < losses[0]
    expected = model(**batch).logits
    torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected, rtol=1e-4, atol=1e-4)
