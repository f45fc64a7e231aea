"""Text classification: one class for a text or a pair of texts, measured by accuracy and macro F1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import SettingError
from ..data import need_columns, need_texts
from ..models import check_length, load_pretrained, max_positions
from .base import QuicklyHashed, Task
from .labels import CLASS_MEASURES, Classes, accuracy_and_f1, hits

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer


class TextClassification(Task):
    """Reads data.text, data.text_pair if set, and data.label (names, numbers or a ClassLabel)."""

    name = "text-classification"
    peft_task_type = "SEQ_CLS"
    metric = "accuracy"
    scores_rows = True
    higher_is_better = True
    measures = CLASS_MEASURES

    classes: Classes

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def check_columns(self, split: str, dataset: Dataset) -> None:
        need_columns(split, dataset, self.data.text, self.data.label, self.data.text_pair)
        need_texts(split, dataset, self.data.text, self.data.text_pair)

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        self.classes = Classes.of(data["train"], self.data.label)
        model, tokenizer = load_pretrained(self.settings.model, self.auto_class(), **self.classes.config)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id
        return model, tokenizer

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        limit = max_positions(model, processor)
        length = self.data.max_length
        check_length(length, limit)
        tokenizer = QuicklyHashed(processor)

        def encode(rows: dict[str, list], classes: Classes) -> dict[str, Any]:
            texts = [rows[name] for name in (self.data.text, self.data.text_pair) if name is not None]
            encoded = tokenizer(*texts, truncation=length is not None, max_length=length)
            return {**encoded, "labels": [classes.number(value) for value in rows[self.data.label]]}

        for split, dataset in data.items():
            data[split] = dataset.map(
                encode,
                batched=True,
                fn_kwargs={"classes": self.classes.of_split(split, dataset)},
                remove_columns=dataset.column_names,
                desc=f"tokens of {split}",
            )
            longest = max(len(ids) for ids in data[split]["input_ids"])
            if limit is not None and longest > limit:
                count = sum(len(ids) > limit for ids in data[split]["input_ids"])
                raise SettingError(
                    f"{count} texts of {split} have up to {longest} tokens, more than the {limit} positions of this "
                    f"model; set data.max_length: {limit} or less to cut them."
                )
        return data

    def scores(self, loss: Any, predictions: Any, labels: Any) -> list[float]:
        return hits(predictions, labels)

    def trainer(self, **kwargs: Any) -> Trainer:
        from transformers import DataCollatorWithPadding

        from ..trainer import RecipeTrainer

        collator = DataCollatorWithPadding(kwargs["processing_class"])
        return RecipeTrainer(data_collator=collator, compute_metrics=accuracy_and_f1, **kwargs)
