"""Zeroth-order training: directions come again from seeds, weights come back, steps are logged, no memory is kept."""

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from shoestring import Recipe
from shoestring.adapters import MoLAConfig
from shoestring.errors import RunFailed, SettingError
from shoestring.memory import Ledger
from shoestring.modes import quiet
from shoestring.objectives import (
    BALora,
    ChunkedLoss,
    DensityLoss,
    LazyLogits,
    MaskedAutoencoder,
    MetricLearning,
)
from shoestring.optimizers import BilevelZOFO, ZerothOrder, replay
from shoestring.optimizers.seeded_noise import PART, _add, add_noise, losses_at, seed_on, seeds_of, update
from shoestring.optimizers.step_log import FILE, StepLog
from shoestring.optimizers.zeroth_order import mean_of_processes
from shoestring.planning.rehearsal import Work, rehearse
from shoestring.recipe import attached_to, load
from shoestring.selection import Speft
from shoestring.technique import Phase, Technique
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, IMAGES, TinyModel, decoder, seeded
from shoestring.training import RecipeCallback, RecipeTrainer
from shoestring.training.checks import GradientCheck
from shoestring.training.observe import StepMemory


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_strategy": "no"}
    given |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **{**given, **settings})


def trained(
    model: nn.Module, folder: Path, rows: Any = None, callbacks: Any = (), resume: Any = None, **settings: Any
) -> RecipeTrainer:
    rows = CLASSIFIER.rows(1, 12) if rows is None else rows
    trainer = RecipeTrainer(
        model=model, args=arguments(folder, **settings), train_dataset=rows, callbacks=[GradientCheck(), *callbacks]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def weights(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(7, 5, generator=generator), torch.randn(3, generator=generator)]


def log_of(model: nn.Module) -> StepLog:
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, ZerothOrder))
    return technique.log


def test_a_seed_draws_the_same_noise_again_and_another_seed_does_not():
    drawn = []
    for seed in (4, 4, 5):
        moved = [torch.zeros(7, 5), torch.zeros(3)]
        add_noise(moved, seed, 1.0)
        drawn.append(torch.cat([w.flatten() for w in moved]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert seeds_of(1, 2, 3) == seeds_of(1, 2, 3) != seeds_of(1, 3, 3)


def test_each_device_draws_noise_of_its_own():
    seeds = [seed_on(number, 7) for number in range(4)]
    assert seeds[0] == 7
    noise = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert torch.corrcoef(torch.stack(noise)).triu(1).abs().max() < 0.15


def test_noise_of_weights_of_several_parts_is_normal_and_new_in_each():
    moved = torch.zeros(2 * PART + 5)
    add_noise([moved], 1, 1.0)
    assert abs(float(moved.mean())) < 5e-3
    assert abs(float(moved.std()) - 1) < 5e-3
    assert not torch.equal(moved[:PART], moved[PART : 2 * PART])


@pytest.mark.parametrize("bring_back", ["copy", "host_copy"])
def test_a_null_step_with_a_copy_gives_the_same_bits(bring_back):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        start = [w.to(dtype) for w in weights()]
        moved = [w.clone() for w in start]
        losses_at(moved, 3, [1e-3, -1e-3], lambda: torch.zeros(()), bring_back)
        update(moved, 3, [0.1, 0.1], 0.0)
        assert all(torch.equal(a, b) for a, b in zip(moved, start, strict=True))


def test_a_null_step_that_adds_back_is_off_by_rounding_at_the_perturbed_size_at_most():
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(1)) * 0.02
    moved = start.clone()
    steps = 50
    for seed in range(steps):
        losses_at([moved], seed, [1e-3, -1e-3], lambda: torch.zeros(()), "add_back")
    # the rounding of weight + 5 eps at 3 additions a step, in a random walk
    largest = start.abs() + 5e-3
    unit = torch.finfo(torch.float32).eps * largest
    assert float(((moved - start).abs() / unit).max()) < 3 * math.sqrt(steps)
    assert float((moved - start).abs().max()) < 1e-7


def test_a_loss_that_raises_leaves_the_weights_at_the_start():
    moved = weights()

    def fail() -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        losses_at(moved, 3, [1.0], fail, "copy")
    assert all(torch.equal(a, b) for a, b in zip(moved, weights(), strict=True))


def test_the_mean_of_slope_times_noise_is_the_gradient():
    """On f = |w|^2 / 2, whose gradient is w, over 20,000 seeds."""
    start = torch.tensor([1.0, -2.0, 0.5, 3.0])
    total = torch.zeros(4)
    for seed in range(20_000):
        noise = torch.zeros(4)
        add_noise([noise], seed, 1.0)
        up, down = ((start + sign * 1e-2 * noise).square().sum() / 2 for sign in (1, -1))
        total += float(up - down) / 2e-2 * noise
    assert float((total / 20_000 - start).norm() / start.norm()) < 0.05


def test_the_update_is_the_equation_with_decay_for_some():
    moved, noise = weights(), [torch.zeros(7, 5), torch.zeros(3)]
    add_noise(noise, 9, 1.0)
    update(moved, 9, [0.1, 0.2], 0.7, [0.5, 0.0])
    of_weights = zip(weights(), noise, (0.1, 0.2), (0.5, 0.0), strict=True)
    expected = [w - rate * (0.7 * z + decay * w) for w, z, rate, decay in of_weights]
    for ours, theirs in zip(moved, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_small_updates_of_bfloat16_count_on_average():
    moved = torch.full((200_000,), 1.0, dtype=torch.bfloat16)
    ones = torch.full((200_000,), 1e-4)  # a fortieth of the unit there
    _add(moved, ones.clone(), torch.Generator().manual_seed(0))
    assert abs(float(moved.double().mean()) - 1.0001) < 1e-5


def test_a_step_in_the_trainer_is_that_of_the_equation_over_an_accumulated_batch(tmp_path):
    rows = DECODER.rows(1, 4)
    base = DECODER.make().double()
    model = Recipe(ZerothOrder(eps=1e-3, num_directions=2, bring_back="copy", seed=5)).apply(base)
    start = values(model)
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "weight_decay": 0.3, "max_steps": 1}
    trained(model, tmp_path, rows, learning_rate=0.01, lr_scheduler_type="constant", **settings)

    reference = DECODER.make().double().eval()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    names = [name for name, _ in reference.named_parameters()]
    expected = {name: value.clone() for name, value in start.items()}
    seeds = seeds_of(5, 0, 2)
    for index, seed in enumerate(seeds):
        noise = [torch.zeros_like(p) for p in reference.parameters()]
        add_noise(noise, seed, 1.0)
        losses = []
        for sign in (1, -1):
            moved = {n: start[n] + sign * 1e-3 * z for n, z in zip(names, noise, strict=True)}
            losses.append(float(torch.func.functional_call(reference, moved, kwargs=batch).loss))
        slope = (losses[0] - losses[1]) / 2e-3
        for name, z in zip(names, noise, strict=True):
            decay = 0.3 if index == 0 and "norm" not in name else 0.0
            expected[name] = expected[name] - 0.01 * (slope / 2 * z + decay * expected[name])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=2e-5)  # the loss is in float32
    assert log_of(model).seeds == [seeds]


def test_tied_weights_move_once_and_buffers_never(tmp_path):
    model = Recipe(ZerothOrder()).apply(DECODER.make())
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    trained(model, tmp_path, DECODER.rows(1, 8))
    assert log_of(model).names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in log_of(model).names
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


def test_beside_lora_only_the_adapters_move_and_dropout_is_off(tmp_path):
    ends = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        model = Recipe(CLASSIFIER.lora(), ZerothOrder(eps=1e-2)).apply(CLASSIFIER.make(dropout=dropout))
        start = values(model)
        trained(model, tmp_path / str(dropout))
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
        ends.append(values(model))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize("tiny", [CLASSIFIER, DECODER], ids=["layers", "attributes"])
@pytest.mark.parametrize(
    ("technique", "where"),
    [(ZerothOrder(), "its forwards and has no effect"), (BilevelZOFO(), "the forwards that move the backbone")],
)
def test_dropout_that_is_off_is_told_of_once(technique, where, tiny, recwarn):
    def told() -> list[str]:
        texts = [str(each.message) for each in recwarn.list if "dropout" in str(each.message)]
        recwarn.clear()
        return texts

    Recipe(tiny.lora(), technique).apply(tiny.make())
    assert not told()
    Recipe(tiny.lora(), technique).apply(tiny.make(dropout=0.25))
    (text,) = told()
    start = f"{technique.name} compares losses of one batch: the dropout of"
    assert re.search(rf"{start} \d+ modules, .* \(0\.25\) first, is off in {where}", text)
    Recipe(tiny.lora(lora_dropout=0.1), technique).apply(tiny.make())
    assert re.search(r"lora_dropout.* \(0\.1\) first", told()[0])
    Recipe(tiny.lora(), BilevelZOFO(backbone_lr=0.0)).apply(tiny.make(dropout=0.25))
    assert not told()


def test_quiet_leaves_modes_as_they_were():
    model = CLASSIFIER.make(dropout=0.5).train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    with quiet(model):
        assert model.training
        assert not any(module.training for module in list(model.modules())[1:])
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("bring_back", ["copy", "add_back"])
def test_the_log_makes_the_trained_weights_from_a_fresh_base(tmp_path, bring_back):
    model = Recipe(ZerothOrder(bring_back=bring_back)).apply(CLASSIFIER.make())
    trained(model, tmp_path, max_steps=5, weight_decay=0.1, warmup_steps=2)
    attached_to(model).save(tmp_path / "saved")
    fresh = CLASSIFIER.make()
    replay(fresh, tmp_path / "saved")
    for name, parameter in model.named_parameters():
        ours = fresh.get_parameter(name)
        if bring_back == "copy":
            assert torch.equal(ours, parameter), name
        else:
            torch.testing.assert_close(ours, parameter, rtol=0, atol=1e-6)
    assert (tmp_path / "saved" / FILE).stat().st_size < 8000


def test_20_000_steps_take_less_than_200_kilobytes(tmp_path):
    log = StepLog(["w"], [[2]], [0], [0.0], "cpu")
    log.seeds, log.slopes, log.rates = [[1]] * 20_000, [[0.5]] * 20_000, [[1e-6]] * 20_000
    log.save(tmp_path)
    assert (tmp_path / FILE).stat().st_size < 200_000
    assert StepLog.load(tmp_path) == log


def test_a_log_of_another_model_is_refused(tmp_path):
    model = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    trained(model, tmp_path, max_steps=1)
    attached_to(model).save(tmp_path / "saved")
    with pytest.raises(SettingError, match=r"trained bert.embeddings.word_embeddings.weight, which LlamaForCausalLM"):
        replay(DECODER.make(), tmp_path / "saved")
    (tmp_path / "saved" / FILE).write_bytes(b"no")
    with pytest.raises(SettingError, match=r"zeroth_order_steps\.safetensors cannot be read"):
        replay(CLASSIFIER.make(), tmp_path / "saved")


def test_noise_of_another_kind_of_device_is_refused_in_a_replay_and_a_resumed_run(tmp_path):
    weight = torch.zeros(2)
    log = StepLog()
    log.describe({"w": weight}, [0], [0.0])
    log.take([weight], [1], [0.5], [1e-3])
    assert log.device == "cpu"
    log.device = "cuda"  # as if these steps had been made there
    log.save(tmp_path)
    before, restored = weight.clone(), StepLog.load(tmp_path)
    restored.describe({"w": weight}, [0], [0.0])
    for go_on in (
        lambda: restored.replay({"w": weight}),
        lambda: restored.take([weight], [2], [0.5], [1e-3]),
    ):
        with pytest.raises(SettingError, match=r"made on cuda, and noise is another on cpu: move the model to cuda"):
            go_on()
    assert torch.equal(weight, before)
    assert len(restored.seeds) == 1


@pytest.mark.parametrize(
    "other",
    ["id3", {"speft": {"count": 9, "dynamic_steps": 2}}, "light_peft", "ist", {"adalora": {"total_step": 9}}],
    ids=["id3", "speft", "light_peft", "ist", "adalora"],
)
@pytest.mark.parametrize("ours", ["zeroth_order", "bilevel_zofo"])
def test_what_changes_the_trained_parameters_on_the_way_is_refused(ours, other):
    recipe = [{"lora": {"r": 2}}, other, ours] if "adalora" not in other else [other, ours]
    if (ours, other) == ("bilevel_zofo", "ist"):  # blocks that rest keep their two copies
        Recipe.from_list(recipe)
        return
    with pytest.raises(SettingError, match=rf"{ours} and \w+ cannot be combined: \w+ changes which .* step to step"):
        Recipe.from_list(recipe)


ADAMSS = {"r": 4, "num_subspaces": 2, "subspace_rank": 1, "target_modules": ["query"]}
FREEZING = {
    **ADAMSS,
    "use_asa": True,
    "asa_target_subspaces": 2,
    "init_warmup": 1,
    "final_warmup": 3,
    "mask_interval": 1,
}


@pytest.mark.parametrize(
    ("others", "freezing"),
    [(["zeroth_order"], "refused"), (["bilevel_zofo"], "goes"), ([{"lora": {"r": 2}}, "lora_fa"], "goes")],
    ids=["zeroth_order", "bilevel_zofo", "lora_fa"],
)
def test_a_budget_that_is_not_shared_out_stands_beside_any_and_one_that_freezes_beside_most(others, freezing):
    Recipe.from_list([{"adamss": ADAMSS}, *others])
    recipe = [{"adamss": FREEZING}, *others]
    if freezing == "goes":
        Recipe.from_list(recipe)
        return
    with pytest.raises(SettingError, match="adamss changes which parameters train from step to step"):
        Recipe.from_list(recipe)


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    whole = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    trained(whole, tmp_path / "whole", max_steps=4)
    stopped = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    trained(stopped, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2)
    again = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    trained(again, tmp_path / "run", max_steps=4, resume=str(tmp_path / "run" / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    assert log_of(again) == log_of(whole)
    attached_to(again).save(tmp_path / "saved")
    loaded = load(CLASSIFIER.make(), tmp_path / "saved")
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in whole.named_parameters())


def test_a_step_whose_loss_is_no_number_is_skipped_and_changes_nothing(tmp_path, monkeypatch):
    model = Recipe(ZerothOrder(bring_back="copy")).apply(CLASSIFIER.make())
    calls = []
    original = RecipeTrainer.compute_loss

    def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        calls.append(loss)
        return loss * math.nan if len(calls) == 4 else loss  # the second loss of the second step

    monkeypatch.setattr(RecipeTrainer, "compute_loss", spoiled)
    with pytest.warns(UserWarning, match="skips a step whose loss is no number"):
        trainer = trained(model, tmp_path, logging_strategy="steps", logging_steps=1, lr_scheduler_type="constant")
    seen = log_of(model)
    assert len(seen.seeds) == 2
    assert seen.seeds == [seeds_of(0, 0, 1), seeds_of(0, 2, 1)]
    assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    fresh = CLASSIFIER.make()
    seen.replay({name: fresh.get_parameter(name).data for name in seen.names})
    assert all(torch.equal(p, fresh.get_parameter(name)) for name, p in model.named_parameters())


def test_a_run_whose_losses_are_no_numbers_ends(tmp_path, monkeypatch):
    model = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    with torch.no_grad():
        model.classifier.weight[0, 0] = math.nan
    with pytest.raises(RunFailed, match="The loss is nan at step 1"):
        trained(model, tmp_path)


def peak(model: nn.Module, folder: Path, rows: Any, **settings: Any) -> int:
    memory = StepMemory()
    trained(model, folder, rows, [memory], max_steps=2, **settings)
    assert memory.report is not None
    return memory.report.peak_bytes


@pytest.mark.parametrize("model", [CLASSIFIER, DECODER], ids=lambda model: model.name)
def test_the_peak_of_a_step_is_that_of_inference(tmp_path, model: TinyModel):
    rows = model.rows(1, 64)
    base = model.make()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad(), Ledger(base) as ledger:
        base.eval()(**batch)
    ours = peak(Recipe(ZerothOrder()).apply(base), tmp_path, rows, per_device_train_batch_size=64)
    assert ours <= 1.05 * ledger.report().peak_bytes


def test_the_planner_predicts_the_peak(tmp_path):
    def make_trainer(model: Any, folder: str, callbacks: Any) -> Trainer:
        run = arguments(Path(folder), max_steps=1, per_device_train_batch_size=8)
        return RecipeTrainer(model=model, args=run, train_dataset=[0], callbacks=list(callbacks))

    def make_batch(model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in DECODER.batch(1, 8).items() if name != "attention_mask"}

    for recipe in (Recipe(ZerothOrder()), Recipe(DECODER.lora(), ZerothOrder())):
        found = rehearse(Work(recipe, DECODER.make, make_trainer, make_batch)).memory
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in DECODER.rows(1, 8)]
        measured = peak(recipe.apply(DECODER.make()), tmp_path, rows, per_device_train_batch_size=8)
        assert abs(found.peak_bytes / measured - 1) < 0.02
        assert found.at_peak["gradients"] == found.at_peak["optimizer_state"] == 0


@dataclass
class Penalty(Technique):
    """Adds to the loss what the model gave."""

    name: ClassVar[str] = "penalty"
    phase: ClassVar[Phase] = Phase.OBJECTIVE

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor:
        return outputs.logits.mean() * 1000


def test_what_techniques_add_to_the_loss_is_in_it(tmp_path):
    slopes = []
    for others in ((), (Penalty(),)):
        model = Recipe(ZerothOrder(), *others).apply(CLASSIFIER.make())
        trained(model, tmp_path, max_steps=1)
        slopes.append(log_of(model).slopes[0][0])
    assert abs(slopes[1]) > 10 * abs(slopes[0])


RELU = replace(DECODER, make=partial(decoder, hidden_act="relu"))
MOLA = MoLAConfig(r=2, experts=2, balance=10.0, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
ADDED = {
    "density_loss": (RELU, RELU.lora, DensityLoss(epsilon=0.05)),
    "metric_learning": (CLASSIFIER, CLASSIFIER.lora, MetricLearning(slerp=True)),
    "mola": (DECODER, lambda: MOLA, None),
    "chunked_loss": (DECODER, DECODER.lora, ChunkedLoss()),
    "ba_lora": (DECODER, DECODER.lora, BALora(consistency=2.0, top_words=9)),
}


@pytest.mark.parametrize(("tiny", "adapters", "technique"), ADDED.values(), ids=ADDED)
def test_a_slope_is_that_of_the_loss_in_training_mode(tmp_path, tiny, adapters, technique):
    """With what techniques add to it; chunked_loss adds nothing."""

    def made() -> RecipeTrainer:
        with seeded(7):
            beside = [] if technique is None else [technique]
            model = Recipe(adapters(), *beside, ZerothOrder(eps=1e-2)).apply(tiny.make())
        run = arguments(tmp_path, max_steps=1)
        return RecipeTrainer(model=model, args=run, train_dataset=tiny.rows(1, 4), callbacks=[GradientCheck()])

    trainer = made()
    trainer.train()
    ((slope,),) = log_of(trainer.model).slopes

    trainer = made()
    model, seed = trainer.model, seeds_of(0, 0, 1)[0]
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._micro_batch(model, inputs, None)
    state, ends, plain = torch.get_rng_state(), [], []
    for scale in (1e-2, -2e-2):
        add_noise([p for p in model.parameters() if p.requires_grad], seed, scale)
        torch.set_rng_state(state)
        loss = batch.loss_of(inputs)
        assert loss.requires_grad
        torch.set_rng_state(state)
        with quiet(model):
            quiet_loss = batch.loss_of(inputs)
        torch.testing.assert_close(quiet_loss, loss.detach(), rtol=1e-5, atol=1e-6)
        ends.append(float(quiet_loss))
        plain.append(float(model.eval()(**inputs).loss.detach()))
        model.train()
    if technique is None or technique.name != "metric_learning":  # draws other features for other numbers before
        assert slope == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=1e-3)
    if technique is None or technique.name != "chunked_loss":
        assert abs(ends[0] - plain[0]) > 1e-3


def test_an_output_head_makes_no_logits_in_forwards_alone(tmp_path):
    model = Recipe(DECODER.lora(), ChunkedLoss(), ZerothOrder()).apply(DECODER.make()).train()
    with quiet(model):
        assert isinstance(model(**DECODER.batch()).logits, LazyLogits)


class Images(RecipeTrainer):
    """Notes what was hidden in each forward."""

    hidden: ClassVar[list[Tensor]] = []

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.hidden.append(outputs.hidden)
        return (loss, outputs) if return_outputs else loss


def test_both_ends_of_a_direction_see_the_same_draws_and_steps_others(tmp_path):
    with seeded(7):
        sizes = {"decoder_width": 16, "decoder_blocks": 1, "decoder_heads": 2}
        recipe = Recipe(IMAGES.lora(), MaskedAutoencoder(**sizes), ZerothOrder(eps=1e-2, num_directions=2))
        model = recipe.apply(IMAGES.make())
    start = values(model)
    run = arguments(tmp_path, max_steps=2, lr_scheduler_type="constant")
    Images.hidden.clear()
    Images(model=model, args=run, train_dataset=IMAGES.rows(1, 4), callbacks=[GradientCheck()]).train()
    masks = Images.hidden
    assert len(masks) == 8
    for up, down in zip(masks[::2], masks[1::2], strict=True):
        assert torch.equal(up, down)
    assert not any(torch.equal(masks[0], other) for other in masks[2::2])

    # the first slope with that mask fixed
    inputs = next(iter(Images(model=model, args=run, train_dataset=IMAGES.rows(1, 4)).get_train_dataloader()))
    weights = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    order = torch.cat([_rest(masks[0]), masks[0]], dim=1).argsort(1).to(torch.float32)
    losses = []
    with pytest.MonkeyPatch.context() as patch, quiet(model):
        patch.setattr(torch, "rand", lambda *sizes, **settings: order)
        for scale in (1e-2, -2e-2):
            add_noise(weights, seeds_of(0, 0, 1)[0], scale)
            losses.append(float(model(**inputs).loss))
    assert log_of(model).slopes[0][0] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-3)


def _rest(hidden: Tensor) -> Tensor:
    """The patches of each image that are not hidden."""
    return torch.stack([torch.tensor([i for i in range(9) if i not in row]) for row in hidden.tolist()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "eps of zeroth_order must be positive, got 0.0"),
        ({"num_directions": 0}, "num_directions of zeroth_order must be at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ZerothOrder(**settings)


def test_weights_that_noise_cannot_be_added_to_are_refused_by_name(tmp_path):
    with pytest.raises(SettingError, match=r"move bert.embeddings.word_embeddings.weight in float16, whose range"):
        Recipe(ZerothOrder()).apply(CLASSIFIER.make().half())
    model = CLASSIFIER.make()
    model.classifier.weight = nn.Parameter(torch.zeros(3, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SettingError, match=r"would move classifier.weight, a Parameter of int8, which is quantised"):
        Recipe(ZerothOrder()).apply(model)
    with pytest.raises(SettingError, match="cannot bring weights in bfloat16 back by adding"):
        Recipe(ZerothOrder(bring_back="add_back")).apply(CLASSIFIER.make().bfloat16())
    with pytest.raises(SettingError, match="finds nothing that trains"):
        Recipe(ZerothOrder()).apply(CLASSIFIER.make().requires_grad_(False))


def test_a_trainer_that_cannot_make_its_steps_is_refused(tmp_path):
    model = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    trainer = Trainer(
        model=model, args=arguments(tmp_path), train_dataset=CLASSIFIER.rows(), callbacks=[RecipeCallback()]
    )
    with pytest.raises(ValueError, match=r"brings an optimizer of its own|makes training steps by itself"):
        trainer.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = RecipeTrainer(model=model, args=arguments(tmp_path), train_dataset=CLASSIFIER.rows())
    given.optimizer = optimizer
    with pytest.raises(SettingError, match="has made no optimizer"):
        given.train()


def test_what_cuts_weights_or_scales_gradients_is_refused(tmp_path):
    model = Recipe(ZerothOrder()).apply(CLASSIFIER.make())
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    (technique,) = attached_to(model).techniques
    for setting, message in (("fsdp", "moves whole weights"), ("fp16", "no gradients for train.fp16 to scale")):
        run = arguments(tmp_path)
        setattr(run, setting, True)
        with pytest.raises(SettingError, match=message):
            technique.make_optimizer(model, groups, run)
    with pytest.raises(SettingError, match="moves whole weights"):
        technique.make_optimizer(model, [{"params": groups[0]["params"][1:]}], arguments(tmp_path))


def test_what_saves_for_backward_has_no_effect_beside_it():
    with pytest.warns(UserWarning, match="recompute has no effect beside zeroth_order"):
        Recipe.from_list(["zeroth_order", "recompute"])
    with pytest.raises(SettingError, match="both act on the optimizer"):
        Recipe.from_list([{"lora": {"r": 2}}, "lora_fa", "zeroth_order"])


def test_it_trains_in_bfloat16(tmp_path):
    model = Recipe(ZerothOrder()).apply(CLASSIFIER.make().bfloat16())
    start = values(model)
    trained(model, tmp_path)
    assert all(not torch.equal(p, start[name]) and p.isfinite().all() for name, p in model.named_parameters())


def test_single_numbers_of_weights_train(tmp_path):
    model = Recipe(Speft(density=0.05, score="magnitude"), ZerothOrder(eps=1e-2)).apply(CLASSIFIER.make())
    start = values(model)
    trained(model, tmp_path)
    assert all(any(slopes) for slopes in log_of(model).slopes)
    (chosen,) = (t for t in attached_to(model).techniques if isinstance(t, Speft))
    for name, entries in chosen.entries.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(entries.taken(), entries.values.detach())
        assert int((weight != start[name]).sum()) == len(entries.places), name


def test_slopes_of_several_processes_are_averaged(monkeypatch):
    """With another process that found 5 where this one found 2."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda found: found.add_(5.0))
    assert mean_of_processes([2.0], torch.device("cpu")) == [3.5]
