"""Group quantisers: grids worked out by hand, bounds on the error, groups that need care, refusals."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from shoestring.quantisation.groups import (
    bounds,
    dequantise,
    grid_of,
    round_to_nearest,
    to_groups,
    to_signed,
    to_unsigned,
)


def test_groups_are_neighbours_along_the_inputs():
    weight = torch.arange(12.0).reshape(2, 6)
    assert to_groups(weight, 3).tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
    assert to_groups(weight, 3).data_ptr() == weight.data_ptr()
    assert to_groups(weight.T.contiguous().T, 2).tolist() == to_groups(weight, 2).tolist()


def test_a_symmetric_grid_is_that_worked_out_by_hand():
    # 3 bits: codes -4 .. 3; the first group is bound by its largest weight, the second by its smallest
    weight = torch.tensor([[-1.0, 0.6, 3.0, -4.0, 1.0, 0.0]])
    codes, step, offset = round_to_nearest(weight, 3, 3)
    assert step.tolist() == [[1.0, 1.0]]
    assert offset.tolist() == [[0.0, 0.0]]
    assert codes.tolist() == [[-1, 1, 3, -4, 1, 0]]
    assert dequantise(codes, step, offset).tolist() == [[-1.0, 1.0, 3.0, -4.0, 1.0, 0.0]]


def test_a_grid_with_an_offset_is_that_worked_out_by_hand():
    # 2 bits: codes -2 .. 1; from 1 to 7 are three steps of 2, so that code -2 is 1 and the offset 5
    codes, step, offset = round_to_nearest(torch.tensor([[1.0, 2.5, 5.5, 7.0]]), 2, 4, symmetric=False)
    assert (step.tolist(), offset.tolist()) == ([[2.0]], [[5.0]])
    assert codes.tolist() == [[-2, -1, 0, 1]]
    assert dequantise(codes, step, offset).tolist() == [[1.0, 3.0, 5.0, 7.0]]


def test_halves_go_to_the_even_code():
    codes, _, _ = round_to_nearest(torch.tensor([[0.5, 1.5, -0.5, -4.0]]), 3, 4)
    assert codes.tolist() == [[0, 2, 0, -4]]


@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_stay_zeros(symmetric: bool):
    weight = torch.tensor([[0.0, 0.0, 0.0, 1.0, -2.0, 0.0]])
    codes, step, offset = round_to_nearest(weight, 4, 3, symmetric)
    assert step[0, 0] == 1
    assert offset[0, 0] == 0
    assert codes[0, :3].tolist() == [0, 0, 0]
    assert dequantise(codes, step, offset)[0, :3].tolist() == [0, 0, 0]
    assert (step > 0).all()


@pytest.mark.parametrize("value", [0.7, -0.3, 1e-3, -123.0])
def test_equal_weights_are_kept_exactly_by_an_offset_and_to_rounding_without(value: float):
    weight = torch.full((2, 4), value)
    assert torch.equal(dequantise(*round_to_nearest(weight, 3, 4, symmetric=False)), weight)
    torch.testing.assert_close(dequantise(*round_to_nearest(weight, 3, 4)), weight, rtol=1e-6, atol=0)


def test_negative_weights_alone_use_the_codes_below_zero():
    # all but 4 steps below zero would be wasted if the size of the largest weight, -3.6, had to fit above zero
    weight = torch.tensor([[-4.0, -3.6, -0.9]])
    codes, step, _ = round_to_nearest(weight, 3, 3)
    assert step.tolist() == [[1.0]]
    assert codes.tolist() == [[-4, -4, -1]]
    codes, step, offset = round_to_nearest(torch.tensor([[-7.0, -1.0]]), 2, 2, symmetric=False)
    assert (step.tolist(), offset.tolist(), codes.tolist()) == ([[2.0]], [[-3.0]], [[-2, 1]])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group_size", [1, 3, 7, 21])
def test_no_weight_moves_by_more_than_half_a_step(bits: int, group_size: int, symmetric: bool):
    torch.manual_seed(bits)
    weight = torch.randn(13, 21, dtype=torch.float64) * torch.rand(13, 1, dtype=torch.float64)
    codes, step, offset = round_to_nearest(weight, bits, group_size, symmetric)
    assert step.shape == offset.shape == (13, 21 // group_size)
    low, high = bounds(bits)
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    error = to_groups((dequantise(codes, step, offset) - weight).abs(), group_size)
    assert (error <= step[..., None] / 2 * (1 + 1e-9)).all()


def test_weights_in_16_bits_are_rounded_in_32():
    weight = torch.randn(5, 8).bfloat16()
    codes, step, offset = round_to_nearest(weight, 4, 4)
    assert step.dtype == offset.dtype == torch.float32
    expected = round_to_nearest(weight.float(), 4, 4)
    assert all(torch.equal(a, b) for a, b in zip((codes, step, offset), expected, strict=True))


def test_codes_are_counted_from_the_smallest_when_they_are_packed():
    codes = torch.tensor([[-4, 0, 3]], dtype=torch.int8)
    assert to_unsigned(codes, 3).tolist() == [[0, 4, 7]]
    every = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(to_signed(to_unsigned(every, 8), 8), every)


def test_tensors_without_values_get_the_same_shapes():
    with FakeTensorMode():
        codes, step, offset = round_to_nearest(torch.zeros(3, 12), 4, 4, symmetric=False)
        assert (codes.shape, step.shape, offset.shape) == ((3, 12), (3, 3), (3, 3))
        assert dequantise(codes, step, offset).shape == (3, 12)


@pytest.mark.parametrize("group_size", [0, 5, 48])
def test_groups_that_do_not_divide_a_row_are_refused_with_sizes_that_do(group_size: int):
    with pytest.raises(ValueError, match=rf"must divide the layer's 24 inputs, got {group_size}; take one of .*\d"):
        to_groups(torch.zeros(2, 24), group_size)
    with pytest.raises(ValueError, match="must divide"):
        grid_of(torch.zeros(2, 24), 4, group_size, symmetric=True)


@pytest.mark.parametrize("bits", [1, 9, 16])
def test_bits_that_no_code_has_are_refused(bits: int):
    with pytest.raises(ValueError, match=rf"must be from 2 to 8, got {bits}\."):
        round_to_nearest(torch.zeros(2, 4), bits, 2)
