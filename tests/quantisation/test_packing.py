"""Packed codes: bytes worked out by hand, every width, odd lengths, refusals."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from shoestring.quantisation.packing import pack, packed_size, unpack

BY_HAND = [
    # 3 | 0 << 2 | 2 << 4 | 1 << 6, then 2 and padding
    (2, [3, 0, 2, 1, 2], [0b01100011, 0b00000010]),
    # bits from the lowest on: 5 = 101, 3 = 011, 7 = 111, 0 = 000, 6 = 110
    (3, [5, 3, 7, 0, 6], [0b11011101, 0b01100001]),
    (4, [15, 1, 9], [0x1F, 0x09]),
    (5, [31, 0, 17], [0b00011111, 0b01000100]),
    (6, [63, 1], [0b01111111, 0b00000000]),
    (7, [1, 127], [0b10000001, 0b00111111]),
    (8, [255, 0, 7], [255, 0, 7]),
]


@pytest.mark.parametrize(("bits", "codes", "expected"), BY_HAND)
def test_bytes_are_those_worked_out_by_hand(bits: int, codes: list[int], expected: list[int]):
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.tolist() == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 63, 129])
def test_every_code_comes_back_and_no_bit_is_wasted(bits: int, n: int):
    torch.manual_seed(n)
    for rows in ((), (5,), (2, 3), (0,)):
        codes = torch.randint(0, 1 << bits, (*rows, n), dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (*rows, (n * bits + 7) // 8)
        assert packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, bits, n), codes)


def test_codes_lie_one_after_the_other_whatever_their_bits():
    for bits in range(2, 9):
        codes = torch.randint(0, 1 << bits, (37,), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
        as_one = sum(int(code) << (bits * j) for j, code in enumerate(codes))
        assert bytes(pack(codes, bits).tolist()) == as_one.to_bytes(packed_size(37, bits), "little")


def test_what_is_packed_is_a_copy():
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    packed = pack(codes, 8)
    unpacked = unpack(packed, 8, 3)
    codes.zero_()
    assert packed.tolist() == [1, 2, 3]
    packed.zero_()
    assert unpacked.tolist() == [1, 2, 3]


def test_other_layouts_and_no_codes_are_packed_too():
    turned = torch.randint(0, 8, (11, 5), dtype=torch.uint8).T
    assert torch.equal(pack(turned, 3), pack(turned.contiguous(), 3))
    empty = pack(torch.zeros(4, 0, dtype=torch.uint8), 3)
    assert empty.shape == (4, 0)
    assert unpack(empty, 3, 0).shape == (4, 0)


def test_tensors_without_values_get_the_same_shapes():
    with FakeTensorMode():
        packed = pack(torch.zeros(3, 13, dtype=torch.uint8), 5)
        assert packed.shape == (3, 9)
        assert unpack(packed, 5, 13).shape == (3, 13)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_other_widths_are_refused(bits: int):
    with pytest.raises(ValueError, match=rf"must be from 2 to 8, got {bits}\."):
        pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=rf"must be from 2 to 8, got {bits}\."):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, 3)


def test_a_code_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Codes of 3 bits must be below 8, got 8\."):
        pack(torch.tensor([7, 8], dtype=torch.uint8), 3)


def test_rows_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"9 codes of 3 bits are packed in 4 bytes a row, got 3\."):
        unpack(torch.zeros(2, 3, dtype=torch.uint8), 3, 9)
