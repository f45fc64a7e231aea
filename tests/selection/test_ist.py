"""IST: which blocks train, what rests as it was, how scores are learned, and what is kept for backward."""

import copy
import itertools
import math
import random

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, VBLoRAConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, TrainingArguments

from shoestring import Ledger, Recipe, assets
from shoestring.adapters import BottleneckConfig, HUTConfig
from shoestring.blocks import Recompute
from shoestring.errors import RunFailed, SettingError
from shoestring.fakes import Valueless, without_values
from shoestring.quantisation.gradients import batches_of
from shoestring.recipe import attached_to
from shoestring.selection import IST
from shoestring.selection.ist import sigmoid, updated
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import DECODER, decoder, seeded
from shoestring.training import RecipeTrainer
from shoestring.training.checks import GradientCheck

BLOCKS = 6
TARGETS = ["q_proj", "down_proj"]


def deep(num_hidden_layers: int = BLOCKS, **settings) -> nn.Module:
    return decoder(num_hidden_layers=num_hidden_layers, **settings)


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings})


def random_lora(**settings) -> LoraConfig:
    return lora(init_lora_weights=False, **settings)


def applied(*techniques, model=None, seed=7):
    with seeded(seed):
        base = deep() if model is None else model
        return Recipe(*techniques).apply(base, data=DECODER.data()).train()


def ist_of(model) -> IST:
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, IST))
    return technique


def by_block(model) -> list[dict[str, nn.Parameter]]:
    """The trained parameters of each block."""
    names = [f".layers.{index}." for index in range(BLOCKS)]
    return [{n: p for n, p in model.named_parameters() if part in n and "lora_" in n} for part in names]


def one_step(model, optimizer, index: int) -> list[int]:
    """A step with its events; the blocks that were trained."""
    attached = attached_to(model)
    attached.event("on_step_begin", Moment(model, optimizer, index))
    active = ist_of(model).active()
    with seeded(index):
        model(**DECODER.batch(index)).loss.backward()
    optimizer.step()
    attached.event("on_step_end", Moment(model, optimizer, index + 1))
    optimizer.zero_grad(set_to_none=False)
    return active


# 1: what rests


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.Adagrad])
def test_each_step_trains_so_many_blocks_and_leaves_the_others_and_their_moments_bit_by_bit(make):
    model = applied(random_lora(), IST(active_layers=2, importance=False))
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(map(len, by_block(model)))
    seen = set()
    for index in range(8):
        before = [{n: p.detach().clone() for n, p in block.items()} for block in by_block(model)]
        state = copy.deepcopy({p: optimizer.state.get(p, {}) for b in by_block(model) for p in b.values()})
        state = {
            id(p): s for p, s in zip((p for b in by_block(model) for p in b.values()), state.values(), strict=True)
        }
        active = one_step(model, optimizer, index)
        seen.update(active)
        assert len(active) == 2
        for number, block in enumerate(by_block(model)):
            for name, parameter in block.items():
                if number in active:
                    assert not torch.equal(parameter, before[number][name])
                else:
                    assert parameter.grad is None, f"{name} rests, but has a gradient"
                    assert torch.equal(parameter, before[number][name])
                    now = optimizer.state.get(parameter, {})
                    assert now.keys() == state[id(parameter)].keys()
                    assert all(
                        torch.equal(torch.as_tensor(now[k]), torch.as_tensor(v))
                        for k, v in state[id(parameter)].items()
                    )
        assert all(p.requires_grad for block in by_block(model) for p in block.values())
    assert len(seen) > 3


def test_gradients_of_what_trains_are_those_of_all_blocks_together():
    batch, plain = DECODER.batch(), applied(random_lora(), model=deep().double())
    plain(**batch).loss.backward()
    model = applied(random_lora(), IST(active_layers=2, importance=False), model=deep().double())
    attached_to(model).event("on_step_begin", Moment(model))
    model(**batch).loss.backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * len(TARGETS)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-14)


def test_what_trains_for_another_reason_never_rests():
    config = random_lora(modules_to_save=["input_layernorm"])
    model = applied(config, IST(active_layers=1, importance=False))
    attached_to(model).event("on_step_begin", Moment(model))
    model(**DECODER.batch()).loss.backward()
    norms = [p.grad for n, p in model.named_parameters() if "modules_to_save" in n]
    assert len(norms) == BLOCKS
    assert all(g is not None for g in norms)


def test_in_the_trainer_the_choice_is_made_once_a_step_and_the_check_of_gradients_lets_blocks_rest(tmp_path):
    model = applied(lora(), IST(active_layers=1, period=3, reward_rows=2))
    chosen, forwards = [], []
    technique = ist_of(model)
    wake = technique._wake
    technique._wake = lambda active: (chosen.append(list(active)), wake(active))  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda *_: forwards.append(technique.active()) if torch.is_grad_enabled() else None)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=14,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    trainer = RecipeTrainer(
        model=model, args=arguments, train_dataset=DECODER.data()["train"], callbacks=[GradientCheck()]
    )
    trainer.train()
    assert chosen[1::2] == [list(range(BLOCKS))] * 14  # between steps all train
    assert [list(a) for a in forwards[::2]] == [list(a) for a in forwards[1::2]] == chosen[::2]
    assert len({tuple(a) for a in chosen[::2]}) > 2
    assert len(trainer.optimizer.param_groups[0]["params"]) == sum(map(len, by_block(model)))


def test_a_block_that_never_learns_is_found_when_its_turn_has_come(tmp_path):
    base = deep(2)
    base.model.layers[1].forward = lambda hidden, *a, **k: (
        hidden + 0 * type(base.model.layers[1]).forward(base.model.layers[1], hidden, *a, **k)
    )
    model = applied(lora(), IST(active_layers=1, importance=False, seed=1), model=base)  # it begins with block 0
    arguments = TrainingArguments(
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = DECODER.data()["train"]
    with pytest.raises(RunFailed, match=r"layers\.1\..* had no gradient but zero in 4 steps"):
        RecipeTrainer(model=model, args=arguments, train_dataset=rows, callbacks=[GradientCheck()]).train()


# 2: suppression


def test_suppression_is_lora_with_a_quarter_of_its_scale_and_changes_no_scale():
    model = applied(random_lora(lora_alpha=5, alpha_pattern={"q_proj": 3}), IST())
    ist, batch = ist_of(model), DECODER.batch()
    scales = {n: dict(m.scaling) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    plain = model(**batch).logits
    with ist.suppressed([1, 4]):
        suppressed = model(**batch).logits
    with pytest.raises(KeyError), ist.suppressed([0, 2]):
        raise KeyError
    assert scales == {n: dict(m.scaling) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert torch.equal(model(**batch).logits, plain)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (".layers.1." in name or ".layers.4." in name):
            module.scaling["default"] *= 0.25
    torch.testing.assert_close(suppressed, model(**batch).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(suppressed, plain, atol=1e-3)


def test_an_update_leaves_scales_and_modes_also_if_a_forward_fails():
    model = applied(random_lora(), IST(reward_rows=2))
    scales = {n: dict(m.scaling) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    ist_of(model).learn(model)
    failing = model.base_model.model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ist_of(model).learn(model)
    failing.remove()
    assert scales == {n: dict(m.scaling) for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert modes == [m.training for m in model.modules()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]


@pytest.mark.parametrize(
    "config",
    [
        random_lora(use_dora=True),
        IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
        HUTConfig(r=2, target_modules=TARGETS, init_weights=False),
        BottleneckConfig(r=2, form="pfeiffer", init_weights=False),
        BottleneckConfig(r=2, form="parallel", init_weights=False),
    ],
    ids=["dora", "ia3", "hut", "pfeiffer", "parallel"],
)
def test_other_adapters_are_suppressed_towards_the_layer_without_them(config):
    config = copy.deepcopy(config)
    model = applied(config, IST(suppression=0.0))
    plain = deep()
    batch = DECODER.batch()
    full = model(**batch).logits
    with ist_of(model).suppressed(range(BLOCKS)):
        torch.testing.assert_close(model(**batch).logits, plain(**batch).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(**batch).logits, full)
    assert not torch.allclose(full, plain(**batch).logits, atol=1e-3)


# 3 and 4: scores


def test_scores_follow_the_formula():
    for seed in range(3):
        draw = random.Random(seed)
        scores = [draw.gauss(0, 3) for _ in range(7)]
        sets, losses = [[0, 2, 5], [1, 2, 6], [2, 3, 4]], [draw.random() * 3 for _ in range(3)]
        old = torch.tensor(scores, dtype=torch.float64)
        reward = torch.exp(-torch.tensor(losses, dtype=torch.float64))
        reward -= reward.mean()
        p = old.sigmoid()
        expected = old.clone()
        for k, chosen in enumerate(sets):
            for i in chosen:
                expected[i] += 10 * reward[k] * p[i] * (1 - p[i])
        got = updated(scores, sets, losses, 10.0)
        assert max(abs(a - b) for a, b in zip(got, expected.tolist(), strict=True)) < 1e-7
    assert updated([1.0, 2.0, 3.0], [[0], [0]], [0.5, 0.1], 1.0)[1:] == [2.0, 3.0]


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_an_update_uses_the_mean_loss_of_the_rows_with_the_sets_suppressed_and_without_dropout(at_once, monkeypatch):
    model = applied(random_lora(lora_dropout=0.5), IST(reward_rows=5, num_draws=2, rate=4.0), model=deep(dropout=0.3))
    ist, seen, drawn = ist_of(model), [], []
    loss = ist._loss
    ist._loss = lambda *given: seen.append((given, loss(*given))) or seen[-1][1]
    monkeypatch.setattr(
        "shoestring.selection.ist.batches_of", lambda *given: drawn.append(given[1]) or batches_of(*given)
    )
    ist.learn(model, at_once)
    (rows,) = drawn
    assert len(rows) == 5
    assert len({int(row["attention_mask"].sum()) for row in rows}) > 1
    parts = [rows[start : start + at_once] for start in range(0, 5, at_once)]
    for (_, batches, chosen), found in seen:
        assert [count for _, count in batches] == [len(part) for part in parts]
        assert len(chosen) == BLOCKS // 2
        with ist.suppressed(chosen), torch.no_grad():
            model.eval()
            padded = [{n: torch.stack([row[n] for row in part]) for n in part[0]} for part in parts]
            expected = sum(float(model(**b).loss) * len(part) for b, part in zip(padded, parts, strict=True)) / 5
            model.train()
        assert abs(found - expected) < 1e-6
    assert ist.scores == updated([0.0] * BLOCKS, [given[2] for given, _ in seen], [found for _, found in seen], 4.0)


def test_in_the_trainer_rewards_run_in_micro_batches_of_the_run_and_in_its_precision(tmp_path):
    model = applied(lora(), IST(active_layers=1, period=3, reward_rows=9))
    layer, seen = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj"), []
    layer.register_forward_hook(lambda m, x, y: seen.append((len(y), y.dtype, torch.is_grad_enabled())))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        bf16=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    RecipeTrainer(model=model, args=arguments, train_dataset=DECODER.data()["train"]).train()
    assert [rows for rows, _, grad in seen if not grad] == [4, 4, 1] * 3
    assert {dtype for _, dtype, _ in seen} == {torch.bfloat16}


def test_a_harmful_block_comes_to_a_higher_score_than_an_essential_one():
    model = applied(random_lora(), IST(reward_rows=4, rate=60.0))
    ist = ist_of(model)
    with torch.no_grad():
        for parameter in (p for block in by_block(model) for p in block.values()):
            parameter.mul_(0.0)
    essential, harmful = 1, 4
    learned = list(by_block(model)[essential].values())
    for parameter in learned:
        nn.init.normal_(parameter, std=0.3)
    optimizer = torch.optim.Adam(learned, lr=0.03)
    data = DECODER.data()["train"]
    whole = {n: torch.stack([row[n] for row in data]) for n in data[0]}
    for _ in range(40):
        model(**whole).loss.backward()
        optimizer.step()
        model.zero_grad()
    with torch.no_grad():
        best = float(model(**whole).loss)
        for parameter in by_block(model)[harmful].values():
            nn.init.normal_(parameter, std=0.7)
        assert float(model(**whole).loss) > best + 0.1
        with ist.suppressed([essential]):
            assert float(model(**whole).loss) > best + 0.1
    for _ in range(12):
        ist.learn(model)
    assert ist.scores[harmful] > ist.scores[essential] + 0.5
    low, high = sigmoid(-ist.scores[harmful]), sigmoid(-ist.scores[essential])
    draws = list(itertools.chain(*(ist._drawn([sigmoid(-s) for s in ist.scores], 2) for _ in range(300))))
    assert low < high
    assert draws.count(essential) > draws.count(harmful)
    assert ist.importance_by_block()["base_model.model.model.layers.4"] == ist.scores[harmful]


# 5: draws


def test_draws_follow_their_weights_and_sets_differ_even_where_one_is_nearly_sure():
    model = applied(random_lora(), IST())
    ist = ist_of(model)
    weights = [0.5, 0.1, 0.2, 0.9, 0.4, 0.3]
    ours = [tuple(ist._drawn(weights, 2)) for _ in range(20000)]
    draw = random.Random(1)

    def in_turn():
        left, chosen = list(range(6)), []
        for _ in range(2):
            chosen += draw.choices(left, [weights[i] for i in left])
            left.remove(chosen[-1])
        return tuple(sorted(chosen))

    theirs = [in_turn() for _ in range(20000)]
    for pair in itertools.combinations(range(6), 2):
        assert abs(ours.count(pair) - theirs.count(pair)) < 5 * math.sqrt(theirs.count(pair) + 20) * 1.5
    ist.scores = [900.0, 900.0, 900.0, -900.0, -900.0, -900.0]
    sets = ist._drawn_sets()
    assert sets[0] == [0, 1, 2]
    assert len({tuple(s) for s in sets}) == 3


def test_the_same_seed_trains_the_same_blocks_and_another_does_not():
    def run(seed: int) -> tuple:
        model = applied(random_lora(), IST(active_layers=2, period=2, reward_rows=2, seed=seed))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        active = [one_step(model, optimizer, index) for index in range(6)]
        return active, ist_of(model).scores

    assert run(3) == run(3)
    assert run(3)[0] != run(4)[0]
    assert any(run(3)[1])


def test_a_resumed_run_goes_on_bit_by_bit(tmp_path):
    def go_on(model, optimizer, steps):
        return [one_step(model, optimizer, index) for index in steps]

    def fresh(seed=7):
        model = applied(random_lora(lora_dropout=0.1), IST(active_layers=2, period=2, reward_rows=2), seed=seed)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    whole, optimizer = fresh()
    active = go_on(whole, optimizer, range(8))
    stopped, first = fresh()
    go_on(stopped, first, range(4))
    attached_to(stopped).save(tmp_path)
    again, second = fresh(8)
    attached_to(again).restore(tmp_path)
    second.load_state_dict(first.state_dict())
    assert go_on(again, second, range(4, 8)) == active[4:]
    assert ist_of(again).state_dict() == ist_of(whole).state_dict()
    for ours, theirs in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# 6: memory


def saved_bytes(model, batch) -> int:
    with Ledger(model) as ledger:
        model(**batch).loss.backward()
    model.zero_grad()
    return ledger.report().saved_bytes


@pytest.mark.parametrize("beside", [(), (Recompute(),)], ids=["plain", "recompute"])
def test_backward_stops_at_the_lowest_block_that_trains(beside):
    model = applied(random_lora(), *beside, IST(active_layers=1, importance=False))
    ist, batch = ist_of(model), DECODER.batch()
    every = saved_bytes(model, batch)
    by_lowest = []
    for lowest in range(BLOCKS):
        ist._wake([lowest])
        with Ledger(model, module_depth=5) as ledger:
            model(**batch).loss.backward()
        by_lowest.append(ledger.report().saved_bytes)
        model.zero_grad()
        kept = {m: size for m, size in ledger.report().by_module.items() if ".layers." in m and size}
        below = {m for m in kept if int(m.split(".")[4]) < lowest} if not beside else set()
        assert not below, f"with block {lowest} the lowest, {below} keep something"
    steps = [a - b for a, b in itertools.pairwise(by_lowest)]
    assert all(step > 0 for step in steps)
    assert by_lowest[0] <= every
    if not beside:
        assert by_lowest[-1] < every / 3


def test_planning_takes_the_lowest_blocks_which_is_the_most_a_step_can_keep():
    with Valueless():
        model = Recipe(lora(), IST(active_layers=2)).apply(without_values(deep(), Valueless()))
        attached_to(model).event("on_step_begin", Moment(model))
        assert ist_of(model).active() == [0, 1]


# 8: refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_layers": 0}, "active_layers of ist must be a count of at least 1 or a share"),
        ({"active_layers": 1.5}, "active_layers of ist must be"),
        ({"suppressed_layers": 0.0}, "suppressed_layers of ist must be"),
        ({"suppression": 1.0}, r"suppression of ist must be at least 0 and below 1, got 1\.0"),
        ({"suppression": -0.1}, "suppression of ist"),
        ({"period": 0}, "period of ist must be at least 1, got 0"),
        ({"reward_rows": 0}, "reward_rows of ist"),
        ({"num_draws": 1}, "num_draws of ist must be at least 2"),
        ({"rate": 0.0}, "rate of ist must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        IST(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"active_layers": 7}, "active_layers of ist is 7, which makes 7 of the 6 blocks"),
        ({"active_layers": 0.1}, r"active_layers of ist is 0\.1, which makes 0 of the 6 blocks"),
        ({"suppressed_layers": 7}, "suppressed_layers of ist is 7"),
        ({"suppressed_layers": 6}, "num_draws of ist is 3, but there are only 1 different sets of 6 of the 6 blocks"),
        ({"reward_rows": 17}, "reward_rows of ist is 17, but the training data has only 16 rows"),
    ],
)
def test_counts_that_do_not_fit_the_model_or_the_data_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        applied(lora(), IST(**settings))


def test_models_without_adapters_in_blocks_or_with_shared_ones_are_refused():
    with pytest.raises(SettingError, match="ist needs a technique of the phase adapter"):
        Recipe(IST())
    with pytest.raises(SettingError, match=r"ist finds no block of .* with adapters that train"):
        applied(lora(target_modules=["lm_head"]), IST(), model=deep(tie_word_embeddings=False))
    with pytest.raises(SettingError, match=r"ist leaves blocks .* take lora in place of adalora"):
        applied(AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"]), IST())
    with pytest.raises(SettingError, match=r"ist lets blocks rest one by one, but .* (shares|trains for all)"):
        applied(VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, target_modules=["q_proj", "v_proj"]), IST())


def test_data_is_asked_for_before_the_first_step_but_not_by_random_blocks():
    model = Recipe(lora(), IST()).apply(deep())
    with pytest.raises(SettingError, match="ist learns from data, and has seen none"):
        attached_to(model).event("on_step_begin", Moment(model))
    with pytest.raises(SettingError, match="split 'train', a data set with a length; got only test"):
        Recipe(lora(), IST()).apply(deep(), data={"test": []})
    model = Recipe(lora(), IST(importance=False)).apply(deep(), data={"train": iter(())})
    attached_to(model).event("on_step_begin", Moment(model))
    assert not IST(importance=False).reads_data


def test_scores_of_other_blocks_and_losses_that_are_no_number_are_refused():
    model = applied(lora(), IST(reward_rows=2))
    ist = ist_of(model)
    with pytest.raises(SettingError, match="those of 2 blocks, but 6 have adapters"):
        ist.load_state_dict({**ist.state_dict(), "scores": [0.0, 0.0]})
    with torch.no_grad():
        model.base_model.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="ist measured losses of"):
        ist.learn(model)


def test_layers_whose_output_is_no_tensor_are_refused_by_name():
    model = applied(lora(), IST())
    hook = model.base_model.model.model.layers[2].mlp.down_proj.register_forward_hook(
        lambda m, a, y: (y,), prepend=True
    )
    named = pytest.raises(SettingError, match=r"layers\.2\.mlp\.down_proj, whose output is a tuple")
    with named, ist_of(model).suppressed([2]):
        model(**DECODER.batch())
    hook.remove()


def test_memory_of_steps_is_below_that_of_adapters_in_all_blocks():
    batch = DECODER.batch()
    every = saved_bytes(applied(random_lora()), batch)
    model, found = applied(random_lora(), IST(active_layers=0.25, importance=False, seed=1)), []
    for index in range(6):
        attached_to(model).event("on_step_begin", Moment(model, step=index))
        found.append(saved_bytes(model, batch))
        attached_to(model).event("on_step_end", Moment(model, step=index + 1))
    mean, most = sum(found) / len(found), max(found)
    assert most < every, f"{mean} in the mean, {most} at most, {every} with all blocks"
    assert mean < 0.9 * every, f"{mean} in the mean, {most} at most, {every} with all blocks"
    assert len(set(found)) > 1


# a real model


@pytest.mark.slow
def test_a_packaged_model_trains_on_packaged_data_half_of_its_blocks_at_a_time(tmp_path):
    need("minilm", "rotten-tomatoes")
    folder = assets.model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = assets.load_data("rotten-tomatoes")["train"].shuffle(seed=0).select(range(64))
    rows = [{**tokenizer(row["text"], truncation=True, max_length=32), "labels": row["label"]} for row in data]
    config = LoraConfig(r=4, target_modules=["query", "value", "dense"], task_type="SEQ_CLS")
    with seeded(0):
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
        model = Recipe(config, IST(active_layers=0.5, period=3, reward_rows=4)).apply(base, data={"train": rows})
    arguments = TrainingArguments(
        tmp_path,
        max_steps=16,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=4,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = RecipeTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[GradientCheck()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    scores = ist_of(model).importance_by_block()
    assert len(scores) == 6
    assert any(scores.values())
