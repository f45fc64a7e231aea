"""Training: run files, tasks, data, trainers that carry a recipe, checks, checkpoints and reports."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callback import RecipeCallback
    from .run import explain_memory, measure, train
    from .settings import RunSettings
    from .trainer import RecipeTrainer, recipe_sft_trainer

__all__ = ["RecipeCallback", "RecipeTrainer", "RunSettings", "explain_memory", "measure", "recipe_sft_trainer", "train"]

_WHERE = {
    "RecipeCallback": "callback",
    "RecipeTrainer": "trainer",
    "recipe_sft_trainer": "trainer",
    "RunSettings": "settings",
    "explain_memory": "run",
    "measure": "run",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line answers --help before transformers is there."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
