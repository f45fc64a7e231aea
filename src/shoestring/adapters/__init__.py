"""Weight adapters: new weights on a layer, through peft. One file a method."""

from .alore import ALoRE, ALoREConfig
from .base import Adapter, AdapterConfig, register
from .bottleneck import Bottleneck, BottleneckConfig
from .hut import HUT, HUTConfig
from .l4q import L4Q, L4QConfig
from .mola import MoLA, MoLAConfig
from .nera import NeRA, NeRAConfig
from .paca import PaCA, PaCAConfig
from .qwha import QWHA, QWHAConfig
from .s2_lora import S2LoRA, S2LoRAConfig
from .s2ft import S2FT, S2FTConfig
from .snell import SNELL, SNELLConfig
from .snella import SNELLA, SNELLAConfig
from .tlora import TLoRA, TLoRAConfig
from .wara import WaRA, WaRAConfig

__all__ = [
    "HUT",
    "L4Q",
    "QWHA",
    "S2FT",
    "SNELL",
    "SNELLA",
    "ALoRE",
    "ALoREConfig",
    "Adapter",
    "AdapterConfig",
    "Bottleneck",
    "BottleneckConfig",
    "HUTConfig",
    "L4QConfig",
    "MoLA",
    "MoLAConfig",
    "NeRA",
    "NeRAConfig",
    "PaCA",
    "PaCAConfig",
    "QWHAConfig",
    "S2FTConfig",
    "S2LoRA",
    "S2LoRAConfig",
    "SNELLAConfig",
    "SNELLConfig",
    "TLoRA",
    "TLoRAConfig",
    "WaRA",
    "WaRAConfig",
    "register",
]
