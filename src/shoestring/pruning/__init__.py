"""Pruning: what of a model is there at all. One file a method."""

from .embedding_pruning import EmbeddingPruning
from .sketchtune import SketchTune

__all__ = ["EmbeddingPruning", "SketchTune"]
