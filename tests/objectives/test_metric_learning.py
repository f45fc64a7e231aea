"""Metric learning: its losses against double loops, slerp, the head of classifiers, and training."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from shoestring import Recipe, assets
from shoestring.errors import RunFailed, SettingError
from shoestring.objectives import ChunkedLoss, MetricLearning
from shoestring.objectives.metric_learning import (
    alignment_loss,
    find_classifier,
    slerp,
    slerp_in_classes,
    uniformity_loss,
)
from shoestring.recipe import attached_to, load
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, seeded, step
from shoestring.training import RecipeTrainer

PLAIN = {"alignment": 0.0, "uniformity": 0.0}


def features(count: int, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=1)


# The losses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.0])
def test_losses_are_their_double_loops(seed, alpha):
    f, labels = features(7, seed=seed), torch.tensor([0, 2, 0, 1, 2, 0, 3])
    same, every = [], []
    for i in range(7):
        for j in range(i + 1, 7):
            distance = (f[i] - f[j]).square().sum().sqrt()
            every.append((-2.5 * distance**2).exp())
            if labels[i] == labels[j]:
                same.append(distance**alpha)
    exact = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(alignment_loss(f, labels, alpha), torch.stack(same).mean(), **exact)
    torch.testing.assert_close(uniformity_loss(f, 2.5), torch.stack(every).mean().log(), **exact)


def nearly_parallel() -> Tensor:
    f = features(4)
    return torch.cat([f, F.normalize(f[:1] + 1e-4 * features(1, seed=5), dim=1)])


@pytest.mark.parametrize("f", [features(5), nearly_parallel()], ids=["apart", "nearly parallel"])
def test_gradcheck(f):
    labels, share = torch.tensor([0, 1, 0, 1, 0]), torch.tensor([0.2, 0.9, 0.5, 0.0, 0.7], dtype=torch.float64)
    f = f.requires_grad_()
    for alpha in (1.0, 2.0):
        assert torch.autograd.gradcheck(lambda x, a=alpha: alignment_loss(x, labels, a), f)
    assert torch.autograd.gradcheck(uniformity_loss, f)
    partner = torch.tensor([4, 3, 0, 1, 0])
    assert torch.autograd.gradcheck(lambda x: slerp(F.normalize(x, dim=1), F.normalize(x, dim=1)[partner], share), f)


def test_equal_features_have_finite_gradients():
    f = torch.cat([features(2), features(2)]).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1])
    for alpha in (0.5, 1.0, 2.0):
        (alignment_loss(f, labels, alpha) + uniformity_loss(f)).backward()
    slerp(f, f.roll(2, 0), torch.full((4,), 0.3, dtype=torch.float64)).square().sum().backward()
    assert torch.isfinite(f.grad).all()


def test_without_two_of_a_class_alignment_is_zero_with_a_graph():
    f = features(3).requires_grad_()
    loss = alignment_loss(f, torch.arange(3))
    assert loss == 0
    loss.backward()
    assert torch.equal(f.grad, torch.zeros_like(f))


# Slerp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slerp_stays_on_the_sphere_and_ends_where_it_should(dtype):
    a, b = features(6).to(dtype), torch.cat([features(4, seed=1), nearly_parallel()[3:]]).to(dtype)
    for share in (0.0, 0.25, 1.0):
        point = slerp(a, b, torch.full((6,), share, dtype=dtype))
        torch.testing.assert_close(point.norm(dim=1), torch.ones(6, dtype=dtype), rtol=0, atol=1e-6)
        if share in (0.0, 1.0):
            torch.testing.assert_close(point, b if share else a, rtol=1e-5, atol=1e-5)


def test_slerp_is_the_formula_and_leaves_what_it_reads_alone():
    a, b = features(6), features(6, seed=1)
    kept, share = a.clone(), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    found = slerp(a, b, share)
    for i in range(6):
        omega = math.acos(float(a[i] @ b[i]))
        along, across = math.sin((1 - share[i]) * omega), math.sin(share[i] * omega)
        torch.testing.assert_close(found[i], (along * a[i] + across * b[i]) / math.sin(omega))
    assert torch.equal(a, kept)
    close = slerp(a, a, share)
    torch.testing.assert_close(close, a)


def test_partners_are_of_the_same_class_and_who_is_alone_stays():
    f, labels = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 1, 2])
    with seeded(3):
        moved = slerp_in_classes(f, labels)
    assert torch.equal(moved[5], f[5])
    for row, label in zip(moved[:5], labels[:5], strict=True):
        assert not row[labels != label].any()
        assert (row != 0).sum() == 2


# In classifiers

VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
TEXT = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


def clip() -> nn.Module:
    vision = {**VIT, "intermediate_size": 20}
    return CLIPForImageClassification(CLIPConfig(vision_config=vision, num_labels=3))


HEADS: dict[str, tuple[Any, str]] = {
    "vit": (lambda: ViTForImageClassification(ViTConfig(**VIT, num_labels=3)), "classifier"),
    "dinov2": (lambda: Dinov2ForImageClassification(Dinov2Config(**VIT, num_labels=3)), "classifier"),
    "clip": (clip, "classifier"),
    "bert": (CLASSIFIER.make, "classifier"),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(num_labels=3, **TEXT)),
        "classifier.out_proj",
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_last_layer_of_the_head_is_found_and_reads_features_of_length_one(name):
    make, path = HEADS[name]
    with seeded(0):
        model = make().eval()
    assert find_classifier(model)[1] is model.get_submodule(path)
    seen: list[Tensor] = []
    head = model.get_submodule(path)
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    words = torch.arange(3, 15).view(2, 6)
    batch = {"input_ids": words} if name in ("bert", "roberta") else {"pixel_values": images}
    model(**batch)
    with Recipe(MetricLearning(scale=4.0))(model):
        logits = model(**batch).logits
    hook.remove()
    v = seen[0]
    expected = 4.0 * (v / v.norm(dim=1, keepdim=True)) @ head.weight.T + head.bias
    torch.testing.assert_close(logits, expected)


def test_the_copy_of_the_head_that_trains_is_used():
    model = Recipe(CLASSIFIER.lora(), MetricLearning()).apply(CLASSIFIER.make())
    assert find_classifier(model)[1] is model.base_model.classifier.modules_to_save["default"]


@pytest.mark.parametrize("slerped", [False, True])
def test_the_loss_of_a_model_is_the_sum_of_its_terms(slerped):
    weights = {"alignment": 0.3, "uniformity": 0.7, "alpha": 1.5, "temperature": 3.0, "slerp": slerped}
    batch = CLASSIFIER.batch(samples=6)
    with seeded(7):
        model = Recipe(CLASSIFIER.lora(), MetricLearning(**weights, scale=2.0)).apply(CLASSIFIER.make()).train()
    head, seen = find_classifier(model)[1], []
    hook = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model.base_model(**batch)
    hook.remove()
    f = F.normalize(seen[0], dim=1)
    with seeded(5):
        f = slerp_in_classes(f, batch["labels"]) if slerped else f
    logits = 2.0 * f @ head.weight.T + head.bias
    expected = F.cross_entropy(logits, batch["labels"]) + 0.3 * alignment_loss(f, batch["labels"], 1.5)
    expected = expected + 0.7 * uniformity_loss(f, 3.0)
    torch.testing.assert_close(step(model, batch).loss, expected.detach(), rtol=1e-5, atol=1e-5)


def test_step_0_features_are_those_of_the_base():
    base, batch = CLASSIFIER.make().eval(), CLASSIFIER.batch()
    expected = base.bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    with Recipe(CLASSIFIER.lora(init_lora_weights=True), MetricLearning())(base) as model:
        inner = model.get_base_model().eval().bert
        found = inner(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).pooler_output
    torch.testing.assert_close(found, expected)


def test_a_learned_scale_trains_and_is_saved(tmp_path):
    with seeded(7):
        recipe = Recipe(CLASSIFIER.lora(), MetricLearning(scale=5.0, learn_scale=True))
        model = recipe.apply(CLASSIFIER.make())
    scale = model.get_base_model().feature_scale
    assert scale == 5.0
    assert step(model, CLASSIFIER.batch()).gradients["base_model.model.feature_scale"].abs() > 0
    with torch.no_grad():
        scale.fill_(8.5)
    attached_to(model).save(tmp_path)
    again = load(CLASSIFIER.make(), tmp_path)
    assert again.get_base_model().feature_scale == 8.5
    batch = CLASSIFIER.batch()
    torch.testing.assert_close(again.eval()(**batch).logits, model.eval()(**batch).logits)
    assert not hasattr(Recipe.remove(model), "feature_scale")


def test_the_last_batch_may_be_of_one_sample_but_not_the_first():
    model = Recipe(CLASSIFIER.lora(), MetricLearning(alignment=0.0)).apply(CLASSIFIER.make()).train()
    one = CLASSIFIER.batch(samples=1)
    with pytest.raises(SettingError, match="there is 1 sample in the batch"):
        model(**one)
    model(**CLASSIFIER.batch())
    assert torch.isfinite(model(**one).loss)
    alone = Recipe(CLASSIFIER.lora(), MetricLearning(uniformity=0.0)).apply(CLASSIFIER.make()).train()
    with pytest.warns(UserWarning, match="alignment of metric_learning is 0 there"):
        assert torch.isfinite(alone(**one).loss)


def test_a_batch_of_one_class_works():
    model = Recipe(CLASSIFIER.lora(), MetricLearning(slerp=True)).apply(CLASSIFIER.make())
    batch = CLASSIFIER.batch()
    batch["labels"] = torch.ones_like(batch["labels"])
    found = step(model, batch)
    assert torch.isfinite(found.loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.gradients.values())


def test_uniformity_spreads_features_and_slerp_trains(tmp_path):
    """Three clusters of words; the features' spread on other rows after training with the loss and without."""
    rows = []
    for index in range(192 + 200):
        words = torch.randint(0, 9, (7,), generator=torch.Generator().manual_seed(index)) + 3 + 9 * (index % 3)
        rows.append({"input_ids": words, "labels": torch.tensor(index % 3)})
    rows, others = rows[:192], rows[192:]
    batch = {name: torch.stack([row[name] for row in others]) for name in others[0]}
    spread, right = {}, {}
    for name, settings in {
        "plain": {**PLAIN},
        "spread": {"alignment": 0.0, "uniformity": 0.5},
        "slerp": {**PLAIN, "slerp": True},
    }.items():
        with seeded(1):
            model = Recipe(CLASSIFIER.lora(init_lora_weights=True), MetricLearning(**settings, scale=8.0)).apply(
                CLASSIFIER.make()
            )
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=100,
            per_device_train_batch_size=16,
            learning_rate=0.02,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        RecipeTrainer(model=model, args=arguments, train_dataset=rows).train()
        head, seen = find_classifier(model)[1], []
        hook = head.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            logits = model.eval()(**batch).logits
        hook.remove()
        spread[name] = float(uniformity_loss(F.normalize(seen[0], dim=1)))
        right[name] = float((logits.argmax(1) == batch["labels"]).double().mean())
    assert min(right.values()) > 0.95, right
    assert right["spread"] >= right["plain"] - 0.01
    assert spread["spread"] < spread["plain"] - 0.1, spread


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": -1.0}, "alignment of metric_learning must be at least 0"),
        ({"uniformity": -1.0}, "uniformity of metric_learning must be at least 0"),
        ({"alpha": 0.0}, "alpha of metric_learning must be above 0"),
        ({"temperature": 0.0}, "temperature of metric_learning must be above 0"),
        ({"scale": 0.0}, "scale of metric_learning must be above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        MetricLearning(**settings)


def test_models_without_a_classifier_are_refused():
    for model in (DECODER.make(), nn.Linear(3, 3)):
        with pytest.raises(SettingError, match="needs a classifier of images or texts"):
            find_classifier(model)
    adapted = Recipe(LoraConfig(target_modules=["classifier"]), MetricLearning())
    with pytest.raises(SettingError, match="list it in modules_to_save in place of target_modules"):
        adapted.apply(CLASSIFIER.make())
    with pytest.raises(SettingError, match="both act on the output head"):
        Recipe(CLASSIFIER.lora(), MetricLearning(), ChunkedLoss())


def test_a_classifier_of_every_token_is_refused():
    config = LlamaConfig(**TEXT, num_labels=3, pad_token_id=0)
    model = Recipe(LoraConfig(target_modules=["q_proj"]), MetricLearning()).apply(
        LlamaForSequenceClassification(config)
    )
    with pytest.raises(SettingError, match="classifies every token and then picks one"):
        model(input_ids=torch.arange(1, 9).view(2, 4), labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("labels", [torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 1, dtype=torch.long)])
@pytest.mark.parametrize("slerp", [True, False])
def test_labels_that_are_not_one_class_a_sample_are_refused(labels, slerp):
    model = Recipe(CLASSIFIER.lora(), MetricLearning(slerp=slerp)).apply(CLASSIFIER.make()).train()
    with pytest.raises(SettingError, match=r"needs labels of shape \[batch\]"):
        model(**{**CLASSIFIER.batch(), "labels": labels})


def test_features_that_are_no_numbers_end_the_run():
    model = Recipe(CLASSIFIER.lora(), MetricLearning()).apply(CLASSIFIER.make()).train()
    with torch.no_grad():
        model.get_base_model().bert.pooler.dense.base_layer.weight.fill_(torch.nan)
    with pytest.raises(RunFailed, match="features before the classifier hold NaN"):
        model(**CLASSIFIER.batch())


# On packaged models


@pytest.mark.slow
def test_a_packaged_vision_transformer_learns_from_a_few_pictures(tmp_path):
    need("dinov2-small", "fashion-mnist")
    rows = assets.load_data("fashion-mnist")["train"].shuffle(seed=0).select(range(64))
    column = next(name for name in rows.column_names if name != "label")

    def pixels(row: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        image = torch.tensor(np.asarray(row[column]), dtype=torch.float32)[None, None] / 255
        return {"pixel_values": F.interpolate(image, (42, 42))[0].expand(3, -1, -1), "labels": row["label"]}

    made = [pixels(row) for row in rows]
    model = Dinov2ForImageClassification.from_pretrained(assets.model_folder("dinov2-small"), num_labels=10)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    model = Recipe(lora, MetricLearning(scale=16.0, slerp=True)).apply(model)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=2,
        remove_unused_columns=False,
    )
    trainer = RecipeTrainer(model=model, args=arguments, train_dataset=made)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
