"""Image classification: one class for a picture, measured by accuracy and macro F1."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from .images import ImageTask, collate
from .labels import CLASS_MEASURES, Classes, accuracy_and_f1, hits

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer


class ImageClassification(ImageTask):
    """Reads data.image, a column of pictures, and data.label (names, numbers or a ClassLabel).

    data.image_size brings pictures to another size. A model that is then told to interpolate its positions, as ViT is,
    wants interpolate_pos_encoding=True at inference too.
    """

    name = "image-classification"
    peft_task_type = ""  # peft has no word for it
    metric = "accuracy"
    scores_rows = True
    higher_is_better = True
    measures = CLASS_MEASURES

    classes: Classes

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModelForImageClassification

        return AutoModelForImageClassification

    @property
    def columns(self) -> list[str]:
        return [self.data.image, self.data.label]

    def model_config(self, train: Dataset) -> dict[str, Any]:
        self.classes = Classes.of(train, self.data.label)
        return self.classes.config

    def encode(self, rows: dict[str, list[Any]], processor: Any, classes: Any = None) -> dict[str, list[Any]]:
        labels = [classes.number(value) for value in rows[self.data.label]]
        return {**super().encode(rows, processor), "labels": labels}

    def scores(self, loss: Any, predictions: Any, labels: Any) -> list[float]:
        return hits(predictions, labels)

    def trainer(self, **kwargs: Any) -> Trainer:
        from ..trainer import RecipeTrainer

        return RecipeTrainer(data_collator=partial(collate, **self.options), compute_metrics=accuracy_and_f1, **kwargs)
