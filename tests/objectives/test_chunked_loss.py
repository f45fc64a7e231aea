"""chunked_loss against the stock models' own losses: values, gradients, bytes, trainers, refusals."""

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from shoestring import assets
from shoestring.errors import SettingError
from shoestring.memory import Ledger
from shoestring.objectives import ChunkedLoss, LazyLogits, summed_cross_entropy
from shoestring.objectives.chunked_loss import rows_of_chunk
from shoestring.recipe import Recipe
from shoestring.testing.assets import need
from shoestring.training import RecipeTrainer

WORDS = 97
TEXT = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**TEXT, "num_key_value_heads": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SEQ2SEQ = {
    "vocab_size": WORDS,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}
OPT = {k: v for k, v in TEXT.items() if k != "intermediate_size"} | {"ffn_dim": 24, "word_embed_proj_dim": 16}


def gpt2() -> nn.Module:
    names = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40}
    dropouts = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return t.GPT2LMHeadModel(t.GPT2Config(**names, **dropouts, bos_token_id=1, eos_token_id=2))


def bart() -> nn.Module:
    model = t.BartForConditionalGeneration(t.BartConfig(**SEQ2SEQ, max_position_embeddings=40))
    model.final_logits_bias.normal_()
    return model


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = t.T5Config(vocab_size=WORDS, **sizes, dropout_rate=0.0, decoder_start_token_id=0)
    return t.T5ForConditionalGeneration(config)


def modern_bert(**settings: Any) -> nn.Module:
    config = t.ModernBertConfig(**TEXT, cls_token_id=1, sep_token_id=2, attn_implementation="sdpa", **settings)
    return t.ModernBertForMaskedLM(config)


def whisper() -> nn.Module:
    lengths = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 40}
    return t.WhisperForConditionalGeneration(t.WhisperConfig(**SEQ2SEQ, **lengths, begin_suppress_tokens=[]))


def distilbert() -> nn.Module:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 40}
    return t.DistilBertForMaskedLM(t.DistilBertConfig(vocab_size=WORDS, **sizes, dropout=0.0, attention_dropout=0.0))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "llama tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "gpt2": gpt2,
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT, dropout=0.0)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**DECODER, head_dim=8, final_logit_softcapping=0.3)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**DECODER, logit_scale=3.0)),
    "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**DECODER, logits_scaling=0.2)),
    "t5": t5,
    "bart": bart,
    "whisper": whisper,
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**TEXT, **NO_DROPOUT)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**TEXT, **NO_DROPOUT)),
    "distilbert": distilbert,
    "modernbert": modern_bert,
    "modernbert sparse": lambda: modern_bert(sparse_prediction=True),
}


def made(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().train()


def batch_for(model: nn.Module, seed: int = 0, rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    """Odd sizes; half of the first row masked and all of the last."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (rows, length), generator=generator)
    labels = ids.clone()
    labels[0, : length // 2] = -100
    labels[-1] = -100
    if isinstance(model, t.WhisperForConditionalGeneration):
        return {"input_features": torch.randn(rows, 8, 32, generator=generator), "labels": labels}
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def assert_same(
    mine: tuple[Tensor, dict],
    plain: tuple[Tensor, dict],
    loss: float = 1e-6,
    gradient: float = 5e-6,
    floor: float = 1e-3,
) -> None:
    """Each gradient within a share of its own norm, or of `floor` times the norm of all where it is less than that."""
    torch.testing.assert_close(mine[0].to(plain[0]), plain[0], rtol=loss, atol=0, equal_nan=True)
    assert mine[1].keys() == plain[1].keys()
    whole = torch.stack([g.double().norm() for g in plain[1].values()]).norm()
    for name, expected in plain[1].items():
        error = (mine[1][name].double() - expected.double()).norm()
        # gradients of attention's key biases are zero but for rounding
        assert error <= gradient * max(expected.double().norm(), floor * whole), name


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradients_equal_the_stock_models(name, seed):
    model = made(name, seed)
    batch = batch_for(model, seed)
    plain = loss_and_gradients(model, batch)
    with Recipe(ChunkedLoss(chunk_rows=(7, None)[seed]))(model) as chunked:
        mine = loss_and_gradients(chunked, batch)
        assert isinstance(chunked(**batch).logits, LazyLogits)
    assert_same(mine, plain)
    assert_same(loss_and_gradients(model, batch), plain, 0, 0)  # as it was


@pytest.mark.parametrize(
    "changes",
    [
        {"num_items_in_batch": torch.tensor(29)},
        {"num_items_in_batch": 29},
        {"shift_labels": torch.arange(33).reshape(3, 11) + 5},
        {"logits_to_keep": 11},
        {"labels": torch.full((3, 11), -100)},
        {"labels": torch.full((3, 11), -100), "num_items_in_batch": torch.tensor(29)},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_what_a_causal_model_is_told_of_its_loss_is_heeded(changes):
    model = made("llama")
    batch = {**batch_for(model), **changes}
    plain = loss_and_gradients(model, batch)
    with Recipe(ChunkedLoss(chunk_rows=5))(model) as chunked:
        assert_same(loss_and_gradients(chunked, batch), plain)


def test_rows_at_the_head_may_be_fewer_than_tokens():
    """As under token selection: some rows reach the head, and their labels come gathered and shifted."""
    model = made("llama")
    batch = batch_for(model)
    kept = torch.tensor([1, 4, 6, 9])
    gathered = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:][:, kept]
    hook = model.lm_head.register_forward_pre_hook(lambda head, args: (args[0][:, kept],))
    plain = loss_and_gradients(model, {**batch, "shift_labels": gathered})
    with Recipe(ChunkedLoss(chunk_rows=3))(model) as chunked:
        assert_same(loss_and_gradients(chunked, {**batch, "shift_labels": gathered}), plain)
    hook.remove()


def test_labels_may_come_without_their_name():
    model = made("gpt2")
    batch = batch_for(model)
    names = list(inspect.signature(model.forward).parameters)
    values = [batch.get(name) for name in names[: names.index("labels") + 1]]
    with Recipe(ChunkedLoss())(model) as chunked:
        output = chunked(*values)
    assert isinstance(output.logits, LazyLogits)
    torch.testing.assert_close(output.loss, model(*values).loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("trains_head", [False, True])
@pytest.mark.parametrize("name", ["llama", "llama tied", "t5", "bert"])
def test_with_lora_only_what_trains_gets_gradients(name, trains_head):
    model = made(name)
    heads = {"t5": "lm_head", "bert": "decoder"}
    layers = {"t5": ["q", "v"], "bert": ["query"]}.get(name, ["q_proj"])
    saved = [heads.get(name, "lm_head")] if trains_head and name != "llama tied" else None
    config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False, modules_to_save=saved)
    batch = batch_for(model)
    torch.manual_seed(3)
    with Recipe(config)(model) as adapted:
        plain = loss_and_gradients(adapted, batch)
    torch.manual_seed(3)
    with Recipe(config, ChunkedLoss(chunk_rows=4))(model) as adapted:
        mine = loss_and_gradients(adapted, batch)
    assert_same(mine, plain)
    assert any("lora" in parameter for parameter in mine[1])


def test_blocks_may_be_checkpointed():
    model = made("llama")
    batch = batch_for(model)
    plain = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with Recipe(ChunkedLoss())(model) as chunked:
        assert_same(loss_and_gradients(chunked, batch), plain)


def test_a_deep_copy_of_the_model_uses_its_own_weights():
    model = made("llama")
    batch = batch_for(model)
    with Recipe(ChunkedLoss())(model) as chunked:
        twin = copy.deepcopy(chunked)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        mine = loss_and_gradients(twin, batch)
    stock = made("llama")
    stock.load_state_dict(twin.state_dict())
    assert_same(mine, loss_and_gradients(stock, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_the_stock_loss(dtype):
    model = made("llama").to(dtype)
    wide = copy.deepcopy(model).double()
    batch = batch_for(model)
    loss, exact = loss_and_gradients(wide, batch)
    plain = loss_and_gradients(model, batch)
    with Recipe(ChunkedLoss(chunk_rows=2))(model) as chunked:
        mine = loss_and_gradients(chunked, batch)
    assert mine[0].dtype == torch.float32
    assert abs(mine[0] - loss) <= abs(plain[0] - loss) + 1e-6

    assert {g.dtype for g in mine[1].values()} == {dtype}
    assert error(mine[1], exact) <= 1.2 * error(plain[1], exact)


def test_autocast_is_no_worse_than_the_stock_loss():
    model = made("gemma2")
    batch = batch_for(model)
    _, exact = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        plain = loss_and_gradients(model, batch)
        with Recipe(ChunkedLoss(chunk_rows=5))(model) as chunked:
            mine = loss_and_gradients(chunked, batch)
    torch.testing.assert_close(mine[0], plain[0], rtol=1e-6, atol=0)
    assert error(mine[1], exact) <= 1.2 * error(plain[1], exact)


def error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return max(float((g.double() - exact[n]).norm() / exact[n].norm()) for n, g in gradients.items())


class TestSummedCrossEntropy:
    def inputs(self, seed: int = 0, rows: int = 13) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        double = {"dtype": torch.float64, "requires_grad": True}
        labels = torch.randint(11, (rows,))
        labels[::3] = -100
        return torch.randn(rows, 5, **double), torch.randn(11, 5, **double), labels, torch.randn(11, **double)

    @pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_gradcheck(self, seed, label_smoothing):
        hidden, weight, labels, bias = self.inputs(seed)

        def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return summed_cross_entropy(h, w, labels, b, chunk_rows=4, label_smoothing=label_smoothing)

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
        expected = F.cross_entropy(
            F.linear(hidden, weight, bias), labels, reduction="sum", label_smoothing=label_smoothing
        )
        torch.testing.assert_close(loss(hidden, weight, bias), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("chunk_rows", [1, 8, 100, None])
    def test_the_size_of_chunks_changes_nothing(self, chunk_rows):
        hidden, weight, labels, bias = self.inputs()
        expected = F.cross_entropy(F.linear(hidden, weight, bias), labels, reduction="sum")
        found = summed_cross_entropy(hidden, weight, labels, bias, chunk_rows=chunk_rows)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)

    def test_a_kept_graph_goes_backward_again(self):
        hidden, weight, labels, _ = self.inputs()
        loss = summed_cross_entropy(hidden, weight, labels)
        once = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5).double(), retain_graph=True)
        again = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5).double())
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
        with pytest.raises(RuntimeError, match="backward"):
            loss.backward()

    def test_a_planned_forward_needs_no_values(self):
        with FakeTensorMode():
            hidden, weight, labels, _ = self.inputs()
            summed_cross_entropy(hidden, weight, labels).backward()
            assert weight.grad.shape == weight.shape

    def test_the_rule_of_chunks(self):
        assert rows_of_chunk(4096, 128256, 4096) == 128
        assert rows_of_chunk(4097, 4096, 4096) == 8192
        assert rows_of_chunk(0, 11, 5) == rows_of_chunk(1000, 10_000, 5) == 64


class Loss(nn.Module):
    """A head alone, chunked or plain."""

    def __init__(self, words: int, width: int, chunked: bool):
        super().__init__()
        self.lm_head, self.chunked = nn.Linear(width, words, bias=False), chunked

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.chunked:
            return summed_cross_entropy(hidden, self.lm_head.weight, labels) / len(labels)
        return F.cross_entropy(self.lm_head(hidden), labels)


@pytest.mark.parametrize("trains", [False, True])
def test_bytes_are_those_of_the_gradients_and_one_chunk(trains):
    rows, words, width = 3000, 2000, 128
    hidden, labels = torch.randn(rows, width, requires_grad=True), torch.randint(words, (rows,))
    reports = {}
    for chunked in (True, False):
        module = Loss(words, width, chunked).requires_grad_(trains)
        ledger = Ledger(module)
        with ledger:
            module(hidden, labels).backward()
        hidden.grad = None
        reports[chunked] = ledger.report()
    kept = (rows * width + words * width * trains) * 4
    chunk = rows_of_chunk(rows, words, width) * words * 4
    mine = reports[True]
    assert mine.saved_bytes <= 1.01 * kept
    beyond = mine.peak_bytes - mine.at_peak["weights"] - mine.at_peak["inputs"]
    assert beyond <= 1.01 * kept + 1.15 * chunk  # a chunk of hidden states and its gradient beside it
    assert reports[False].saved_bytes >= rows * words * 4


def test_no_logits_are_ever_alive_in_a_model():
    """The vocabulary is so large that logits of all tokens would be most of the memory."""
    torch.manual_seed(0)
    words, tokens = 12_000, 256
    model = t.LlamaForCausalLM(t.LlamaConfig(**{**DECODER, "vocab_size": words, "max_position_embeddings": tokens}))
    ids = torch.randint(words, (4, tokens))
    peaks = {}
    for techniques in ((), (ChunkedLoss(),)):
        with Recipe(LoraConfig(r=2, target_modules=["q_proj"]), *techniques)(model) as adapted:
            ledger = Ledger(adapted.train())
            with ledger:
                output = adapted(input_ids=ids, labels=ids)
                output.loss.backward()
            report = ledger.report()
            peaks[len(techniques)] = report.peak_bytes - report.at_peak["weights"]
    assert peaks[0] > ids.numel() * words * 4
    assert peaks[1] < 0.1 * ids.numel() * words * 4


class TestTrainers:
    def arguments(self, folder: Path, **settings: Any) -> dict[str, Any]:
        return {
            **{"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 3, "learning_rate": 1e-2},
            **{"gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "no", "report_to": "none"},
            **{"use_cpu": True, "disable_tqdm": True, "seed": 0, **settings},
        }

    def data(self) -> Dataset:
        ids = torch.randint(3, WORDS, (24, 11), generator=torch.Generator().manual_seed(0))
        labels = ids.clone()
        labels[::2, :6] = -100
        return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("name", ["llama", "t5", "bert"])
    def test_losses_of_several_steps_are_those_of_plain_training(self, name, bf16, tmp_path):
        def losses(*techniques: ChunkedLoss) -> list[float]:
            model = Recipe(*techniques).apply(made(name))
            evaluation = {"eval_strategy": "steps", "eval_steps": 2}
            arguments = t.TrainingArguments(**self.arguments(tmp_path, bf16=bf16, **evaluation))
            trainer = RecipeTrainer(model, arguments, train_dataset=self.data(), eval_dataset=self.data())
            trainer.train()
            return [row[key] for row in trainer.state.log_history for key in ("loss", "eval_loss") if key in row]

        plain = losses()
        assert len(plain) == 6
        assert losses(ChunkedLoss(chunk_rows=8)) == pytest.approx(plain, rel=1e-3 if bf16 else 1e-5)

    def test_a_trainer_that_computes_the_loss_elsewhere_leaves_it_without_effect(self, tmp_path):
        model = Recipe(ChunkedLoss()).apply(made("llama"))
        arguments = t.TrainingArguments(**self.arguments(tmp_path, max_steps=2, label_smoothing_factor=0.1))
        with pytest.warns(UserWarning, match="chunked_loss has no effect"):
            RecipeTrainer(model, arguments, train_dataset=self.data()).train()


class TestWhatStaysAsItWas:
    def test_evaluation_and_forwards_without_labels_make_logits(self):
        model = made("llama")
        batch = batch_for(model)
        plain = model(input_ids=batch["input_ids"]).logits
        with Recipe(ChunkedLoss())(model) as chunked:
            assert torch.equal(chunked(input_ids=batch["input_ids"]).logits, plain)
            assert torch.equal(chunked.eval()(**batch).logits, plain)
            assert chunked.generate(batch["input_ids"][:1], max_new_tokens=2).shape[1] <= 13

    def test_a_training_forward_without_gradients_computes_none(self):
        model = made("llama")
        batch = batch_for(model)
        with Recipe(ChunkedLoss())(model) as chunked, torch.no_grad():
            loss = chunked(**batch).loss
        assert not loss.requires_grad
        torch.testing.assert_close(loss, model(**batch).loss.detach(), rtol=1e-6, atol=0)

    def test_the_forward_keeps_its_signature(self):
        model = made("llama")
        before = inspect.signature(model.forward)
        with Recipe(ChunkedLoss())(model):
            assert inspect.signature(model.forward) == before
        assert "forward" not in vars(model)
        assert "forward" not in vars(model.lm_head)

    @pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite"])  # three change their logits on the way
    def test_an_output_that_outlives_its_forward_holds_nothing(self, name):
        model = made(name)
        with Recipe(ChunkedLoss())(model) as chunked:
            logits = chunked(**batch_for(model)).logits
        assert logits.hidden.is_meta
        assert logits.weight is None
        assert logits.shape == (3, 11, WORDS)


class TestRefusals:
    @pytest.mark.parametrize(
        "use",
        [
            lambda logits: logits.softmax(-1),
            lambda logits: torch.softmax(logits, -1),
            lambda logits: logits.argmax(-1),
            lambda logits: logits[..., 0],
            lambda logits: logits[0, 0, 0],
            lambda logits: logits.view(-1),
            lambda logits: logits + torch.ones(3, 11, 1),
            lambda logits: logits * torch.ones(WORDS),
            lambda logits: torch.ones(3) @ logits,
            lambda logits: F.cross_entropy(logits.float().view(-1, WORDS).tanh().exp(), torch.zeros(33).long()),
        ],
    )
    def test_whoever_wants_logits_is_told(self, use, monkeypatch):
        model = made("llama")
        monkeypatch.setattr(
            type(model), "loss_function", property(lambda self: lambda logits, **rest: use(logits)), raising=True
        )
        with (
            Recipe(ChunkedLoss())(model) as chunked,
            pytest.raises(SettingError, match="chunked_loss makes no logits in training, but"),
        ):
            chunked(**batch_for(model))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"reduction": "none"}, "reduction='none'"),
            ({"weight": torch.ones(WORDS)}, "weight=given"),
            ({"target": torch.rand(33, WORDS)}, "one label a row"),
            ({"target": torch.zeros(32).long()}, "one label a row"),
        ],
    )
    def test_other_forms_of_the_loss(self, settings, message, monkeypatch):
        def loss(logits: LazyLogits, **rest: Any) -> Tensor:
            return F.cross_entropy(logits.view(-1, WORDS), **{"target": torch.zeros(33).long(), **settings})

        model = made("llama")
        monkeypatch.setattr(type(model), "loss_function", property(lambda self: loss))
        with Recipe(ChunkedLoss())(model) as chunked, pytest.raises(SettingError, match=message):
            chunked(**batch_for(model))

    def test_logits_after_the_forward(self):
        model = made("llama")
        with Recipe(ChunkedLoss())(model) as chunked:
            logits = chunked(**batch_for(model)).logits
        with pytest.raises(SettingError, match="wants them"):
            logits.detach()
        with pytest.raises(SettingError, match="a loss after the forward"):
            F.cross_entropy(logits.float().view(-1, WORDS), torch.zeros(33).long())
        assert not hasattr(logits, "no_such_thing")

    def test_models_without_a_head(self):
        config = t.BertConfig(**TEXT)
        with pytest.raises(SettingError, match="BertForSequenceClassification has none"):
            Recipe(ChunkedLoss()).apply(t.BertForSequenceClassification(config))

    def test_an_adapted_head(self):
        lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
        with pytest.raises(SettingError, match="lm_head is of type Linear"):
            Recipe(lora, ChunkedLoss()).apply(made("llama"))

    @pytest.mark.parametrize("chunk_rows", [0, -3])
    def test_chunks_without_rows(self, chunk_rows):
        with pytest.raises(
            SettingError, match=f"chunk_rows of chunked_loss must be at least 1 or left out, got {chunk_rows}"
        ):
            ChunkedLoss(chunk_rows=chunk_rows)

    def test_two_that_act_on_the_head(self):
        class Other(ChunkedLoss):
            name = "other_loss"

        with pytest.raises(SettingError, match="both act on the output head"):
            Recipe(ChunkedLoss(), Other())


@pytest.mark.slow
def test_a_packaged_decoder_trains_alike_on_real_text():
    """Problems and answers of GSM8K, the problems masked; a vocabulary of 49,152 words."""
    need("smollm2", "gsm8k-test")
    folder = assets.model_folder("smollm2")
    tokenizer = t.AutoTokenizer.from_pretrained(folder)
    model = t.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    problems = assets.load_data("gsm8k-test")["test"].select(range(2))
    texts = [row["prompt"] + row["completion"] for row in problems]
    batch = dict(tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=96))
    batch["use_cache"] = False
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for labels, row in zip(batch["labels"], problems, strict=True):
        labels[: len(tokenizer(row["prompt"])["input_ids"])] = -100

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    with Recipe(config, ChunkedLoss())(model) as adapted, Ledger(adapted) as ledger:
        mine = loss_and_gradients(adapted, batch)
    report = ledger.report()
    logits_bytes = batch["labels"].numel() * model.config.vocab_size * 4
    assert report.peak_bytes - report.at_peak["weights"] - report.saved_bytes < 0.45 * logits_bytes
    # with so many words the stock float32 loss is off by more than the bound, so the softmax of the reference is wider
    model.loss_function = lambda logits, labels, **rest: F.cross_entropy(
        logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten()
    )
    torch.manual_seed(0)
    with Recipe(config)(model) as adapted:
        assert_same(mine, loss_and_gradients(adapted, batch), floor=1.0)  # float32 rounds in thirty blocks as well
