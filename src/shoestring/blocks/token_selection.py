"""Which tokens of a batch are selected: drawn at random, among the supervised ones, or by their TokenSeek score."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..fakes import has_values


@dataclass(frozen=True, eq=False)
class Selection:
    """The selected tokens of each sample, and the others.

    kept: positions, ascending; a sample with fewer selected tokens than others is filled up with others of its own.
    rest: all other positions, ascending.
    valid: False where `kept` is filled up.
    filled_up: whether `valid` is False anywhere.
    """

    kept: Int[Tensor, "batch kept"]
    rest: Int[Tensor, "batch rest"]
    valid: Bool[Tensor, "batch kept"]
    filled_up: bool

    @cached_property
    def order(self) -> Int[Tensor, "batch tokens"]:
        """Positions in the order of `kept` and then `rest`."""
        return torch.cat([self.kept, self.rest], 1)

    @cached_property
    def mask(self) -> Bool[Tensor, "batch tokens"]:
        """True at selected positions."""
        mask = torch.zeros_like(self.order, dtype=torch.bool)
        return mask.scatter(1, self.kept, self.valid)

    @property
    def everything(self) -> bool:
        """Whether every token of every sample is selected."""
        return self.rest.shape[1] == 0 and not self.filled_up


def select(
    scores: Float[Tensor, "batch tokens"],
    allowed: Bool[Tensor, "batch tokens"],
    forced: Bool[Tensor, "batch tokens"],
    keep_fraction: float,
) -> Selection:
    """The `forced` positions and those of the highest scores among the `allowed` ones, `keep_fraction` of these in all.

    At least one position is selected in a sample that has an allowed one; ties go to the earlier position. Of tensors
    without values, such as fake ones, `keep_fraction` of all positions are selected, as if all were allowed.
    """
    num_kept = (allowed.sum(1) * keep_fraction).round().long().clamp(min=1)
    num_kept = num_kept.maximum((forced & allowed).sum(1)).minimum(allowed.sum(1))
    ranked = torch.where(allowed, scores, scores.min() - 1)
    ranked = torch.where(forced & allowed, scores.max() + 1, ranked)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    if has_values(scores):
        most, fewest = int(num_kept.max()), int(num_kept.min())
    else:
        most = fewest = max(round(scores.shape[1] * keep_fraction), 1)
    chosen = order[:, :most]
    kept, by_position = chosen.sort(1)
    valid = (torch.arange(most, device=scores.device) < num_kept[:, None]).gather(1, by_position)
    rest = order[:, most:].sort(1).values
    return Selection(kept, rest, valid, filled_up=fewest < most)


def ends(allowed: Bool[Tensor, "batch tokens"], last: bool) -> Bool[Tensor, "batch tokens"]:
    """True at the first allowed position of each sample, and at the last one where asked."""
    place = allowed.long().cumsum(1)
    at = allowed & (place == 1)
    return at | (allowed & (place == allowed.sum(1, keepdim=True))) if last else at


def seek_scores(
    attention: Float[Tensor, "batch tokens"],
    gradient: Float[Tensor, "batch tokens"],
    allowed: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """TokenSeek's score: log of the attention a token receives, plus its gradient scaled to [0, 1] in each sample.

    attention: summed over queries, mean over heads. gradient: of the last block's input, sum of sizes over the width.
    Source: arXiv:2601.19739, both weights 1.
    """
    inside = gradient.masked_fill(~allowed, float("inf"))
    low = inside.amin(1, keepdim=True)
    high = gradient.masked_fill(~allowed, float("-inf")).amax(1, keepdim=True)
    scaled = (gradient - low) / (high - low).clamp_min(torch.finfo(gradient.dtype).tiny)
    tiny = torch.finfo(attention.dtype).tiny
    return attention.clamp_min(tiny).log() + scaled
