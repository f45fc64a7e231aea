r"""Sketches of weights: a small table of values for each row and group of columns, and for each weight a place in it.

Source   Zhang, Su, Desai, Wu, Xu, Shrivastava 2025, arXiv:2410.06364; building: LeanQuant, arXiv:2407.10032
Update   W_ij ~ table_{i, q(j), code_ij}, q(j) the group of column j
         tables: k-means of the weights of a row and group, weight j counted a_j = (U_jj)^-e times
         codes: column by column the nearest value; what it misses by, over U_jj, goes into the columns after it by U_j:
         H = 2 / N sum x x^T + d mean(diag H) I,  H^-1 = U^T U
Shapes   W [out, in], tables [out, groups, 2^bits], codes uint8 [out, in], U [in, in] upper triangular
Start    up to 8 values: evenly from the smallest to the largest weight; more: k-means++ from a seed. With several
         groups, values of half as many are tried too and the better ones kept, so more groups never have a larger loss
Costs    a sort of the weights, then 2^bits look-ups in sorted rows for each pass of k-means; two copies of W for the
         codes. U takes 8 in^2 bytes, and as much again while it is made
Differs  without moments of the inputs a_j = 1 and codes are nearest values. Inputs never seen: their columns are zero.
         e = 2, with which k-means counts a miss as the sweep does; LeanQuant takes 4, which on layers with correlated
         inputs gave larger errors of the output, and without the sweep at times larger ones than a grid
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from ..precision import wide_dtype

BLOCK_NUMBERS = 1 << 20  # weights that k-means has in hand at once
SWEPT_COLUMNS = 128
EVEN_START = 8
SETTLED = 1e-6  # of the variance, squared moves of the centres, over all rows at once


class Sketch(NamedTuple):
    """The tables of a weight, in float32 or wider, and the codes that choose from them."""

    tables: Tensor
    codes: Tensor


class Curvature(NamedTuple):
    """What the inputs of a layer say about its columns: U of H^-1 = U^T U, and which columns no input ever used."""

    factor: Tensor
    unused: Tensor


def build_sketch(
    weight: Float[Tensor, "out in"],
    bits: int,
    groups: int = 1,
    *,
    curvature: Curvature | None = None,
    exponent: float = 2.0,
    sweep: bool = True,
    seed: int = 0,
    passes: int = 100,
) -> Sketch:
    """Tables and codes of a weight; with `curvature`, those that change the layer's output least.

    groups: of equal width, in each row. exponent: how much more columns count that matter more. sweep: later columns
    make up for what earlier ones miss by. passes: of k-means at most.

    Raises ValueError if groups does not divide the number of inputs.
    """
    check_groups_per_row(weight.shape[1], groups)
    values = weight.detach().to(wide_dtype(weight.dtype)).contiguous()
    if curvature is None:
        tables = cluster(values, torch.ones_like(values[0]), 1 << bits, groups, seed=seed, passes=passes)
        return Sketch(tables, nearest_codes(values, tables))
    values = values.masked_fill(curvature.unused, 0.0)
    spread = curvature.factor.diagonal()
    importance = (spread / spread.min()).pow(-exponent)  # the scale is of no account, and might not fit
    tables = cluster(values, importance.to(values.dtype), 1 << bits, groups, seed=seed, passes=passes)
    return Sketch(tables, swept_codes(values, tables, curvature.factor) if sweep else nearest_codes(values, tables))


def check_groups_per_row(in_features: int, groups: int) -> None:
    """Refuse groups that do not fill a row.

    Raises ValueError.
    """
    if groups < 1 or in_features % groups:
        fitting = [n for n in range(1, 33) if in_features % n == 0]
        raise ValueError(
            f"groups must divide the layer's {in_features} inputs, got {groups}; take one of "
            f"{', '.join(map(str, fitting))}."
        )


def curvature_of(total: Float[Tensor, "in in"], count: int, damping: float = 0.01) -> Curvature:
    """From the sum of x x^T over `count` inputs of a layer.

    damping: share of the mean diagonal that is added to the diagonal.

    Raises ValueError if the moments are not those of any inputs.
    """
    moments = total.double() * (2 / count)
    diagonal = moments.diagonal()
    unused = diagonal == 0
    diagonal += unused
    diagonal += damping * diagonal.mean()
    lower, failed = torch.linalg.cholesky_ex(moments)
    if failed.item():
        raise ValueError(
            "the moments of its inputs are not positive definite: give more rows for calibration, or more damping."
        )
    return Curvature(torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), unused)


def dequantise(tables: Float[Tensor, "out groups values"], codes: UInt8[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight that a sketch stands for."""
    places = codes.unflatten(1, (tables.shape[1], -1)).long()
    return tables.gather(2, places).flatten(1)


def cluster(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, " in"],
    num_values: int,
    groups: int,
    *,
    seed: int = 0,
    passes: int = 100,
) -> Float[Tensor, "out groups values"]:
    """By k-means with weights, the values that stand for the weights of each row and group, in ascending order."""
    coarser = None
    if groups > 1:
        fewer = groups // 2 if groups % 2 == 0 else 1
        coarser = cluster(weight, importance, num_values, fewer, seed=seed, passes=passes)
    draws = _draws(weight, num_values, groups, seed)
    at_once = max(1, BLOCK_NUMBERS // weight.shape[1])
    made = []
    for first in range(0, len(weight), at_once):
        rows = slice(first, first + at_once)
        points = _Points(weight[rows].unflatten(1, (groups, -1)), importance.view(groups, -1))
        found = points.settle(points.start(num_values, None if draws is None else draws[rows]), passes)
        if coarser is not None:
            other = points.settle(coarser[rows].repeat_interleave(groups // coarser.shape[1], dim=1), passes)
            better = points.loss(other) < points.loss(found)
            found = torch.where(better[..., None], other, found)
        made.append(found)
    return torch.cat(made).to(weight.dtype)


def cluster_loss(
    weight: Float[Tensor, "out in"],
    importance: Float[Tensor, " in"],
    tables: Float[Tensor, "out groups values"],
) -> Float[Tensor, "out groups"]:
    """What k-means makes small: the weighted squared distances to the nearest value, summed."""
    groups = tables.shape[1]
    points = _Points(weight.unflatten(1, (groups, -1)), importance.view(groups, -1))
    return points.loss(tables.to(points.values.dtype))


def _draws(weight: Tensor, num_values: int, groups: int, seed: int) -> Float[Tensor, "out groups values"] | None:
    """The random numbers of k-means++, the same on all devices and for all sizes of blocks."""
    if num_values <= EVEN_START:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(len(weight), groups, num_values, generator=generator, dtype=torch.float64)
    return drawn.to(weight.device)


class _Points:
    """Numbers in sorted rows, and sums of them up to each place: clusters of numbers on a line are stretches of a row.

    Sums are in float64, since they are taken as differences of sums.
    """

    def __init__(self, weight: Float[Tensor, "rows groups g"], importance: Float[Tensor, "groups g"]):
        self.values, order = weight.double().sort(dim=-1)
        self.counts = importance.double().expand_as(self.values).gather(-1, order)
        self.up_to_counts, self.up_to_sums = (
            torch.nn.functional.pad(each.cumsum(-1), (1, 0)) for each in (self.counts, self.counts * self.values)
        )

    def start(self, num_values: int, draws: Tensor | None) -> Float[Tensor, "rows groups values"]:
        """Evenly spread, or with `draws` by k-means++: each next value is a point, drawn by its squared distance."""
        if draws is None:
            share = torch.linspace(0, 1, num_values, dtype=self.values.dtype, device=self.values.device)
            smallest, largest = self.values[..., :1], self.values[..., -1:]
            return smallest + (largest - smallest) * share
        chosen = [self._drawn(self.counts, draws[..., :1])]
        distance = (self.values - chosen[0]) ** 2
        for index in range(1, num_values):
            chosen.append(self._drawn(self.counts * distance, draws[..., index : index + 1]))
            distance = torch.minimum(distance, (self.values - chosen[-1]) ** 2)
        return torch.cat(chosen, dim=-1).sort(dim=-1).values

    def _drawn(self, likely: Tensor, draw: Float[Tensor, "rows groups one"]) -> Float[Tensor, "rows groups one"]:
        up_to = likely.cumsum(-1)
        place = torch.searchsorted(up_to, draw * up_to[..., -1:], right=True)
        return self.values.gather(-1, place.clamp_(max=self.values.shape[-1] - 1))

    def settle(self, centres: Float[Tensor, "rows groups values"], passes: int) -> Float[Tensor, "rows groups values"]:
        """Centres moved to the means of what is nearest to them, until they hardly move; an empty one stays."""
        still = SETTLED * self.values.var(dim=-1, correction=0).sum()
        for _ in range(passes):
            before, centres = centres, self._means(self._ends(centres), centres).sort(dim=-1).values
            if (centres - before).square().sum() <= still:
                break
        return centres

    def loss(self, centres: Float[Tensor, "rows groups values"]) -> Float[Tensor, "rows groups"]:
        """The weighted squared distances to the nearest centre, summed."""
        places = torch.searchsorted((centres[..., 1:] + centres[..., :-1]) / 2, self.values)
        return (self.counts * (self.values - centres.gather(-1, places)) ** 2).sum(-1)

    def _ends(self, centres: Tensor) -> Int64[Tensor, "rows groups ends"]:
        """Where in each row the points of a centre end, and before the first one begin."""
        inner = torch.searchsorted(self.values, (centres[..., 1:] + centres[..., :-1]) / 2)
        return torch.nn.functional.pad(inner, (1, 1)).index_fill_(
            -1, torch.tensor([centres.shape[-1]], device=centres.device), self.values.shape[-1]
        )

    def _means(self, ends: Tensor, where_empty: Tensor) -> Float[Tensor, "rows groups values"]:
        """The mean of each stretch: within it, though a difference of sums may round to anything for tiny weights."""
        counts, sums = (up_to.gather(-1, ends).diff(dim=-1) for up_to in (self.up_to_counts, self.up_to_sums))
        smallest = self.values.gather(-1, ends[..., :-1].clamp(max=self.values.shape[-1] - 1))
        largest = self.values.gather(-1, (ends[..., 1:] - 1).clamp(min=0))
        means = torch.minimum(torch.maximum(sums / counts, smallest), largest)
        return torch.where((ends.diff(dim=-1) > 0) & (counts > 0), means, where_empty)


def nearest_codes(
    weight: Float[Tensor, "out in"], tables: Float[Tensor, "out groups values"]
) -> UInt8[Tensor, "out in"]:
    """For each weight the place of the nearest value in its table, which is in ascending order."""
    borders = ((tables[..., 1:] + tables[..., :-1]) / 2).contiguous()
    places = torch.searchsorted(borders, weight.unflatten(1, (tables.shape[1], -1)).contiguous(), out_int32=True)
    return places.to(torch.uint8).flatten(1)


def swept_codes(
    weight: Float[Tensor, "out in"],
    tables: Float[Tensor, "out groups values"],
    factor: Float[Tensor, "in in"],
) -> UInt8[Tensor, "out in"]:
    """Codes chosen column by column, where the columns after each make up for what it misses by.

    Source: GPTQ, arXiv:2210.17323, algorithm 1, with a table in place of a grid.
    """
    left = weight.clone()
    factor = factor.to(left.dtype)
    codes = torch.empty_like(left, dtype=torch.uint8)
    in_features, width = weight.shape[1], weight.shape[1] // tables.shape[1]
    for first in range(0, in_features, SWEPT_COLUMNS):
        block = slice(first, min(first + SWEPT_COLUMNS, in_features))
        missed = torch.empty_like(left[:, block])
        for j in range(block.start, block.stop):
            table, column = tables[:, j // width], left[:, j : j + 1]
            places = nearest_codes(column, table[:, None]).long()
            codes[:, j : j + 1] = places
            error = (column - table.gather(1, places)) / factor[j, j]
            left[:, j : block.stop] -= error * factor[j, j : block.stop]
            missed[:, j - first : j - first + 1] = error
        left[:, block.stop :] -= missed @ factor[block, block.stop :]
    return codes
