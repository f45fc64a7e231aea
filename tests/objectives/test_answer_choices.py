"""Answer choices: T-Few's losses against loops, batches of them, (IA)3 beside them, and the task that gives them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import IA3Config, LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, TrainingArguments

from shoestring import Recipe
from shoestring.adapters import MoLAConfig
from shoestring.blocks import Recompute
from shoestring.errors import SettingError
from shoestring.objectives import AnswerChoices, ChunkedLoss, DensityLoss
from shoestring.objectives.answer_choices import (
    length_normalised_loss,
    log_one_minus_exp,
    reference_unlikelihood_loss,
    unlikelihood_loss,
)
from shoestring.objectives.choice_rows import (
    ChoiceRows,
    encoded_once,
    mean_log_likelihoods,
    only_answers,
    ranked_first,
    token_log_likelihoods,
)
from shoestring.planning import predict, predict_model
from shoestring.real_tokens import NO_LABEL
from shoestring.recipe import attached_to
from shoestring.technique import Moment
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import Step, seeded, step
from shoestring.training import RunSettings, measure, train
from shoestring.training.choice_trainer import ChoiceTrainer
from shoestring.training.tasks.multiple_choice import AutoModelForChoices, ChoiceCollator

WORDS, PAD, START = 31, 7, 1  # padding is not 0


def example(prompt: int, answers: list[int], answer: int, seed: int) -> dict[str, Any]:
    """A prompt of so many tokens, and answers of the lengths given."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(8, WORDS, (count,), generator=generator).tolist()

    return {"prompt_ids": words(prompt), "choice_ids": [words(count) for count in answers], "answer": answer}


# two, three and four choices, of different lengths
EXAMPLES = [example(5, [1, 4], 1, 0), example(3, [2, 2, 3], 0, 1), example(6, [3, 1, 2, 5], 2, 2)]


def t5(**settings: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 2}
    given = {"decoder_start_token_id": START, "pad_token_id": PAD, "dropout_rate": 0.0}
    with seeded(0):
        return T5ForConditionalGeneration(T5Config(vocab_size=WORDS, **{**sizes, **given, **settings}))


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    with seeded(0):
        return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, num_key_value_heads=2, **sizes))


MODELS = {"t5": (t5, ChoiceCollator(PAD, START)), "llama": (llama, ChoiceCollator(PAD))}
both = pytest.mark.parametrize("name", MODELS)


def log_p(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    """log p of each token of one answer, without padding and alone in its batch."""
    if model.config.is_encoder_decoder:
        given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[START, *answer[:-1]]])}
        logits = model(**given).logits[0]
    else:
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(answer)), answer]


def losses(model: nn.Module, examples: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """L_LM over the tokens of the batch, L_UL and L_LN, as the paper writes them."""
    of_answers, unlikelihoods, normalised = [], [], []
    for each in examples:
        found = [log_p(model, each["prompt_ids"], ids) for ids in each["choice_ids"]]
        right = found.pop(each["answer"])
        of_answers.append(right)
        total = sum((1 - term.exp()).log().sum() for term in found)
        unlikelihoods.append(-total / sum(len(term) for term in found))
        betas = torch.stack([right.mean(), *(term.mean() for term in found)])
        normalised.append(-(betas[0].exp() / betas.exp().sum()).log())
    return -torch.cat(of_answers).mean(), torch.stack(unlikelihoods).mean(), torch.stack(normalised).mean()


# The losses


def drawn_rows(seed: int) -> tuple[Tensor, Tensor, ChoiceRows]:
    """log p of tokens, which of them count, and rows of 3 examples."""
    generator = torch.Generator().manual_seed(seed)
    batch = ChoiceCollator(PAD, START)(EXAMPLES)
    targets = batch["choice_labels"]
    values = -torch.rand(targets.shape, generator=generator, dtype=torch.float64) * 5 - 1e-3
    rows = ChoiceRows(targets, batch["example"], batch["is_answer"])
    return values.masked_fill(targets == NO_LABEL, 0), targets != NO_LABEL, rows


def by_example(values: Tensor, counted: Tensor, rows: ChoiceRows) -> list[tuple[Tensor, list[Tensor]]]:
    """For each example the log p of its right answer and of its wrong ones."""
    found = []
    for number in range(int(rows.example.max()) + 1):
        mine = [i for i in range(len(values)) if rows.example[i] == number]
        right = next(values[i][counted[i]] for i in mine if rows.is_answer[i])
        found.append((right, [values[i][counted[i]] for i in mine if not rows.is_answer[i]]))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_each_loss_is_its_loop(seed):
    values, counted, rows = drawn_rows(seed)
    unlikely, normalised = [], []
    for right, wrong in by_example(values, counted, rows):
        unlikely.append(-sum((1 - w.exp()).log().sum() for w in wrong) / sum(map(len, wrong)))
        betas = [right.mean(), *(w.mean() for w in wrong)]
        normalised.append(-(betas[0].exp() / sum(b.exp() for b in betas)).log())
    scores = mean_log_likelihoods(values, rows.choice_labels)
    exact = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(unlikelihood_loss(values, counted, rows), torch.stack(unlikely).mean(), **exact)
    torch.testing.assert_close(length_normalised_loss(scores, rows), torch.stack(normalised).mean(), **exact)


@pytest.mark.parametrize("seed", range(3))
def test_the_reference_form_is_that_of_the_public_code(seed):
    values, counted, rows = drawn_rows(seed)
    as_it_is = values.clone()  # log p of padding and of right answers stands at -100 there
    as_it_is[~counted] = -100
    as_it_is[rows.is_answer] = -100
    expected = -torch.log(1 - torch.exp(as_it_is) + 1e-2).sum() / (as_it_is != -100).sum()
    torch.testing.assert_close(reference_unlikelihood_loss(values, counted, rows), expected, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    values, counted, rows = drawn_rows(0)
    values.requires_grad_()
    for loss in (unlikelihood_loss, reference_unlikelihood_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, counted, rows), values)
    normalised = lambda x: length_normalised_loss(mean_log_likelihoods(x, rows.choice_labels), rows)  # noqa: E731
    assert torch.autograd.gradcheck(normalised, values)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([[1, 4, NO_LABEL], [NO_LABEL, 0, 2]])
    assert torch.autograd.gradcheck(lambda x: token_log_likelihoods(x, targets), logits)


def test_log_one_minus_exp_is_finite_and_exact_at_both_ends():
    x = torch.tensor([-1e-12, -1e-5, -0.3, -0.7, -40.0, -200.0], dtype=torch.float64, requires_grad=True)
    found = log_one_minus_exp(x)
    expected = [math.log(-math.expm1(value)) for value in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    certain = torch.tensor([0.0, -1e-9], requires_grad=True)
    log_one_minus_exp(certain).sum().backward()
    assert torch.isfinite(log_one_minus_exp(certain)).all()
    assert torch.isfinite(certain.grad).all()


def test_an_example_without_wrong_answers_adds_nothing():
    batch = ChoiceCollator(PAD, START)([example(3, [2], 0, 0)])
    rows = ChoiceRows(batch["choice_labels"], batch["example"], batch["is_answer"])
    values = torch.full((1, 2), -1.5, dtype=torch.float64)
    assert unlikelihood_loss(values, values < 0, rows) == 0
    assert length_normalised_loss(values.mean(1), rows) == 0


# In a model


@both
@pytest.mark.parametrize("weights", [(0.5, 2.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_the_loss_of_a_model_is_the_sum_of_the_three(name, weights):
    make, collate = MODELS[name]
    model = Recipe(LoraConfig(r=2, target_modules="all-linear"), AnswerChoices(*weights)).apply(make()).train()
    expected = sum(w * loss for w, loss in zip((1.0, *weights), losses(model, EXAMPLES), strict=True))
    torch.testing.assert_close(model(**collate(EXAMPLES)).loss.double(), expected, rtol=2e-6, atol=2e-6)


@both
def test_gradients_are_those_of_the_loops(name):
    make, collate = MODELS[name]
    with seeded(1):
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = Recipe(lora, AnswerChoices()).apply(make().double()).train()
    total = sum(losses(model, EXAMPLES))
    total.backward()
    expected = Step(total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert step(model, collate(EXAMPLES)).error(expected) < 1e-6


@both
def test_examples_together_are_the_mean_of_each_alone(name):
    make, collate = MODELS[name]
    model = Recipe(IA3Config(), AnswerChoices()).apply(make()).train()
    alone = []
    for each in EXAMPLES:
        outputs = model(**collate([each]))
        alone.append(outputs.loss - losses(model, [each])[0])  # L_LM is the batch's mean over tokens
    together = model(**collate(EXAMPLES)).loss - losses(model, EXAMPLES)[0]
    torch.testing.assert_close(together, torch.stack(alone).mean(), rtol=1e-5, atol=1e-5)


def test_an_encoder_reads_each_example_once():
    model = t5().eval()
    batch = ChoiceCollator(PAD, START)(EXAMPLES)
    rows = ChoiceRows(*(batch.pop(name) for name in ("choice_labels", "example", "is_answer")))
    read = []
    hook = model.encoder.block[0].register_forward_pre_hook(lambda module, args: read.append(len(args[0])))
    plain = model(**batch).logits
    with encoded_once(model, rows):
        once = model(**batch).logits
    hook.remove()
    assert read == [9, 3]
    torch.testing.assert_close(once, plain, rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(model.encoder)


def padded(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The batch with so many more tokens of padding in each prompt."""
    ids, mask = (F.pad(batch[name], (0, count), value=v) for name, v in (("input_ids", PAD), ("attention_mask", 0)))
    return {**batch, "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("what", ["density_loss", "mola"])
def test_padding_does_not_count_in_what_is_added_of_an_encoder_that_reads_examples_once(what, tmp_path):
    wi = {"target_modules": ["wi"], "r": 2}
    beside = {
        "density_loss": [LoraConfig(**wi), DensityLoss(epsilon=0.05)],
        "mola": [MoLAConfig(experts=3, k=1, balance=5.0, **wi)],
    }[what]
    with seeded(1):
        model = Recipe(*beside, AnswerChoices()).apply(t5(feed_forward_proj="relu")).train()
    batch = ChoiceCollator(PAD, START)(EXAMPLES)
    torch.testing.assert_close(model(**padded(batch, 9)).loss, model(**batch).loss, rtol=1e-5, atol=1e-5)
    if what == "density_loss":
        trainer = ChoiceTrainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
        measured = []
        for count in (0, 9):
            trainer.prediction_step(model.eval(), padded(batch, count), prediction_loss_only=False)
            measured.append(attached_to(model).measured())
        assert measured[1]["density"] == pytest.approx(measured[0]["density"], rel=1e-5)
        assert measured[1]["density_with_padding"] != pytest.approx(measured[0]["density_with_padding"], rel=1e-3)


@both
def test_blocks_that_run_again_give_the_same_gradients(name):
    make, collate = MODELS[name]
    found = []
    for beside in ([], [Recompute()]):
        with seeded(1):
            lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
            model = Recipe(lora, AnswerChoices(), *beside).apply(make())
        found.append(step(model, collate(EXAMPLES)))
    assert found[1].error(found[0]) < 2e-6


@both
def test_wrong_answers_are_ranked_by_their_mean_log_likelihood(name):
    make, collate = MODELS[name]
    model, batch = make().eval(), collate(EXAMPLES)
    rows = ChoiceRows(batch["choice_labels"], batch["example"], batch["is_answer"])
    betas = [[log_p(model, e["prompt_ids"], ids).mean() for ids in e["choice_ids"]] for e in EXAMPLES]
    first, right = ranked_first(torch.stack([beta for each in betas for beta in each]), rows)
    assert first.tolist() == [int(torch.stack(each).argmax()) for each in betas]
    assert right.tolist() == [e["answer"] for e in EXAMPLES]


@both
def test_labels_are_of_right_answers_only(name):
    _, collate = MODELS[name]
    batch = collate(EXAMPLES)
    labelled = (batch["labels"] != NO_LABEL).any(1)
    assert torch.equal(labelled, batch["is_answer"])
    kept = only_answers(batch)
    assert len(kept["input_ids"]) == 3
    assert not {"choice_labels", "example", "is_answer"} & kept.keys()
    counts = (batch["choice_labels"] != NO_LABEL).sum(1).tolist()
    assert counts == [len(ids) for each in EXAMPLES for ids in each["choice_ids"]]


def test_evaluation_with_choices_gives_the_outputs_of_all_rows():
    model = Recipe(IA3Config(), AnswerChoices()).apply(t5()).eval()
    batch = ChoiceCollator(PAD, START)(EXAMPLES)
    plain = {name: value for name, value in batch.items() if name not in ("choice_labels", "example", "is_answer")}
    torch.testing.assert_close(model(**batch).logits, model(**plain).logits, rtol=1e-5, atol=1e-6)


# (IA)3, which is peft's


@both
def test_ia3_starts_as_the_base_and_merges(name):
    make, collate = MODELS[name]
    base, batch = make().eval(), only_answers(collate(EXAMPLES))
    expected = base(**batch).logits
    model = Recipe.named("t-few").apply(base).eval()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-6)  # products in another order
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "ia3" in key:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    changed = model(**batch).logits
    assert not torch.allclose(changed, expected, atol=1e-3)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(**batch).logits, changed, rtol=1e-5, atol=1e-5)


def test_ia3_trains_what_the_formula_says():
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3}
    with seeded(0):
        base = T5ForConditionalGeneration(T5Config(vocab_size=9, feed_forward_proj="gated-gelu", **sizes))
    model = Recipe.named("t-few").apply(base)
    inner, ff = 8 * 6, 40
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * (2 * inner + ff) + 3 * (4 * inner + ff)


def test_ia3_trains_of_t0_of_11_billion_what_the_paper_says():
    sizes = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 24}
    with torch.device("meta"):
        base = T5ForConditionalGeneration(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes))
        model = Recipe.named("t-few").apply(base)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 24 * (2 * 4096 + 10240) + 24 * (4 * 4096 + 10240) == 1_081_344


def test_gradcheck_of_the_vectors_of_attention_cross_attention_and_a_gated_feed_forward_part(monkeypatch):
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # T5 takes its softmax in float32
    with seeded(0):
        base = t5(feed_forward_proj="gated-gelu", d_model=8, d_ff=6, num_layers=1, num_decoder_layers=1, num_heads=2)
    for module in base.modules():  # and its norms
        for name, child in module.named_children():
            if type(child).__name__ == "T5LayerNorm":
                norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    model = Recipe.named("t-few").apply(base.double()).train()
    vectors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    places = ("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v", "DenseReluDense.wo")
    assert all(any(place in name for name in vectors) for place in places)
    batch = ChoiceCollator(PAD, START)(EXAMPLES[:2])

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(vectors, values, strict=True))
        return torch.func.functional_call(model, given, kwargs=dict(batch)).loss

    with seeded(2):
        start = [(1 + 0.3 * torch.randn_like(p)).detach().requires_grad_() for p in vectors.values()]
    assert loss(*start).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, start)


def test_feed_forward_modules_that_are_no_targets_and_targets_that_are_not_linear_are_refused():
    ia3 = {"target_modules": ["k", "v"], "feedforward_modules": ["wo"]}
    with pytest.raises(ValueError, match="`feedforward_modules` should be a subset of `target_modules`"):
        Recipe.from_list([{"ia3": ia3}, "answer_choices"])
    recipe = Recipe.from_list([{"ia3": {"target_modules": ["layer_norm"], "feedforward_modules": []}}])
    with pytest.raises(ValueError, match=r"T5LayerNorm.*is not supported"):
        recipe.apply(t5())


def test_at_the_width_of_t0_its_vectors_take_little_and_a_step_no_more_than_with_lora():
    sizes = {"d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240, "num_layers": 2, "num_decoder_layers": 2}
    named = {"decoder_start_token_id": 0, "pad_token_id": 0, "architectures": ["T5ForConditionalGeneration"]}
    config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes, **named)
    lora = {"lora": {"r": 8, "target_modules": "all-linear"}}
    ours, theirs = (predict_model(config, [recipe], batch=8, length=64) for recipe in ("ia3", lora))
    of_all_blocks = 12 * (ours.parts["adapters"] + ours.parts["optimizer_state"])  # there are 24 in each stack
    assert ours.parts["optimizer_state"] > 0
    assert of_all_blocks <= 20e6
    assert ours.peak_bytes <= theirs.peak_bytes


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unlikelihood": -0.1}, "unlikelihood of answer_choices must be at least 0"),
        ({"length_normalised": -1.0}, "length_normalised of answer_choices must be at least 0"),
        ({"variant": "code"}, "variant of answer_choices must be"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        AnswerChoices(**settings)


def test_batches_that_do_not_say_which_answer_is_right_are_refused():
    batch = ChoiceCollator(PAD, START)(EXAMPLES)
    model = Recipe(IA3Config(), AnswerChoices()).apply(t5()).train()
    for wrong in (torch.zeros(9), torch.ones(9)):
        with pytest.raises(SettingError, match="one row with is_answer, and one only"):
            model(**{**batch, "is_answer": wrong.bool()})
    with pytest.raises(SettingError, match="must have one entry a row"):
        model(**{**batch, "example": batch["example"][1:]})


def test_what_makes_no_logits_is_refused():
    with pytest.raises(SettingError, match="both act on the output head"):
        Recipe(IA3Config(), AnswerChoices(), ChunkedLoss())


def test_batches_without_choices_are_told_of():
    model = Recipe(IA3Config(), AnswerChoices()).apply(llama()).train()
    ids = torch.arange(8, 20).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.warns(UserWarning, match="no answers to choose from"):
        attached_to(model).event("on_step_end", Moment(model, step=1))


def test_it_needs_a_task_that_gives_choices():
    run = {"model": "m", "data": {"train": "x.jsonl"}, "recipe": "t-few"}
    for task in ("causal-lm", "text-classification"):
        settings = RunSettings.from_dict({**run, "task": task})
        with pytest.raises(SettingError, match=f"answer_choices reads choices of a batch, which the task {task} does"):
            train(settings)


# The task


def test_both_kinds_of_models_are_loaded_for_choices(tmp_path):
    for name, (make, _) in MODELS.items():
        model = make()
        model.save_pretrained(tmp_path / name)
        assert type(AutoModelForChoices.from_pretrained(tmp_path / name)) is type(model)
        assert type(AutoModelForChoices.from_config(model.config)) is type(model)
        assert AutoModelForChoices._model_mapping[type(model.config)] is type(model)


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return str(file)


def words_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "</s>", "<unk>", "red", "blue", "green", "what", "colour", "is", "the", "sky", "grass", "deep"]
    plain = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=40
    ).save_pretrained(folder)


@pytest.fixture(scope="module", params=["t5", "llama"])
def model_folder(request, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "t5":
        t5(decoder_start_token_id=0, pad_token_id=0, eos_token_id=1).save_pretrained(folder)
    else:
        llama().save_pretrained(folder)
    words_tokenizer(folder)
    return str(folder)


ROWS = [
    {"thing": "sky", "answers": ["red", "deep blue", "green"], "best": 1},
    {"thing": "grass", "answers": ["green", "red"], "best": "green"},
] * 6


def run_of(model_folder: str, tmp_path: Path, recipe: Any, rows: list[dict[str, Any]] = ROWS, **data: Any) -> Any:
    file = written(tmp_path, rows)
    columns = {"template": "what colour is the {thing}", "choices": "answers", "label": "best"}
    return RunSettings.from_dict(
        {
            "model": model_folder,
            "task": "multiple-choice",
            "data": {"train": file, "validation": file, **columns, **data},
            "recipe": recipe,
            "train": {
                "max_steps": 6,
                "learning_rate": 0.05,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 2,
                "eval_strategy": "no",
                "eval_on_start": True,
                "save_strategy": "no",
                "seed": 0,
                "use_cpu": True,
            },
            "output_dir": str(tmp_path / "run"),
        }
    )


def test_a_run_learns_the_right_answers_of_the_rows_it_trains_on(model_folder, tmp_path):
    rows = [{**ROWS[0], "answers": ROWS[0]["answers"][:2]}, ROWS[1]] * 6  # as files, lists of one column alike
    for row in rows:
        row["best"] = row["answers"].index(row["best"]) if isinstance(row["best"], str) else row["best"]
    lora = {"lora": {"r": 4, "target_modules": "all-linear"}}
    for recipe in ([lora, "answer_choices"], [lora]):
        quality = train(run_of(model_folder, tmp_path, recipe, rows), overwrite=True).quality
        assert quality["validation"]["accuracy"] == 1.0
        assert quality["validation"]["loss"] > 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": [], "best": 0}, "Row 0 of train must have at least two answers"),
        ({"answers": ["red"], "best": 0}, "Row 0 of train must have at least two answers"),
        ({"answers": ["red", "blue"], "best": 2}, "Row 0 of train has the label 2 in 'best', which is out of range"),
        ({"answers": ["red", "blue"], "best": "green"}, "has the label 'green' in 'best', which is out of range"),
        ({"answers": ["red", "  "], "best": 0}, "Row 0 of train has an answer without tokens"),
    ],
)
def test_rows_that_no_answer_can_be_chosen_from_are_refused(model_folder, tmp_path, row, message):
    with pytest.raises(SettingError, match=message):
        train(run_of(model_folder, tmp_path, ["ia3", "answer_choices"], [{"thing": "sky", **row}]))


def test_columns_that_are_missing_are_named(model_folder, tmp_path):
    for key, value in {"choices": "options", "template": "{place}?", "label": "right"}.items():
        with pytest.raises(SettingError, match=f"no column '{value.strip('{}?')}'"):
            train(run_of(model_folder, tmp_path, ["answer_choices"], **{key: value}))
    with pytest.raises(SettingError, match="must name a column"):
        train(run_of(model_folder, tmp_path, ["answer_choices"], template="which?"))


def test_a_long_prompt_loses_its_beginning(model_folder, tmp_path):
    from shoestring.training.run import prepare

    rows = [{"thing": "sky " * 30 + "grass", "answers": ["red", "blue"], "best": 0}] * 2
    ready = prepare(run_of(model_folder, tmp_path, ["ia3", "answer_choices"], rows, max_length=12))
    row = ready.data["train"][0]
    spent = 0 if ready.trainer.model.config.is_encoder_decoder else 2  # the longest answer and its end
    assert len(row["prompt_ids"]) == 12 - spent
    assert row["prompt_ids"][-1] == 11  # grass
    Recipe.remove(ready.trainer.model)


def test_the_planner_rehearses_a_run_without_choices(model_folder, tmp_path, recwarn):
    run = run_of(model_folder, tmp_path, "t-few")
    assert predict(run, batch=2, length=9).trained_parameters > 0
    assert not [warning for warning in recwarn if "choose from" in str(warning.message)]


def test_the_planner_predicts_a_step_with_a_row_for_each_choice(model_folder, tmp_path):
    rows = [{"thing": thing, "answers": ["red", "blue", "green"], "best": 1} for thing in ("sky", "grass")] * 4
    run = run_of(model_folder, tmp_path, "t-few", rows)
    predicted = predict(run, batch=4 * 3, length=8).peak_bytes  # a prompt and its answer, with their ends
    measured = measure(run, say=lambda text: None).peak_bytes
    # beside an encoder it is more: that reads each example once, and answers are shorter than prompts
    assert measured <= predicted < (4 if "t5" in model_folder else 1.1) * measured


@pytest.mark.slow
@pytest.mark.parametrize("model", ["flan-t5-small", "smollm2"])
def test_the_recipe_trains_a_packaged_model(model, tmp_path):
    need(model, "rotten-tomatoes")
    sizes = {"max_steps": 3, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4}
    changes = [f"model=packaged:{model}", "data.max_train_rows=16", "data.max_eval_rows=8", "data.max_length=40"]
    changes += [f"train.{name}={value}" for name, value in sizes.items()]
    run = RunSettings.load("examples/t-few.yaml", [*changes, f"output_dir={tmp_path}"])
    report = train(run)
    vectors = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert vectors
    assert not [name for name, vector in vectors.items() if (vector == 1).all()]  # where (IA)3 starts
    assert 0 <= report.quality["test"]["accuracy"] <= 1
    assert math.isfinite(report.quality["test"]["loss"])
