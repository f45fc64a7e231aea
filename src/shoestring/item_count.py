"""Whether a model divides its loss by the number of items of a whole accumulated batch, as trainers ask it to."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

from torch import nn


def passes_item_count(model: nn.Module) -> bool:
    """Whether a model hands on to its loss over how many items it is to be taken; True where its source is not there.

    transformers asks whether forward takes any keyword. Many classifiers do, and give the mean of each micro-batch.
    """
    return _passes_on(type(model).forward)


@functools.cache
def _passes_on(forward: Callable[..., Any]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return True
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    of_loss = [call for call in calls if getattr(call.func, "attr", "") in ("loss_function", "forward")]
    return any(keyword.arg is None for call in of_loss for keyword in call.keywords)
