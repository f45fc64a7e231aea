"""Which modules of a model are norms: torch's own, and those that models bring with them."""

import re

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

NORM_CLASS = re.compile(r".*Norm(2d|3d|Gated)?")  # LlamaRMSNorm, T5LayerNorm, Qwen2RMSNorm, ...
TORCH_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
LEARNED = frozenset({"weight", "bias", "scale", "gamma", "beta"})


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm, by its type or, for a class that no library shares, by that class's name.

    A norm learns at most one scale and one shift, so a larger module of such a name is none.
    """
    if isinstance(module, TORCH_NORMS):
        return True
    named = any(NORM_CLASS.fullmatch(cls.__name__) for cls in type(module).__mro__)
    learned = {key for key, parameter in module._parameters.items() if parameter is not None}
    return named and not list(module.children()) and learned <= LEARNED
