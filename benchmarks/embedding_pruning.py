"""Bytes of a step of full fine-tuning with and without the embedding rows that a data set leaves unused.

    python benchmarks/embedding_pruning.py [--json FILE]

Counted by the ledger, float32, AdamW; the rows are those of all splits of the packaged reviews, with special tokens.
Weights hold 4 bytes a row of the full table more, the places of the rows. The full matrix waits outside of what is
counted, in host memory or a file.
"""

import argparse
from typing import Any

import torch
from datasets import DatasetDict
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from result import Row, print_table, write
from shoestring import Recipe, assets
from shoestring.memory import Ledger, MemoryReport
from shoestring.pruning import EmbeddingPruning

SEED = 0
WORDS = ("terrible", "great")
MODELS: dict[str, Any] = {"minilm": AutoModelForSequenceClassification, "flan-t5-small": AutoModelForSeq2SeqLM}
BYTES = 4  # of a number in float32


def model_inputs(tokenizer: Any, text_to_text: bool) -> DatasetDict:
    """All reviews as ids, with their labels as classes or as words."""
    words = [tokenizer(word).input_ids for word in WORDS]

    def encode(rows: dict[str, list]) -> dict[str, Any]:
        labels = [words[label] for label in rows["label"]] if text_to_text else rows["label"]
        return {"input_ids": tokenizer(rows["text"], truncation=True, max_length=128)["input_ids"], "labels": labels}

    return assets.load_data("rotten-tomatoes").map(encode, batched=True, remove_columns=["text", "label"])


def step(model: Any, batch: dict[str, Tensor]) -> tuple[MemoryReport, float]:
    """What the ledger counts in one step, and the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    with Ledger(model, optimizer) as ledger:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    return ledger.report(), loss.item()


def compare(name: str) -> tuple[list[Row], dict[str, int]]:
    """Rows of one model, and how many rows its table has and keeps."""
    folder = assets.model_folder(name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = model_inputs(tokenizer, text_to_text="t5" in name)
    first = data["train"].select(range(8))
    batch = dict(tokenizer.pad({"input_ids": first["input_ids"]}, return_tensors="pt"))
    batch["labels"] = torch.tensor(first["labels"])

    def counted(recipe: Recipe) -> tuple[MemoryReport, float, int]:
        torch.manual_seed(SEED)  # of the new head
        model = MODELS[name].from_pretrained(folder, dtype=torch.float32).eval()  # no dropout: one loss for both
        with recipe(model, data, tokenizer) as attached:
            return *step(attached, batch), attached.get_input_embeddings().num_embeddings

    (full, full_loss, size), (few, few_loss, kept) = counted(Recipe()), counted(Recipe(EmbeddingPruning()))
    width = MODELS[name].from_pretrained(folder).get_input_embeddings().embedding_dim
    fewer = (size - kept) * width * BYTES
    rows = [Row(f"{name}: rows of the embedding", kept, size)]
    parts = {"weights": fewer - BYTES * size, "gradients": fewer, "optimizer_state": 2 * fewer}
    for part, expected in parts.items():
        ours, baseline = few.largest[part], full.largest[part]
        goal = f"less by exactly {expected:,}"
        rows.append(Row(f"{name}: {part.replace('_', ' ')}, bytes", ours, baseline, goal, baseline - ours == expected))
    rows.append(Row(f"{name}: peak of the step, bytes", few.peak_bytes, full.peak_bytes))
    rows.append(Row(f"{name}: loss", few_loss, full_loss, "equal", few_loss == full_loss))
    return rows, {"rows": size, "kept": kept, "width": width}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the rows here")
    options = parser.parse_args()
    rows, tables = [], {}
    for name in MODELS:
        found, tables[name] = compare(name)
        rows += found
    print_table(rows, "Full fine-tuning with the embedding rows of the data (ours) and with all (baseline)")
    if options.json:
        write(rows, options.json, seeds=[SEED], tables=tables, data="rotten-tomatoes", dtype="float32")


if __name__ == "__main__":
    main()
