"""Running mean and variance of batch norms: buffers that every forward in training mode changes."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Those of a model, with what they were when this was made."""

    def __init__(self, model: nn.Module):
        norms = {name: module for name, module in model.named_modules() if isinstance(module, _NormBase)}
        self._norms = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
        self._before = {name: tensor.clone() for name, tensor in self.now().items()}

    def now(self) -> dict[str, Tensor]:
        """The buffers by their names in the model; looked up anew, as moving a model replaces them."""
        return {
            f"{name}.{key}" if name else key: buffer.detach()
            for name, norm in self._norms.items()
            for key, buffer in norm.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def put(self, saved: Mapping[str, Tensor]) -> None:
        """Take over those that are among `saved`."""
        for name, buffer in self.now().items():
            if name in saved:
                buffer.copy_(saved[name])

    def go_back(self, trained: Collection[int]) -> None:
        """Be what they were; but for norms with a weight among `trained`, by id, which keep what they learned."""
        kept = [name for name, norm in self._norms.items() if any(id(p) in trained for p in norm.parameters())]
        self.put({name: tensor for name, tensor in self._before.items() if name.rpartition(".")[0] not in kept})
