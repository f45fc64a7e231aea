"""The base of tasks on images: pictures as pixels of the size that the model gets."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ...assets.extras import need_packages
from ...errors import SettingError
from ...technique import Phase
from ..data import need_columns
from ..models import load_pretrained, options_for_images
from .base import Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from ...recipe import Recipe
    from ..settings import RunSettings

BLANK = (96, 64)  # not square, to see whether a processor makes it so


class ImageTask(Task):
    """Reads data.image, a column of pictures; data.image_size brings them to another size."""

    takes_images = True

    def __init__(self, settings: RunSettings):
        super().__init__(settings)
        self.options: dict[str, Any] = {}  # what the model is told beside its inputs, once it is loaded

    def argument_defaults(self) -> dict[str, Any]:
        # pictures become pixels as they are needed
        return {"remove_unused_columns": False, "include_num_input_tokens_seen": "no"}

    def set_up_recipe(self, recipe: Recipe) -> None:
        """Refuse prompts, whose vectors stand among tokens."""
        for technique in recipe.techniques:
            if technique.phase == Phase.PROMPT:
                raise SettingError(
                    f"{technique.name} learns vectors among the tokens of a text, which the task {self.name} does not "
                    "have; leave it out."
                )
        super().set_up_recipe(recipe)

    @property
    def columns(self) -> list[str]:
        """What is read of the data."""
        return [self.data.image]

    def check_columns(self, split: str, dataset: Dataset) -> None:
        from datasets import Image

        need_packages(("PIL",), "Reading pictures")
        need_columns(split, dataset, *self.columns)
        if not isinstance(feature := dataset.features[self.data.image], Image):
            raise SettingError(
                f"data.image {self.data.image!r} of {split} must hold pictures, but it holds {feature}; a folder of "
                "pictures, or a data set with a column of the type Image, has them."
            )

    def model_config(self, train: Dataset) -> dict[str, Any]:
        """Settings of the model's configuration that the training data decides."""
        return {}

    def load(self, data: DatasetDict) -> tuple[Any, Any]:
        from transformers import AutoImageProcessor

        config = self.model_config(data["train"])
        model, processor = load_pretrained(self.settings.model, self.auto_class(), AutoImageProcessor, **config)
        name, vision = self.settings.model.name, getattr(model.config, "vision_config", model.config)
        if (channels := getattr(vision, "num_channels", 3)) != 3:
            raise SettingError(
                f"{name} takes {channels} channels, but {self.name} reads pictures as three: red, green and blue."
            )
        if self.data.image_size is not None:
            processor = of_size(processor, self.data.image_size)
        self.options = options_for_images(model, *_sides(processor, name))
        return model, processor

    def encode(self, rows: dict[str, list[Any]], processor: Any, classes: Any = None) -> dict[str, list[Any]]:
        """Rows of the data as what the model takes. classes: to read their labels by."""
        return {"pixel_values": as_pixels(rows[self.data.image], processor)}

    def prepare(self, data: DatasetDict, model: Any, processor: Any) -> DatasetDict:
        for split, dataset in data.items():
            classes = self.classes and self.classes.of_split(split, dataset)
            encode = partial(self.encode, processor=processor, classes=classes)
            data[split] = dataset.select_columns(self.columns).with_transform(encode)
        return data

    def probe(self, data: DatasetDict, model: Any, processor: Any) -> dict[str, Any]:
        rows = self.prepare(data, model, processor)["train"]
        return {"pixel_values": torch.stack(rows[:]["pixel_values"]), **self.options}


def of_size(processor: Any, side: int) -> Any:
    """The same processor, for square images of so many pixels a side."""
    settings = processor.to_dict()
    for name in ("size", "crop_size"):
        if given := settings.get(name):
            settings[name] = dict.fromkeys(given, side)
    return type(processor)(**settings)


def _sides(processor: Any, name: str) -> tuple[int, int]:
    """Height and width of the images that a processor makes.

    Raises SettingError if they hang on the picture, so that no batch could be made of them.
    """
    from PIL import Image

    found = {tuple(as_pixels([Image.new("RGB", sides)], processor)[0].shape[-2:]) for sides in (BLANK, BLANK[::-1])}
    if len(found) > 1:
        raise SettingError(
            f"The image processor of {name} leaves pictures of different shapes in different sizes, of which no batch "
            "can be made; crop them to one shape, or give the processor a crop_size."
        )
    height, width = found.pop()
    return height, width


def as_pixels(pictures: list[Any], processor: Any) -> list[torch.Tensor]:
    """Pictures as the model takes them."""
    return list(processor(images=[p.convert("RGB") for p in pictures], return_tensors="pt")["pixel_values"])


def collate(rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """A batch of rows, and what the model is told beside it."""
    batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return {**batch, **options}
