"""Image pretraining: an encoder of images goes on learning from images alone, by an objective of the recipe."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...errors import SettingError
from ..data import need_columns
from ..models import load_pretrained
from .base import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import Trainer

    from ...recipe import Recipe


class ImagePretraining(Task):
    """Reads data.image, a column of pictures, and no labels; data.image_size brings them to another size.

    The recipe brings the loss, as masked_autoencoder does; on held-out images it is the measure.
    """

    name = "image-pretraining"
    peft_task_type = "FEATURE_EXTRACTION"
    metric = "loss"
    higher_is_better = False
    takes_images = True

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModel

        return AutoModel

    def argument_defaults(self) -> dict[str, Any]:
        return {
            "remove_unused_columns": False,  # pictures become pixels as they are needed
            "label_names": [],
            "prediction_loss_only": True,
            "include_num_input_tokens_seen": "no",
        }

    def set_up_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe without an objective."""
        super().set_up_recipe(recipe)
        if not any(technique.brings_loss for technique in recipe.techniques):
            raise SettingError(
                "The task image-pretraining has no labels, so the recipe needs an objective that learns without, such "
                "as masked_autoencoder."
            )

    def check_columns(self, split: str, dataset: Dataset) -> None:
        from datasets import Image

        need_columns(split, dataset, self.data.image)
        if not isinstance(feature := dataset.features[self.data.image], Image):
            raise SettingError(
                f"data.image {self.data.image!r} of {split} must hold pictures, but it holds {feature}; a folder of "
                "pictures, or a data set with a column of the type Image, has them."
            )

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor

        model, processor = load_pretrained(self.settings.model, self.auto_class(), AutoImageProcessor)
        if (channels := getattr(model.config, "num_channels", 3)) != 3:
            raise SettingError(
                f"{self.settings.model.name} takes {channels} channels, but image-pretraining reads pictures as three: "
                "red, green and blue."
            )
        if self.data.image_size is not None:
            processor = of_size(processor, self.data.image_size)
        return model, processor

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        for split, dataset in data.items():
            pixels = partial(as_pixels, column=self.data.image, processor=processor)
            data[split] = dataset.select_columns([self.data.image]).with_transform(pixels)
        return data

    def probe(self, data: DatasetDict, model: Any, processor: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.stack(self.prepare(data, model, processor)["train"][:]["pixel_values"])}

    def trainer(self, **kwargs: Any) -> Trainer:
        from ..trainer import RecipeTrainer

        return RecipeTrainer(data_collator=collate, **kwargs)


def of_size(processor: Any, side: int) -> Any:
    """The same processor, for square images of so many pixels a side."""
    settings = processor.to_dict()
    for name in ("size", "crop_size"):
        if given := settings.get(name):
            settings[name] = dict.fromkeys(given, side)
    return type(processor)(**settings)


def as_pixels(rows: dict[str, list[Any]], column: str, processor: Any) -> dict[str, list[torch.Tensor]]:
    """Pictures as the model takes them."""
    pictures = [picture.convert("RGB") for picture in rows[column]]
    return {"pixel_values": list(processor(images=pictures, return_tensors="pt")["pixel_values"])}


def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A batch, of which the loss is wanted in evaluation too."""
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "return_loss": True}
