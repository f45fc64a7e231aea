"""Density loss: the penalty against its formula, where it looks, what it measures, memory, and training."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from shoestring import Recipe, assets
from shoestring.blocks import Recompute, Reversible, TokenTune
from shoestring.errors import RunFailed, SettingError
from shoestring.memory import Ledger
from shoestring.modes import quiet
from shoestring.objectives import DensityLoss
from shoestring.objectives.density_loss import find_places, mean_of_samples, soft_density
from shoestring.recipe import attached_to
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, TinyModel, decoder, seeded, step
from shoestring.training import RecipeTrainer

EPSILON = 0.05
RELU = replace(DECODER, make=partial(decoder, hidden_act="relu"))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def formula(z: Tensor, epsilon: float) -> Tensor:
    return z.square() / (z.square() + epsilon)


# The penalty


@pytest.mark.parametrize("seed", range(3))
def test_the_soft_density_is_the_formula_and_so_is_its_gradient(seed):
    z = drawn(3, 7, 11, seed=seed).relu().requires_grad_()
    found = soft_density(z, EPSILON)
    assert ((found >= 0) & (found <= 1)).all()
    expected = formula(z, EPSILON).mean(-1)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    weights = drawn(3, 7, seed=seed + 9)
    (ours,) = torch.autograd.grad((found * weights).sum(), z)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), z)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_it_tends_to_the_exact_share():
    z = drawn(5, 9, 13).relu()
    torch.testing.assert_close(soft_density(z, 1e-12), (z != 0).double().mean(-1), rtol=1e-6, atol=1e-6)


def test_gradcheck():
    z = drawn(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_density(x, EPSILON), z)
    assert torch.autograd.gradcheck(lambda x: soft_density(x.transpose(0, 1), EPSILON), z)
    real = torch.tensor([[True, True, False], [True, False, False]])
    assert torch.autograd.gradcheck(lambda x: mean_of_samples(soft_density(x, EPSILON), real), z)


def test_half_precision_is_computed_in_single():
    z = torch.tensor([[2e-4, 0.0, -3e-4, 1.0]], dtype=torch.float16, requires_grad=True)  # whose squares underflow
    found = soft_density(z, 1e-7)
    wide = z.detach().double().requires_grad_()
    expected = formula(wide, 1e-7).mean(-1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    expected.sum().backward()
    found.sum().backward()
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2e-3, atol=1e-3)


def test_padding_does_not_count_and_samples_count_alike():
    shares = drawn(3, 4).abs()
    real = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    torch.testing.assert_close(mean_of_samples(shares, real), (shares[0].mean() + shares[1, 0]) / 2)
    torch.testing.assert_close(mean_of_samples(shares, None), shares.mean())
    assert mean_of_samples(shares, torch.zeros(3, 4, dtype=torch.bool)) == 0


# Where it looks


def t5(**settings: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 3}
    with seeded(0):
        config = T5Config(vocab_size=41, decoder_start_token_id=0, **sizes, **settings)
        return T5ForConditionalGeneration(config)


COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, int]] = {
    "bert": (CLASSIFIER.make, "intermediate", "output", 2),
    "llama": (RELU.make, "down_proj", "input", 2),
    "t5": (lambda: t5(feed_forward_proj="relu"), "act", "output", 5),
    "t5-gated": (lambda: t5(feed_forward_proj="gated-gelu"), "DenseReluDense.dropout", "input", 5),
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(vocab_size=40, ffn_dim=20, word_embed_proj_dim=16, **COMMON)),
        "activation_fn",
        "output",
        2,
    ),
    "vit": (lambda: ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **COMMON)), "", "output", 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_block_has_one_place(name):
    make, end, at, count = MODELS[name]
    places = find_places(make())
    assert len(places) == count
    assert {place.at for place in places} == {at}
    assert all(end in place.name for place in places)


def test_the_gate_alone_can_be_looked_at():
    places = find_places(RELU.make(), of="gate")
    assert [(place.name, place.at) for place in places] == [(f"model.layers.{i}.mlp.act_fn", "output") for i in (0, 1)]


def test_functions_of_adapters_are_none_of_the_models():
    with seeded(0):
        model = Recipe(LoraConfig(target_modules="all-linear"), DensityLoss()).apply(CLASSIFIER.make())
    for layer in model.modules():
        if hasattr(layer, "lora_A") and len(layer.lora_A):
            layer.lora_A["default"] = nn.Sequential(layer.lora_A["default"], nn.ReLU())
    assert len(find_places(model)) == 2


def seen_by_name(model: nn.Module, batch: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    """What enters the layers of these names, by hooks of the test."""
    seen: list[Tensor] = []
    layers = [module for name, module in model.named_modules() if name.endswith(names)]
    hooks = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for layer in layers]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def of_layers(zs: list[Tensor], real: Tensor, epsilon: float = EPSILON) -> Tensor:
    """The formula, in loops."""
    total = torch.zeros((), dtype=zs[0].dtype)
    for z in zs:
        for sample, tokens in zip(z, real.bool(), strict=True):
            total = total + formula(sample[tokens], epsilon).mean() / len(z) / len(zs)
    return total


@pytest.mark.parametrize("model", [RELU, CLASSIFIER], ids=lambda model: model.name)
def test_the_penalty_on_a_model_is_the_formula_over_real_tokens(model: TinyModel):
    batch = model.batch()
    plain, ours = (
        Recipe(model.lora(), DensityLoss(weight=w, epsilon=EPSILON)).apply(model.make().double()).train()
        for w in (0.0, 0.7)
    )
    ours.load_state_dict(plain.state_dict())
    last = ("mlp.down_proj",) if model is RELU else ("layer.0.output.dense", "layer.1.output.dense")
    loss = plain(**batch).loss + 0.7 * of_layers(seen_by_name(plain, batch, last), batch["attention_mask"])
    loss.backward()
    with_it = ours(**batch).loss
    with_it.backward()
    torch.testing.assert_close(with_it, loss.to(with_it), rtol=1e-6, atol=1e-6)  # the penalty joins a loss in float32
    for (name, p), q in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_encoder_and_decoder_count_alike_whatever_their_depth():
    ids = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    lora = LoraConfig(r=2, target_modules=["q", "v"])
    with seeded(1):
        model = Recipe(lora, DensityLoss(weight=0.0)).apply(t5(feed_forward_proj="relu", dropout_rate=0.0)).train()
    zs = seen_by_name(model, batch, (".wo",))
    assert [z.shape[1] for z in zs] == [7, 7, 3, 3, 3]
    expected = model(**batch).loss + of_layers(zs[:2], mask) + of_layers(zs[2:], labels != -100)
    with seeded(1):
        ours = Recipe(lora, DensityLoss(epsilon=EPSILON)).apply(t5(feed_forward_proj="relu", dropout_rate=0.0)).train()
    torch.testing.assert_close(ours(**batch).loss, expected)


def test_dropout_after_the_product_is_not_taken_for_zeros():
    make = partial(t5, feed_forward_proj="gated-gelu", dropout_rate=0.5)
    model = Recipe(LoraConfig(r=2, target_modules=["q"]), DensityLoss()).apply(make()).train()
    technique = attached_to(model).techniques[1]
    ids = torch.arange(3, 13).view(2, 5)
    model(input_ids=ids, labels=ids)
    assert all(shares.min() > 0.9 for _, shares in technique._trained)


# Training


def test_weight_zero_is_the_plain_run_to_the_bit():
    with seeded(7):
        ours = Recipe(RELU.lora(), DensityLoss(weight=0.0)).apply(RELU.make())
    with seeded(7):
        plain = Recipe(RELU.lora()).apply(RELU.make())
    for seed in range(3):
        one, two = step(plain, RELU.batch(seed)), step(ours, RELU.batch(seed))
        assert torch.equal(one.loss, two.loss)
        assert all(torch.equal(two.gradients[name], gradient) for name, gradient in one.gradients.items())


@pytest.mark.parametrize("model", [RELU, CLASSIFIER], ids=lambda model: model.name)
@pytest.mark.parametrize("how", ["recompute", "segments", "transformers"])
def test_blocks_that_run_again_are_counted_once(model: TinyModel, how: str):
    beside = {"recompute": [Recompute()], "segments": [Recompute(segments=2)], "transformers": []}[how]
    technique = DensityLoss(epsilon=EPSILON)
    with seeded(7):
        plain = Recipe(model.lora(), technique).apply(model.make())
    base = model.make()
    if how == "transformers":
        base.gradient_checkpointing_enable({"use_reentrant": False})
    with seeded(7):
        again = Recipe(model.lora(), technique, *beside).apply(base)
    expected, found = step(plain, model.batch()), step(again, model.batch())
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.error(expected) < 1e-5
    (ours,) = (t for t in attached_to(again).techniques if t.name == "density_loss")
    assert ours._running is None
    assert ours._trained == []  # what ran again in backward left nothing


def test_reentrant_checkpointing_is_refused():
    base = RELU.make()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    model = Recipe(RELU.lora(), DensityLoss()).apply(base).train()
    with pytest.raises(ValueError, match="reentrant checkpointing"):
        model(**RELU.batch())


def test_a_forward_without_gradients_has_the_same_penalty():
    model = Recipe(RELU.lora(), DensityLoss(epsilon=EPSILON)).apply(RELU.make()).train()
    batch, attached = RELU.batch(), attached_to(model)
    attached.add_losses_in_forward = False  # as under a trainer, which asks for them
    expected = attached.added_loss(batch, model(**batch))
    with quiet(model):
        assert torch.equal(attached.added_loss(batch, model(**batch)), expected)
    assert attached.measured() == {}


def test_a_forward_for_metrics_alone_does_not_count():
    model = Recipe(RELU.lora(), DensityLoss(epsilon=EPSILON)).apply(RELU.make()).train()
    batch, attached = RELU.batch(), attached_to(model)
    attached.add_losses_in_forward = False
    expected = attached.added_loss(batch, model(**batch))
    outputs = model(**batch)
    with torch.no_grad():  # as TRL runs the model once more where labels are smoothed
        model(**{name: value[:1] for name, value in batch.items()})
    assert torch.equal(attached.added_loss(batch, outputs), expected)


@pytest.mark.parametrize("name", ["llama", "opt"])  # OPT's MLPs read the tokens of all samples in one row
def test_tokens_that_are_not_selected_do_not_count(name):
    """The same from a stream of selected tokens, of unequal number, and from all of which selected ones are kept."""
    batch = RELU.batch(samples=2)
    batch["input_ids"] = batch["input_ids"] % 37 + 3
    batch["attention_mask"] = torch.stack([torch.arange(13) < 4, torch.arange(13) < 13]).long()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = []
    for form in ("streams", "rows"):
        with seeded(0):
            model = MODELS[name][0]().double().train()
        for module in model.modules():
            module.__dict__.update(dict.fromkeys({"dropout", "layerdrop"} & vars(module).keys(), 0.0))
        Recipe(TokenTune(keep_fraction=0.5, form=form), DensityLoss(epsilon=EPSILON)).apply(model)
        loss = model(**batch).loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_a_forward_aside_does_not_count():
    """Of token_tune, which looks for tokens by one more forward before the step's own."""
    batch = RELU.batch()
    found = []
    for aside in (False, True):
        with seeded(0):
            recipe = Recipe(TokenTune(keep_fraction=1.0, select="seek" if aside else "random"), DensityLoss(EPSILON))
            found.append(recipe.apply(RELU.make()).train()(**batch).loss)
    torch.testing.assert_close(*found)


def test_accumulated_penalties_are_their_mean(tmp_path):
    changes = []
    for accumulate in (1, 2):
        with seeded(7):
            model = Recipe(RELU.lora(), DensityLoss(epsilon=EPSILON)).apply(RELU.make())
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in RELU.rows(count=4)]
        for row in rows:  # equal lengths, so that the mean over all tokens is that of the micro-batches
            row["labels"] = row["input_ids"] = row["input_ids"].clamp(min=3)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4 // accumulate,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.1,
            max_grad_norm=0.0,
            optim="sgd",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        RecipeTrainer(model=model, args=arguments, train_dataset=rows).train()
        changes.append({name: p.detach() - start[name] for name, p in model.named_parameters() if name in start})
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[1][name], change, rtol=1e-5, atol=1e-7)


def test_epsilon_falls_by_equal_factors_and_is_that_of_the_step_when_resumed():
    model = Recipe(RELU.lora(), DensityLoss(epsilon=1e-6, start_epsilon=1e-2)).apply(RELU.make())
    technique = attached_to(model).techniques[1]
    for done, wanted in ((0, 1e-2), (5, 1e-4), (10, 1e-6)):
        technique.on_step_begin(Moment(model, step=done, num_steps=10))
        assert technique._now == pytest.approx(wanted)
    with pytest.raises(SettingError, match="number is not known"):
        technique.on_step_begin(Moment(model))


def test_nothing_grows_and_nothing_stays():
    base = RELU.make()
    ids = RELU.batch()["input_ids"]
    with torch.no_grad():
        before = base.eval()(input_ids=ids).logits
    model = Recipe(RELU.lora(), DensityLoss()).apply(base)
    technique = attached_to(model).techniques[1]
    for index in range(24):
        if index % 8 == 0:
            model.eval()(**RELU.batch())
        model.train()(**RELU.batch()).loss.backward()
        assert technique._trained == []
        assert technique._running is None
        assert len(technique._measured) == 2
    Recipe.remove(model)
    with torch.no_grad():
        assert torch.equal(base.eval()(input_ids=ids).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_memory_is_that_of_the_plain_run():
    with seeded(0):
        config = LlamaConfig(
            vocab_size=31, hidden_size=32, intermediate_size=256, num_hidden_layers=6, num_attention_heads=2
        )
        config.hidden_act = "relu"
        made = LlamaForCausalLM(config)
    ids = torch.randint(0, 31, (3, 65), generator=torch.Generator().manual_seed(1))

    def peak(*techniques: DensityLoss) -> int:
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])  # whose A keeps z
        model = Recipe(lora, *techniques).apply(copy.deepcopy(made)).train()
        with Ledger(model) as ledger:
            model(input_ids=ids, labels=ids).loss.backward()
        return ledger.report().peak_bytes

    assert peak(DensityLoss()) <= 1.05 * peak()


# What is measured


def test_evaluation_reports_the_exact_share_without_padding(tmp_path):
    model = Recipe(RELU.lora(), DensityLoss()).apply(RELU.make())
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=3, report_to=[], use_cpu=True)
    trainer = RecipeTrainer(model=model, args=arguments, eval_dataset=RELU.rows(count=4))
    model.eval()(**RELU.batch(2))  # before, and none of the evaluation's
    metrics = trainer.evaluate()
    batch = RELU.batch(samples=4)
    zs, real = seen_by_name(model.eval(), batch, ("mlp.down_proj",)), batch["attention_mask"].bool()
    exact = [float((z[real] != 0).double().mean()) for z in zs]
    assert metrics["eval_density"] == pytest.approx(sum(exact) / 2)
    assert metrics["eval_density_with_padding"] == pytest.approx(sum(float((z != 0).double().mean()) for z in zs) / 2)
    for index, share in enumerate(exact):
        assert metrics[f"eval_density_of_model.layers.{index}.mlp.down_proj"] == pytest.approx(share)


def test_density_falls_at_an_equal_score():
    """Which of three words stands most often, told by a small ReLU encoder; full tuning first, then LoRA."""
    with seeded(0):
        config = BertConfig(
            vocab_size=12, num_labels=3, max_position_embeddings=16, hidden_act="relu", **{**COMMON, "hidden_size": 32}
        )
        config.intermediate_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 64, 0.0, 0.0
        base = BertForSequenceClassification(config)

    def rows(seed: int, count: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 4, (count, 9), generator=torch.Generator().manual_seed(seed))
        counts = torch.stack([(ids == word).sum(1) for word in (1, 2, 3)], 1).float()
        return {"input_ids": ids, "labels": (counts - 0.01 * torch.arange(3)).argmax(1)}

    def train(model: nn.Module, steps: int, rate: float) -> None:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
        for seed in range(steps):
            optimizer.zero_grad()
            model.train()(**rows(seed, 64)).loss.backward()
            optimizer.step()

    train(base, 120, 4e-3)
    found = {}
    for weight in (0.0, 1.0):
        with seeded(1):
            lora = LoraConfig(r=8, target_modules="all-linear", exclude_modules=["classifier"])
            model = Recipe(lora, DensityLoss(weight, epsilon=1e-2)).apply(copy.deepcopy(base))
        train(model, 100, 5e-3)
        test = rows(10**6, 1000)
        with torch.no_grad():
            right = (model.eval()(**test).logits.argmax(1) == test["labels"]).double().mean()
        found[weight] = (attached_to(model).measured()["density"], float(right))
    (plain, score), (sparse, score_with) = found[0.0], found[1.0]
    assert score > 0.9
    assert score_with >= score - 0.01
    assert sparse <= 0.7 * plain, found


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": -1.0}, "weight of density_loss must be at least 0"),
        ({"weight": float("nan")}, "weight of density_loss must be at least 0"),
        ({"epsilon": 0.0}, "epsilon of density_loss must be above 0"),
        ({"start_epsilon": 1e-9}, "start_epsilon of density_loss must be at least epsilon"),
        ({"of": "up"}, "of of density_loss must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        DensityLoss(**settings)


@pytest.mark.parametrize("function", ["silu", "quick_gelu", "tanh", "leaky_relu"])
def test_functions_that_are_never_zero_are_refused(function):
    model = CLASSIFIER.make(hidden_act=function)
    with pytest.raises(SettingError, match=r"never exactly zero; it is for ReLU"):
        Recipe(CLASSIFIER.lora(), DensityLoss()).apply(model)


@pytest.mark.parametrize("function", ["relu", "relu2", "relu6", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_functions_with_exact_zeros_are_taken(function):
    assert len(find_places(CLASSIFIER.make(hidden_act=function))) == 2


def test_blocks_that_cannot_be_read_are_refused():
    class Fused(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu(x)

    model = CLASSIFIER.make()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = Fused()
    with pytest.raises(SettingError, match=r"no activation function in bert.encoder.layer.1 \(BertLayer\)"):
        find_places(model)
    experts = MixtralForCausalLM(
        MixtralConfig(vocab_size=9, num_local_experts=2, num_key_value_heads=2, hidden_act="relu", **COMMON)
    )
    with pytest.raises(SettingError, match="weights of its own, as experts of a mixture"):
        find_places(experts)
    with pytest.raises(SettingError, match="never exactly zero"):
        find_places(CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **COMMON)))
    with pytest.raises(SettingError, match="no list of equal transformer blocks"):
        find_places(nn.Linear(2, 2))


def test_blocks_outside_of_the_graph_are_refused():
    with pytest.raises(SettingError, match="keeps out of the graph"):
        Recipe(RELU.lora(), DensityLoss(), Reversible())
    Recipe(RELU.lora(), DensityLoss(weight=0.0), Reversible())


def test_activations_that_are_no_numbers_end_the_run():
    model = Recipe(RELU.lora(), DensityLoss()).apply(RELU.make()).train()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match=r"activations at .*layers\.1\.mlp\.down_proj hold NaN"):
        model(**RELU.batch())


# On a packaged model


@pytest.mark.slow
def test_a_packaged_encoder_with_relu_becomes_sparser(tmp_path):
    need("minilm", "rotten-tomatoes")
    folder = assets.model_folder("minilm")
    tokenizer, data = AutoTokenizer.from_pretrained(folder), assets.load_data("rotten-tomatoes")

    def encoded(split: str, count: int) -> Any:
        rows = data[split].shuffle(seed=0).select(range(count))
        return rows.map(
            lambda row: {**tokenizer(row["text"], truncation=True, max_length=24), "labels": row["label"]},
            remove_columns=rows.column_names,
        )

    density = []
    for weight in (0.0, 1.0):
        set_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(folder, hidden_act="relu")
        lora = LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
        model = Recipe(lora, DensityLoss(weight, epsilon=0.01)).apply(model)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=15, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True
        )
        trainer = RecipeTrainer(
            model=model,
            args=arguments,
            train_dataset=encoded("train", 120),
            eval_dataset=encoded("test", 64),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
        density.append(trainer.evaluate()["eval_density"])
    assert density[1] < 0.9 * density[0]
