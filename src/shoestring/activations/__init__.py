"""Activations: how what is kept for backward is stored, or what is kept instead. One file a method."""

from .shared_norm import SharedNorm
from .step_activation import StepActivation

__all__ = ["SharedNorm", "StepActivation"]
