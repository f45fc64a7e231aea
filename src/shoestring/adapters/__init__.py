"""Weight adapters: new weights on a layer, through peft. One file a method."""

from .base import Adapter, AdapterConfig, register
from .hut import HUT, HUTConfig
from .s2_lora import S2LoRA, S2LoRAConfig

__all__ = ["HUT", "Adapter", "AdapterConfig", "HUTConfig", "S2LoRA", "S2LoRAConfig", "register"]
