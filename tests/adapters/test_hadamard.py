"""Hadamard transforms: matrices of every construction, against dense Kronecker products, and sizes that have none."""

import numpy as np
import pytest
import torch

from shoestring.adapters.hadamard import (
    _paley,
    has_transform,
    matrix,
    next_size,
    products_a_number,
    transform,
)

FIRST_KIND = (12, 20, 24, 28, 44, 60, 108, 140, 344, 368)  # q = 11, 19, 23, 27 = 3^3, 43, 59, 107, 139, 343 = 7^3, 367
SECOND_KIND = (36, 52, 76, 100, 148, 180, 196, 252)  # q = 17, 25 = 5^2, 37, 49 = 7^2, 73, 89 or 179, 97, 125 = 5^3
OF_MODELS = (384, 576, 768, 896, 960, 1024, 1152, 1280, 1536, 2048, 2560, 2880, 3072, 3584, 4096, 4864, 5120, 5632)
LARGE = (6912, 8192, 8960, 11008, 13824, 14336, 17920, 18944, 27648, 29568)


@pytest.mark.parametrize("k", FIRST_KIND + SECOND_KIND)
def test_paleys_matrices_have_orthogonal_rows_of_ones_and_minus_ones(k):
    h = _paley(k)
    assert h.shape == (k, k)
    assert np.array_equal(np.abs(h), np.ones((k, k)))
    assert np.array_equal(h @ h.T, k * np.eye(k))


def sylvester(bits):
    h = np.ones((1, 1))
    for _ in range(bits):
        h = np.block([[h, h], [h, -h]])
    return h


@pytest.mark.parametrize(
    ("k", "bits"), [(1, 0), (1, 1), (1, 3), (1, 7), (1, 11), (12, 0), (12, 3), (12, 6), (28, 2), (36, 4), (344, 1)]
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_fast_transform_is_that_of_the_dense_kronecker_product(k, bits, seed):
    dense = torch.from_numpy(np.kron(_paley(k) if k > 1 else np.ones((1, 1)), sylvester(bits)))
    n = len(dense)
    assert torch.equal(matrix(n), dense)
    x = torch.randn(3, 5, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(transform(x), x @ dense.T / n**0.5)
    torch.testing.assert_close(transform(x, transposed=True), x @ dense / n**0.5)
    assert torch.equal(transform(x[0, 0]), transform(x[:1, :1]).flatten())


@pytest.mark.parametrize("n", [*OF_MODELS, *LARGE, 172 * 2, 156 * 4, 12 * 8, 28 * 16])
def test_the_transposed_transform_undoes_it_at_the_sizes_of_models(n):
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(transform(transform(x), transposed=True), x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(transform(x).norm(), x.norm(), rtol=1e-5, atol=0)
    assert products_a_number(n) <= max(n / 12, 320 + 64)


def test_gradients_are_those_of_the_transposed_transform():
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, (x,), fast_mode=True)
    dy = torch.randn(2, 24, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(transform(x), x, dy)[0], transform(dy, transposed=True))


def test_half_precision_neither_overflows_nor_loses_more_than_its_rounding():
    x = 200 * torch.randn(4, 14336, generator=torch.Generator().manual_seed(0))
    y = transform(x.half())
    assert y.isfinite().all()
    torch.testing.assert_close(y.float(), transform(x), rtol=0, atol=2.0)


@pytest.mark.parametrize("n", [3, 6, 10, 14, 18, 92, 156, 172, 190, 577])
def test_sizes_without_a_transform_are_refused_by_name_with_the_next_one(n):
    assert not has_transform(n)
    with pytest.raises(ValueError, match=f"no Hadamard transform of size {n} here: .* next size .* {next_size(n)}"):
        transform(torch.zeros(n))


def test_the_next_size_is_the_size_itself_where_it_has_one():
    assert [next_size(n) for n in (1, 2, 5, 10, 20, 92, 577)] == [1, 2, 8, 12, 20, 96, 580]
