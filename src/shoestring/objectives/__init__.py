"""Objectives: how the loss is computed. One file a method."""

from .ba_lora import BALora
from .base import HeadLoss, LazyLogits
from .chunked_loss import ChunkedLoss, summed_cross_entropy

__all__ = ["BALora", "ChunkedLoss", "HeadLoss", "LazyLogits", "summed_cross_entropy"]
