"""Small integers in as few bits as they need: eight codes of n bits in n bytes, for n from 2 to 8.

Shapes   codes uint8 [..., n], each below 2**bits; packed uint8 [..., ceil(n bits / 8)]
         code j takes bits j bits .. (j + 1) bits of its row, counted from the lowest bit of the first byte on
Costs    packing and unpacking take two bytes a code beside what goes in and comes out
"""

import torch
from jaxtyping import UInt8
from torch import Tensor

from ..fakes import has_values

BITS = range(2, 9)
CODES = 8  # codes that fill whole bytes, whatever their bits


def packed_size(n: int, bits: int) -> int:
    """Bytes that n codes take.

    >>> packed_size(10, 3)
    4
    """
    return -(-n * bits // 8)


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """The codes of each row one after the other, the last byte filled up with zeros.

    Raises ValueError if bits is not from 2 to 8 or a code does not fit into them.
    """
    _check_bits(bits)
    if has_values(codes) and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"Codes of {bits} bits must be below {1 << bits}, got {int(codes.max())}.")
    if bits == 8:
        return codes.clone()
    n = codes.shape[-1]
    words = _of_eight(codes, CODES, bits)
    as_bytes = torch.stack([(words >> (8 * i) & 0xFF).to(torch.uint8) for i in range(bits)], dim=-1)
    return as_bytes.flatten(-2)[..., : packed_size(n, bits)].contiguous()


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """The n codes of each row that `pack` put into these bytes.

    Raises ValueError if bits is not from 2 to 8, or rows are not as long as n codes are when packed.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_size(n, bits):
        raise ValueError(
            f"{n} codes of {bits} bits are packed in {packed_size(n, bits)} bytes a row, got {packed.shape[-1]}."
        )
    if bits == 8:
        return packed.clone()
    words = _of_eight(packed, bits, 8)
    mask = (1 << bits) - 1
    codes = torch.stack([(words >> (bits * j) & mask).to(torch.uint8) for j in range(CODES)], dim=-1)
    return codes.flatten(-2)[..., :n].contiguous()


def _of_eight(parts: Tensor, count: int, bits: int) -> Tensor:
    """Integers of `count` neighbouring parts, of `bits` bits each; rows are filled up with zeros."""
    parts = torch.nn.functional.pad(parts, (0, -parts.shape[-1] % count)).unflatten(-1, (-1, count))
    words = parts[..., 0].to(torch.int64)
    for j in range(1, count):
        words |= parts[..., j].to(torch.int64) << (bits * j)
    return words


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ValueError(f"bits of packed codes must be from {BITS.start} to {BITS.stop - 1}, got {bits}.")
