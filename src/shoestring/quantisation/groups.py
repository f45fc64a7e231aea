r"""Groups of weights on a grid of integers: one step and one offset for every g neighbours along `in`.

Update   code = clamp(round((W - offset) / step), -2^(bits - 1), 2^(bits - 1) - 1)     W ~ step code + offset
Shapes   W and codes [out, in], step and offset [out, in / g]
Start    symmetric: offset 0, the smallest step with which no weight is clipped
         else: the grid reaches from the smallest to the largest weight of the group
"""

import torch
from jaxtyping import Float, Int8, Shaped, UInt8
from torch import Tensor

from ..precision import at_least_float32


def bounds(bits: int) -> tuple[int, int]:
    """The smallest and the largest integer of so many bits.

    >>> bounds(3)
    (-4, 3)
    """
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def check_groups(in_features: int, group_size: int) -> None:
    """Refuse groups that do not fill a row.

    Raises ValueError.
    """
    if group_size < 1 or in_features % group_size:
        raise ValueError(
            f"group_size must divide the layer's {in_features} inputs, got {group_size}; take one of "
            f"{', '.join(map(str, divisors_near(in_features, group_size)))}."
        )


def divisors_near(size: int, wanted: int, count: int = 3) -> list[int]:
    """The divisors of `size` that are nearest to the wanted one, in ascending order.

    >>> divisors_near(576, 128)
    [72, 96, 144]
    """
    divisors = (n for n in range(1, size + 1) if size % n == 0)
    return sorted(sorted(divisors, key=lambda n: abs(n - wanted))[:count])


def to_groups(weight: Shaped[Tensor, "out in"], group_size: int) -> Shaped[Tensor, "out groups g"]:
    """The same numbers by groups along `in`.

    Raises ValueError if group_size does not divide the number of inputs.
    """
    check_groups(weight.shape[1], group_size)
    return weight.unflatten(1, (-1, group_size))


def grid_of(
    weight: Float[Tensor, "out in"], bits: int, group_size: int, symmetric: bool
) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Step and offset, in float32 or wider, with which no weight is clipped but for rounding.

    Where the step would be zero, it is 1: in groups of zeros, and without symmetry in those of equal weights.

    Raises ValueError if group_size does not divide the number of inputs.
    """
    low, high = bounds(bits)
    groups = to_groups(at_least_float32(weight), group_size)
    smallest, largest = groups.aminmax(dim=-1)
    if symmetric:
        step = torch.maximum(smallest / low, largest / high)
        offset = torch.zeros_like(step)
    else:
        step = (largest - smallest) / (high - low)
        offset = smallest - step * low
    flat = step <= torch.finfo(step.dtype).tiny
    return torch.where(flat, 1.0, step), offset if symmetric else torch.where(flat, smallest, offset)


def round_to_nearest(
    weight: Float[Tensor, "out in"], bits: int, group_size: int, symmetric: bool = True
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
    """Codes, step and offset of the weight: signed codes within `bounds(bits)`, bits from 2 to 8.

    Raises ValueError if bits is out of range or group_size does not divide the number of inputs.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits of rounded weights must be from 2 to 8, got {bits}.")
    step, offset = grid_of(weight, bits, group_size, symmetric)
    positions = (to_groups(weight, group_size) - offset[..., None]) / step[..., None]
    return positions.round_().clamp_(*bounds(bits)).to(torch.int8).flatten(1), step, offset


def dequantise(
    codes: Shaped[Tensor, "out in"],
    step: Float[Tensor, "out groups"],
    offset: Float[Tensor, "out groups"] | None = None,
) -> Float[Tensor, "out in"]:
    """step code + offset, in the dtype of `step`; codes are whole numbers of any dtype, no offset is zero."""
    values = codes.to(step.dtype).unflatten(1, (step.shape[1], -1)) * step[..., None]
    return (values if offset is None else values.add_(offset[..., None])).flatten(1)


def to_unsigned(codes: Int8[Tensor, "*shape"], bits: int) -> UInt8[Tensor, "*shape"]:
    """Signed codes counted from the smallest on, as they are packed."""
    return (codes.to(torch.int16) - bounds(bits)[0]).to(torch.uint8)


def to_signed(codes: UInt8[Tensor, "*shape"], bits: int) -> Int8[Tensor, "*shape"]:
    """The inverse of `to_unsigned`."""
    return (codes.to(torch.int16) + bounds(bits)[0]).to(torch.int8)
