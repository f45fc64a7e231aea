"""How many tokens a model has positions for."""

from typing import Any

from torch import nn

from .wrappers import innermost


def positions_in(config: Any) -> int | None:
    """What a model's configuration says; None where it says nothing."""
    text = getattr(config, "get_text_config", lambda: config)()
    count = getattr(text, "max_position_embeddings", None)
    return count if isinstance(count, int) and count > 0 else None


def positions_of(model: nn.Module) -> int | None:
    """The most tokens of a row that the model has positions for; None where nothing says so.

    In a table of positions with a row for padding, as RoBERTa's, tokens are counted from the row after that one.
    """
    inner = innermost(model)
    stated = positions_in(getattr(inner, "config", None))
    tables = [
        module.num_embeddings - module.padding_idx - 1
        for name, module in inner.named_modules()
        if isinstance(module, nn.Embedding) and module.padding_idx is not None and "position" in name
    ]
    return min([*tables, *([stated] if stated else [])], default=None)
