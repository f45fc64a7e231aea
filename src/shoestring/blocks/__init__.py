"""Techniques that change how transformer blocks run: token selection, reversible stacks, windows, recomputation."""

from .base import BlockTechnique, Pass
from .recompute import Recompute
from .reversible import Reversible
from .stacks import BlockCall, Stack, find_stacks
from .token_tune import TokenTune
from .token_windows import TokenWindows

__all__ = [
    "BlockCall",
    "BlockTechnique",
    "Pass",
    "Recompute",
    "Reversible",
    "Stack",
    "TokenTune",
    "TokenWindows",
    "find_stacks",
]
