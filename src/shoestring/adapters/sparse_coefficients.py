r"""Which few coefficients of a change of a weight to keep, and with which values, so that the output is off by least.

Source   Jeon et al., ICLR 2026, arXiv:2509.17428: AdaAlloc and value refinement
Update   D ~ F U with p non-zeros in F, D [out, in] wanted, U [in, in] orthonormal; error ||(D - F U) X^T||
         G = U (X^T X) U^T     f = D U^T     n_i = ||D_i X^T||
         p_i = p n_i^t / sum_j n_j^t, rounded down, at most in; what is left goes to the rows with the fewest
         of row i the p_i places with the largest f_ij^2 G_jj are kept, E_i
         values: argmin (f_i - c) G (f_i - c)^T, which is f_i + G[E, E]^-1 G[E, not E] f_i[not E] on E
Costs    in^2 log in and out in^2 operations for G and its products with f, and out p_i^3 / 3 for the values; once
Differs  In the basis of U neither the root of X^T X nor its eigenvectors are needed. Solving for what is added to f
         makes a row that keeps all of its coefficients exact, however badly G is conditioned
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BYTES_AT_ONCE = 1 << 26  # of the systems that are solved together


@dataclass(frozen=True)
class Coefficients:
    """The non-zeros of F.

    places: row-major and ascending. unrefined: how many rows have values that make up for nothing, having no solution.
    """

    places: Int[Tensor, " p"]
    values: Float[Tensor, " p"]
    unrefined: int = 0


def best_coefficients(
    wanted: Float[Tensor, "out n"], moments: Float[Tensor, "n n"] | None, counts: Int[Tensor, " out"]
) -> Coefficients:
    """The coefficients to keep, given f = D U^T in `wanted` and how many each row keeps.

    moments: G; None stands for the identity.
    """
    weights = wanted.square() if moments is None else wanted.square() * moments.diagonal()
    rank = weights.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = rank < counts[:, None]
    values, unrefined = wanted, 0
    if moments is not None:
        added, unrefined = _corrections(wanted, moments, kept, counts)
        values = wanted + added
    return Coefficients(kept.flatten().nonzero().flatten(), values[kept], unrefined)


def allocate(errors: Float[Tensor, " out"], total: int, most: int, power: float = 1.0) -> Int[Tensor, " out"]:
    """How many of `total` coefficients each row gets, at most `most`, by its share of the errors to `power`.

    No row has fewer than one of a smaller error. Without any error all rows count the same.
    """
    shares = errors.double().pow(power)
    shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(shares))
    counts = (total * shares).floor().long().clamp(max=most)
    while (left := total - int(counts.sum())) > 0:
        open_rows = (counts < most).nonzero().flatten()
        if each := left // len(open_rows):
            counts[open_rows] = (counts[open_rows] + each).clamp(max=most)
            continue
        by_error = open_rows[errors[open_rows].argsort(descending=True, stable=True)]
        fewest = by_error[counts[by_error].argsort(stable=True)][:left]
        counts[fewest] += 1
    return counts


def output_errors(delta: Float[Tensor, "out n"], moments: Float[Tensor, "n n"] | None) -> Float[Tensor, " out"]:
    """||D_i X^T|| of each row, given X^T X; without it ||D_i||."""
    product = delta if moments is None else delta @ moments
    return (product * delta).sum(1).clamp(min=0).sqrt()


def _corrections(
    wanted: Float[Tensor, "out n"],
    moments: Float[Tensor, "n n"],
    kept: Bool[Tensor, "out n"],
    counts: Int[Tensor, " out"],
) -> tuple[Float[Tensor, "out n"], int]:
    """What is added to each kept coefficient to make up for those that are not, and the number of rows without.

    A row gets zeros where that cannot be solved.
    """
    unrefined = 0
    pull = wanted.masked_fill(kept, 0) @ moments
    added = torch.zeros_like(wanted)
    for rows in _batches(counts, wanted.shape[1]):
        width = int(counts[rows[-1]])
        columns = kept[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
        real = torch.arange(width, device=counts.device) < counts[rows, None]
        system = moments[columns[:, :, None], columns[:, None, :]]
        one = torch.eye(width, dtype=system.dtype, device=system.device)
        system = torch.where(real[:, :, None] & real[:, None, :], system, one)
        factor, failed = torch.linalg.cholesky_ex(system)
        solved = torch.cholesky_solve((pull[rows].gather(1, columns) * real)[..., None], factor)[..., 0]
        found = (failed == 0) & solved.isfinite().all(dim=1)
        added[rows] = added[rows].scatter(1, columns, torch.where(found[:, None], solved, 0) * real)
        unrefined += int((~found).sum())
    return added, unrefined


def _batches(counts: Int[Tensor, " out"], most: int) -> Iterator[Int[Tensor, " rows"]]:
    """Rows with systems to solve, of rising size, as many at once as fit `BYTES_AT_ONCE`."""
    order = counts.argsort(stable=True)
    order = order[(counts[order] > 0) & (counts[order] < most)]
    sizes = counts[order].tolist()
    end = len(sizes)
    while end > 0:
        rows = max(1, BYTES_AT_ONCE // (8 * sizes[end - 1] ** 2))
        yield order[max(0, end - rows) : end]
        end -= rows
