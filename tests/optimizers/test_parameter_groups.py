"""Parameter groups: which parameters a group means, what the optimizer gets of it, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from shoestring import Recipe
from shoestring.errors import SettingError
from shoestring.optimizers import LoraFA, ParameterGroups, ZerothOrder
from shoestring.planning.rehearsal import Work, rehearse
from shoestring.testing.tiny_models import CLASSIFIER, DECODER
from shoestring.training import RecipeTrainer


def trainer_of(model: nn.Module, folder: Path, callbacks: Any = (), **settings: Any) -> RecipeTrainer:
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1}
    given |= {"report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    run = TrainingArguments(str(folder), **{**given, **settings})
    return RecipeTrainer(model=model, args=run, train_dataset=CLASSIFIER.rows(1, 12), callbacks=list(callbacks))


def lora() -> LoraConfig:
    return CLASSIFIER.lora(task_type="SEQ_CLS")


def applied(*groups: dict[str, Any], beside: Any = ()) -> nn.Module:
    torch.manual_seed(0)
    return Recipe(lora(), ParameterGroups(list(groups)), *beside).apply(CLASSIFIER.make())


def options(model: nn.Module, folder: Path, **settings: Any) -> dict[str, dict[str, Any]]:
    """What the optimizer has for each parameter."""
    optimizer = trainer_of(model, folder, **settings).create_optimizer()
    of_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {name: of_parameter[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def test_names_and_parts_of_names_and_expressions_choose(tmp_path):
    model = applied(
        {"names": ["lora_B"], "lr_factor": 16},
        {"names": r".*layer\.0\..*lora_A.*", "lr": 3e-4, "weight_decay": 0.0},
    )
    found = options(model, tmp_path)
    for name, group in found.items():
        first_block = "layer.0." in name and "lora_A" in name
        assert group["lr"] == pytest.approx(0.16 if "lora_B" in name else 3e-4 if first_block else 1e-2), name
        spared = first_block or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if spared else 0.1), name


@pytest.mark.parametrize("kind", ["adapters", "head", "biases"])
def test_kinds_choose_beside_lora(tmp_path, kind):
    found = options(applied({"kind": kind, "lr": 5.0}), tmp_path)
    chosen = {name for name, group in found.items() if group["lr"] == 5.0}
    expected = {"adapters": "lora_", "head": "classifier", "biases": "bias"}[kind]
    assert chosen == {name for name in found if expected in name}


def test_kinds_choose_in_a_whole_model(tmp_path):
    groups = [{"kind": "norms", "lr": 1.0}, {"kind": "embeddings", "lr": 2.0}]
    found = options(Recipe(ParameterGroups(groups)).apply(CLASSIFIER.make()), tmp_path)
    for name, group in found.items():
        expected = 1.0 if "LayerNorm" in name else 2.0 if "embeddings" in name else 1e-2
        assert group["lr"] == expected, name
        assert group["weight_decay"] == (0.0 if "LayerNorm" in name or "bias" in name else 0.1), name


class Rates(TrainerCallback):
    """Notes the learning rates of each step."""

    def __init__(self) -> None:
        self.seen: list[list[float]] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.seen.append([group["lr"] for group in optimizer.param_groups if group["params"]])


@pytest.mark.parametrize("beside", [(), (LoraFA(),), (ZerothOrder(),)], ids=["stock", "lora_fa", "zeroth_order"])
def test_the_schedule_acts_on_every_group_with_any_optimizer(tmp_path, beside):
    rates = Rates()
    model = applied({"names": ["lora_B"], "lr_factor": 4.0}, beside=beside)
    trainer_of(model, tmp_path, [rates], lr_scheduler_type="linear").train()
    assert len(rates.seen) == 3
    for step, seen in enumerate(rates.seen):
        share = 1 - step / 3
        assert sorted(set(seen)) == pytest.approx([1e-2 * share, 4e-2 * share])


def test_other_options_of_the_optimizer_reach_it(tmp_path):
    found = options(applied({"names": ["lora_B"], "betas": [0.5, 0.6], "eps": 1e-3}), tmp_path)
    name = next(name for name in found if "lora_B" in name)
    assert tuple(found[name]["betas"]) == (0.5, 0.6)
    assert found[name]["eps"] == 1e-3


def test_a_factor_of_zero_leaves_parameters_as_they_are(tmp_path):
    model = applied({"names": ["lora_A"], "lr_factor": 0.0})
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer_of(model, tmp_path).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, start[name]) == (not p.requires_grad or "lora_A" in name), name


def test_a_resumed_run_ends_at_the_same_bits(tmp_path):
    groups = [{"names": ["lora_B"], "lr_factor": 4.0}, {"kind": "head", "lr": 1e-4}]
    whole = applied(*groups)
    trainer_of(whole, tmp_path / "whole", max_steps=4).train()
    trainer_of(applied(*groups), tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2).train()
    again = applied(*groups)
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    trainer_of(again, tmp_path / "run", max_steps=4).train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in whole.named_parameters())


def test_the_planner_counts_as_much_as_without(tmp_path):
    def make_trainer(model: Any, folder: str, callbacks: Any) -> Any:
        run = TrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True)
        return RecipeTrainer(model=model, args=run, train_dataset=[0], callbacks=list(callbacks))

    def make_batch(model: nn.Module) -> Any:
        return {name: value for name, value in DECODER.batch(1, 4).items() if name != "attention_mask"}

    groups = ParameterGroups([{"names": ["lora_B"], "lr_factor": 4.0}])
    peaks = [
        rehearse(Work(Recipe(DECODER.lora(), *others), DECODER.make, make_trainer, make_batch)).memory.peak_bytes
        for others in ((), (groups,))
    ]
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"lr": 1.0}, "must have either names or kind, got lr"),
        ({"names": ["x"], "kind": "head", "lr": 1.0}, "must have either names or kind"),
        ({"names": [], "lr": 1.0}, "names must be a regular expression or a list of names"),
        ({"names": "(", "lr": 1.0}, "is no regular expression"),
        ({"kind": "norm", "lr": 1.0}, "there is no kind 'norm'. Did you mean 'norms'"),
        ({"names": ["x"]}, "sets nothing; give lr"),
        ({"names": ["x"], "lr": 1.0, "lr_factor": 2.0}, "has lr and lr_factor; keep one"),
        (
            {"names": ["x"], "lr": -1.0},
            r"lr in groups\[0\] of parameter_groups must be a number of at least 0",
        ),
        ({"names": ["x"], "lr": "1e-4"}, "must be a number of at least 0, got '1e-4'"),
        ({"names": ["x"], "lr_factor": True}, "must be a number of at least 0, got True"),
        ({"names": ["x"], "params": 1}, "params is not for users to set"),
        ({"names": ["x"], "gives_way": True}, "gives_way is not for users to set"),
    ],
)
def test_groups_that_cannot_be_right_are_refused(group, message):
    with pytest.raises(SettingError, match=message):
        ParameterGroups([group])


def test_groups_that_do_not_fit_the_model_are_refused(tmp_path):
    with pytest.raises(SettingError, match="at least one group"):
        ParameterGroups([])
    with pytest.raises(SettingError, match=r"groups\[0\] of parameter_groups, names \['lora_C'\], fits no parameter"):
        applied({"names": ["lora_C"], "lr": 1.0})
    with pytest.raises(SettingError, match="kind norms, fits frozen parameters only"):
        applied({"kind": "norms", "lr": 1.0})
    with pytest.raises(SettingError, match=r"is in groups\[0\] and in groups\[1\] of parameter_groups"):
        applied({"kind": "adapters", "lr": 1.0}, {"names": ["lora_A"], "lr": 2.0})
    with pytest.raises(SettingError, match="option 'momentum', which the optimizer AdamW does not have"):
        trainer_of(applied({"names": ["lora_A"], "momentum": 0.9}), tmp_path).create_optimizer()
    trainer = trainer_of(applied({"names": ["lora_A"], "betas": [0.9, 0.9]}, beside=(ZerothOrder(),)), tmp_path)
    with pytest.raises(SettingError, match="option 'betas', which the optimizer SeededSGD does not have"):
        trainer.create_optimizer()
