"""LoRA-FA: A is frozen and B learns by peft's rule, in the trainer, beside heads and other adapters."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)

from shoestring import Recipe
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.optimizers import LoraFA
from shoestring.recipe import Technique, attached_to
from shoestring.technique import Phase
from shoestring.training import RecipeCallback, RecipeTrainer

LAYERS = ["query", "value", "output.dense"]


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout=0.0,
    )
    return BertForSequenceClassification(config)


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 40, (count, 7), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 2} for row in ids]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": LAYERS, **settings})


def arguments(folder, **settings) -> TrainingArguments:
    given = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), report_to=[], save_strategy="no", use_cpu=True, **{**given, **settings})


def trained(model: nn.Module, folder, **settings) -> dict[str, Tensor]:
    trainer = RecipeTrainer(model=model, args=arguments(folder, **settings), train_dataset=rows())
    trainer.train()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_trainer_makes_the_steps_of_pefts_own_optimizer(tmp_path):
    torch.manual_seed(3)
    ours = trained(Recipe(lora(), LoraFA()).apply(classifier()), tmp_path / "ours")

    torch.manual_seed(3)
    model = get_peft_model(classifier(), lora())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = create_lorafa_optimizer(model, r=3, lora_alpha=5, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 3)
    trainer = Trainer(
        model=model, args=arguments(tmp_path / "theirs"), train_dataset=rows(), optimizers=(optimizer, schedule)
    )
    trainer.train()

    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours[name]), name
        moved = "lora_B" in name
        assert torch.equal(parameter, start[name]) != moved, name


def test_the_update_of_b_is_the_papers(tmp_path):
    model = Recipe(lora(), LoraFA()).apply(classifier())
    run = arguments(tmp_path, learning_rate=0.5, weight_decay=0.1, adam_beta1=0.8)
    trainer = RecipeTrainer(model=model, args=run, train_dataset=rows())
    optimizer = trainer.create_optimizer()
    a = model.get_parameter("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight")
    b = model.get_parameter("base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.default.weight")
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    with torch.no_grad():
        b.copy_(torch.randn_like(b))
    before, scale = b.detach().double(), 5 / 3
    gradient = b.grad.double() @ torch.linalg.inv(a.detach().double() @ a.detach().double().T) / scale**2
    optimizer.step()
    rounded = {"rtol": 0.02, "atol": 0.02 * float(gradient.abs().max())}  # peft multiplies the gradient in bfloat16
    (moment,) = (state["exp_avg_B"] for key, state in optimizer.state.items() if "layer.0.attention.self.query" in key)
    torch.testing.assert_close(moment.double(), (1 - 0.8) * gradient, **rounded)
    expected = before - 0.5 * gradient / gradient.abs()  # AdamW's first step keeps signs alone
    expected -= 0.5 * 0.1 * expected
    assert torch.allclose(b.double(), expected, atol=0.02)


def test_gradients_of_b_equal_those_of_lora():
    def gradients(*more) -> dict[str, Tensor]:
        torch.manual_seed(0)
        with Recipe(lora(), *more)(classifier()) as model:
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(parameter, std=0.3)
            model(input_ids=torch.arange(1, 15).view(2, 7), labels=torch.tensor([0, 1])).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, frozen = gradients(), gradients(LoraFA())
    assert {name for name in plain if "lora_A" not in name} == frozen.keys()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in frozen.items())


def test_an_adapted_block_keeps_what_a_frozen_one_does():
    """All linear layers of a Llama block whose width is large beside r; the frozen block passes gradients on."""
    torch.manual_seed(0)
    tokens, width = 48, 128
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=width,
        intermediate_size=344,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = LlamaModel(config)

    def kept(*recipe) -> float:
        with Recipe(*recipe)(model) as trained:
            if not recipe:
                trained.requires_grad_(False)
            x = torch.randn(1, tokens, width, requires_grad=True)
            ledger = Ledger(trained)
            with ledger:
                trained(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
            return ledger.report().saved_bytes / (4 * tokens * width)

    config_of_all = LoraConfig(r=2, target_modules="all-linear")
    frozen, plain, freezing = kept(), kept(config_of_all), kept(config_of_all, LoraFA())
    assert freezing <= 1.03 * frozen
    assert plain > 1.25 * frozen


def test_heads_and_biases_learn_beside_it(tmp_path):
    """A bias of B, which has "lora" in its name too, would break the pairing by order of names."""
    model = Recipe(lora(lora_bias=True, modules_to_save=["classifier"]), LoraFA()).apply(classifier())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    end = trained(model, tmp_path, weight_decay=0.01)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == learning
    assert any("lora_B.default.bias" in name for name in moved)
    assert any("classifier" in name for name in moved)
    assert not any("lora_A" in name for name in moved)


def test_groups_have_the_runs_weight_decay_and_learning_rates_of_their_own(tmp_path):
    class FastHead(Technique):
        name, phase = "fast_head", Phase.OBJECTIVE

        def parameter_groups(self, model):
            return [
                {"params": [p for n, p in model.named_parameters() if "classifier" in n and p.requires_grad], "lr": 1}
            ]

        def settings(self):
            return {}

    model = Recipe(lora(modules_to_save=["classifier"]), FastHead(), LoraFA()).apply(classifier())
    trainer = RecipeTrainer(model=model, args=arguments(tmp_path, weight_decay=0.3), train_dataset=rows())
    groups = trainer.create_optimizer().param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.3, 0.0]
    assert [group["lr"] for group in groups] == [1e-2, 1e-2, 1, 1]
    assert [len(group["params"]) for group in groups[2:]] == [1, 1]  # a weight and a bias
    assert trainer.create_optimizer() is trainer.optimizer


def optimizer_of(model: nn.Module, folder) -> torch.optim.Optimizer:
    return RecipeTrainer(model=model, args=arguments(folder), train_dataset=rows()).create_optimizer()


def test_pairs_without_a_gradient_wait(tmp_path):
    model = Recipe(lora(), LoraFA()).apply(classifier())
    optimizer = optimizer_of(model, tmp_path)
    waiting, *others = [p for name, p in model.named_parameters() if "lora_B" in name]
    for step in range(3):
        for p in others:
            p.grad = torch.ones_like(p)
        waiting.grad = torch.ones_like(waiting) if step == 2 else None
        optimizer.step()
        assert len(optimizer.param_groups[0]["params"]) == 2 * (1 + len(others))
        assert (waiting.abs().sum() == 0) == (step < 2)
    assert all(p.abs().sum() > 0 for p in others)


def test_a_resumed_state_is_where_the_weights_are(tmp_path):
    model = Recipe(lora(), LoraFA()).apply(classifier())
    optimizer = optimizer_of(model, tmp_path)
    for name, p in model.named_parameters():
        p.grad = torch.ones_like(p) if "lora_B" in name else None
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {  # as a GPU's is read: on another device than the weights
        key: {name: each.to("meta") if torch.is_tensor(each) else each for name, each in own.items()}
        for key, own in saved["state"].items()
    }
    with pytest.raises(NotImplementedError, match="out of meta tensor"):  # which it tries to bring to the weights
        optimizer.load_state_dict(saved)


def test_numbers_that_come_and_go_are_refused_beside_it():
    with pytest.raises(SettingError, match="lora_fa"):
        Recipe.from_list([{"lora": {"target_modules": LAYERS}}, {"id3": {"of": "adapters"}}, "lora_fa"])


def test_a_is_trainable_again_after():
    model = classifier()
    recipe = Recipe(lora(), LoraFA())
    adapted = recipe.apply(model)
    a = [p for name, p in adapted.named_parameters() if "lora_A" in name]
    assert a
    assert not any(p.requires_grad for p in a)
    Recipe.remove(adapted)
    assert all(p.requires_grad for p in a)
    assert all(p.requires_grad for p in model.parameters())


def test_a_plain_trainer_that_cannot_use_it_is_refused(tmp_path):
    model = Recipe(lora(), LoraFA()).apply(classifier())
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=rows(), callbacks=[RecipeCallback()])
    with pytest.raises(ValueError, match="brings an optimizer of its own, which a callback cannot set; use"):
        trainer.train()


def test_another_optimizer_in_the_run_is_said_to_have_no_effect(tmp_path):
    model = Recipe(lora(), LoraFA()).apply(classifier())
    trainer = RecipeTrainer(model=model, args=arguments(tmp_path, optim="adafactor"), train_dataset=rows())
    with pytest.warns(UserWarning, match="lora_fa brings its own optimizer: optim=.*has no effect"):
        trainer.create_optimizer()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(use_dora=True), r"works on LoRA of linear layers, but .*query is a layer with the LoRA variant Dora"),
        (
            lora(target_modules=["word_embeddings"]),
            r"works on LoRA of linear layers, but .*word_embeddings is an embedding: take it out of target_modules",
        ),
    ],
    ids=["dora", "embedding"],
)
def test_other_kinds_of_lora_are_refused(config, message):
    with pytest.raises(SettingError, match=message):
        Recipe(config, LoraFA()).apply(classifier())


def test_ranks_that_change_on_the_way_are_refused_before_there_is_a_model():
    budget = AdaLoraConfig(target_modules=["query"], total_step=9, init_r=3, target_r=2)
    with pytest.raises(SettingError, match="lora_fa and adalora cannot be combined: adalora changes which numbers"):
        Recipe(budget, LoraFA())


def test_lora_of_several_experts_is_refused():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 61}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=3)
    experts = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(SettingError, match=r"but .*experts is of 3 experts, .*: take it out of target_parameters"):
        Recipe(experts, LoraFA()).apply(MixtralForCausalLM(config))


def test_recipes_without_lora_are_refused():
    with pytest.raises(SettingError, match="lora_fa needs a technique of the phase adapter"):
        Recipe(LoraFA())
    with pytest.raises(SettingError, match="lora_fa freezes A of LoRA, but the recipe has no `lora`; add one"):
        Recipe.from_list([{"ia3": {"target_modules": ["query"], "feedforward_modules": []}}, "lora_fa"]).apply(
            classifier()
        )
    with pytest.raises(SettingError, match=r"eps of lora_fa must be positive, got 0\.0"):
        LoraFA(eps=0.0)


def test_adapters_in_16_bits_are_refused():
    class Halve(Technique):
        name, phase = "halve", Phase.SIDE

        def on_attached(self, model):
            pass

        def attach(self, model):
            model.to(torch.bfloat16)
            return super().attach(model)

        def settings(self):
            return {}

    with pytest.raises(SettingError, match=r"lora_fa needs adapters in float32, but A of .*query is torch\.bfloat16"):
        Recipe(lora(), Halve(), LoraFA()).apply(classifier())


def test_what_is_saved_holds_a_and_b(tmp_path):
    from shoestring.recipe import load

    model = Recipe(lora(), LoraFA()).apply(classifier())
    end = trained(model, tmp_path / "run")
    attached_to(model).save(tmp_path / "saved")
    again = load(classifier(), tmp_path / "saved")
    assert all(torch.equal(end[name], p) for name, p in again.named_parameters() if "lora_" in name)
