"""Fixtures: tiny models, tokenizers and data made on the spot, and run files on them; a whole run takes a second."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

GOOD_WORDS = ["lovely", "bright", "warm", "moving", "clever"]
BAD_WORDS = ["dull", "flat", "cold", "tired", "clumsy"]
OTHER_WORDS = ["the", "film", "is", "a", "story", "and", "plot", "with", "people", "in", "it"]
POSITIONS = 32

CHAT_TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>{% endgeneration %}"
    "{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def save_tokenizer(folder: Path, *, pad: str, unk: str, begin: str, end: str, bert: bool) -> None:
    """A tokenizer with one token a word; `begin` and `end` go around a text for BERT, and not for a decoder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [pad, unk, begin, end, "user", "assistant", *GOOD_WORDS, *BAD_WORDS, *OTHER_WORDS, "good", "bad"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unk))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": pad, "unk_token": unk}
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B {end}", special_tokens=[(begin, 2), (end, 3)]
        )
        names |= {"cls_token": begin, "sep_token": end}
    else:
        names |= {"bos_token": begin, "eos_token": end, "chat_template": CHAT_TEMPLATE}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, **names).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers, width 12 and 32 positions, random weights, with its tokenizer."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-classifier")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=20,
        max_position_embeddings=POSITIONS,
    )
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder, pad="[PAD]", unk="[UNK]", begin="[CLS]", end="[SEP]", bert=True)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers, width 12 and 32 positions, random weights, with a tokenizer that has a chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-decoder")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=20,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, pad="<pad>", unk="<unk>", begin="<s>", end="</s>", bert=False)
    return folder


@pytest.fixture(scope="session")
def wide_decoder(tmp_path_factory: pytest.TempPathFactory, tiny_decoder_folder: Path) -> Path:
    """The tiny decoder with layers in sizes of whole blocks, which bitsandbytes wants at inference on some CPUs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-decoder") / "model"
    shutil.copytree(tiny_decoder_folder, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of three blocks of 24, for pictures of 15 x 15 pixels in patches of 5 x 5, with its image processor."""
    from transformers import Dinov2Config, Dinov2Model, ViTImageProcessor

    folder = tmp_path_factory.mktemp("image-encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 15, "patch_size": 5}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 15, "width": 15}).save_pretrained(folder)
    return folder


def reviews(count: int) -> list[dict[str, str]]:
    """Rows of text and label, in which one word tells the label; of different lengths, labels in turn."""
    rows = []
    for index in range(count):
        label, words = [("bad", BAD_WORDS), ("good", GOOD_WORDS)][index % 2]
        rest = [OTHER_WORDS[(index * 3 + step) % len(OTHER_WORDS)] for step in range(3 + index % 5)]
        rows.append({"text": " ".join([*rest, words[index // 2 % len(words)]]), "label": label})
    return rows


@pytest.fixture(scope="session")
def review_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 reviews as csv, columns text and label ("bad" or "good")."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    rows = reviews(24)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def prompt_jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 reviews as jsonl, columns prompt and completion, for causal-lm."""
    import json

    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": row["text"] + " is", "completion": " " + row["label"]} for row in reviews(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_file(
    tmp_path: Path, tiny_classifier_folder: Path, tiny_decoder_folder: Path, review_csv: Path, prompt_jsonl: Path
) -> Callable[..., Path]:
    """Write a run file in tmp_path: 4 steps of LoRA on the tiny model of the task, a checkpoint after every second.

    run_file(name="run", task="text-classification", data={}, train={}, **rest): `data` and `train` are put over the
    defaults, a value None takes a key out; `rest` (model, recipe, output_dir, ...) replaces what is there.
    The output folder is tmp_path / name.
    """

    def write(
        name: str = "run",
        task: str = "text-classification",
        data: dict[str, Any] | None = None,
        train: dict[str, Any] | None = None,
        **rest: Any,
    ) -> Path:
        classify = task == "text-classification"
        layers = ["query", "value"] if classify else ["q_proj", "v_proj"]
        arguments = {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "seed": 0,
        }
        run = {
            "model": str(tiny_classifier_folder if classify else tiny_decoder_folder),
            "task": task,
            "data": {"train": str(review_csv if classify else prompt_jsonl), **(data or {})},
            "recipe": [{"lora": {"r": 2, "target_modules": layers}}],
            "train": {key: value for key, value in {**arguments, **(train or {})}.items() if value is not None},
            "output_dir": str(tmp_path / name),
            **rest,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(run, sort_keys=False))
        return path

    return write
