"""Optimizers: how gradients become updates. One file a method."""

from .lora_fa import LoraFA

__all__ = ["LoraFA"]
