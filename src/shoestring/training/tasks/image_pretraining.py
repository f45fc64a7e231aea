"""Image pretraining: an encoder of images goes on learning from images alone, by an objective of the recipe."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import SettingError
from .images import ImageTask, collate

if TYPE_CHECKING:
    from transformers import Trainer

    from ...recipe import Recipe


class ImagePretraining(ImageTask):
    """Reads data.image, a column of pictures, and no labels; data.image_size brings them to another size.

    The recipe brings the loss, as masked_autoencoder does; on held-out images it is the measure.
    """

    name = "image-pretraining"
    peft_task_type = "FEATURE_EXTRACTION"
    metric = "loss"
    higher_is_better = False

    @classmethod
    def auto_class(cls) -> Any:
        from transformers import AutoModel

        return AutoModel

    def argument_defaults(self) -> dict[str, Any]:
        return {**super().argument_defaults(), "label_names": [], "prediction_loss_only": True}

    def set_up_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe without an objective."""
        super().set_up_recipe(recipe)
        if not any(technique.brings_loss for technique in recipe.techniques):
            raise SettingError(
                "The task image-pretraining has no labels, so the recipe needs an objective that learns without, such "
                "as masked_autoencoder."
            )

    def trainer(self, **kwargs: Any) -> Trainer:
        from ..trainer import RecipeTrainer

        # the loss is wanted in evaluation too
        return RecipeTrainer(data_collator=partial(collate, return_loss=True), **kwargs)
