"""Splits that stay the same everywhere and for ever: a row's split follows from the hash of what it belongs to."""

from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from typing import TypeVar

Row = TypeVar("Row")

EIGHT_ONE_ONE = {"train": 0.8, "validation": 0.1, "test": 0.1}


def place_of(key: str) -> float:
    """Where the key's hash lies between 0 and 1: as good as random, and the same everywhere."""
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big") / 2**64


def split_of(key: str, fractions: Mapping[str, float] = EIGHT_ONE_ONE) -> str:
    """The split in which everything with this key lies.

    fractions: expected share of the keys in each split; they add up to 1.

    >>> [split_of(movie) for movie in ["abandon", "about_a_boy", "about_schmidt"]]
    ['validation', 'train', 'train']
    """
    place = place_of(key)
    for split, fraction in fractions.items():
        if place < fraction:
            return split
        place -= fraction
    return list(fractions)[-1]  # rounding left a place just under 1


def split_rows(
    rows: Iterable[Row], key: Callable[[Row], str], fractions: Mapping[str, float] = EIGHT_ONE_ONE
) -> dict[str, list[Row]]:
    """The rows of each split, in their given order; rows of one key are never apart."""
    splits: dict[str, list[Row]] = {split: [] for split in fractions}
    for row in rows:
        splits[split_of(key(row), fractions)].append(row)
    return splits
