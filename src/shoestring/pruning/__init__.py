"""Pruning: what of a model is there at all. One file a method."""

from .embedding_pruning import EmbeddingPruning
from .light_peft import LightPEFT
from .pruned_model import load_pruned, save_pruned
from .sketchtune import SketchTune

__all__ = ["EmbeddingPruning", "LightPEFT", "SketchTune", "load_pruned", "save_pruned"]
