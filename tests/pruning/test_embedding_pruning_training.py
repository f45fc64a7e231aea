"""Embedding pruning in whole runs: checkpoints, resuming, saving, and what data a run gives to its techniques."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from shoestring import Recipe, load
from shoestring.errors import SettingError
from shoestring.pruning import EmbeddingPruning
from shoestring.recipe import attached_to
from shoestring.testing.assets import need
from shoestring.training import RecipeCallback, RecipeTrainer
from shoestring.training.run import prepare, train
from shoestring.training.settings import RunSettings

WORDS = [f"w{index}" for index in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
V = len(WORDS) + len(SPECIAL) + 3  # a table larger than the tokenizer
SIZES = {"vocab_size": V, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
TABLE = "bert.embeddings.word_embeddings.weight"
CHAT = "{% for m in messages %}[CLS] {{ m['content'] }} [SEP] {% endfor %}{% if add_generation_prompt %}w39{% endif %}"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders "bert" and "llama" (untied) with a tokenizer of one token a word."""
    from tokenizers import Tokenizer, pre_tokenizers, processors
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**SIZES, max_position_embeddings=32)).save_pretrained(folder / "bert")
    LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64, pad_token_id=0)).save_pretrained(folder / "llama")
    names: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "model_max_length": 32}
    names |= {"eos_token": "[SEP]", "bos_token": "[CLS]", "chat_template": CHAT}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "llama")
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder / "bert")
    return folder


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def reviews(first: int, count: int = 24) -> list[dict[str, str]]:
    """Texts out of ten words from `first` on."""
    texts = [" ".join(f"w{first + (i * step) % 10}" for step in range(1, 4 + i % 4)) for i in range(count)]
    return [{"text": text, "label": ("bad", "good")[i % 2]} for i, text in enumerate(texts)]


@pytest.fixture
def run_file(models: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a run file of 4 steps, a checkpoint after every second, on words 0 to 9, held out 5 to 14."""

    def write(name: str, recipe: list[Any], **changes: Any) -> Path:
        steps = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "seed": 0}
        run = {
            "model": str(models / "bert"),
            "task": "text-classification",
            "data": {
                "train": lines(tmp_path / "train.jsonl", reviews(0)),
                "validation": lines(tmp_path / "validation.jsonl", reviews(5, 8)),
                "test": lines(tmp_path / "test.jsonl", reviews(20, 8)),
            },
            "recipe": recipe,
            "train": {
                **steps,
                "learning_rate": 1e-2,
                "per_device_train_batch_size": 4,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "weight_decay": 0.0,
                **changes.pop("train", {}),
            },
            "output_dir": str(tmp_path / name),
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    return write


def final(folder: Path) -> dict[str, Tensor]:
    return {
        name: value
        for path in sorted((folder / "final").glob("*.safetensors"))
        if path.name != "techniques.safetensors"
        for name, value in load_file(path).items()
    }


def back_to_step_2(folder: Path) -> None:
    """Leave of a finished run what it had written by step 2."""
    for name in ("checkpoint-4", "final"):
        shutil.rmtree(folder / name)
    (folder / "report.json").unlink()


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_a_run_gives_the_losses_quality_and_weights_of_one_without_pruning(run_file, tmp_path):
    plain = train(RunSettings.load(run_file("plain", [])))
    pruned = train(RunSettings.load(run_file("pruned", ["embedding_pruning"])))
    assert plain.losses == pruned.losses
    assert plain.quality == pruned.quality
    assert set(pruned.quality) == {"validation", "test"}
    saved = final(tmp_path / "pruned")
    assert saved[TABLE].shape == (V, 12)
    assert_same(saved, final(tmp_path / "plain"))
    kept = 10 + 5 + 10 + 4  # words of the three splits, and special tokens
    assert plain.total_parameters - pruned.total_parameters == (V - kept) * 12


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(["embedding_pruning"], marks=pytest.mark.slow),
        ["embedding_pruning", {"lora": {"r": 2, "target_modules": ["query"], "lora_dropout": 0.2}}],
    ],
    ids=["full", "lora"],
)
def test_a_resumed_run_ends_as_one_that_was_left_alone(run_file, tmp_path, recipe):
    settings, folder = RunSettings.load(run_file("run", recipe)), tmp_path / "run"
    whole, weights = train(settings), final(folder)
    back_to_step_2(folder)
    resumed = train(settings, resume=True)
    assert resumed.losses == whole.losses
    assert resumed.quality == whole.quality
    assert_same(final(folder), weights)


def test_a_run_resumed_with_data_of_other_rows_is_refused(run_file, tmp_path):
    path = run_file("run", ["embedding_pruning"])
    train(RunSettings.load(path))
    back_to_step_2(tmp_path / "run")
    lines(tmp_path / "test.jsonl", reviews(25, 8))  # the test split is no part of what a run must agree on
    with pytest.raises(SettingError, match="trained with 29 embedding rows, and the data here needs other 29"):
        train(RunSettings.load(path), resume=True)


def test_the_final_folder_loads_with_all_rows(run_file, models, tmp_path):
    train(RunSettings.load(run_file("run", ["embedding_pruning"])))
    model = load(AutoModelForSequenceClassification.from_pretrained(models / "bert"), tmp_path / "run" / "final")
    assert model.get_input_embeddings().num_embeddings == V
    assert model(input_ids=torch.arange(V)[None, :30]).logits.shape == (1, 2)
    assert_same(dict(Recipe.remove(model).state_dict()), final(tmp_path / "run"))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([{"text": f"w{i} w{i + 1}"} for i in range(8)], marks=pytest.mark.slow),
        pytest.param([{"prompt": f"w{i}", "completion": f" w{i + 1}"} for i in range(8)], marks=pytest.mark.slow),
        pytest.param(
            [
                {
                    "prompt": [{"role": "user", "content": f"w{i}"}],
                    "completion": [{"role": "user", "content": f"w{i + 1}"}],
                }
                for i in range(8)
            ],
            marks=pytest.mark.slow,
        ),
        [{"messages": [{"role": "user", "content": f"w{i} w{i + 1}"}]} for i in range(8)],
    ],
    ids=["text", "prompts", "prompt chats", "chats"],
)
def test_every_form_of_data_for_causal_lm_is_counted(run_file, models, tmp_path, rows):
    data = {"train": lines(tmp_path / "forms.jsonl", rows), "validation": lines(tmp_path / "held-out.jsonl", rows[:3])}
    lora = {"lora": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}}
    settings = {"model": str(models / "llama"), "task": "causal-lm", "data": data}
    settings["train"] = {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
    plain = train(RunSettings.load(run_file("plain", [lora], **settings)))
    pruned = train(RunSettings.load(run_file("pruned", ["embedding_pruning", lora], **settings)))
    assert pruned.losses == plain.losses
    assert pruned.total_parameters < plain.total_parameters


def test_unseen_ids_under_way_end_the_run_with_the_remedy(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    rows = Dataset.from_list([{**tokenizer(row["text"]), "labels": 0} for row in reviews(0, 8)])
    other = Dataset.from_list([{**tokenizer(row["text"]), "labels": 0} for row in reviews(20, 8)])
    base = AutoModelForSequenceClassification.from_pretrained(models / "bert")
    model = Recipe(EmbeddingPruning()).apply(base, {"train": rows}, tokenizer)
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = RecipeTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    with pytest.raises(SettingError, match=r"no row for the id \d+ \('w2\d'\)"):
        trainer.evaluate(other)


def test_a_plain_trainer_with_the_callback_saves_and_resumes_the_full_matrix(models, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(models / "bert")
    rows = Dataset.from_list([{**tokenizer(row["text"]), "labels": i % 2} for i, row in enumerate(reviews(0, 16))])

    def trained(folder: Path, resume: bool = False) -> dict[str, Tensor]:
        base = AutoModelForSequenceClassification.from_pretrained(models / "bert")
        model = Recipe(EmbeddingPruning()).apply(base, {"train": rows}, tokenizer)
        arguments = TrainingArguments(
            folder,
            max_steps=4,
            save_steps=2,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, processing_class=tokenizer, callbacks=[RecipeCallback()]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert attached_to(model).techniques[0].state_dict()["kept_ids"].numel() == 14
        return {name: value.clone() for name, value in Recipe.remove(model).state_dict().items()}

    whole = trained(tmp_path)
    for file in ("model.safetensors", "trained.safetensors"):
        assert_same(load_file(tmp_path / "checkpoint-4" / file), whole)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert_same(trained(tmp_path, resume=True), whole)


def test_a_packaged_model_trains_on_packaged_data_with_a_tenth_of_the_rows(tmp_path):
    need("minilm", "rotten-tomatoes")
    run = {
        "model": "packaged:minilm",
        "task": "text-classification",
        "data": {"train": "packaged:rotten-tomatoes", "max_train_rows": 64, "max_eval_rows": 16, "max_length": 48},
        "recipe": ["embedding_pruning"],
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "seed": 0},
        "output_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    ready = prepare(RunSettings.load(tmp_path / "run.yaml"))
    (rows,) = ready.attached.techniques[0]._rows
    assert len(rows.parameter) < 30522 / 10
    start = rows.full.clone()
    ready.trainer.train()
    ready.trainer.evaluate(ready.data["test"])
    table = Recipe.remove(ready.attached.model).get_input_embeddings().weight
    assert table.shape == (30522, 384)
    moved = (table != start).any(1)
    assert 0 < moved.sum() <= len(rows.kept)
    assert not moved[[i for i in range(30522) if i not in set(rows.kept.tolist())]].any()
