r"""A linear layer that holds integers of few bits, for inference.

Update   y = x W^T + bias    W = step code + offset
Shapes   codes [out, in], packed to uint8 [out, ceil(in bits / 8)]; step and offset [out, in / g]; W [out, in]
Costs    bits / 8 bytes a weight and 4 to 8 a group. In forward W is there whole, in x's dtype
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from ..fakes import has_values
from .groups import bounds, dequantise, to_unsigned
from .packed_model import packed_layer
from .packing import pack, packed_size, unpack

BLOCK = 1 << 20  # weights that are unpacked at once


@packed_layer("grid")
class PackedLinear(nn.Module):
    """`nn.Linear` with packed codes in place of the weight. Nothing of it trains; gradients reach x.

    dtype: of `weight`, where it is asked for; products are in that of x.
    """

    codes: Tensor
    step: Tensor
    offset: Tensor | None
    _like: Tensor  # empty; its dtype follows the model's

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        bias: bool,
        offset: bool,
        dtype: torch.dtype,
        step_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        groups = (out_features, in_features // group_size)
        self.register_buffer("codes", torch.zeros(out_features, packed_size(in_features, bits), dtype=torch.uint8))
        self.register_buffer("step", torch.ones(groups, dtype=step_dtype))
        self.register_buffer("offset", torch.zeros(groups, dtype=step_dtype) if offset else None)
        self.register_buffer("_like", torch.empty(0, dtype=dtype), persistent=False)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        codes: Int8[Tensor, "out in"],
        step: Float[Tensor, "out groups"],
        offset: Float[Tensor, "out groups"] | None,
        bits: int,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> "PackedLinear":
        """The layer with these signed codes."""
        (rows, columns), groups = codes.shape, step.shape[1]
        sizes = (columns, rows, bits, columns // groups)
        with torch.device(codes.device):
            layer = cls(*sizes, bias is not None, offset is not None, dtype, step.dtype)
        layer.codes, layer.step, layer.offset = pack(to_unsigned(codes, bits), bits), step, offset
        if layer.bias is not None and bias is not None:
            layer.bias.data = bias.detach().clone()
        return layer

    def settings(self) -> dict[str, Any]:
        """What `from_settings` builds an empty layer of its sizes from, as plain data."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "group_size": self.group_size,
            "bias": self.bias is not None,
            "offset": self.offset is not None,
            "dtype": _name(self.dtype),
            "step_dtype": _name(self.step.dtype),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> "PackedLinear":
        """A layer whose values are to be loaded."""
        dtypes = {name: getattr(torch, settings[name]) for name in ("dtype", "step_dtype")}
        return cls(**{**settings, **dtypes})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight that it stands for."""
        return self._like.dtype

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """W, made anew each time; for code that looks at a layer's weight."""
        return self.weight_in(self.dtype)

    def weight_in(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """W in a dtype."""
        whole = torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.codes.device)
        at_once = max(1, BLOCK // self.in_features)
        for start in range(0, self.out_features, at_once):
            rows = slice(start, start + at_once)
            codes = unpack(self.codes[rows], self.bits, self.in_features).to(self.step.dtype) + bounds(self.bits)[0]
            whole[rows] = dequantise(codes, self.step[rows], None if self.offset is None else self.offset[rows])
        return whole

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + bias."""
        return F.linear(x, self.weight_in(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """As in torch; steps and offsets stay in their dtype, for rounding them would change every weight."""
        exact = {name: getattr(self, name) for name in ("step", "offset")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            if before is not None and (after := getattr(self, name)).dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in torch; refuses steps that are not positive numbers.

        Raises ValueError.
        """
        step = state_dict.get(f"{prefix}step")
        if step is not None and has_values(step) and not bool((torch.isfinite(step) & (step > 0)).all()):
            raise ValueError(f"{prefix}step must hold positive numbers, and holds others: what was saved is damaged.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
