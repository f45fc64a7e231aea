"""What a suite may measure beside training; one file each."""

from .base import Extra
from .forgetting import Forgetting
from .generation import Generation
from .latency import Latency
from .lm_eval import LmEval

EXTRAS: dict[str, type[Extra]] = {extra.name: extra for extra in (Forgetting, Generation, Latency, LmEval)}

__all__ = ["EXTRAS", "Extra", "Forgetting", "Generation", "Latency", "LmEval"]
