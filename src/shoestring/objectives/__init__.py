"""Objectives: how the loss is computed. One file a method."""

from .answer_choices import AnswerChoices
from .ba_lora import BALora
from .base import HeadLoss, LazyLogits
from .chunked_loss import ChunkedLoss, summed_cross_entropy
from .density_loss import DensityLoss
from .masked_autoencoder import MaskedAutoencoder
from .metric_learning import MetricLearning

__all__ = [
    "AnswerChoices",
    "BALora",
    "ChunkedLoss",
    "DensityLoss",
    "HeadLoss",
    "LazyLogits",
    "MaskedAutoencoder",
    "MetricLearning",
    "summed_cross_entropy",
]
