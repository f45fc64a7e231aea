"""Each operation of torch, with what it was given."""

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class EveryOperation(TorchDispatchMode):
    """Hands each operation on to `run(function, args, kwargs)`, which is to return its result."""

    def __init__(self, run: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]):
        super().__init__()
        self._run = run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a wrapper (DTensor, torchao) takes the operation apart, and its parts come here
        return self._run(func, args, kwargs or {})
