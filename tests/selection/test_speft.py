"""SPEFT: its scores, budgets, dynamic places, memory and files."""

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from shoestring import Ledger, Recipe, load
from shoestring.blocks import Recompute
from shoestring.errors import SettingError
from shoestring.fakes import Valueless, without_values
from shoestring.pruning import SketchTune
from shoestring.recipe import attached_to
from shoestring.selection import Speft
from shoestring.selection.sparse import FILE
from shoestring.selection.speft import MovingEntries
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, classifier, decoder
from shoestring.training import RecipeTrainer, RunSettings, train
from shoestring.training.merging import merged_model

BATCH = CLASSIFIER.batch()
DATA = CLASSIFIER.data()
ROWS = 6
IN_BLOCKS = 2 * (4 * 24 * 24 + 2 * 24 * 40)


def applied(base=None, data=None, **settings):
    settings = {"count": 50, "calibration_rows": ROWS, **settings}
    return Recipe(Speft(**settings)).apply(classifier() if base is None else base, data=DATA if data is None else data)


def technique_of(model):
    (technique,) = attached_to(model).techniques
    return technique


def places_of(model):
    return {name: entries.places.tolist() for name, entries in technique_of(model).entries.items()}


def trained(model, steps=3, lr=0.05, start=0, optimizer=None, batches=None):
    """Take steps with AdamW and all events."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(start, start + steps):
        attached_to(model).event("on_step_begin", Moment(model, optimizer, step))
        optimizer.zero_grad()
        loss = model(**(batches[step] if batches else BATCH)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        attached_to(model).event("on_step_end", Moment(model, optimizer, step + 1))
    return optimizer, losses


def wanted_places(model, score, count, generator=None):
    """The best numbers by a score made from plain gradients: all of them sorted, of equal ones the first."""
    plain = copy.deepcopy(model).eval()
    weights = {n: p for n, p in plain.named_parameters() if ".layer." in n and p.dim() == 2}
    rows = Speft(count=1, calibration_rows=ROWS)
    rows.see_data(DATA)
    each, total = [], 0
    for row in rows.rows_drawn():
        length = int(row["attention_mask"].sum())
        loss = plain(input_ids=row["input_ids"][None, :length], labels=row["labels"][None]).loss
        total = total + loss / ROWS
        each.append(torch.autograd.grad(loss, list(weights.values()), retain_graph=True))
    mean = [torch.stack(parts).mean(0) for parts in zip(*each, strict=True)]
    squares = [torch.stack(parts).square().mean(0) for parts in zip(*each, strict=True)]
    if score == "grasp":
        gradients = torch.autograd.grad(total, list(weights.values()), create_graph=True)
        product = sum((g * g.detach()).sum() for g in gradients)
        mean = torch.autograd.grad(product, list(weights.values()))
    elif score == "synflow":
        for parameter in plain.parameters():
            parameter.data.abs_()
        for layer in plain.bert.encoder.layer:
            layer.intermediate.intermediate_act_fn = torch.nn.Identity()
        plain.bert.pooler.activation = torch.nn.Identity()
        flow = plain(inputs_embeds=torch.ones(1, 1, 24, dtype=torch.float64)).logits.sum()
        mean = torch.autograd.grad(flow, list(weights.values()), materialize_grads=True)
    scores = {
        "gradient": lambda g, s, w: g.abs(),
        "snip": lambda g, s, w: (g * w).abs(),
        "force": lambda g, s, w: -g * w,
        "taylor": lambda g, s, w: (g * w) ** 2,
        "fisher": lambda g, s, w: s,
        "grasp": lambda h, s, w: -h * w,
        "synflow": lambda g, s, w: (g * w).abs(),
        "magnitude": lambda g, s, w: w.abs(),
        "small_magnitude": lambda g, s, w: -w.abs(),
    }
    all_ = torch.cat(
        [scores[score](g, s, w).flatten() for g, s, w in zip(mean, squares, weights.values(), strict=True)]
    )
    best = set(all_.sort(descending=True, stable=True).indices[:count].tolist())
    places, start = {}, 0
    for name, weight in weights.items():
        places[name] = [i for i in range(weight.numel()) if start + i in best]
        start += weight.numel()
    return places


@pytest.mark.parametrize("score", ["gradient", "snip", "force", "taylor", "fisher", "magnitude", "small_magnitude"])
def test_the_places_are_those_of_the_best_scores_by_plain_gradients(score):
    base = classifier().double()
    wanted = wanted_places(base, score, 50)
    assert places_of(applied(base, score=score)) == wanted


@pytest.mark.parametrize("score", ["grasp", "synflow"])
def test_curvature_and_flow_choose_the_places_that_plain_derivatives_do_but_for_rounding(score):
    base = classifier(attn_implementation="eager").double()
    wanted = wanted_places(base, score, 50)
    chosen = places_of(applied(base, score=score))
    both = sum(len(set(chosen[name]) & set(wanted[name])) for name in wanted)
    assert both >= 48


@pytest.mark.parametrize("score", ["grasp", "synflow", "random"])
def test_the_other_scores_choose_the_same_places_again_and_others_than_gradients(score):
    chosen = places_of(applied(score=score))
    assert chosen == places_of(applied(score=score))
    assert chosen != places_of(applied())
    assert sum(map(len, chosen.values())) == 50
    if score == "random":
        assert chosen != places_of(applied(score=score, seed=1))


@pytest.mark.parametrize("score", ["gradient", "magnitude"])
def test_budgets_are_met_exactly(score):
    counted = [
        ({"count": 51, "scope": "local"}, 51),
        ({"count": 1}, 1),
        ({"count": IN_BLOCKS}, IN_BLOCKS),
        ({"count": None, "density": 0.0123}, round(0.0123 * IN_BLOCKS)),
        ({"count": None, "density": 1.0}, IN_BLOCKS),
        ({"count": None, "density": 0.0123, "scope": "local"}, 2 * (4 * round(0.0123 * 576) + 2 * round(0.0123 * 960))),
    ]
    for settings, count in counted:
        model = applied(score=score, **settings)
        chosen = places_of(model)
        assert sum(map(len, chosen.values())) == count
        assert all(places == sorted(set(places)) for places in chosen.values())
        trains = [p for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n]
        assert sum(p.numel() for p in trains) == count
        assert all(p.numel() for p in trains)


def test_the_local_scope_takes_the_best_of_each_weight():
    model = applied(score="magnitude", count=None, density=0.02, scope="local")
    for entries in technique_of(model).entries.values():
        size = entries.weight[0].abs().flatten()
        assert set(entries.places.tolist()) == set(size.topk(round(0.02 * len(size))).indices.tolist())


@pytest.mark.parametrize("dynamic_steps", [None, 2])
def test_it_starts_as_the_pretrained_model_and_leaves_it_so_to_the_bit(dynamic_steps):
    base = classifier().eval()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    plain = base(**BATCH).logits
    model = applied(base, dynamic_steps=dynamic_steps, train_head=False).eval()
    assert torch.equal(model(**BATCH).logits, plain)
    _, losses = trained(model, 5)
    assert losses[-1] < losses[0]
    learned = model(**BATCH).logits
    with technique_of(model).switched_off():
        assert torch.equal(model(**BATCH).logits, plain)
    assert torch.equal(model(**BATCH).logits, learned)
    chosen = sum(len(entries.learned()[0]) for entries in technique_of(model).entries.values())
    changed = sum(int((p != before[n]).sum()) for n, p in model.named_parameters() if n in before)
    assert 45 <= changed <= chosen
    Recipe.remove(model)
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_weights_without_a_chosen_number_ask_for_no_gradient():
    model = applied(count=1)
    (with_one,) = (e for e in technique_of(model).entries.values() if len(e.places))
    model(**BATCH).loss.backward()
    assert with_one.values.grad.abs() > 0
    assert all(e.values.grad is None for e in technique_of(model).entries.values() if e is not with_one)


def test_dynamic_places_move_and_numbers_that_stay_keep_their_moments():
    model = applied(dynamic_steps=3)
    entries = technique_of(model).entries
    optimizer, _ = trained(model, 2)
    before = {name: dict(zip(e.places.tolist(), e.values.tolist(), strict=True)) for name, e in entries.items()}
    moments = {}
    for name, e in entries.items():
        if e.values in optimizer.state:
            moments[name] = dict(zip(e.places.tolist(), optimizer.state[e.values]["exp_avg"].tolist(), strict=True))
    weights = {name: e.weight[0].detach().clone().flatten() for name, e in entries.items()}
    wanted = technique_of(applied(score="random", seed=5)).entries
    for name, e in entries.items():
        e.move(wanted[name].places, optimizer)
    came = 0
    for name, e in entries.items():
        assert e.places.tolist() == wanted[name].places.tolist()
        assert torch.equal(e.weight[0].flatten(), weights[name]), "a number changed by moving"
        assert torch.equal(e.values, weights[name][e.places.long()])
        new = optimizer.state[e.values]["exp_avg"].tolist() if e.values in optimizer.state else [0] * len(e.places)
        for place, moment in zip(e.places.tolist(), new, strict=True):
            came += place not in before[name]
            assert moment == moments.get(name, {}).get(place, 0)
        assert set(e.left.tolist()) == before[name].keys() - set(e.places.tolist())
    assert came > 40
    trained(model, 1, start=2, optimizer=optimizer)


def test_moved_moments_are_found_by_place():
    weight = torch.nn.Parameter(torch.arange(20.0))
    entries = MovingEntries("w", weight, torch.tensor([1, 4, 9, 16]))
    optimizer = torch.optim.Adam([entries.values], lr=0.1)
    entries.values.grad = torch.tensor([1.0, 2.0, 3.0, 4.0])
    optimizer.step()
    moments, values = optimizer.state[entries.values]["exp_avg"].tolist(), entries.values.tolist()
    entries.move(torch.tensor([0, 4, 5, 16, 17]), optimizer)
    assert optimizer.state[entries.values]["exp_avg"].tolist() == [0, moments[1], 0, moments[3], 0]
    assert entries.values.tolist() == [0, values[1], 5, values[3], 17]
    assert entries.left.tolist() == [1, 9]
    assert entries.originals.tolist() == [0, 4, 5, 16, 17]
    entries.values.grad = torch.ones(5)
    optimizer.step()
    entries.move(torch.tensor([1]), optimizer)
    assert entries.values.tolist() == [values[0]]
    assert entries.originals.tolist() == [1]
    entries.move(torch.tensor([], dtype=torch.int64))
    entries.move(torch.tensor([2]))
    entries.switch(on=False)
    assert weight.tolist() == list(range(20))
    entries.switch(on=True)
    assert weight[1] == values[0]
    entries.leave()
    assert weight.tolist() == list(range(20))


def test_dynamic_places_are_chosen_at_every_so_many_steps_by_the_weights_as_they_are_then():
    model = applied(dynamic_steps=2, score="magnitude")
    first = places_of(model)
    optimizer, _ = trained(model, 1)
    assert places_of(model) == first
    with torch.no_grad():
        e = next(iter(technique_of(model).entries.values()))
        e.weight[0][0, :5] = 100
    trained(model, 1, start=1, optimizer=optimizer)
    assert e.places.tolist()[:5] == [0, 1, 2, 3, 4]
    same = applied(dynamic_steps=2)
    trained(same, 2)
    assert places_of(same) != places_of(applied())
    with pytest.raises(SettingError, match="Adafactor mixes those of one tensor"):
        trained(same, 1, optimizer=torch.optim.Adafactor([p for p in same.parameters() if p.requires_grad]))


@pytest.mark.parametrize("score", ["gradient", "random"])
def test_a_dynamic_run_goes_on_where_it_stopped(tmp_path, score):
    batches = [CLASSIFIER.batch(seed) for seed in range(7)]
    whole = applied(dynamic_steps=2, score=score)
    _, losses = trained(whole, 7, batches=batches)
    stopped = applied(dynamic_steps=2, score=score)
    optimizer, _ = trained(stopped, 5, batches=batches)
    attached_to(stopped).save(tmp_path)
    again = applied(dynamic_steps=2, score=score)
    attached_to(again).restore(tmp_path)
    assert places_of(again) == places_of(stopped)
    fresh = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
    fresh.load_state_dict(optimizer.state_dict())
    assert trained(again, 2, start=5, optimizer=fresh, batches=batches)[1] == losses[5:]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name])
    loaded = load(classifier(), tmp_path)
    stopped.eval(), loaded.eval()
    assert torch.equal(loaded(**BATCH).logits, stopped(**BATCH).logits)


@pytest.mark.parametrize("through_files", [False, True], ids=["as trained", "loaded"])
def test_merged_after_places_have_moved_it_keeps_what_was_learned_at_those_that_were_left(through_files, tmp_path):
    before = dict(classifier().named_parameters())
    model = applied(dynamic_steps=2, score="random")
    trained(model, 5)
    moved = {name: entries.learned()[0] for name, entries in technique_of(model).entries.items()}
    left = {name: entries.left for name, entries in technique_of(model).entries.items()}
    assert sum(map(len, left.values())) > 50
    learned = model.eval()(**BATCH).logits
    if through_files:
        attached_to(model).save(tmp_path)
        model = load(classifier(), tmp_path)
    attached = attached_to(model)
    merged = merged_model(attached)
    for _ in range(2):
        assert torch.equal(merged.eval()(**BATCH).logits, learned)
        for name, places in moved.items():
            changed = (merged.get_parameter(name) != before[name]).flatten().nonzero()[:, 0]
            assert set(changed.tolist()) == set(places.tolist())
            assert set(left[name].tolist()) <= set(changed.tolist())
        attached.detach()  # which finds nothing left to undo
    assert merged.state_dict().keys() == classifier().state_dict().keys()


def test_memory_is_that_of_lora_with_as_many_numbers_and_the_file_holds_little_else(tmp_path):
    config = BertConfig(
        vocab_size=99, hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512
    )
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    batch = {"input_ids": torch.arange(8 * 64).view(8, 64) % 99, "labels": torch.arange(8) % 2}

    def peak(technique):
        data = {"train": [{"input_ids": torch.arange(9) + i, "labels": i % 2} for i in range(4)]}
        model = Recipe(technique).apply(copy.deepcopy(base), data=data)
        trains = [p for p in model.parameters() if p.requires_grad]
        with Ledger(model) as ledger:
            optimizer = torch.optim.AdamW(trains)
            for _ in range(2):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return ledger.report().peak_bytes, model

    lora, with_lora = peak(LoraConfig(r=1, target_modules=["query", "key", "value", "dense"], task_type="SEQ_CLS"))
    count = sum(p.numel() for n, p in with_lora.named_parameters() if "lora_" in n)
    ours, model = peak(Speft(count=count, calibration_rows=4))
    assert ours <= 1.10 * lora
    attached_to(model).save(tmp_path)
    (file,) = tmp_path.rglob(FILE)
    names = sum(len(name) + 30 for name in technique_of(model).entries)
    assert file.stat().st_size <= 8 * count + names + 300


@pytest.mark.parametrize("count", [500, 2_000])
def test_optimizer_state_and_file_follow_the_count(count, tmp_path):
    model = applied(count=count, train_head=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(**BATCH).loss.backward()
    optimizer.step()
    assert sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.dim()) == 2 * 4 * count
    attached_to(model).save(tmp_path)
    (file,) = tmp_path.rglob(FILE)
    names = sum(len(name) + 30 for name in technique_of(model).entries)
    assert 8 * count < file.stat().st_size <= 8 * count + names + 300


def walks(step, rows, seed):
    """Texts that go through the words in steps of one size."""
    start = torch.randint(0, 40, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(13)) % 41 + 3


@pytest.mark.slow
def test_chosen_by_gradients_it_learns_more_than_random_numbers_and_than_lora():
    pretrained = decoder()
    optimizer = torch.optim.AdamW(pretrained.parameters(), lr=3e-3)
    for seed in range(200):
        texts = walks(1, 16, seed)
        pretrained(input_ids=texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    data = {"train": [{"input_ids": text, "labels": text} for text in walks(3, 32, 0)]}
    batches = [{"input_ids": text, "labels": text} for text in (walks(3, 16, seed) for seed in range(1, 41))]

    def last_loss(make, lr):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = Recipe(make()).apply(copy.deepcopy(pretrained), data=data)
        return sum(trained(model, 40, lr=lr, batches=batches)[1][-5:])

    def lora():
        return LoraConfig(r=1, lora_alpha=2, target_modules=list(DECODER.targets), task_type="CAUSAL_LM")

    count = sum(p.numel() for p in Recipe(lora()).apply(decoder()).parameters() if p.requires_grad)
    by_gradient, by_chance, of_lora = (
        min(last_loss(make, lr) for lr in (1e-3, 3e-3, 0.01, 0.03, 0.1))
        for make in (
            lambda: Speft(count=count, calibration_rows=32),
            lambda: Speft(count=count, score="random"),
            lora,
        )
    )
    assert by_gradient < 0.9 * by_chance
    assert by_gradient < 0.75 * of_lora


def test_with_recomputation_gradients_are_the_same():
    plain, recomputed = (
        Recipe(Speft(count=50, calibration_rows=ROWS), *more).apply(classifier(), data=DATA).train()
        for more in ((), (Recompute(),))
    )
    for model in (plain, recomputed):
        model(**BATCH).loss.backward()
    for ours, theirs in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, theirs.grad)


def test_settings_out_of_range_are_refused():
    refused = [
        ({}, "takes either density or count, got density=None and count=None"),
        ({"density": 0.1, "count": 3}, "takes either density or count"),
        ({"density": 0.0}, "density of speft must be above 0 and at most 1, got 0.0"),
        ({"density": 1.5}, "density of speft"),
        ({"count": 0}, "count of speft must be at least 1"),
        ({"count": 1, "score": "salience"}, "score of speft must be one of gradient, .* got 'salience'"),
        ({"count": 1, "scope": "layer"}, "scope of speft must be global or local"),
        ({"count": 1, "dynamic_steps": 0}, "dynamic_steps of speft"),
        ({"count": 1, "calibration_rows": 0}, "calibration_rows of speft must be"),
    ]
    for settings, message in refused:
        with pytest.raises(SettingError, match=message):
            Speft(**settings)


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(SettingError, match=rf"count of speft is {IN_BLOCKS + 1}, but the 12 .* {IN_BLOCKS} num"):
        applied(count=IN_BLOCKS + 1)
    with pytest.raises(SettingError, match="which is none of"):
        applied(count=None, density=1e-6)
    with pytest.raises(SettingError, match="speft is calibrated on data when it is attached, and has seen none"):
        Recipe(Speft(count=3)).apply(classifier())
    with pytest.raises(SettingError, match="has only 0 rows"):
        applied(data={"train": []})
    with pytest.raises(SettingError, match=r"single numbers of .*tables, which trains whole by another technique"):
        Recipe(SketchTune(groups=2, calibrate=False), Speft(count=3, calibration_rows=ROWS)).apply(
            classifier(), data=DATA
        )
    broken = classifier()
    with torch.no_grad():
        broken.bert.encoder.layer[0].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(SettingError, match=r"The scores of .*output\.dense\.weight hold NaN or Inf"):
        applied(broken, score="magnitude")
    with pytest.raises(SettingError, match="holds NaN or Inf"):
        applied(broken)


def test_it_runs_without_values_and_does_not_look_at_them():
    with Valueless() as mode:
        recipe = Recipe(Speft(density=0.05, dynamic_steps=1, score="grasp"))
        model = recipe.apply(without_values(classifier(), mode))
        trained(model, 2, batches=[{name: mode.from_tensor(value) for name, value in BATCH.items()}] * 2)
        sizes = [len(entries.values) for entries in technique_of(model).entries.values()]
    assert sum(sizes) == round(0.05 * IN_BLOCKS)


def test_scores_without_data_ask_for_none():
    assert Speft(count=1).reads_data
    for score in ("magnitude", "small_magnitude", "random", "synflow"):
        assert not Speft(count=1, score=score).reads_data
        Recipe(Speft(count=1, score=score)).apply(classifier())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic_steps", [None, 4])
def test_a_packaged_model_learns_from_a_small_share_of_its_numbers(tmp_path, dynamic_steps):
    need("minilm", "rotten-tomatoes")
    run = {
        "model": "packaged:minilm",
        "task": "text-classification",
        "data": {"train": "packaged:rotten-tomatoes", "max_length": 32, "max_train_rows": 16, "max_eval_rows": 8},
        "recipe": [{"speft": {"density": 0.01, "calibration_rows": 8, "dynamic_steps": dynamic_steps}}],
        "train": {
            "max_steps": 10,
            "per_device_train_batch_size": 16,
            "learning_rate": 5e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "eval_strategy": "no",
        },
        "output_dir": str(tmp_path / "run"),
    }
    losses = [loss for _, loss in train(RunSettings.from_dict(run)).losses]
    assert losses[-1] < 0.7 * losses[0], losses


def test_later_choices_are_scored_in_the_precision_of_the_first(tmp_path):
    model, seen = applied(dynamic_steps=1, score="grasp"), []
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    layer.register_forward_hook(lambda module, x, y: seen.append((model.training, y.dtype)))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    RecipeTrainer(model=model, args=arguments, train_dataset=DATA["train"]).train()
    assert {dtype for training, dtype in seen if training} == {torch.bfloat16}
    assert {dtype for training, dtype in seen if not training} == {torch.float32}
