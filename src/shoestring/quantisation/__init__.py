"""Quantisers by groups, packed integers, and models whose layers are stored in them."""

from .groups import dequantise, round_to_nearest, to_groups
from .packed_linear import PackedLinear
from .packed_model import load_packed, pack_model, packed_layer, read_packed, save_packed
from .packing import pack, unpack

__all__ = [
    "PackedLinear",
    "dequantise",
    "load_packed",
    "pack",
    "pack_model",
    "packed_layer",
    "read_packed",
    "round_to_nearest",
    "save_packed",
    "to_groups",
    "unpack",
]
