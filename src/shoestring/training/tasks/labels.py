"""Labels: the classes that examples belong to, and how well they are told apart; for all tasks of classification."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import SettingError

if TYPE_CHECKING:
    from datasets import Dataset

NAMED = 20  # classes that an error lists
CLASS_MEASURES = ("accuracy", "f1_macro", "majority_class", "loss")


@dataclass(frozen=True)
class Classes:
    """The classes of a run, as its training data has them.

    column: where the labels are: names, whole numbers or a ClassLabel. names: in the order of their numbers.
    numbered: what the whole numbers of a split stand for, where it numbers named classes by itself.
    """

    column: str
    names: tuple[str, ...]
    numbered: tuple[str, ...] = ()

    @classmethod
    def of(cls, train: Dataset, column: str) -> Classes:
        """The classes in a column of the training data.

        Raises SettingError if there are fewer than two, or their values or numbers cannot be classes.
        """
        names = _names_in(train, column)
        if len(names) < 2:
            raise SettingError(
                f"All rows of train have the label {names[0]!r} in {column!r}, but there must be at least two classes; "
                "name the column of the classes as data.label."
            )
        return cls(column, tuple(names))

    @property
    def config(self) -> dict[str, Any]:
        """What the configuration of a model says of them."""
        return {
            "num_labels": len(self.names),
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: index for index, name in enumerate(self.names)},
        }

    def of_split(self, split: str, dataset: Dataset) -> Classes:
        """The same classes, to read the labels of a split by; a ClassLabel of its own may number them otherwise.

        Raises SettingError for a label that is no class, naming the first row of one.
        """
        from datasets import ClassLabel

        feature = dataset.features[self.column]
        are_named = self.names != tuple(map(str, range(len(self.names))))
        own = replace(self, numbered=tuple(feature.names) if are_named and isinstance(feature, ClassLabel) else ())
        for value in dataset.unique(self.column):
            if not own._is_known(value):
                in_range = own.numbered and isinstance(value, int) and 0 <= value < len(own.numbered)
                shown = own.numbered[value] if in_range else value
                raise SettingError(
                    f"Row {dataset[self.column].index(value)} of {split} has the label {shown!r} in {self.column!r}, "
                    f"which is out of range: the training data has {', '.join(self.names[:NAMED])}."
                )
        return own

    def number(self, value: Any) -> int:
        """The number of the class that a label names."""
        if isinstance(value, int):  # true and false are 1 and 0
            return self.names.index(self.numbered[value]) if self.numbered else int(value)
        return self.names.index(str(value))

    def _is_known(self, value: Any) -> bool:
        if not isinstance(value, int):
            return str(value) in self.names
        if not self.numbered:
            return 0 <= value < len(self.names)
        return 0 <= value < len(self.numbered) and self.numbered[value] in self.names


def _names_in(train: Dataset, column: str) -> list[str]:
    from datasets import ClassLabel

    feature = train.features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = train.unique(column)
    for value in values:
        if isinstance(value, float) or value is None:
            raise SettingError(f"data.label {column!r} must hold names or whole numbers, got {value!r}.")
    if all(isinstance(value, int) for value in values):
        wrong = [value for value in values if not 0 <= value < len(values)]
        if wrong:
            raise SettingError(
                f"Row {train[column].index(wrong[0])} of train has the label {wrong[0]} in {column!r}, out of range: "
                f"{len(values)} classes are numbered 0 to {len(values) - 1}."
            )
        return [str(value) for value in sorted(values)]
    return sorted(str(value) for value in values)


def accuracy_and_f1(prediction: Any) -> dict[str, float]:
    """Accuracy, macro F1, and the share of the most frequent class, each in [0, 1].

    prediction: `predictions` logits [rows, classes] and `label_ids` [rows].
    """
    import numpy as np

    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    predicted, labels = logits.argmax(-1), prediction.label_ids
    scores = []
    for label in np.unique(labels):
        hit = ((predicted == label) & (labels == label)).sum()
        scores.append(2 * hit / ((predicted == label).sum() + (labels == label).sum()))
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1_macro": float(np.mean(scores)),
        "majority_class": float(np.bincount(labels).max() / len(labels)),
    }


def hits(logits: Any, labels: Any) -> list[float]:
    """1 for each row whose largest logit is its label's, else 0; nothing where logits were not asked for."""
    if logits is None:
        return []
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    return [float(hit) for hit in logits.argmax(-1) == labels]
