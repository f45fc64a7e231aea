"""Text classification: one class for a text or a pair of texts, measured by accuracy and macro F1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import SettingError
from ..data import need_columns
from ..models import check_length, load_pretrained, max_positions
from .base import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer


class TextClassification(Task):
    """Reads data.text, data.text_pair if set, and data.label (names, numbers or a ClassLabel)."""

    name = "text-classification"
    peft_task_type = "SEQ_CLS"
    metric = "accuracy"
    higher_is_better = True

    labels: list[str]

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def check_columns(self, split: str, dataset: Dataset) -> None:
        need_columns(split, dataset, self.data.text, self.data.label, self.data.text_pair)
        for name in filter(None, (self.data.text, self.data.text_pair)):
            row = next((i for i, value in enumerate(dataset[name]) if not isinstance(value, str)), None)
            if row is not None:
                raise SettingError(f"Row {row} of {split} holds no text in {name!r}, but {dataset[row][name]!r}.")

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        self.labels = self._label_names(data["train"])
        model, tokenizer = load_pretrained(
            self.settings.model,
            self.auto_class(),
            num_labels=len(self.labels),
            id2label=dict(enumerate(self.labels)),
            label2id={name: index for index, name in enumerate(self.labels)},
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        limit = max_positions(model, processor)
        length = self.data.max_length
        check_length(length, limit)

        def encode(rows: dict[str, list]) -> dict[str, Any]:
            texts = [rows[name] for name in (self.data.text, self.data.text_pair) if name is not None]
            encoded = processor(*texts, truncation=length is not None, max_length=length)
            return {**encoded, "labels": [self._index(value) for value in rows[self.data.label]]}

        for split, dataset in data.items():
            known = set(dataset.unique(self.data.label))
            for value in known:
                if not self._is_known(value):
                    row = dataset[self.data.label].index(value)
                    raise SettingError(
                        f"Row {row} of {split} has the label {value!r} in {self.data.label!r}, which is out of range: "
                        f"the training data has {', '.join(self.labels[:20])}."
                    )
            data[split] = dataset.map(
                encode, batched=True, remove_columns=dataset.column_names, desc=f"tokens of {split}"
            )
            longest = max(len(ids) for ids in data[split]["input_ids"])
            if limit is not None and longest > limit:
                count = sum(len(ids) > limit for ids in data[split]["input_ids"])
                raise SettingError(
                    f"{count} texts of {split} have up to {longest} tokens, more than the {limit} positions of this "
                    f"model; set data.max_length: {limit} or less to cut them."
                )
        return data

    def trainer(self, **kwargs: Any) -> Trainer:
        from transformers import DataCollatorWithPadding

        from ..trainer import RecipeTrainer

        collator = DataCollatorWithPadding(kwargs["processing_class"])
        return RecipeTrainer(data_collator=collator, compute_metrics=accuracy_and_f1, **kwargs)

    def _label_names(self, train: Dataset) -> list[str]:
        from datasets import ClassLabel

        feature = train.features[self.data.label]
        if isinstance(feature, ClassLabel):
            return list(feature.names)
        values = train.unique(self.data.label)
        if any(isinstance(value, float) or value is None for value in values):
            raise SettingError(f"data.label {self.data.label!r} must hold names or whole numbers, got {values[0]!r}.")
        if all(isinstance(value, int) for value in values):
            wrong = [value for value in values if not 0 <= value < len(values)]
            if wrong:
                raise SettingError(
                    f"Row {train[self.data.label].index(wrong[0])} of train has the label {wrong[0]} in "
                    f"{self.data.label!r}, out of range: {len(values)} classes are numbered 0 to {len(values) - 1}."
                )
            return [str(value) for value in sorted(values)]
        return sorted(str(value) for value in values)

    def _is_known(self, value: Any) -> bool:
        return 0 <= value < len(self.labels) if isinstance(value, int) else str(value) in self.labels

    def _index(self, value: Any) -> int:
        return value if isinstance(value, int) else self.labels.index(str(value))


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
