"""Optimizers: how gradients become updates, or what takes their place. One file a method."""

from .bilevel_zofo import BilevelZOFO
from .lora_fa import LoraFA
from .parameter_groups import ParameterGroups
from .step_log import replay
from .zeroth_order import ZerothOrder

__all__ = ["BilevelZOFO", "LoraFA", "ParameterGroups", "ZerothOrder", "replay"]
