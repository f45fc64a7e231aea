r"""A linear layer whose weight is a sketch: tables that train, and packed codes that do not.

Source   Zhang, Su, Desai, Wu, Xu, Shrivastava 2025, arXiv:2410.06364
Update   y = x W^T + b,  W_ij = table_{i, q(j), code_ij}
         dtable_{i, q, k} = sum of D_ij over the columns j of group q with code_ij = k,  D = dY^T X,  dX = dY W
Shapes   tables [out, groups, 2^bits]; codes [out, ceil(in bits / 8)] uint8; D [out, in]
Trains   out groups 2^bits numbers, a bias aside
Costs    W and D are there for some rows at a time, of at most `BLOCK_NUMBERS` weights, and W is made again in backward.
         For a block of rows its codes stand unpacked, in 16 bytes a weight for a moment. x is kept, as in any layer
Differs  the authors' kernels add to the tables by atomics; here sums have one order on a CPU, and on a GPU where torch
         is asked for deterministic algorithms
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from ..errors import SettingError
from ..fakes import has_values
from ..precision import autocast_dtype, autocast_off, wide_dtype
from .packed_model import packed_layer
from .packing import pack, packed_size, unpack

BLOCK_NUMBERS = 1 << 20  # weights that are there at once


class _SketchedProduct(torch.autograd.Function):
    """x W^T, with W by blocks of rows from tables and packed codes, in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tables: Tensor, codes: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, tables, codes)
        ctx.bits = bits
        y = x.new_empty(*x.shape[:-1], len(tables))
        for rows, places in _blocks(tables, codes, bits, x):
            y[..., rows] = x @ _weight(tables[rows], places).to(x.dtype).T
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, tables, codes = ctx.saved_tensors
        dy, of_tokens = dy.flatten(0, -2), x.flatten(0, -2)
        wide = wide_dtype(dy.dtype)  # sums over blocks do not round to 16 bit each time
        dx = torch.zeros_like(of_tokens, dtype=wide) if ctx.needs_input_grad[0] else None
        dtables = torch.empty_like(tables) if ctx.needs_input_grad[1] else None
        for rows, places in _blocks(tables, codes, ctx.bits, x):
            if dx is not None:
                dx += dy[:, rows] @ _weight(tables[rows], places).to(dy.dtype)
            if dtables is not None:
                dense = (dy[:, rows].T @ of_tokens).to(torch.promote_types(wide, tables.dtype))
                dtables[rows] = _summed(dense.view(places.shape), places, tables.shape[-1]).to(tables.dtype)
        return (None if dx is None else dx.to(x.dtype).view(x.shape)), dtables, None, None


def _blocks(tables: Tensor, codes: Tensor, bits: int, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their codes as places in the tables [rows, groups, in / groups]."""
    at_once = max(1, BLOCK_NUMBERS // x.shape[-1])
    for first in range(0, len(tables), at_once):
        rows = slice(first, min(first + at_once, len(tables)))
        yield rows, unpack(codes[rows], bits, x.shape[-1]).unflatten(1, (tables.shape[1], -1)).long()


def _weight(tables: Float[Tensor, "rows groups k"], places: Int64[Tensor, "rows groups g"]) -> Float[Tensor, "rows in"]:
    return tables.gather(2, places).flatten(1)


def _summed(
    dense: Float[Tensor, "rows groups g"], places: Int64[Tensor, "rows groups g"], num_values: int
) -> Float[Tensor, "rows groups k"]:
    """Sums of what has the same place."""
    if dense.is_cuda and torch.are_deterministic_algorithms_enabled():
        return torch.stack([(dense * (places == k)).sum(-1) for k in range(num_values)], dim=-1)
    return dense.new_zeros(*dense.shape[:2], num_values).scatter_add_(2, places, dense)


def sketched_linear(
    x: Float[Tensor, "*batch in"],
    tables: Float[Tensor, "out groups k"],
    codes: UInt8[Tensor, "out bytes"],
    bits: int,
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*batch out"]:
    """`x W^T + bias` in x's dtype or autocast's; x, tables and codes are kept for backward, and nothing of W's size.

    Second derivatives are not available.
    """
    lower = autocast_dtype(x)
    with autocast_off(x):
        x = x.to(lower) if lower else x
        y = _SketchedProduct.apply(x[None] if x.dim() == 1 else x, tables, codes, bits)
        y = y[0] if x.dim() == 1 else y
        return y if bias is None else y + bias.to(y.dtype)


OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
WRITES_IN_PLACE = frozenset({"__setitem__", *(f"__i{name}__" for name in OPERATORS)})
WRITES_NO_VALUES = frozenset({"requires_grad_", "detach_"})


class _Shown(Tensor):
    """A weight that was made to be read: what is written into it, or into its data, would be lost.

    tables: those that it was made of.
    """

    tables: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Operations give plain tensors; those that write into one that is shown are refused."""
        name, kwargs = getattr(function, "__name__", ""), kwargs or {}
        in_place = name.endswith("_") and not name.endswith("__") and name not in WRITES_NO_VALUES
        first = next(iter((*args, *kwargs.values())), None)  # torch.nn.init gives all by name
        if isinstance(kwargs.get("out"), cls) or ((in_place or name in WRITES_IN_PLACE) and isinstance(first, cls)):
            raise _not_written()
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    @property
    def data(self) -> Tensor:
        """As of any tensor, to be read."""
        data: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return data.as_subclass(_Shown)

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _not_written()


def _not_written() -> SettingError:
    return SettingError(
        "A sketch takes no other weight, so that nothing can be merged into it, and no adapter can start from a part "
        "of it, as init_lora_weights: pissa does. Leave adapters unmerged beside sketches, as shoestring.load gives "
        "them, or adapt other layers."
    )


@packed_layer("sketch")
class SketchedLinear(nn.Linear):
    """An `nn.Linear` with tables and codes in place of its weight.

    bias: a new one, the parameter of the layer that it stands for, or none.
    dtype: of the weight that it stands for. The tables are in float32 or wider, whatever the layer is cast to, for
        steps of training are smaller than what 16 bits can tell apart.
    filled: whether tables and codes hold values, or are about to get them from a state dict.
    """

    codes: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        groups: int,
        bias: nn.Parameter | bool,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ):
        nn.Module.__init__(self)  # that of nn.Linear makes a weight
        self.in_features, self.out_features, self.bits, self.groups = in_features, out_features, bits, groups
        self.dtype, self.filled = dtype, False
        wide = wide_dtype(dtype)
        self.tables = nn.Parameter(torch.zeros(out_features, groups, 1 << bits, dtype=wide, device=device))
        codes = torch.zeros(out_features, packed_size(in_features, bits), dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        if bias is True:
            bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", bias if isinstance(bias, nn.Parameter) else None)

    def settings(self) -> dict[str, Any]:
        """What `from_settings` builds an empty layer of its sizes from, as plain data."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bits": self.bits,
            "groups": self.groups,
            "bias": self.bias is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> SketchedLinear:
        """A layer whose values are to be loaded."""
        layer = cls(**{**settings, "dtype": getattr(torch, settings["dtype"])})
        layer.filled = True
        return layer

    @torch.no_grad()
    def fill(self, tables: Float[Tensor, "out groups k"], codes: UInt8[Tensor, "out in"]) -> None:
        """Set the values.

        Raises ValueError if a code is out of range.
        """
        self.tables.copy_(tables)
        self.codes.copy_(pack(codes, self.bits))
        self.filled = True

    @property
    def weight(self) -> Tensor:
        """The weight that the sketch stands for, dense, for code that asks for it; gradients go to the tables."""
        places = unpack(self.codes, self.bits, self.in_features).unflatten(1, (self.groups, -1)).long()
        weight = _weight(self.tables, places).to(self.dtype)
        if type(weight) is not Tensor:
            return weight
        shown = weight.as_subclass(_Shown)
        shown.tables = self.tables
        return shown

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if getattr(value, "tables", None) is not self.tables:  # peft puts back what it was shown
            raise _not_written()

    def forward(self, input: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x W^T + b."""
        if not self.filled:
            raise ValueError("This sketch holds no values: restore those that were saved, or build it from data.")
        return sketched_linear(input, self.tables, self.codes, self.bits, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SketchedLinear:
        """As in torch; tables stay in float32 or wider."""
        before = self.tables.detach()
        super()._apply(fn, recurse)
        if self.tables.dtype.itemsize < before.dtype.itemsize:
            self.tables.data = before.to(self.tables.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in torch; refuses tables that are not finite.

        Raises ValueError.
        """
        tables = state_dict.get(f"{prefix}tables")
        if tables is not None and has_values(tables) and not bool(tables.isfinite().all()):
            raise ValueError(f"{prefix}tables must hold finite numbers, and holds others: what was saved is damaged.")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Sizes, bits and groups."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={self.bits}, groups={self.groups}"
        )
