"""Weight adapters: new weights on a layer, through peft. One file a method."""

from .base import Adapter, AdapterConfig, register
from .bottleneck import Bottleneck, BottleneckConfig
from .hut import HUT, HUTConfig
from .nera import NeRA, NeRAConfig
from .s2_lora import S2LoRA, S2LoRAConfig
from .wara import WaRA, WaRAConfig

__all__ = [
    "HUT",
    "Adapter",
    "AdapterConfig",
    "Bottleneck",
    "BottleneckConfig",
    "HUTConfig",
    "NeRA",
    "NeRAConfig",
    "S2LoRA",
    "S2LoRAConfig",
    "WaRA",
    "WaRAConfig",
    "register",
]
