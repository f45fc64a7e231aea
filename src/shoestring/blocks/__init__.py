"""Techniques that change how transformer blocks run: token selection, reversible stacks, windows, recomputation."""

from .base import BlockTechnique, Pass
from .recompute import Recompute
from .stacks import BlockCall, Stack, find_stacks
from .token_tune import TokenTune

__all__ = ["BlockCall", "BlockTechnique", "Pass", "Recompute", "Stack", "TokenTune", "find_stacks"]
