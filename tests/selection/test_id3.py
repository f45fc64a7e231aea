"""ID3: the schedule, the choice, equality with dense Adam under a mask, memory, files, resume, refusals."""

import copy
import math
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification, Trainer, TrainingArguments

from shoestring import Ledger, Recipe, load
from shoestring.blocks import Recompute, TokenWindows
from shoestring.errors import SettingError
from shoestring.fakes import Valueless, without_values
from shoestring.recipe import attached_to
from shoestring.selection import ID3
from shoestring.selection.id3 import best_places
from shoestring.selection.optimizer_state import carry_state
from shoestring.selection.sparse import FILE, HOLDER
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, TinyModel, classifier, decoder
from shoestring.training import RecipeCallback, RecipeTrainer, RunSettings, train


def technique_of(model: nn.Module) -> ID3:
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, ID3))
    return technique


def values_of(model: nn.Module) -> list[nn.Parameter]:
    return [entries.values for entries in technique_of(model).entries.values()]


def steps_of(
    model: nn.Module,
    tiny: TinyModel,
    optimizer: torch.optim.Optimizer,
    steps: range,
    backwards: int = 1,
    clip: float = 0,
) -> Iterator[float]:
    """Training by hand, in eval mode, with the events of a trainer; gives the losses."""
    attached = attached_to(model)
    for index in steps:
        moment = Moment(model, optimizer, index, num_steps=steps.stop, accumulation_steps=backwards)
        attached.event("on_step_begin", moment)
        losses = [model(**tiny.batch(index * backwards + part)).loss for part in range(backwards)]
        for loss in losses:
            loss.backward()
        if clip:
            attached.event("before_clipping", moment)
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], clip)
        attached.event("on_gradients", moment)
        optimizer.step()
        attached.event("on_step_end", Moment(model, optimizer, index + 1))
        optimizer.zero_grad()
        yield sum(float(loss.detach()) for loss in losses)


class MaskedAdam:
    """The reference: dense weights, dense moments, gradients under a mask that grows by the rule of the paper."""

    def __init__(self, model: nn.Module, names: list[str], budget: int, steps: int, **settings):
        self.model, self.budget, self.steps = model, budget, steps
        self.exponent, self.epsilon = settings.pop("exponent", 1.0), settings.pop("epsilon", 0.1)
        self.clip, self.strategy = settings.pop("clip", 0), settings.pop("strategy", "increment")
        self.weights = {name: p for name, p in model.named_parameters() if name in names}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        self.masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        kind = settings.pop("kind", torch.optim.Adam)
        self.optimizer = kind(self.weights.values(), **settings)

    def step(self, index: int, batches: list[dict[str, Tensor]]) -> float:
        total = 0.0
        for batch in batches:
            loss = self.model(**batch).loss
            loss.backward()
            total += float(loss.detach())
        due = self.budget
        if self.strategy == "increment":
            due = math.floor(self.budget * min(index + 1, self.steps) / self.steps)
        flat_g = torch.cat([w.grad.flatten() for w in self.weights.values()])
        flat_w = torch.cat([w.detach().flatten() for w in self.weights.values()])
        flat_m = torch.cat([m.flatten() for m in self.masks.values()])
        if self.strategy == "repeat":
            flat_m[:] = False
        scores = flat_g.abs() / (flat_w.abs() + self.epsilon) ** self.exponent
        scores[flat_m] = -1
        flat_m[scores.sort(descending=True, stable=True).indices[: due - int(flat_m.sum())]] = True
        parts = flat_m.split([w.numel() for w in self.weights.values()])
        self.masks = {name: m.view_as(w) for (name, w), m in zip(self.weights.items(), parts, strict=True)}
        for name, weight in self.weights.items():
            weight.grad[~self.masks[name]] = 0
        if self.clip:
            nn.utils.clip_grad_norm_(self.weights.values(), self.clip)
        before = {name: w.detach().clone() for name, w in self.weights.items()}
        self.optimizer.step()
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight[~self.masks[name]] = before[name][~self.masks[name]]
        self.optimizer.zero_grad()
        return total


CASES = {
    "increment": ({}, {}),
    "weights count against": ({"exponent": 2.0, "epsilon": 0.01}, {}),
    "weights count for": ({"exponent": -1.0}, {}),
    "gradients alone": ({"exponent": 0.0}, {}),
    "static": ({"strategy": "static"}, {}),
    "repeat": ({"strategy": "repeat"}, {}),
    "clipped": ({}, {"clip": 0.05}),
    "decay": ({}, {"weight_decay": 0.1, "kind": torch.optim.AdamW}),
}


@pytest.mark.parametrize(
    ("case", "tiny"),
    [*((case, CLASSIFIER) for case in CASES), ("increment", DECODER)],
    ids=lambda part: getattr(part, "name", part),
)
def test_training_equals_dense_adam_under_a_growing_mask(case, tiny):
    settings, others = CASES[case]
    base = tiny.make().double().eval()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    reference = copy.deepcopy(base)
    budget, steps = 130, 7 if case != "increment" else 20
    model = Recipe(ID3(count=budget, train_head=False, **settings)).apply(base)
    names = list(technique_of(model).entries)
    theirs = MaskedAdam(reference, names, budget, steps, lr=1e-2, **settings, **others)
    optimizer = type(theirs.optimizer)(values_of(model), lr=1e-2, weight_decay=others.get("weight_decay", 0))
    seen: dict[str, set] = {name: set() for name in names}
    run = steps_of(model, tiny, optimizer, range(steps), clip=others.get("clip", 0))
    for index, loss in enumerate(run):
        assert loss == pytest.approx(theirs.step(index, [tiny.batch(index)]), rel=1e-9)
        technique = technique_of(model)
        if case not in ("static", "repeat"):
            assert technique.chosen_count == budget * (index + 1) // steps
        for name, entries in technique.entries.items():
            places = set(entries.places.tolist())
            assert seen[name] <= places
            seen[name] = places
            torch.testing.assert_close(entries.weight[0], theirs.weights[name], rtol=1e-9, atol=1e-12)
            if case != "repeat":
                assert places == set(theirs.masks[name].flatten().nonzero()[:, 0].tolist())
            rest = torch.ones(entries.weight[0].numel(), dtype=torch.bool)
            rest[entries.places.long()] = False
            assert torch.equal(entries.weight[0].flatten()[rest], before[name].flatten()[rest])
    Recipe.remove(model)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_in_single_precision_losses_and_weights_agree_to_a_millionth():
    base = classifier().eval()
    reference = copy.deepcopy(base)
    model = Recipe(ID3(count=200, train_head=False)).apply(base)
    theirs = MaskedAdam(reference, list(technique_of(model).entries), 200, 20, lr=1e-3)
    run = steps_of(model, CLASSIFIER, torch.optim.Adam(values_of(model), lr=1e-3), range(20))
    for index, loss in enumerate(run):
        assert loss == pytest.approx(theirs.step(index, [CLASSIFIER.batch(index)]), abs=1e-6)
    for name, entries in technique_of(model).entries.items():
        torch.testing.assert_close(entries.weight[0], theirs.weights[name], rtol=0, atol=1e-6)


def test_gradients_of_several_backwards_are_scored_once():
    base = classifier().double().eval()
    reference = copy.deepcopy(base)
    model = Recipe(ID3(count=90, train_head=False)).apply(base)
    theirs = MaskedAdam(reference, list(technique_of(model).entries), 90, 4, lr=1e-2)
    run = steps_of(model, CLASSIFIER, torch.optim.Adam(values_of(model), lr=1e-2), range(4), backwards=3)
    for index, loss in enumerate(run):
        batches = [CLASSIFIER.batch(index * 3 + part) for part in range(3)]
        assert loss == pytest.approx(theirs.step(index, batches), rel=1e-9)


def albert() -> nn.Module:
    config = AlbertConfig(
        vocab_size=61,
        embedding_size=8,
        hidden_size=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        num_labels=3,
        problem_type="single_label_classification",
    )
    torch.manual_seed(0)
    return AlbertForSequenceClassification(config)


def checkpointed(reentrant: bool) -> nn.Module:
    model = classifier()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: out.requires_grad_(True))
    return model.train()


IN_PARTS = {
    "one block for all layers": (albert, [], CLASSIFIER),
    "checkpointed": (partial(checkpointed, False), [], CLASSIFIER),
    "checkpointed, reentrant": (partial(checkpointed, True), [], CLASSIFIER),
    "recomputed": (albert, [Recompute()], CLASSIFIER),
    "windows": (decoder, [TokenWindows(window_tokens=4)], DECODER),
}


@pytest.mark.parametrize("case", IN_PARTS)
def test_a_weight_whose_gradient_comes_in_parts_is_scored_by_the_whole(case):
    make, beside, tiny = IN_PARTS[case]
    base = make().double()
    reference = copy.deepcopy(base)
    model = Recipe(ID3(count=40, train_head=False), *beside).apply(base)
    theirs = MaskedAdam(reference, list(technique_of(model).entries), 40, 3, lr=1e-2)
    model.train()
    reference.train()
    run = steps_of(model, tiny, torch.optim.Adam(values_of(model), lr=1e-2), range(3))
    for index, loss in enumerate(run):
        assert loss == pytest.approx(theirs.step(index, [tiny.batch(index)]), rel=1e-7)


def test_static_and_increment_agree_over_one_step_and_updates_are_about_half():
    chosen = []
    for strategy in ("static", "increment"):
        model = Recipe(ID3(count=77, strategy=strategy, steps=1)).apply(classifier())
        optimizer = torch.optim.SGD(values_of(model), lr=0.1)
        list(steps_of(model, CLASSIFIER, optimizer, range(1)))
        chosen.append({name: e.places.tolist() for name, e in technique_of(model).entries.items()})
    assert chosen[0] == chosen[1]
    updates = {}
    for strategy in ("static", "increment"):
        model = Recipe(ID3(count=80, strategy=strategy)).apply(classifier())
        list(steps_of(model, CLASSIFIER, torch.optim.SGD(values_of(model), lr=0.1), range(8)))
        updates[strategy] = technique_of(model).measured()["id3_updates"]
    assert updates == {"static": 80 * 8, "increment": 80 * 9 // 2}


def test_fewer_numbers_than_steps_start_one_by_one():
    model = Recipe(ID3(count=3)).apply(classifier())
    run = steps_of(model, CLASSIFIER, torch.optim.Adam(values_of(model)), range(7))
    assert [technique_of(model).chosen_count for _ in run] == [3 * (t + 1) // 7 for t in range(7)]


def test_the_best_are_found_exactly_and_of_equal_ones_the_first():
    for seed in range(6):
        scores = torch.randint(5, (37,), generator=torch.Generator().manual_seed(seed)).float()
        scores[::5] = -math.inf
        for count in (1, 4, 20, 37):
            order = scores.sort(descending=True, stable=True).indices[:count]
            want = order[scores[order] > -math.inf].sort().values
            assert torch.equal(best_places(scores, count), want)


def test_equal_scores_are_settled_by_the_order_of_weights():
    model = Recipe(ID3(count=5)).apply(classifier())
    contest = technique_of(model).contest
    contest.open(5)
    for order in (3, 1, 2, 0):
        contest.offer(order, torch.ones(3), torch.arange(3.0) + 10 * order)
    best = contest.close()
    assert {order: (places.tolist(), g.tolist()) for order, (places, g) in best.items() if len(places)} == {
        0: ([0, 1, 2], [0.0, 1.0, 2.0]),
        1: ([0, 1], [10.0, 11.0]),
    }


def test_after_the_last_choice_only_weights_with_chosen_numbers_get_gradients():
    model = Recipe(ID3(count=2, steps=1, train_head=False)).apply(classifier())
    list(steps_of(model, CLASSIFIER, torch.optim.SGD(values_of(model), lr=0.1), range(2)))
    assert technique_of(model).finished
    model(**CLASSIFIER.batch()).loss.backward()
    for entries in technique_of(model).entries.values():
        assert (entries.values.grad is not None) == (len(entries.places) > 0)


@pytest.mark.parametrize("budget", [500, 1_500])
def test_optimizer_state_and_file_follow_the_budget_and_no_dense_gradient_is_kept(budget, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=2, intermediate_size=256)
    base = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(8).view(1, 8), "labels": torch.tensor([0])}
    peaks = []
    model = Recipe(ID3(count=budget, steps=2, train_head=False)).apply(base)
    optimizer = torch.optim.Adam(values_of(model))
    attached = attached_to(model)
    for index in range(3):
        moment = Moment(model, optimizer, index)
        with Ledger(model, optimizer) as ledger:
            attached.event("on_step_begin", moment)
            model(**batch).loss.backward()
            attached.event("on_gradients", moment)
            optimizer.step()
        attached.event("on_step_end", Moment(model, optimizer, index + 1))
        optimizer.zero_grad()
        report = ledger.report()
        peaks.append(report.peak_bytes - report.at_peak["weights"] - report.saved_bytes)
    moments = sum(v.numel() * v.element_size() for s in optimizer.state.values() for v in s.values() if v.dim())
    assert moments == 2 * budget * 4
    blocks = sum(p.numel() * 4 for n, p in base.named_parameters() if ".layer." in n and p.dim() == 2)
    assert max(peaks) < blocks / 4
    assert peaks[-1] < blocks / 6  # most of it the gradient of one weight
    attached.save(tmp_path)
    header = sum(len(name) + 30 for name in technique_of(model).entries)  # 1 % has room for it from 50,000 numbers on
    assert 8 * budget < (tmp_path / FILE).stat().st_size < 8 * budget + header + 300
    trained = model(**batch).logits
    Recipe.remove(model)
    assert torch.equal(load(base, tmp_path)(**batch).logits, trained)
    Recipe.remove(base)
    for width in (32, 512):
        other = BertForSequenceClassification(BertConfig(**{**config.to_dict(), "intermediate_size": width}))
        with pytest.raises(SettingError, match=rf"dense\.weight had the shape \(256, 64\) .* has \({width}, 64\) here"):
            load(other, tmp_path)


def arguments(folder, **settings) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.1,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    return TrainingArguments(str(folder), **given)


def test_chosen_numbers_of_biases_and_norms_get_no_weight_decay(tmp_path):
    model = Recipe(ID3(count=60, vectors=True)).apply(classifier())
    trainer = RecipeTrainer(model=model, args=arguments(tmp_path), train_dataset=CLASSIFIER.rows(count=8))
    decay = {id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, entries in technique_of(model).entries.items():
        assert decay[id(entries.values)] == (0.1 if entries.weight[0].dim() == 2 else 0), name
    trainer.train()
    assert technique_of(model).chosen_count == 60


@pytest.mark.parametrize("settings", [{}, {"strategy": "repeat"}], ids=["increment", "repeat"])
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_a_resumed_run_is_bit_equal_in_the_trainer(settings, lora, tmp_path):
    def recipe() -> Recipe:
        of = {"of": "adapters"} if lora else {}
        return Recipe(*([CLASSIFIER.lora()] if lora else []), ID3(count=60, **of, **settings))

    def run(name: str, resume: bool = False) -> nn.Module:
        model = recipe().apply(classifier(dropout=0.1))
        args = arguments(tmp_path / name, gradient_accumulation_steps=2 if lora else 1)
        trainer = RecipeTrainer(model=model, args=args, train_dataset=CLASSIFIER.rows(count=8))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return model

    whole, resumed = run("whole"), run("resumed", resume=True)
    assert technique_of(whole).chosen_count >= 60
    assert technique_of(whole).updates == technique_of(resumed).updates > 0
    ours, theirs = dict(whole.state_dict()), dict(resumed.state_dict())
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_a_run_resumed_after_its_last_choice_has_the_optimizer_that_it_had(lora, tmp_path):
    def run(name: str, resume: bool = False) -> nn.Module:
        of = {"of": "adapters"} if lora else {"target_modules": ["query", "key"]}
        model = Recipe(*([CLASSIFIER.lora()] if lora else []), ID3(count=2, steps=2, **of)).apply(classifier())
        trainer = RecipeTrainer(model=model, args=arguments(tmp_path / name), train_dataset=CLASSIFIER.rows(count=8))
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if resume else None)
        return model

    whole, resumed = run("whole"), run("resumed", resume=True)
    assert technique_of(resumed).finished
    assert not len(values_of(resumed)[-1])
    theirs = dict(resumed.state_dict())
    for name, value in whole.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    if not lora:
        resumed(**CLASSIFIER.batch()).loss.backward()
        assert all((values.grad is not None) == (len(values) > 0) for values in values_of(resumed))


def test_of_adapters_only_chosen_numbers_of_lora_change():
    base = classifier()
    model = Recipe(CLASSIFIER.lora(), ID3(count=40, of="adapters", steps=4)).apply(base)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    technique = technique_of(model)
    assert technique.entries
    assert all("lora_" in name for name in technique.entries)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    list(steps_of(model, CLASSIFIER, optimizer, range(5)))
    after = dict(model.named_parameters())
    for name, entries in technique.entries.items():
        changed = (after[name] != before[name]).flatten().nonzero()[:, 0]
        assert set(changed.tolist()) == set(entries.places.tolist())
    assert technique.chosen_count == 40
    heads = [name for name in before if "modules_to_save" in name]
    assert heads
    assert all(not torch.equal(after[name], before[name]) for name in heads)
    assert all(torch.equal(after[n], p) for n, p in before.items() if "base_layer" in n or "embeddings" in n)
    kept = sum(v.numel() for p in values_of(model) for v in optimizer.state[p].values() if v.dim())
    assert kept == 2 * 40
    assert not any(p in optimizer.state for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("of", ["weights", "adapters"])
def test_switched_off_it_is_the_pretrained_model(of):
    beside = [CLASSIFIER.lora(init_lora_weights=True, task_type="FEATURE_EXTRACTION")] if of == "adapters" else []
    base = classifier().eval()
    plain = base(**CLASSIFIER.batch(9)).logits
    model = Recipe(*beside, ID3(count=200, of=of, vectors=of == "weights", train_head=False)).apply(base).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    list(steps_of(model, CLASSIFIER, optimizer, range(4)))
    learned = model(**CLASSIFIER.batch(9)).logits
    assert not torch.allclose(learned, plain, atol=1e-3)
    with technique_of(model).switched_off():
        assert torch.equal(model(**CLASSIFIER.batch(9)).logits, plain)
    assert torch.equal(model(**CLASSIFIER.batch(9)).logits, learned)


def test_of_lora_the_choice_is_that_of_dense_gradients():
    base = classifier().double().eval()
    reference = Recipe(CLASSIFIER.lora()).apply(classifier().double().eval())
    model = Recipe(CLASSIFIER.lora(), ID3(count=50, of="adapters")).apply(base)
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(
            model.base_model.named_parameters(), reference.base_model.named_parameters(), strict=False
        ):
            if ours.shape == theirs.shape:
                theirs.copy_(ours)
    names = list(technique_of(model).entries)
    theirs = MaskedAdam(reference, names, 50, 4, lr=1e-2)
    run = steps_of(model, CLASSIFIER, torch.optim.Adam(values_of(model), lr=1e-2), range(4), backwards=2)
    for index, loss in enumerate(run):
        batches = [CLASSIFIER.batch(index * 2 + part) for part in range(2)]
        assert loss == pytest.approx(theirs.step(index, batches), rel=1e-9)


def test_state_follows_numbers_that_change_places():
    parameter = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    moments = optimizer.state[parameter]["exp_avg"].clone()
    carry_state(optimizer, parameter, 3, torch.tensor([2, -1, 0, -1]), "mine")
    want = torch.stack([moments[2], torch.tensor(0.0), moments[0], torch.tensor(0.0)])
    assert torch.equal(optimizer.state[parameter]["exp_avg"], want)
    assert optimizer.state[parameter]["step"] == 1
    optimizer.state[parameter]["absmax"] = torch.zeros(2)
    with pytest.raises(SettingError, match=r"mine cannot go on with Adam: its state 'absmax', of shape \(2,\)"):
        carry_state(optimizer, parameter, 4, torch.tensor([0]), "mine")


def test_without_values_it_takes_what_it_will_at_the_end():
    with Valueless() as mode:
        model = Recipe(ID3(count=1000)).apply(without_values(classifier(), mode))
        optimizer = torch.optim.Adam(values_of(model))
        batch = {name: mode.from_tensor(value) for name, value in CLASSIFIER.batch().items()}
        attached_to(model).event("on_step_begin", Moment(model, optimizer))
        model(**batch).loss.backward()
        attached_to(model).event("on_gradients", Moment(model, optimizer))
        assert 1000 <= technique_of(model).chosen_count < 1030


def test_overflow_of_a_scaled_gradient_puts_the_choice_off():
    model = Recipe(ID3(count=10, steps=2)).apply(classifier())
    technique = technique_of(model)
    optimizer = torch.optim.SGD(values_of(model), lr=0.1)
    for index, scale in enumerate((math.inf, 1.0)):
        moment = Moment(model, optimizer, index)
        technique.on_step_begin(moment)
        (model(**CLASSIFIER.batch()).loss * scale).backward()
        technique.on_gradients(moment)
        assert technique.chosen_count == (0 if math.isinf(scale) else 10)
        model.zero_grad()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count of id3 must be at least 1, got 0"),
        ({"steps": 0}, "steps of id3 must be at least 1, got 0"),
        ({"density": 0.0}, "density of id3 must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density of id3 must be above 0"),
        ({"epsilon": 0.0}, "epsilon of id3 must be above 0, got 0.0"),
        ({"exponent": math.inf}, "exponent of id3 must be a finite number"),
        ({"strategy": "all"}, "strategy of id3 must be one of increment, static, repeat, got 'all'"),
        ({"of": "lora"}, "of of id3 must be 'weights' or 'adapters', got 'lora'"),
        ({"count": 3, "density": 0.1}, "count and density of id3 say the same"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ID3(**settings)


def test_what_cannot_run_is_refused(tmp_path):
    with pytest.raises(SettingError, match=r"count of id3 is 10000000, but there are only \d+ numbers"):
        Recipe(ID3(count=10_000_000)).apply(classifier())
    with pytest.raises(SettingError, match="no module 'nowhere'"):
        Recipe(ID3(target_modules=["nowhere"])).apply(classifier())
    with pytest.raises(SettingError, match="needs an adapter beside it"):
        Recipe(ID3(of="adapters"))
    with pytest.raises(SettingError, match="say nothing with of: adapters"):
        Recipe(CLASSIFIER.lora(), ID3(of="adapters", target_modules=["query"])).apply(classifier())
    model = Recipe(ID3()).apply(classifier())
    technique = technique_of(model)
    with pytest.raises(SettingError, match="does not say how many steps"):
        technique.on_step_begin(Moment(model, torch.optim.SGD(values_of(model))))
    with pytest.raises(SettingError, match="Adafactor mixes those of one tensor"):
        technique.on_step_begin(Moment(model, torch.optim.Adafactor(values_of(model)), num_steps=3))
    technique.on_step_begin(Moment(model, num_steps=3))
    with pytest.raises(SettingError, match="No gradient reached any of the weights"):
        technique.on_gradients(Moment(model, num_steps=3))
    technique.on_step_begin(Moment(model, num_steps=3))
    model(**CLASSIFIER.batch()).loss.backward()
    with pytest.raises(RuntimeError, match="give Moment its accumulation_steps"):
        model(**CLASSIFIER.batch()).loss.backward()
    model.zero_grad()
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=CLASSIFIER.rows(), callbacks=[RecipeCallback()]
    )
    with pytest.raises(ValueError, match="acts before gradients are clipped"):
        trainer.train()


def test_beside_lora_it_chooses_from_the_base_and_lora_trains_whole():
    model = Recipe(LoraConfig(r=2, target_modules=["query"]), ID3(count=30, steps=2)).apply(classifier())
    assert not any("lora_" in name for name in technique_of(model).entries)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    list(steps_of(model, CLASSIFIER, optimizer, range(3)))
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in before.items())
    assert HOLDER not in before


@pytest.mark.slow
def test_chosen_numbers_of_the_packaged_encoder_learn_a_few_reviews(tmp_path):
    need("minilm", "rotten-tomatoes")
    report = train(
        RunSettings.from_dict(
            {
                "model": "packaged:minilm",
                "task": "text-classification",
                "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 32},
                "recipe": [{"id3": {"count": 20_000}}],
                "train": {
                    "max_steps": 24,
                    "per_device_train_batch_size": 16,
                    "learning_rate": 1e-2,
                    "logging_steps": 1,
                    "eval_strategy": "no",
                    "seed": 0,
                },
                "output_dir": str(tmp_path / "run"),
            }
        )
    )
    losses = [loss for _, loss in report.losses]
    assert sum(losses[-4:]) / 4 < 0.75 * sum(losses[:2]) / 2, losses
    assert report.trained_parameters == 20_000 + 2 * 384 + 2
    saved = load_file(tmp_path / "run" / "final" / FILE)
    assert len(saved["places"]) == 20_000


def test_scaled_gradients_are_refused() -> None:
    model = Recipe(ID3(density=0.1)).apply(classifier())
    arguments = SimpleNamespace(n_gpu=0, torch_compile=False, fp16=True)
    with pytest.raises(SettingError, match=r"id3 reads gradients while backward runs, where fp16 has them scaled"):
        RecipeCallback().on_train_begin(arguments, None, None, model=model)
