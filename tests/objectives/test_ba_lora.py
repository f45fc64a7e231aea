"""BA-LoRA: its terms against plain references, its teacher against the pretrained model, memory, refusals."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PromptTuningConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, T5Config, T5ForConditionalGeneration

from shoestring import Recipe
from shoestring.adapters import S2LoRAConfig
from shoestring.errors import SettingError
from shoestring.fakes import without_values
from shoestring.memory import Ledger
from shoestring.objectives import BALora, ChunkedLoss
from shoestring.objectives.logit_terms import (
    Spectrum,
    divergence,
    leading_singular,
    negative_entropy,
    normalised_distance,
    off_diagonal_covariance,
    singular_share,
    token_terms,
)
from shoestring.recipe import Moment, attached_to
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, TinyModel, seeded, step

EVERYTHING = {"consistency": 0.7, "diversity": 0.4, "concentration": 0.3}
NOTHING = dict.fromkeys(EVERYTHING, 0.0)


def drawn(*shape: int, seed: int = 0, **settings: Any) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, **settings)


# The terms


def plain_classes(z: Tensor, t: Tensor, k: int, temperature: float, variant: str) -> Tensor:
    """The equations as they stand, by autograd through everything."""
    a, b, c = EVERYTHING.values()
    p, q = (t / temperature).softmax(1), (z / temperature).softmax(1)
    consistency = temperature**2 * (p * (p / q).log()).sum(1).mean()
    if variant == "v1":
        consistency = ((z / z.norm(dim=1, keepdim=True) - t / t.norm(dim=1, keepdim=True)) ** 2).mean()
    covariance = torch.cov(z.T)
    diversity = (covariance - covariance.diag().diag()).square().sum() / z.shape[1]
    s = torch.linalg.svd(z, full_matrices=False).S
    return a * consistency + b * diversity - c * s[:k].sum() / s.sum()


def plain_words(z: Tensor, t: Tensor, k: int, temperature: float, variant: str, top: int = 50) -> Tensor:
    a, b, c = EVERYTHING.values()
    p, q = (t / temperature).softmax(1), (z / temperature).softmax(1)
    consistency = temperature**2 * (p * (p / q).log()).sum(1).mean()
    likely = z.softmax(1)
    if variant == "iclr":
        likely = likely.sort(1, descending=True).values[:, :top]
        likely = likely / likely.sum(1, keepdim=True)
    entropy = -(likely * likely.log()).sum(1).mean()
    s = torch.linalg.svd(z, full_matrices=False).S
    return a * consistency - b * entropy - c * s[:k].sum() / z.square().sum().sqrt()


def test_terms_on_numbers_small_enough_to_check_by_hand():
    even, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 3.0]]).log1p()  # softmax of (0, ln 4): 1/5, 4/5
    wanted = 0.5 * torch.tensor(0.5 / 0.2).log() + 0.5 * torch.tensor(0.5 / 0.8).log()
    torch.testing.assert_close(divergence(sure, even), wanted)
    torch.testing.assert_close(divergence(2 * sure, 2 * even, 2.0), 4 * wanted)
    torch.testing.assert_close(negative_entropy(even), torch.tensor(0.5).log())
    torch.testing.assert_close(negative_entropy(torch.tensor([[9.0, 9.0, -50.0]]), 2), torch.tensor(0.5).log())
    torch.testing.assert_close(
        normalised_distance(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 2.0]])), torch.tensor(1.0)
    )
    # columns (1, -1) and (2, -2): covariances 2, 4 and 8
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    torch.testing.assert_close(off_diagonal_covariance(z), torch.tensor(2 * 16 / 2.0))
    torch.testing.assert_close(singular_share(torch.diag(torch.tensor([3.0, 1.0])), 1), torch.tensor(0.75))


def test_terms_vanish_or_are_least_where_the_paper_says_so():
    z = drawn(6, 4)
    assert divergence(z, z, 2.0) == 0
    assert normalised_distance(z, z) == 0
    centred = z - z.mean(0)
    uncorrelated = torch.linalg.qr(centred).Q * torch.arange(1.0, 5.0, dtype=torch.float64)
    assert off_diagonal_covariance(uncorrelated) < 1e-28
    rank_one = drawn(6, 1) @ drawn(1, 4, seed=1)
    for k in (1, 3):
        torch.testing.assert_close(singular_share(rank_one, k), torch.ones((), dtype=torch.float64))
        term = token_terms(rank_one, None, torch.arange(6), None, Spectrum(k), -1.0)
        torch.testing.assert_close(term, -torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3])
def test_the_gradient_of_singular_values_is_autograds(seed, k):
    z = drawn(9, 5, seed=seed).requires_grad_()
    s = torch.linalg.svd(z, full_matrices=False).S
    (expected,) = torch.autograd.grad(s[:k].sum() / s.sum(), z)
    (found,) = torch.autograd.grad(singular_share(z, k), z)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    s = torch.linalg.svd(z, full_matrices=False).S
    (expected,) = torch.autograd.grad(s[:k].sum() / z.norm(), z)
    (found,) = torch.autograd.grad(token_terms(z, None, torch.arange(9), None, Spectrum(k), 1.0), z)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "z", [torch.eye(5, 4), torch.ones(5, 4), torch.zeros(5, 4)], ids=["repeated", "rank 1", "zero"]
)
def test_gradients_are_finite_where_singular_values_repeat_or_vanish(z):
    z = z.double().requires_grad_()
    for value in (singular_share(z, 2), token_terms(z, None, torch.arange(5), None, Spectrum(2), 1.0)):
        (gradient,) = torch.autograd.grad(value, z)
        assert torch.isfinite(value)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_the_randomised_sum_is_within_a_percent_of_the_exact_one(decay):
    """Of a spectrum that falls as those of logits do; of white noise two iterations find 93 %."""
    with seeded(0):
        u, v = (torch.linalg.qr(torch.randn(n, 256)).Q for n in (256, 4096))
    s = torch.arange(1, 257) ** -decay
    rows = torch.arange(256)
    _, found, _ = leading_singular(u @ torch.diag(s) @ v.T, rows, Spectrum(10))
    assert 0.99 * s[:10].sum() < found.sum() < 1.0001 * s[:10].sum()
    assert all(
        torch.equal(a, b)
        for a, b in zip(leading_singular(u, rows, Spectrum(3)), leading_singular(u, rows, Spectrum(3)), strict=True)
    )


@pytest.mark.parametrize("chunks", [1, 3, 32])
def test_chunks_and_rows_that_do_not_count_change_nothing(chunks):
    z, t = drawn(13, 7).requires_grad_(), drawn(13, 7, seed=1)
    rows = torch.tensor([0, 2, 3, 7, 11])

    def term(ours: Tensor, theirs: Tensor | None) -> Tensor:
        assert theirs is not None
        return divergence(ours, theirs, 2.0) + 0.5 * negative_entropy(ours, 4)

    s = torch.linalg.svd(z[rows], full_matrices=False).S
    expected = term(z[rows], t[rows]) / 5 + 0.3 * s[:2].sum() / z[rows].norm()
    (wanted,) = torch.autograd.grad(expected, z)
    for fill in (0.0, 1e6):
        other, mine = (x.detach().index_fill(0, torch.tensor([1, 4, 5, 6, 8, 9, 10, 12]), fill) for x in (t, z))
        mine.requires_grad_()
        found = token_terms(mine, other, rows, term, Spectrum(2, iterations=6), 0.3, chunks)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        (gradient,) = torch.autograd.grad(3 * found, mine)
        torch.testing.assert_close(gradient, 3 * wanted, rtol=1e-7, atol=1e-7)


def test_a_batch_without_labels_adds_nothing():
    z = drawn(3, 7).requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    total = token_terms(z, drawn(3, 7, seed=1), none, lambda ours, theirs: ours.sum(), Spectrum(2), 1.0)
    total.backward()
    assert total == 0
    assert not z.grad.any()


def test_the_gradient_comes_twice_where_the_graph_is_kept():
    z = drawn(5, 7).requires_grad_()
    total = token_terms(z, None, torch.arange(5), lambda ours, theirs: ours.square().sum())
    (first,) = torch.autograd.grad(total, z, retain_graph=True)
    (second,) = torch.autograd.grad(total, z)
    torch.testing.assert_close(first, 2 * z.detach() / 5)
    assert torch.equal(first, second)


def test_words_ruled_out_by_the_lowest_of_numbers_have_no_singular_value():
    z = drawn(5, 7).float()
    ruled_out = torch.cat([z, torch.full((5, 2), torch.finfo(torch.float32).min / 2)], 1)
    totals = [token_terms(x, None, torch.arange(5), None, Spectrum(2), 1.0) for x in (z, ruled_out)]
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-3, atol=1e-3)


# The technique


def applied(model: TinyModel, *techniques: Any, dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    with seeded(7):
        return Recipe(model.lora(**lora), *techniques).apply(model.make().to(dtype)).train()  # type: ignore[return-value]


def original(model: TinyModel, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return model.make().to(dtype).eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits


def teacher_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    (technique,) = (t for t in attached_to(model).techniques if t.name == "ba_lora")
    with technique._teacher.in_place(model):
        return model(**{k: v for k, v in batch.items() if k != "labels"}).logits


@pytest.mark.parametrize("variant", ["iclr", "v1"])
@pytest.mark.parametrize("model", [DECODER, CLASSIFIER], ids=lambda model: model.name)
@pytest.mark.parametrize("seed", [1, 2])
def test_loss_and_gradients_are_those_of_the_equations_in_double_precision(model, variant, seed):
    technique = BALora(**EVERYTHING, num_singular=2, temperature=1.5, power_iterations=30, variant=variant)
    batch = model.batch(seed, samples=5)
    found = step(applied(model, technique, dtype=torch.float64), batch)

    plain = applied(model, dtype=torch.float64)
    theirs = original(model, batch, torch.float64)
    outputs = plain(**batch)
    if model is DECODER:  # a row predicts the next token; the last one predicts none
        counted = batch["labels"][:, 1:] != -100
        z, t = outputs.logits[:, :-1][counted], theirs[:, :-1][counted]
        added = plain_words(z, t, 2, 1.5, variant)
    else:
        added = plain_classes(outputs.logits, theirs, 2, 1.5, variant)
    (outputs.loss + added).backward()
    assert added.detach().abs() > 0.01
    torch.testing.assert_close(found.loss, (outputs.loss + added).detach().to(found.loss), rtol=1e-6, atol=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:  # the stock model's norms and losses compute in float32
            torch.testing.assert_close(found.gradients[name], parameter.grad, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("model", [DECODER, CLASSIFIER], ids=lambda model: model.name)
def test_with_all_weights_zero_a_step_is_pissas_bit_by_bit(model):
    plain = step(applied(model, init_lora_weights="pissa"), model.batch())
    ours = step(applied(model, BALora(**NOTHING), init_lora_weights="pissa"), model.batch())
    assert torch.equal(ours.loss, plain.loss)
    assert all(torch.equal(ours.gradients[name], gradient) for name, gradient in plain.gradients.items())


STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa", "lora_dropout": 0.3},
    "fast pissa": {"init_lora_weights": "pissa_niter_4", "lora_alpha": 12},
    "olora": {"init_lora_weights": "olora"},
    "lora": {"init_lora_weights": True, "lora_dropout": 0.3},
    "random": {"init_lora_weights": False},
    "dora on pissa": {"init_lora_weights": "pissa", "use_dora": True},
    "biases": {"init_lora_weights": "pissa", "bias": "all"},
}


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("model", [DECODER, CLASSIFIER], ids=lambda model: model.name)
def test_the_teacher_is_the_pretrained_model_at_every_step(model, start):
    batch = model.batch()
    expected = original(model, batch)
    tuned = applied(model, BALora(), **STARTS[start])
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        torch.testing.assert_close(teacher_logits(tuned, batch), expected, rtol=1e-5, atol=1e-5)
        tuned(**batch).loss.backward()
        optimizer.step()
    assert (tuned(**batch).logits - expected).abs().max() > 0.05
    assert all(module.training for module in tuned.modules())


def test_disabling_a_pissa_adapter_is_not_the_pretrained_model():
    batch = DECODER.batch()
    tuned = applied(DECODER, init_lora_weights="pissa")
    with tuned.disable_adapter(), torch.no_grad():
        residual = tuned(**batch).logits
    assert (residual - original(DECODER, batch)).abs().max() > 0.1


def test_the_teacher_of_other_adapters_is_the_model_without_them():
    config = S2LoRAConfig(r=3, target_modules=list(DECODER.targets), init_weights=False, task_type="CAUSAL_LM")
    with seeded(7):
        model = Recipe(config, BALora()).apply(DECODER.make()).train()
    batch = DECODER.batch()
    assert torch.equal(teacher_logits(model, batch), original(DECODER, batch))


def test_a_student_that_has_not_moved_is_not_pulled():
    batch = DECODER.batch()
    with_it = applied(DECODER, BALora(**{**NOTHING, "consistency": 5.0}), init_lora_weights="pissa", lora_dropout=0.0)
    without = applied(DECODER, init_lora_weights="pissa")
    torch.testing.assert_close(with_it(**batch).loss, without(**batch).loss, rtol=1e-6, atol=1e-6)


def test_labels_of_masked_and_of_encoder_decoder_models_are_not_shifted():
    small = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(0)
    masked = BertForMaskedLM(BertConfig(**small))
    t5 = T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    t5.dropout_rate = 0.0
    batch = DECODER.batch()
    for model, targets in ((masked, ["query"]), (T5ForConditionalGeneration(t5), ["q"])):
        plain, lora = copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa")
        with seeded(3):
            tuned = Recipe(lora, BALora(**EVERYTHING, num_singular=2, power_iterations=30)).apply(model).train()
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * ("lora_" in name))
        with torch.no_grad():
            theirs = plain.eval()(**batch).logits
        logits = []
        # the teacher's forward comes first
        hook = tuned.register_forward_hook(lambda _, __, outputs, logits=logits: logits.append(outputs))
        loss = tuned(**batch).loss
        hook.remove()
        z = logits[-1].logits[batch["labels"] != -100]
        plain_loss = F.cross_entropy(z, batch["labels"][batch["labels"] != -100])
        expected = plain_loss + plain_words(z, theirs[batch["labels"] != -100], 2, 2.0, "iclr")
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_padding_and_prompts_do_not_count():
    batch = DECODER.batch()
    model = applied(DECODER, BALora(**EVERYTHING))
    expected = step(model, batch)
    padded = {name: F.pad(value, (0, 4), value=-100 if name == "labels" else 0) for name, value in batch.items()}
    found = step(model, padded)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_last_batch_of_one_sample_goes_without_the_covariance():
    model = applied(CLASSIFIER, BALora(**{**NOTHING, "diversity": 1.0}))
    assert model(**CLASSIFIER.batch(samples=3)).loss > applied(CLASSIFIER)(**CLASSIFIER.batch(samples=3)).loss
    one = CLASSIFIER.batch(samples=1)
    torch.testing.assert_close(model(**one).loss, applied(CLASSIFIER)(**one).loss)


def test_pissa_saved_and_restored_goes_on_bit_equal_with_the_same_teacher(tmp_path):
    def go_on(model: nn.Module, seed: int) -> float:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        loss = step(model, DECODER.batch(seed)).loss
        optimizer.step()
        attached_to(model).event("on_step_end", Moment(model, optimizer, 1))
        return float(loss)

    first, again = (applied(DECODER, BALora(**EVERYTHING), init_lora_weights="pissa") for _ in range(2))
    go_on(first, 1)
    attached_to(first).save(tmp_path)
    attached_to(again).restore(tmp_path)
    assert go_on(again, 2) == go_on(first, 2)
    torch.testing.assert_close(
        teacher_logits(again, DECODER.batch()), original(DECODER, DECODER.batch()), rtol=1e-5, atol=1e-5
    )


def test_merged_the_trained_pissa_gives_the_same_outputs():
    model = applied(DECODER, BALora(**EVERYTHING), init_lora_weights="pissa")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    step(model, DECODER.batch())
    optimizer.step()
    with torch.no_grad():
        expected = model.eval()(**DECODER.batch()).logits
        model.merge_adapter()
        torch.testing.assert_close(model(**DECODER.batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_beyond_pissa_a_step_takes_one_tensor_like_the_logits_and_the_start_of_the_factors():
    words, samples, tokens = 4096, 6, 64
    batch = {"input_ids": torch.randint(0, words, (samples, tokens), generator=torch.Generator().manual_seed(0))}
    batch["labels"] = batch["input_ids"]

    def peak(*techniques: BALora) -> int:
        config = DECODER.make().config
        config.vocab_size = words
        base = type(DECODER.make())(config)
        recipe = Recipe(DECODER.lora(init_lora_weights="pissa"), *techniques)
        with seeded(7):
            model = recipe.apply(base).train()
        with Ledger(model) as ledger:
            model(**batch).loss.backward()
        return ledger.report().peak_bytes

    logits = samples * tokens * words * 4
    assert peak(BALora()) - peak() <= 1.02 * logits
    model = applied(DECODER, BALora(), init_lora_weights="pissa")
    (technique,) = (t for t in attached_to(model).techniques if t.name == "ba_lora")
    held = sum(t.numel() for t in technique._teacher.kept.values())
    sizes = {name: m.weight.shape for name, m in DECODER.make().named_modules() if name.endswith(DECODER.targets)}
    assert held == 3 * sum(sum(shape) for shape in sizes.values())
    plain = applied(DECODER, BALora(), init_lora_weights=True)
    (technique,) = (t for t in attached_to(plain).techniques if t.name == "ba_lora")
    assert technique._teacher.kept == {}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("model", [DECODER, CLASSIFIER], ids=lambda model: model.name)
def test_a_step_is_planned_on_fake_tensors(model, when):
    """Whether the technique is attached to weights without values, or they lose them after."""
    mode = FakeTensorMode()
    batch = model.batch()
    technique = BALora()
    attached = applied(model, *([technique] if when == "after" else []), init_lora_weights="pissa")
    without_values(attached, mode)
    fakes = {name: mode.from_tensor(value) for name, value in batch.items() if name != "attention_mask"}
    with mode:
        if when == "before":
            with technique.attach(attached) as inner:
                added = technique.added_loss(inner, fakes, inner(**fakes))
                assert added is not None
                added.backward()
        else:
            attached(**fakes).loss.backward()
    for name, parameter in attached.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.shape == parameter.shape


def test_a_copy_of_the_model_is_a_model_of_its_own():
    model = applied(DECODER, BALora(**EVERYTHING), init_lora_weights="pissa")
    twin = copy.deepcopy(model)
    twin(**DECODER.batch()).loss.backward()
    (technique,) = (t for t in attached_to(model).techniques if t.name == "ba_lora")
    assert technique._late._noted is None


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_singular": 0}, "num_singular of ba_lora must be at least 1, got 0"),
        ({"consistency": -0.1}, r"consistency of ba_lora must be at least 0, got -0\.1"),
        ({"diversity": float("nan")}, "diversity of ba_lora must be at least 0, got nan"),
        ({"temperature": 0}, "temperature of ba_lora must be above 0, got 0"),
        ({"top_words": 1}, "top_words of ba_lora must be at least 2, got 1"),
        ({"oversampling": -1}, "oversampling of ba_lora must be at least 0, got -1"),
        ({"variant": "v2"}, "variant of ba_lora must be 'iclr' or 'v1', got 'v2'"),
    ],
)
def test_wrong_settings_are_refused_by_name(settings, message):
    with pytest.raises(SettingError, match=message):
        BALora(**settings)


def test_a_recipe_without_adapters_or_with_chunked_loss_or_prompts_is_refused():
    with pytest.raises(SettingError, match="ba_lora needs a technique of the phase adapter"):
        Recipe(BALora())
    with pytest.raises(SettingError, match="both act on the output head"):
        Recipe(DECODER.lora(), BALora(), ChunkedLoss())
    with pytest.raises(SettingError, match="prompt_tuning adds tokens"):
        Recipe(DECODER.lora(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), BALora())
    with pytest.raises(SettingError, match="token_tune gives those of a share"):
        Recipe.from_list([{"lora": {"target_modules": ["q_proj"]}}, "ba_lora", "token_tune"])


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ("bilevel_zofo", "moves, without gradients,"),
        ("sketchtune", "puts others in the place of"),
        ("light_peft", "puts others in the place of"),
    ],
)
def test_what_leaves_no_pretrained_weights_is_refused(other, what):
    with pytest.raises(SettingError, match=f"pretrained model's, but {other} {what} its weights"):
        Recipe.from_list([{"lora": {"target_modules": ["q_proj"]}}, "ba_lora", other])
    Recipe.from_list([{"lora": {"target_modules": ["q_proj"]}}, "ba_lora", "embedding_pruning", "zeroth_order"])


def refused_in_a_forward(message: str, model: nn.Module, *args: Any, **batch: Any) -> None:
    with pytest.raises(SettingError, match=message):
        model(*args, **batch)


def test_batches_that_the_terms_cannot_take_are_refused_by_size():
    batch = DECODER.batch()
    model = applied(DECODER, BALora(top_words=62))
    refused_in_a_forward("top_words of ba_lora is 62, but there are 61 words", model, **batch)
    refused_in_a_forward("saw no input_ids in it: pass the inputs of the model by name", model, batch["input_ids"])
    refused_in_a_forward(
        r"needs labels of shape \[3, 13\], one for each row of logits, got None", model, input_ids=batch["input_ids"]
    )
    one = CLASSIFIER.batch(samples=1)
    refused_in_a_forward(
        "there is 1 sample in it: set per_device_train_batch_size", applied(CLASSIFIER, BALora()), **one
    )


def test_a_regression_is_refused():
    regression = CLASSIFIER.make().config
    regression.num_labels, regression.problem_type = 1, "regression"
    model = type(CLASSIFIER.make())(regression)
    batch = CLASSIFIER.batch()
    attached = Recipe(CLASSIFIER.lora(), BALora()).apply(model).train()
    refused_in_a_forward(
        r"at least two classes or words.*got \[3, 1\]; leave it out for regression",
        attached,
        **{**batch, "labels": batch["labels"].float()},
    )


def test_outputs_without_logits_are_refused():
    model = applied(DECODER, BALora())
    technique = attached_to(model).techniques[1]
    with pytest.raises(SettingError, match="ba_lora needs logits, but this forward of LlamaForCausalLM returned none"):
        technique.added_loss(model, DECODER.batch(), object())


def test_more_singular_values_than_there_are_warn():
    model = applied(CLASSIFIER, BALora(num_singular=3))
    with pytest.warns(UserWarning, match="num_singular=3 of ba_lora has no effect on 3 singular values"):
        model(**CLASSIFIER.batch())


def test_weights_that_loftq_has_rounded_are_refused():
    model = applied(DECODER)
    model.peft_config["default"].init_lora_weights = "loftq"
    with pytest.raises(SettingError, match="init_lora_weights='loftq' has rounded"), BALora().attach(model):
        pass


def test_sharded_weights_are_refused():
    model = applied(DECODER, BALora(), init_lora_weights="pissa")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    layer.weight = nn.Parameter(layer.weight[:1].detach())
    (technique,) = (t for t in attached_to(model).techniques if t.name == "ba_lora")
    message = r"of shape \[3, 24\], but its shape is \[1, 24\] now"
    with pytest.raises(SettingError, match=message), technique._teacher.in_place(model):
        pass


def test_tokens_with_classes_are_words():
    config = BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=5
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["query"], task_type="TOKEN_CLS", init_lora_weights=False)
    batch = DECODER.batch()
    batch["labels"] = batch["labels"].where(batch["labels"] == -100, batch["labels"] % 5)

    def run(technique: BALora) -> Tensor:
        return Recipe(lora, technique).apply(BertForTokenClassification(config)).train()(**batch).loss

    with pytest.raises(SettingError, match="top_words of ba_lora is 50, but there are 5 words"):
        run(BALora())
    assert torch.isfinite(run(BALora(top_words=5)))
