"""Bilevel ZOFO: two copies of the adapters, a backbone moved by forwards, and what it becomes at its limits."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from shoestring import Recipe
from shoestring.blocks import Recompute, TokenTune
from shoestring.errors import SettingError
from shoestring.optimizers import BilevelZOFO, ParameterGroups, ZerothOrder, replay
from shoestring.optimizers.seeded_noise import add_noise, seeds_of
from shoestring.optimizers.step_log import StepLog
from shoestring.planning.rehearsal import Work, rehearse
from shoestring.recipe import attached_to, load
from shoestring.selection import IST
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, TinyModel, seeded
from shoestring.training import RecipeTrainer
from shoestring.training.checks import GradientCheck
from shoestring.training.observe import StepMemory


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_strategy": "no"}
    given |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**given, **settings})


def trainer_of(model: nn.Module, folder: Path, callbacks: Any = (), tiny: TinyModel = DECODER, **settings: Any) -> Any:
    return RecipeTrainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=tiny.rows(1, 16),
        eval_dataset=tiny.rows(2, 16),
        callbacks=[GradientCheck(), *callbacks],
    )


def applied(*techniques: Any, tiny: TinyModel = DECODER, **model: Any) -> nn.Module:
    torch.manual_seed(0)
    return Recipe(tiny.lora(), *techniques).apply(tiny.make(**model))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def technique_of(model: nn.Module) -> BilevelZOFO:
    (technique,) = (t for t in attached_to(model).techniques if isinstance(t, BilevelZOFO))
    return technique


def test_inner_steps_train_the_inner_copy_as_the_adapters_alone_would_be(tmp_path):
    plain = applied()
    trainer_of(plain, tmp_path / "plain", max_steps=2).train()
    model = applied(BilevelZOFO(inner_steps=3))
    start = values(model)
    trainer_of(model, tmp_path / "ours", max_steps=2).train()
    for name, s in technique_of(model).inner.items():
        assert torch.equal(s, plain.get_parameter(name)), name
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]), name


def test_without_a_learning_rate_of_the_backbone_it_stays_and_only_adapters_learn(tmp_path):
    model = applied(BilevelZOFO(inner_steps=1, backbone_lr=0.0))
    start = values(model)
    trainer_of(model, tmp_path).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == set(technique_of(model).outer)


def options_of(model: nn.Module, optimizer: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The optimizer's options of each parameter of the outer copy, and of its twin."""
    options = {
        id(p): {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups for p in g["params"]
    }
    technique = technique_of(model)
    return [(options[id(p)], options[id(technique.inner[name])]) for name, p in technique.outer.items()]


def test_the_inner_copy_has_the_weight_decay_and_the_options_of_the_outer_one(tmp_path):
    with_biases = {"lora_bias": True, "modules_to_save": ["norm"]}
    groups = {"groups": [{"names": ["lora_B"], "lr_factor": 4.0, "betas": (0.5, 0.9)}]}
    for beside in ([], [ParameterGroups(**groups)]):
        with seeded(1):
            model = Recipe(DECODER.lora(**with_biases), BilevelZOFO(), *beside).apply(DECODER.make())
        optimizer = trainer_of(model, tmp_path, weight_decay=0.3).create_optimizer()
        options = options_of(model, optimizer)
        assert all(p == s for p, s in options)
        assert {s["weight_decay"] for _, s in options} == {0.0, 0.3}
        assert {s["lr"] for _, s in options} == ({1e-3, 4e-3} if beside else {1e-3})


def test_a_rate_of_the_outer_copy_is_not_that_of_the_inner_one(tmp_path):
    model = applied(BilevelZOFO(outer_lr=0.1))
    options = options_of(model, trainer_of(model, tmp_path, weight_decay=0.3).create_optimizer())
    assert {(p["lr"], s["lr"], p["weight_decay"] == s["weight_decay"]) for p, s in options} == {(0.1, 1e-3, True)}
    twice = ParameterGroups(groups=[{"names": ["lora_B"], "lr_factor": 4.0}])
    model = applied(BilevelZOFO(outer_lr=0.1), twice)
    with pytest.raises(SettingError, match="Two techniques of the recipe give one parameter optimizer options"):
        trainer_of(model, tmp_path).create_optimizer()


class OnHeldOutRows(RecipeTrainer):
    """Steps on the rows that a bilevel run draws from its held-out ones, in the same order."""

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        inputs = self.held_out_batch(seeds_of(0, 2 * self.state.global_step + 1, 1)[0])
        return super().training_step(model, inputs, None)


def test_without_a_penalty_and_a_rate_of_the_backbone_p_trains_as_adapters_alone_on_held_out_rows(tmp_path):
    run = {"lr_scheduler_type": "constant", "weight_decay": 0.1}
    model = applied(BilevelZOFO(inner_steps=1, penalty=0.0, backbone_lr=0.0))
    trainer_of(model, tmp_path / "ours", **run).train()
    plain = applied()
    OnHeldOutRows(
        model=plain,
        args=arguments(tmp_path / "plain", **run | {"max_steps": 2}),
        train_dataset=DECODER.rows(1, 16),
        eval_dataset=DECODER.rows(2, 16),
    ).train()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-7)


def test_without_a_penalty_and_a_rate_of_p_the_backbone_takes_the_steps_of_zeroth_order(tmp_path, monkeypatch):
    """Held-out rows alone count, so the outer steps are those of MeZO on them, with the same seeds."""
    run = {"lr_scheduler_type": "constant"}
    model = applied(BilevelZOFO(inner_steps=1, penalty=0.0, backbone_lr=1e-3, outer_lr=0.0))
    trainer_of(model, tmp_path / "ours", **run).train()
    log = technique_of(model).log
    assert log.seeds == [seeds_of(0, 1, 1), seeds_of(0, 3, 1)]

    mezo = applied(ZerothOrder(eps=1e-3, bring_back="add_back"))
    for name, p in mezo.named_parameters():
        p.requires_grad_(name in log.names)
    # the directions of the outer steps, which are every second of the other run
    monkeypatch.setattr(
        "shoestring.optimizers.zeroth_order.seeds_of", lambda seed, step, n: seeds_of(seed, 2 * step + 1, n)
    )
    settings = {**run, "max_steps": 2}
    trainer = OnHeldOutRows(
        model=mezo,
        args=arguments(tmp_path / "mezo", **settings),
        train_dataset=DECODER.rows(1, 16),
        eval_dataset=DECODER.rows(2, 16),
    )
    trainer.train()
    for name in log.names:
        torch.testing.assert_close(model.get_parameter(name), mezo.get_parameter(name), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("two_sided", [True, False])
def test_the_slope_and_the_gradient_of_p_are_those_of_the_equation(tmp_path, two_sided):
    technique = BilevelZOFO(
        inner_steps=1, penalty=2.5, backbone_lr=0.01, outer_lr=0.1, two_sided=two_sided, bring_back="copy"
    )
    model = applied(technique).double()
    start = values(model)
    seen: dict[str, Any] = {}
    original = RecipeTrainer._micro_batch

    def looked_at(self: Any, *args: Any) -> Any:
        seen["batch"] = original(self, *args)
        return seen["batch"]

    trainer = trainer_of(model, tmp_path, max_steps=2, optim="sgd", lr_scheduler_type="constant")
    trainer._micro_batch = looked_at.__get__(trainer)
    trainer.train()
    ours = technique_of(model)
    inner = {name: s.detach() for name, s in ours.inner.items()}
    train, seed = seen["batch"].inputs, seeds_of(0, 1, 1)[0]
    held_out = trainer.held_out_batch(seed)

    fresh = applied().double().eval()

    def height(backbone: dict[str, Tensor], p: dict[str, Tensor]) -> Tensor:
        def loss(adapters: dict[str, Tensor], batch: Any) -> Tensor:
            return torch.func.functional_call(fresh, {**start, **backbone, **adapters}, kwargs=dict(batch)).loss

        return (loss(p, held_out) + 2.5 * (loss(p, train) - loss(inner, train))) / 3.5

    names = ours.log.names
    noise = [torch.zeros_like(start[name]) for name in names]
    add_noise(noise, seed, 1.0)
    outer = {name: start[name].clone().requires_grad_() for name in inner}
    ends = (1e-3, -1e-3) if two_sided else (1e-3, 0.0)
    up, down = (
        height({name: start[name] + end * z for name, z in zip(names, noise, strict=True)}, outer) for end in ends
    )
    slope = float(up.detach() - down.detach()) / (ends[0] - ends[1])
    assert abs(ours.log.slopes[0][0] / slope - 1) < 1e-3  # losses of language models are in float32
    gradients = torch.autograd.grad(height({}, outer), list(outer.values()))
    for (name, p), gradient in zip(outer.items(), gradients, strict=True):
        torch.testing.assert_close(model.get_parameter(name).detach(), p.detach() - 0.1 * gradient, rtol=0, atol=1e-6)
    for name, z in zip(names, noise, strict=True):
        torch.testing.assert_close(
            model.get_parameter(name).detach(), start[name] - 0.01 * slope * z, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("beside", [Recompute(), TokenTune(keep_fraction=1.0)], ids=lambda technique: technique.name)
def test_inner_and_outer_steps_are_the_same_beside_what_runs_blocks_otherwise(tmp_path, beside):
    models = []
    for techniques in ((), (beside,)):
        ours = BilevelZOFO(inner_steps=1, backbone_lr=1e-3, outer_lr=0.1, bring_back="copy")
        models.append(applied(*techniques, ours).double())
        trainer_of(models[-1], tmp_path, optim="sgd", learning_rate=0.1).train()
    start = applied().double()
    alone, together = ({**values(model), **inner_of(model)} for model in models)
    moves = {name: value - start.get_parameter(name.removeprefix("inner ")) for name, value in alone.items()}
    moved = {name for name, move in moves.items() if move.abs().max() > 1e-4}
    ours = technique_of(models[0])
    assert moved >= {*ours.outer, *inner_of(models[0])}
    assert moved & set(ours.log.names)
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-7)


def inner_of(model: nn.Module) -> dict[str, Tensor]:
    return {f"inner {name}": s.detach() for name, s in technique_of(model).inner.items()}


def test_a_resumed_run_ends_at_the_same_bits_and_the_log_replays_the_backbone(tmp_path):
    settings = {"inner_steps": 2, "backbone_lr": 1e-3, "bring_back": "copy"}
    run = {"max_steps": 7, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
    whole = applied(BilevelZOFO(**settings))
    trainer_of(whole, tmp_path / "whole", **run).train()
    stopped = applied(BilevelZOFO(**settings))
    trainer_of(stopped, tmp_path / "run", save_strategy="steps", save_steps=4, **run).train()
    again = applied(BilevelZOFO(**settings))
    trainer_of(again, tmp_path / "run", **run).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, p in whole.named_parameters():
        assert torch.equal(p, again.get_parameter(name)), name
    for name, s in technique_of(whole).inner.items():
        assert torch.equal(s, technique_of(again).inner[name]), name

    attached_to(again).save(tmp_path / "saved")
    loaded = load(DECODER.make(), tmp_path / "saved")
    assert all(torch.equal(p, loaded.get_parameter(name)) for name, p in whole.named_parameters())
    fresh = applied()
    (folder,) = (tmp_path / "saved").glob("**/zeroth_order_steps.safetensors")
    replay(fresh, folder.parent)
    for name in StepLog.load(folder.parent).names:
        assert torch.equal(fresh.get_parameter(name), whole.get_parameter(name)), name


def test_tied_weights_are_moved_once_and_adapters_are_no_backbone():
    model = applied(BilevelZOFO(target_modules=["embed_tokens", "lm_head"]))
    assert len(technique_of(model).backbone) == 1
    model = applied(BilevelZOFO(exclude_modules=["q_proj"]))
    names = technique_of(model).backbone
    assert not [name for name in names if "lora" in name or "q_proj" in name]
    assert any("v_proj.base_layer" in name for name in names)


def peak(model: nn.Module, folder: Path, tiny: TinyModel, **settings: Any) -> int:
    memory = StepMemory()
    trainer_of(model, folder, [memory], tiny, max_steps=2, per_device_train_batch_size=16, **settings).train()
    assert memory.report is not None
    return memory.report.peak_bytes


@pytest.mark.parametrize("tiny", [CLASSIFIER, DECODER], ids=lambda tiny: tiny.name)
def test_the_peak_of_both_steps_is_that_of_the_adapters(tmp_path, tiny):
    lora = {"r": 1, "target_modules": [tiny.targets[0]]}
    plain = peak(Recipe(tiny.lora(**lora)).apply(tiny.make()), tmp_path, tiny, optim="sgd")
    for inner_steps in (1, 5):  # the second step, which is counted, is an outer one, then an inner one
        technique = BilevelZOFO(inner_steps=inner_steps, bring_back="add_back")
        ours = peak(Recipe(tiny.lora(**lora), technique).apply(tiny.make()), tmp_path, tiny, optim="sgd")
        assert ours <= 1.10 * plain, inner_steps


def test_the_planner_runs_it(tmp_path):
    def make_trainer(model: Any, folder: str, callbacks: Any) -> Any:
        return RecipeTrainer(
            model=model, args=arguments(Path(folder), max_steps=1), train_dataset=[0], callbacks=list(callbacks)
        )

    def make_batch(model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in DECODER.batch(1, 16).items() if name != "attention_mask"}

    recipe = Recipe(DECODER.lora(), BilevelZOFO())
    found = rehearse(Work(recipe, DECODER.make, make_trainer, make_batch)).memory
    measured = rehearse(Work(Recipe(DECODER.lora()), DECODER.make, make_trainer, make_batch)).memory
    assert measured.peak_bytes < found.peak_bytes < 1.3 * measured.peak_bytes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inner_steps": 0}, "inner_steps of bilevel_zofo must be at least 1, got 0"),
        ({"penalty": -1.0}, "penalty of bilevel_zofo must be a number of at least 0, got -1.0"),
        ({"penalty": math.inf}, "penalty of bilevel_zofo must be a number of at least 0, got inf"),
        ({"eps": 0.0}, "eps of bilevel_zofo must be positive, got 0.0"),
        ({"backbone_lr": -1.0}, "backbone_lr of bilevel_zofo must be"),
        ({"outer_lr": -1.0}, "outer_lr of bilevel_zofo must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        BilevelZOFO(**settings)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(SettingError, match="bilevel_zofo needs a technique of the phase adapter or prompt"):
        Recipe(BilevelZOFO())
    with pytest.raises(SettingError, match="lora_fa cannot be combined"):
        Recipe.from_list([{"lora": {"r": 2}}, "bilevel_zofo", "lora_fa"])
    with pytest.raises(SettingError, match="both act on the training step"):
        Recipe.from_list([{"lora": {"r": 2}}, "bilevel_zofo", "zeroth_order"])
    half = DECODER.make().half()
    with pytest.raises(SettingError, match="in float16, whose range"):
        Recipe(DECODER.lora(), BilevelZOFO()).apply(half)
    int8 = DECODER.make()
    int8.model.norm.weight = nn.Parameter(torch.ones(24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(SettingError, match=r"would move base_model.model.model.norm.weight, a Parameter of int8"):
        Recipe(DECODER.lora(), BilevelZOFO()).apply(int8)
    model = applied(BilevelZOFO())
    for nothing in (None, []):
        trainer = RecipeTrainer(
            model=model, args=arguments(tmp_path), train_dataset=DECODER.rows(), eval_dataset=nothing
        )
        with pytest.raises(SettingError, match="trains on held-out rows too, but this run has none"):
            trainer.train()


@pytest.mark.filterwarnings("ignore")
def test_blocks_that_rest_in_a_step_rest_in_both_copies(tmp_path):
    model = applied(IST(active_layers=1, importance=False), BilevelZOFO(inner_steps=3, backbone_lr=0.0))
    start = values(model)
    trainer_of(model, tmp_path, max_steps=1).train()  # an inner step
    moved = {name for name, s in technique_of(model).inner.items() if not torch.equal(s, start[name])}
    assert len({re.search(r"layers\.(\d+)\.", name)[1] for name in moved}) == 1
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    trainer_of(
        applied(IST(active_layers=1, importance=False), BilevelZOFO(inner_steps=1)), tmp_path, max_steps=4
    ).train()


def test_it_learns_with_prompts_too(tmp_path):
    from peft import PromptTuningConfig

    recipe = Recipe(PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), BilevelZOFO(inner_steps=1))
    model = recipe.apply(DECODER.make())
    start = values(model)
    trainer_of(model, tmp_path).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert moved >= {"prompt_encoder.default.embedding.weight", "base_model.model.embed_tokens.weight"}
