"""Tasks: what is learned, and so which model class, data columns, trainer and measures a run uses. One file a task."""

from .base import Task
from .causal_lm import CausalLM
from .image_classification import ImageClassification
from .image_pretraining import ImagePretraining
from .multiple_choice import MultipleChoice
from .text_classification import TextClassification

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (TextClassification, CausalLM, MultipleChoice, ImageClassification, ImagePretraining)
}

__all__ = [
    "TASKS",
    "CausalLM",
    "ImageClassification",
    "ImagePretraining",
    "MultipleChoice",
    "Task",
    "TextClassification",
]
