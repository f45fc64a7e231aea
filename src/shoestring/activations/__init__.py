"""Activations: how what is kept for backward is stored, or what is kept instead. One file a method."""

from .base import Codec, Operation, Stage
from .lean_mlp import LeanMLP
from .low_bit_activations import LowBitActivations
from .offload import Offload
from .shared_norm import SharedNorm
from .step_activation import StepActivation

__all__ = ["Codec", "LeanMLP", "LowBitActivations", "Offload", "Operation", "SharedNorm", "Stage", "StepActivation"]
