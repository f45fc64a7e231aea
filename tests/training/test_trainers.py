"""Recipes in trainers: a user's plain Trainer and SFTTrainer with RecipeCallback, and the recipe trainers."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from shoestring.activations import LowBitActivations
from shoestring.adapters import S2LoRAConfig
from shoestring.errors import RunFailed, SettingError
from shoestring.objectives import DensityLoss
from shoestring.optimizers import LoraFA
from shoestring.recipe import Moment, Phase, Recipe, Technique, attached_to
from shoestring.selection import NormTuning
from shoestring.training import RecipeCallback, RecipeTrainer, recipe_sft_trainer
from shoestring.training.checks import GradientCheck
from shoestring.training.run import prepare, train
from shoestring.training.settings import RunSettings


@dataclass
class Recorder(Technique):
    """Writes down its events, whether gradients were there, and keeps a count as its state."""

    name: ClassVar[str] = "recorder"
    phase: ClassVar[Phase] = Phase.OBJECTIVE

    def __post_init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.without_gradients: list[tuple[str, int]] = []
        self.steps_seen = 0

    def note(self, event: str, moment: Moment) -> None:
        self.calls.append((event, moment.step))
        learned = [p for p in moment.model.parameters() if p.requires_grad]
        if event in ("gradients", "end") and not any(p.grad is not None and p.grad.any() for p in learned):
            self.without_gradients.append((event, moment.step))
        assert isinstance(moment.optimizer, torch.optim.Optimizer)

    def on_step_begin(self, moment: Moment) -> None:
        self.note("begin", moment)

    def on_gradients(self, moment: Moment) -> None:
        self.note("gradients", moment)

    def on_step_end(self, moment: Moment) -> None:
        self.note("end", moment)
        self.steps_seen += 1

    def on_epoch_end(self, moment: Moment) -> None:
        self.note("epoch", moment)

    def state_dict(self) -> dict[str, Any]:
        return {"steps_seen": self.steps_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_seen = state["steps_seen"]


@dataclass
class Decay(Technique):
    """Adds the mean square of what trains to the loss."""

    name: ClassVar[str] = "decay_in_loss"
    phase: ClassVar[Phase] = Phase.OBJECTIVE
    strength: float = 3.0

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor:
        return self.strength * decay(model)


def decay(model: nn.Module) -> Tensor:
    return torch.stack([p.square().mean() for p in model.parameters() if p.requires_grad]).sum()


@dataclass
class FastFactors(Technique):
    """Gives every lora_B a learning rate of its own."""

    name: ClassVar[str] = "fast_factors"
    phase: ClassVar[Phase] = Phase.OPTIMIZER
    lr: float = 0.5

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return [{"params": [p for n, p in model.named_parameters() if "lora_B" in n], "lr": self.lr}]


class Watch(TrainerCallback):
    """Calls `look` with the model and the optimizer while gradients of each step are there."""

    def __init__(self, look: Any):
        self.look = look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.look(kwargs["model"], kwargs["optimizer"])


@pytest.fixture(scope="module", autouse=True)
def recipes_are_known() -> Iterator[None]:
    """Checkpoints name techniques, so these have to be registered to be read again."""
    from shoestring.technique import TECHNIQUES

    added = {cls.name: cls for cls in (Recorder, Decay, FastFactors)}
    TECHNIQUES.update(added)
    yield
    for name in added:
        del TECHNIQUES[name]


def lora(classify: bool = True, **settings: Any) -> LoraConfig:
    layers = ["query", "value"] if classify else ["q_proj", "v_proj"]
    return LoraConfig(r=2, target_modules=layers, task_type="SEQ_CLS" if classify else "CAUSAL_LM", **settings)


@pytest.fixture
def classifier(tiny_classifier_folder: Path) -> nn.Module:
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(tiny_classifier_folder)


@pytest.fixture
def decoder(tiny_decoder_folder: Path) -> nn.Module:
    set_seed(0)
    return AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)


def sentences(count: int = 24, labels: bool = True) -> Dataset:
    """Texts of six tokens; labels are tokens for a decoder (labels=False), classes otherwise."""
    rows = torch.arange(count * 6).reshape(count, 6) % 30 + 6
    lists = rows.tolist()
    return Dataset.from_dict({"input_ids": lists, "labels": [i % 2 for i in range(count)] if labels else lists})


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **settings,
    }


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def sft_arguments(folder: Path, **settings: Any) -> Any:
    from trl import SFTConfig

    return SFTConfig(**arguments(folder, max_length=16, **settings))


EXPECTED = [
    *(("begin", 0), ("gradients", 0), ("end", 1), ("begin", 1), ("gradients", 1), ("end", 2)),
    *(("begin", 2), ("gradients", 2), ("end", 3), ("epoch", 3), ("begin", 3), ("gradients", 3), ("end", 4)),
    ("epoch", 4),
]


@pytest.mark.parametrize("trl", [False, True], ids=["Trainer", "SFTTrainer"])
def test_a_plain_trainer_passes_on_events_saves_and_restores(trl, request, tmp_path, tiny_decoder_folder):
    settings = {"max_steps": 4, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)

    def made(folder: Path) -> tuple[Recorder, Trainer]:
        set_seed(0)
        auto = AutoModelForCausalLM if trl else AutoModelForSequenceClassification
        source = tiny_decoder_folder if trl else request.getfixturevalue("tiny_classifier_folder")
        model = Recipe(lora(not trl), Recorder()).apply(auto.from_pretrained(source))
        recorder = attached_to(model).techniques[-1]
        rest = {"train_dataset": sentences(labels=not trl), "callbacks": [RecipeCallback()]}
        if trl:
            from trl import SFTTrainer

            return recorder, SFTTrainer(model, sft_arguments(folder, **settings), processing_class=tokenizer, **rest)
        return recorder, Trainer(model, TrainingArguments(**arguments(folder, **settings)), **rest)

    recorder, trainer = made(tmp_path)
    trainer.train()
    assert recorder.calls == EXPECTED
    assert recorder.without_gradients == []
    assert (tmp_path / "checkpoint-2" / "recipe.yaml").exists()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()

    resumed, again = made(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.steps_seen == 4
    assert resumed.calls == EXPECTED[6:]
    assert losses(again) == losses(trainer)


def projected_prefix() -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8)


@pytest.mark.parametrize(
    "parts",
    [lambda: (lora(), S2LoRAConfig(r=2, target_modules=["key"]), NormTuning()), lambda: (projected_prefix(),)],
    ids=["adapters and norms", "projected prefix"],
)
def test_a_plain_trainer_goes_back_to_all_of_the_best_model(classifier, tmp_path, parts):
    model = Recipe(*parts(), Recorder()).apply(classifier)
    recorder, seen = attached_to(model).techniques[-1], iter([0.5, 0.9, 0.1])
    times = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True}
    after: list[dict[str, Tensor]] = []

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            after.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer = Trainer(
        model,
        TrainingArguments(**arguments(tmp_path, **times, **best)),
        train_dataset=sentences(),
        eval_dataset=sentences(4),
        compute_metrics=lambda prediction: {"score": next(seen)},
        callbacks=[RecipeCallback(), Note()],
    )
    trainer.train()
    found = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, after[1], rtol=0, atol=0)
    moved = [name for name, value in after[2].items() if "LayerNorm" in name or "transform" in name]
    assert moved
    assert not any(torch.equal(after[2][name], after[1][name]) for name in moved)
    assert recorder.steps_seen == 2


def test_a_plain_trainer_goes_on_with_a_projected_prefix(classifier, tmp_path):
    def made() -> Trainer:
        set_seed(1)
        model = Recipe(projected_prefix()).apply(classifier)
        settings = arguments(tmp_path, save_strategy="steps", save_steps=1)
        return Trainer(model, TrainingArguments(**settings), train_dataset=sentences(), callbacks=[RecipeCallback()])

    whole = made()
    whole.train()
    wanted = {n: p.detach().clone() for n, p in whole.model.named_parameters() if p.requires_grad}
    Recipe.remove(whole.model)
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = {n: p.detach() for n, p in again.model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_plain_trainer_resumed_from_elsewhere_never_drops_the_state_silently(classifier, tmp_path):
    def made(folder: Path) -> Trainer:
        model = Recipe(lora(), Recorder()).apply(classifier)
        settings = arguments(folder, save_strategy="steps", save_steps=2)
        return Trainer(model, TrainingArguments(**settings), train_dataset=sentences(), callbacks=[RecipeCallback()])

    first = made(tmp_path / "one")
    first.train()
    Recipe.remove(first.model)
    again = made(tmp_path / "two")
    with pytest.raises(ValueError, match="checkpoint-2"):
        again.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-2"))


@pytest.mark.parametrize("trainer_class", [Trainer, RecipeTrainer])
@pytest.mark.parametrize("kind", ["classifier", "decoder"])
def test_added_loss_gives_the_gradients_of_a_loss_added_by_hand(trainer_class, kind, request, tmp_path):
    """A decoder's loss is a share of the accumulated batch (num_items_in_batch), a classifier's is divided later.

    transformers' Trainer leaves that out for classifiers that take any keyword, so that all counts twice there.
    """
    times = 2.0 if kind == "classifier" and trainer_class is Trainer else 1.0
    model = request.getfixturevalue(kind)
    data = sentences(labels=kind == "classifier")
    config = lora(kind == "classifier", init_lora_weights=False)
    settings = arguments(
        tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0, lr_scheduler_type="constant"
    )
    found: dict[str, dict[str, Tensor]] = {}

    def run(name: str, *techniques: Technique) -> None:
        set_seed(1)
        recipe = Recipe(config, *techniques)
        with recipe(model) as attached:
            extra: dict[str, Tensor] = {}
            learned = {n: p for n, p in attached.named_parameters() if p.requires_grad}
            if not techniques:
                by_hand = torch.autograd.grad(times * 3.0 * decay(attached), list(learned.values()))
                extra = dict(zip(learned, by_hand, strict=True))

            def look(seen: nn.Module, optimizer: Any) -> None:
                found[name] = {n: p.grad + extra.get(n, 0.0) for n, p in learned.items()}

            callbacks = [Watch(look), *([RecipeCallback()] if trainer_class is Trainer else [])]
            trainer_class(attached, TrainingArguments(**settings), train_dataset=data, callbacks=callbacks).train()

    run("recipe", Decay())
    run("hand")
    for name, gradient in found["hand"].items():
        torch.testing.assert_close(found["recipe"][name], gradient, rtol=1e-4, atol=1e-6)


def encoder_decoder() -> nn.Module:
    set_seed(0)
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 4, "num_heads": 4, "num_layers": 1, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=40, decoder_start_token_id=0, **sizes))


@pytest.mark.parametrize("kind", ["classifier", "decoder", "encoder-decoder"])
def test_an_accumulated_step_has_the_gradients_of_one_batch(kind, request, tmp_path):
    model = encoder_decoder() if kind == "encoder-decoder" else request.getfixturevalue(kind)
    layers = {"classifier": ["query"], "decoder": ["q_proj"], "encoder-decoder": ["q"]}[kind]
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    found = []
    for rows, accumulated in ((4, 1), (2, 2), (1, 4)):
        sizes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulated}
        settings = TrainingArguments(**arguments(tmp_path, max_steps=1, max_grad_norm=0.0, **sizes))
        set_seed(1)
        with Recipe(config, Decay())(model) as attached:
            gradients: list[Tensor] = []

            def look(
                seen: nn.Module, optimizer: Any, learned: nn.Module = attached, to: list[Tensor] = gradients
            ) -> None:
                to += [p.grad.clone() for p in learned.parameters() if p.grad is not None]

            data = sentences(labels=kind == "classifier")
            trainer = RecipeTrainer(attached, settings, train_dataset=data, callbacks=[Watch(look)])
            trainer.train()
            found.append((losses(trainer), gradients))
    for logged, gradients in found[1:]:
        assert logged == pytest.approx(found[0][0], rel=1e-4)  # rounded where it is logged
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-6)


def test_labels_are_smoothed_for_the_next_token_below_two_adapters(decoder, tmp_path):
    batch = {name: torch.tensor(sentences(4, labels=False)[name]) for name in ("input_ids", "labels")}
    settings = TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1))
    expected = Trainer(decoder, settings).compute_loss(decoder.eval(), dict(batch))
    model = Recipe(lora(False), S2LoRAConfig(r=4, target_modules=["o_proj"])).apply(decoder)
    found = RecipeTrainer(model, settings).compute_loss(model.eval(), dict(batch))
    torch.testing.assert_close(found, expected)


def test_added_loss_is_refused_in_plain_sft_trainer_and_right_in_recipe_sft_trainer(
    decoder, tmp_path, tiny_decoder_folder
):
    from trl import SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
    settings = sft_arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    rest = {"train_dataset": sentences(labels=False), "processing_class": tokenizer}
    config = lora(False, init_lora_weights=False)
    with Recipe(config, Decay())(decoder) as model:
        trainer = SFTTrainer(model, settings, callbacks=[RecipeCallback()], **rest)
        with pytest.raises(ValueError, match="recipe_sft_trainer"):
            trainer.train()
    values = {}
    for techniques in ((), (Decay(),)):
        set_seed(1)
        with Recipe(config, *techniques)(decoder) as model:
            extra = 0.0 if techniques else 3.0 * float(decay(model))
            trainer = recipe_sft_trainer()(model, settings, **rest)
            trainer.train()
            values[len(techniques)] = losses(trainer)[0] + extra
    assert values[1] == pytest.approx(values[0], rel=1e-4)


def test_density_loss_is_added_to_smoothed_labels_under_trl(decoder, tmp_path, tiny_decoder_folder):
    for layer in decoder.model.layers:
        layer.mlp.act_fn = nn.ReLU()
    data, tokenizer = sentences(4, labels=False), AutoTokenizer.from_pretrained(tiny_decoder_folder)
    settings = sft_arguments(tmp_path, max_steps=1, label_smoothing_factor=0.1)
    found = []
    for weight in (0.0, 1.0):
        set_seed(1)
        with Recipe(lora(False), DensityLoss(weight=weight))(decoder) as model:
            trainer = recipe_sft_trainer()(model, settings, train_dataset=data, processing_class=tokenizer)
            trainer.train()
            found.append(losses(trainer)[0])
    with Recipe(DensityLoss())(decoder) as model:
        ids = torch.tensor(data["input_ids"])
        attached = attached_to(model.train())
        attached.add_losses_in_forward = False
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        penalty = float(attached.added_loss(batch, model(**batch)).detach())
    assert penalty > 0.1
    assert found[1] - found[0] == pytest.approx(penalty, rel=1e-3)


def test_own_learning_rates_are_used_and_survive_a_resume(classifier, tmp_path):
    rates: list[list[float]] = []
    settings = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)

    def made() -> Trainer:
        set_seed(0)
        model = Recipe(lora(), FastFactors()).apply(classifier)
        look = Watch(lambda model, optimizer: rates.append([g["lr"] for g in optimizer.param_groups if g["params"]]))
        return RecipeTrainer(model, TrainingArguments(**settings), train_dataset=sentences(), callbacks=[look])

    trainer = made()
    trainer.train()
    assert max(rates[0]) == pytest.approx(0.5)
    assert min(rates[0]) == pytest.approx(1e-2)
    whole = list(rates)
    Recipe.remove(trainer.model)
    rates.clear()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates == whole[2:]
    assert losses(again) == losses(trainer)


def test_own_learning_rates_are_refused_in_a_plain_trainer(classifier, tmp_path):
    model = Recipe(lora(), FastFactors()).apply(classifier)
    settings = TrainingArguments(**arguments(tmp_path))
    trainer = Trainer(model, settings, train_dataset=sentences(), callbacks=[RecipeCallback()])
    with pytest.raises(ValueError, match="RecipeTrainer"):
        trainer.train()


@pytest.mark.parametrize("technique", [FastFactors, LoraFA])
def test_an_optimizer_given_in_place_of_the_recipes_own_is_refused(classifier, tmp_path, technique):
    model = Recipe(lora(), technique()).apply(classifier)
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(SettingError, match="which one given in optimizers does not have"):
        RecipeTrainer(model, TrainingArguments(**arguments(tmp_path)), optimizers=(given, None))


def test_an_optimizer_given_is_used_where_the_recipe_has_none(classifier, tmp_path):
    model = Recipe(lora()).apply(classifier)
    given = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    settings = TrainingArguments(**arguments(tmp_path))
    trainer = RecipeTrainer(model, settings, train_dataset=sentences(), optimizers=(given, None))
    trainer.train()
    assert trainer.optimizer.optimizer is given


@pytest.mark.parametrize("trainer", [Trainer, RecipeTrainer])
def test_copies_on_several_gpus_and_compilation_that_hides_operations_are_refused(classifier, tmp_path, trainer):
    callbacks = [RecipeCallback()] if trainer is Trainer else []
    model = Recipe(lora(), LowBitActivations()).apply(classifier)
    settings = TrainingArguments(**arguments(tmp_path))
    made = trainer(model, settings, train_dataset=sentences(), callbacks=callbacks)
    callback = next(c for c in made.callback_handler.callbacks if isinstance(c, RecipeCallback))
    settings._n_gpu = 2
    with pytest.raises(SettingError, match="2 GPUs are visible to one process"):
        callback.on_train_begin(settings, made.state, made.control, model=model)
    settings._n_gpu, settings.torch_compile = 0, True
    with pytest.raises(ValueError, match="low_bit_activations cannot tell operations apart"):
        callback.on_train_begin(settings, made.state, made.control, model=model)


def test_ranks_of_adalora_fall(classifier, tmp_path):
    config = AdaLoraConfig(
        init_r=4,
        target_r=1,
        tinit=1,
        tfinal=2,
        deltaT=1,
        total_step=8,
        target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )
    model = Recipe(config).apply(classifier)
    settings = TrainingArguments(**arguments(tmp_path, max_steps=8))
    RecipeTrainer(model, settings, train_dataset=sentences()).train()
    singular = [p for n, p in model.named_parameters() if "lora_E" in n]
    assert sum(int((p != 0).sum()) for p in singular) <= len(singular)  # target_r = 1 a layer on average


@pytest.mark.parametrize("trl", [False, True], ids=["RecipeTrainer", "RecipeSFTTrainer"])
def test_factors_of_adalora_are_kept_orthogonal_in_training_alone(trl, request, tmp_path, tiny_decoder_folder):
    model = request.getfixturevalue("decoder" if trl else "classifier")
    batch = {name: torch.tensor(sentences(4, labels=not trl)[name]) for name in ("input_ids", "labels")}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    found = {}
    for weight in (0.0, 0.5):
        set_seed(0)
        config = AdaLoraConfig(
            init_r=4,
            total_step=8,
            orth_reg_weight=weight,
            target_modules=["q_proj"] if trl else ["query"],
            task_type="CAUSAL_LM" if trl else "SEQ_CLS",
        )
        with Recipe(config)(model) as attached:
            if trl:
                tokenizer = AutoTokenizer.from_pretrained(tiny_decoder_folder)
                rest = {"train_dataset": sentences(labels=False), "processing_class": tokenizer}
                trainer = recipe_sft_trainer()(attached, sft_arguments(tmp_path), **rest)
            else:
                trainer = RecipeTrainer(attached, TrainingArguments(**arguments(tmp_path)))
            evaluated = trainer.compute_loss(attached.eval(), dict(batch))
            set_seed(1)
            trained = trainer.compute_loss(attached.train(), dict(batch))
            factors = [p.T if "lora_B" in n else p for n, p in attached.named_parameters() if "lora_" in n]
            factors = [f for f in factors if f.shape[0] == 4 and f.shape[1] > 1]
            term = torch.stack([(f @ f.T - torch.eye(4)).norm() for f in factors]).mean()
            found[weight] = (evaluated, trained, term)
    torch.testing.assert_close(found[0.5][0], found[0.0][0])
    torch.testing.assert_close(found[0.5][1], found[0.0][1] + 0.5 * found[0.5][2])
    assert found[0.5][2] > 0


def test_losses_and_weights_equal_those_of_plain_peft_and_trainer(tiny_classifier_folder, tmp_path):
    def run(recipe: bool) -> tuple[list[float], list[Tensor]]:
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_classifier_folder)
        set_seed(0)
        config = lora(lora_dropout=0.1)
        model = Recipe(config).apply(model) if recipe else get_peft_model(model, config)
        settings = TrainingArguments(**arguments(tmp_path, gradient_accumulation_steps=2))
        trainer = (RecipeTrainer if recipe else Trainer)(model, settings, train_dataset=sentences())
        trainer.model_accepts_loss_kwargs = False  # transformers takes this classifier for one that divides its loss
        trainer.train()
        return losses(trainer), [p.detach() for p in model.parameters() if p.requires_grad]

    (mine, my_weights), (theirs, their_weights) = run(True), run(False)
    assert mine == theirs
    assert all(torch.equal(a, b) for a, b in zip(my_weights, their_weights, strict=True))


def test_mixed_precision_on_cpu_trains_float32_adapters(run_file):
    settings = RunSettings.load(run_file(train={"bf16": True}))
    ready = prepare(settings)
    seen = []
    layer = next(m for n, m in ready.attached.model.named_modules() if n.endswith("query.lora_A.default"))
    layer.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    ready.trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in ready.attached.model.parameters() if p.requires_grad} == {torch.float32}


def test_the_seed_decides_the_losses(run_file):
    def run(name: str, seed: int) -> list:
        torch.manual_seed(len(name) * 100)  # what came before must not matter
        return train(RunSettings.load(run_file(name, train={"seed": seed}))).losses

    assert run("first", 1) == run("second-run", 1)
    assert run("third", 2) != run("fourth", 1)


def test_adapters_start_from_the_seed(run_file):
    def starts(seed: int) -> list[Tensor]:
        torch.rand(7)
        ready = prepare(RunSettings.load(run_file(train={"seed": seed})))
        return [p.detach() for n, p in ready.attached.model.named_parameters() if "lora_A" in n]

    assert all(torch.equal(a, b) for a, b in zip(starts(1), starts(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(starts(1), starts(2), strict=True))


class TwoHeads(nn.Module):
    """A linear model; `spare` trains but is multiplied by `factor`, or not used where that is None."""

    def __init__(self, factor: float | None):
        super().__init__()
        self.used, self.spare, self.factor = nn.Linear(3, 1), nn.Linear(3, 1), factor

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = (self.used(x).squeeze(-1) - labels).square().mean()
        return {"loss": loss if self.factor is None else loss + (self.factor * self.spare(x)).mean()}


@dataclass
class Excuse(Technique):
    """Says that some parameters may go without a gradient."""

    name: ClassVar[str] = "excuse"
    phase: ClassVar[Phase] = Phase.SELECTION
    names: list[str] = field(default_factory=list)

    def idle_parameters(self, model: nn.Module) -> set[str]:
        return set(self.names)


def checked_run(model: nn.Module, folder: Path, *techniques: Technique, look: Any = None, **settings: Any) -> int:
    """Steps that a run with GradientCheck came to."""
    data = Dataset.from_dict({"x": torch.randn(24, 3).tolist(), "labels": [float(i % 3) for i in range(24)]})
    callbacks = [*([Watch(look)] if look else []), GradientCheck()]
    made = TrainingArguments(**arguments(folder, **{"max_steps": 6, **settings}))
    trainer = RecipeTrainer(Recipe(*techniques).apply(model), made, train_dataset=data, callbacks=callbacks)
    trainer.train()
    return trainer.state.global_step


def test_a_parameter_that_the_forward_leaves_out_is_named(tmp_path):
    with pytest.raises(RunFailed, match=r"spare\.weight \(and 1 more\) got no gradient"):
        checked_run(TwoHeads(None), tmp_path)


def test_a_parameter_with_nan_as_its_gradient_is_named(tmp_path):
    def spoil(model: Any, optimizer: Any) -> None:
        model.used.bias.grad.fill_(float("nan"))

    with pytest.raises(RunFailed, match=r"used\.bias got NaN or Inf"):
        checked_run(TwoHeads(1.0), tmp_path, look=spoil, max_grad_norm=0.0)


def test_gradients_that_stay_zero_end_the_run_after_three_steps(tmp_path):
    steps: list[int] = []
    with pytest.raises(RunFailed, match=r"spare\.weight \(and 1 more\) had no gradient but zero in 4 steps"):
        checked_run(TwoHeads(0.0), tmp_path, look=lambda model, optimizer: steps.append(1))
    assert len(steps) == 4


def test_steps_without_a_learning_rate_do_not_count_against_a_parameter(tmp_path):
    with pytest.raises(RunFailed, match="zero in 4 steps"):
        checked_run(TwoHeads(0.0), tmp_path, warmup_steps=2)
    assert checked_run(TwoHeads(0.0), tmp_path, max_steps=3) == 3


def test_idle_parameters_may_go_without_a_gradient(tmp_path):
    assert checked_run(TwoHeads(None), tmp_path, Excuse(["spare.weight", "spare.bias"])) == 6
    assert checked_run(TwoHeads(0.0), tmp_path, Excuse(["spare.weight", "spare.bias"])) == 6
    with pytest.raises(RunFailed, match=r"spare\.bias got no gradient"):
        checked_run(TwoHeads(None), tmp_path, Excuse(["spare.weight"]))


@pytest.mark.parametrize("init", ["kaiming", "adalora", "lora"])
def test_adapters_that_start_with_zeros_pass_the_check(init, classifier, tmp_path):
    config = lora() if init == "lora" else S2LoRAConfig(r=2, target_modules=["query"], init=init, task_type="SEQ_CLS")
    trainer = RecipeTrainer(
        Recipe(config).apply(classifier),
        TrainingArguments(**arguments(tmp_path, max_steps=6, warmup_steps=2)),
        train_dataset=sentences(),
        callbacks=[GradientCheck()],
    )
    trainer.train()
    assert trainer.state.global_step == 6
