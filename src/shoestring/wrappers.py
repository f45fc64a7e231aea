"""Models inside of wrappers."""

from typing import Any

from torch import nn


def innermost(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return inside() if callable(inside) else model
