"""Shoestring: fine-tune Hugging Face Transformers in the memory you have."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory import Ledger
    from .planning import plan
    from .recipe import Recipe, load
    from .technique import Technique

__version__ = "0.1.0"
__all__ = ["Ledger", "Recipe", "Technique", "load", "plan"]

_WHERE = {"Ledger": "memory", "Recipe": "recipe", "Technique": "technique", "load": "recipe", "plan": "planning"}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command line answers --help before torch is there."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_WHERE[name]}", __name__), name)
