"""The packaged data as published: sizes, columns, and splits that share nothing."""

import bz2
import csv
import hashlib
import json
from functools import cache

import pytest

from shoestring import assets
from shoestring.assets import rotten_tomatoes
from shoestring.assets.splits import split_of, split_rows
from shoestring.testing.assets import need


@cache
def load(name):
    need(name)
    return assets.load_data(name)


def sizes(data):
    return {split: rows.num_rows for split, rows in data.items()}


def assert_splits_share_no(column, data):
    values = {split: set(rows[column]) for split, rows in data.items()}
    assert sum(len(of_split) for of_split in values.values()) == len(set().union(*values.values()))


def test_rotten_tomatoes_has_every_review_once():
    data = load("rotten-tomatoes")
    # 12,808 reviews, of which 56 repeat another word by word
    assert sizes(data) == {"train": 9036, "validation": 1233, "test": 2483}
    assert sum(sizes(data).values()) == 12_808 - 56
    assert_splits_share_no("text", data)
    assert data["train"].features["label"].names == ["rotten", "fresh"]
    fresh = sum(sum(rows["label"]) for rows in data.values())
    assert abs(fresh / 12_752 - 7_403 / 12_808) < 0.002
    assert not any("&amp;" in text for rows in data.values() for text in rows["text"])


def test_no_movie_is_in_two_splits():
    data = load("rotten-tomatoes")
    assert_splits_share_no("movie", data)
    # 508 titles, of which one has no review of its own: all of them stand under its other title
    assert sum(len(set(rows["movie"])) for rows in data.values()) == 507


def test_a_movie_under_two_titles_is_one_movie():
    where = {movie: split for split, rows in load("rotten-tomatoes").items() for movie in rows["movie"]}
    titles_of: dict[str, set[str]] = {}  # by review, before any is left out
    with bz2.open(assets.data_files("rotten-tomatoes") / "rotten_tomatoes_corpus_full.csv.bz2", "rt") as stream:
        for line in csv.DictReader(stream):
            if line["category"] != "plot" and line["movie_name"] in where:
                titles_of.setdefault(line["text"], set()).add(line["movie_name"])
    shared = [titles for titles in titles_of.values() if len(titles) > 1]
    assert len(shared) == 2
    assert all(len({where[title] for title in titles}) == 1 for titles in shared)


def test_rotten_tomatoes_is_as_fresh_in_every_split():
    data = load("rotten-tomatoes")
    assert all(sum(rows["label"]) / rows.num_rows == pytest.approx(7_403 / 12_808, abs=0.02) for rows in data.values())


def test_titles_are_joined_through_others():
    film_of: dict[str, str] = {}
    for one, other in [("c", "d"), ("a", "b"), ("b", "c"), ("e", "e")]:
        rotten_tomatoes.join(film_of, one, other)
    assert [rotten_tomatoes.film(film_of, title) for title in "abcde"] == ["a", "a", "a", "a", "e"]


def test_reuters_keeps_its_own_test():
    data = load("reuters-r8")
    # 5,485 for training, of which 5 repeat one of 4 texts of the test
    assert sizes(data) == {"train": 4950, "validation": 530, "test": 2189}
    assert_splits_share_no("text", {"learn": _joined(data, "train", "validation"), "test": data["test"]})
    assert_splits_share_no("text", {split: data[split] for split in ("train", "validation")})
    names = data["test"].features["label"].names
    counts = {name: data["test"]["label"].count(label) for label, name in enumerate(names)}
    assert counts["earn"] == 1083
    assert counts["grain"] == 10


def _joined(data, *splits):
    return {"text": [text for split in splits for text in data[split]["text"]]}


def test_boolq_is_split_by_article():
    data = load("boolq")
    assert sizes(data) == {"train": 10_167, "validation": 1_260, "test": 1_270}
    assert sum(sizes(data).values()) == 12_697
    articles = {split: {"article": [p.split(" -- ")[0] for p in rows["passage"]]} for split, rows in data.items()}
    assert_splits_share_no("article", articles)
    assert sum(sum(rows["label"]) for rows in data.values()) == 7_907
    row = data["train"][0]
    assert row["text"] == f"{row['question']}? {row['passage']}"


def test_gsm8k_is_ready_for_prompt_and_completion():
    data = load("gsm8k-test")
    assert sizes(data) == {"train": 1054, "test": 265}
    assert_splits_share_no("question", data)
    row = data["train"][0]
    assert row["prompt"] == f"Question: {row['question']}\nAnswer:"
    assert row["completion"] == f" {row['answer']}"
    assert all("\n#### " in answer for answer in data["test"]["answer"])


def test_xsum_has_no_empty_document():
    data = load("xsum")
    assert sizes(data) == {"train": 804, "validation": 99, "test": 96}
    assert_splits_share_no("document", data)
    assert all(row["prompt"] == f"Summarize: {row['document']}\nSummary:" for row in data["test"])
    assert all(document.strip() for rows in data.values() for document in rows["document"])


def test_fashion_mnist_shows_clothes():
    data = load("fashion-mnist")
    assert sizes(data) == {"train": 53_993, "validation": 6_007, "test": 10_000}
    labels = data["test"]["label"]
    assert [labels.count(label) for label in range(10)] == [1000] * 10
    first = data["test"][0]
    assert first["image"].size == (28, 28)
    assert first["image"].mode == "L"
    assert data["test"].features["label"].int2str(first["label"]) == "ankle boot"
    # Trousers are two columns with a gap: the mean picture is darker in the middle than beside it.
    trousers = [row["image"] for row in data["test"].select(range(400)) if row["label"] == 1]
    assert sum(image.getpixel((14, 24)) < image.getpixel((10, 24)) for image in trousers) > 0.8 * len(trousers)


def test_the_same_rows_come_in_the_same_order_in_every_process():
    first = json.dumps(load("rotten-tomatoes")["test"][:50])
    assert hashlib.sha256(first.encode()).hexdigest()[:16] == "3be9513be369734d"


def test_a_split_follows_from_the_key_alone():
    keys = [f"key {i}" for i in range(10_000)]
    splits = split_rows(keys, lambda key: key)
    assert {split: round(len(rows) / 10_000, 1) for split, rows in splits.items()} == {
        "train": 0.8,
        "validation": 0.1,
        "test": 0.1,
    }
    assert split_rows(keys[::-1], lambda key: key)["test"] == splits["test"][::-1]
    assert {split_of(key, {"all": 1.0}) for key in keys} == {"all"}
    with pytest.raises(IndexError):
        split_of("key", {})
