"""Quantisers by groups, packed integers, and models whose layers are stored in them."""

from .groups import dequantise, round_to_nearest, to_groups
from .packing import pack, unpack

__all__ = ["dequantise", "pack", "round_to_nearest", "to_groups", "unpack"]
