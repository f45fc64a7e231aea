"""Pruning: what of a model is there at all. One file a method."""

from .embedding_pruning import EmbeddingPruning

__all__ = ["EmbeddingPruning"]
