r"""TLoRA: a dense transform of the weight and a small residual, both as tensor rings.

Source   Tao, Takida, Murata, Zhao, Mitsufuji 2025, arXiv:2501.08727
Code     none read; the authors' is github.com/taozerui/tlora_diffusion
Update   y = (W0 T + Delta) x + b
         T[i, j] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D])
         ring: Delta[i, j] = tr(B_1[i_1] ... B_D[i_D] C_1[j_1] ... C_D[j_D]), of rank r^2 at most
         lora: Delta = B C, which we take the paper's star to mean
Shapes   T [in, in]; A_d [n_d, n_d, R, R], B_d [m_d, r, r], C_d [n_d, r, r] with in = prod n_d, out = prod m_d and
         i = i_1 + n_1 i_2 + n_1 n_2 i_3 + ..., the first factor fastest
Start    T = I and Delta = 0. asymmetric: A_1 has I in slice (1, 1) and zeros; A_d has I in slice (1, 1), zeros in
         (1, r' > 1), and noise of deviation 0.1 elsewhere. paper: I / R in all slices. B_1 = 0, or B = 0; the
         others are random
Trains   R^2 sum n_d^2 + r^2 (sum m_d + sum n_d) numbers a layer; lora: r (out + in) in place of the second term
Costs    x and r^2 numbers a token kept at a layer. Many tokens: W0 T + Delta is built, and again in backward, with two
         dense matrices at that moment; few tokens or a quantised base: one more [in, in] product a token
Differs  the paper's start gives all R^2 slices of a core the same gradient, so that they never part and T stays a
         Kronecker product: ours breaks the tie. A size of fewer than D prime factors is refused, or split as far as
         it goes with `strict=False`; one factor alone has R = 1. Factors are as equal as can be, in ascending order.
         The penalties pull towards the start's own identity; their weight is not public
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..precision import at_least_float32, autocast_dtype
from ..technique import sum_of
from .base import Adapter, AdapterConfig, linear_sizes, linear_with_rebuilt_weight, register

Core = Float[Tensor, "n n rank rank"]


class TLoRA(Adapter):
    """The cores of transform and residual of one adapter on one layer."""

    name = "tlora"

    def __init__(self, base: nn.Module, config: "TLoRAConfig"):
        super().__init__()
        self.out_features, self.in_features = linear_sizes(base)
        self.init, self.ring = config.init, config.residual == "ring"
        n, r = config.split(self.in_features), config.r
        rank = config.transform_rank if len(n) > 1 else 1  # the trace of one core adds up slices that do the same
        self.numbers: dict[str, int] = {}
        self._add("a", [(size, size, rank, rank) for size in n])
        if self.ring:
            self._add("b", [(size, r, r) for size in config.split(self.out_features)])
            self._add("c", [(size, r, r) for size in n])
        else:
            self._add("b", [(self.out_features, r)])
            self._add("c", [(r, self.in_features)])
        self._set_start(config.init_weights)

    def _add(self, letter: str, shapes: list[tuple[int, ...]]) -> None:
        self.numbers[letter] = len(shapes)
        for number, shape in enumerate(shapes, 1):
            self.register_parameter(f"{letter}_{number}", nn.Parameter(torch.zeros(shape)))

    def cores(self, letter: str) -> list[Tensor]:
        """A_1, ..., A_D for "a"; likewise "b" and "c", which are LoRA's two factors where that is the residual."""
        return [getattr(self, f"{letter}_{number}") for number in range(1, self.numbers[letter] + 1)]

    @torch.no_grad()
    def _set_start(self, init_weights: bool) -> None:
        for number, (core, identity) in enumerate(zip(self.cores("a"), self.identity_cores(), strict=True)):
            core.copy_(identity)
            if not init_weights:
                core.add_(torch.randn_like(core), alpha=0.1)
            elif self.init == "asymmetric" and number > 0:
                nn.init.normal_(core[:, :, 1:], std=0.1)
        for core in [*self.cores("b")[init_weights:], *self.cores("c")]:
            if self.ring:
                size, r, _ = core.shape
                nn.init.normal_(core, std=r**0.5 / (size * r))
            else:
                nn.init.kaiming_uniform_(core, a=5**0.5)  # as in LoRA

    def identity_cores(self) -> list[Core]:
        """Cores of T = I: the start without its noise."""
        found = []
        for core in self.cores("a"):
            size, _, rank, _ = core.shape
            slices = core.new_full((rank, rank), 1 / rank)
            if self.init == "asymmetric":
                slices = core.new_zeros(rank, rank)
                slices[0, 0] = 1
            found.append(core.new_ones(size).diag()[:, :, None, None] * slices)
        return found

    def change(self) -> Float[Tensor, "in in"]:
        """T - I, in float32 at least: in 16 bits 1 + t would be 1 for small t."""
        *first, last = (at_least_float32(core) for core in self.cores("a"))
        if not first:
            return last[:, :, 0, 0] - last.new_ones(len(last)).diag()
        ring = first[0]
        for core in first[1:]:
            ring = torch.einsum("ijrs,klst->kiljrt", ring, core).flatten(2, 3).flatten(0, 1)
        ring = with_slice(ring.transpose(2, 3), -1.0)
        # [k, 1, l, sr] @ [i, sr, j]: [k, i, l, j] as it is to lie in memory, with no other dense matrix on the way
        product = with_slice(last, 1.0)[:, None] @ ring.transpose(1, 2)
        return product.flatten(2).flatten(0, 1)

    def down(self) -> Float[Tensor, "inner in"]:
        """The factor of Delta that reads x; for a ring C_1[j_1] ... C_D[j_D], a row for each ring index."""
        if not self.ring:
            return self.cores("c")[0]
        return chain(self.cores("c")).permute(2, 1, 0).flatten(0, 1)

    def up(self) -> Float[Tensor, "out inner"]:
        """The factor of Delta that writes y; for a ring B_1[i_1] ... B_D[i_D], a column for each ring index."""
        if not self.ring:
            return self.cores("b")[0]
        return chain(self.cores("b")).flatten(1)

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W T + Delta, with no more than two dense matrices at a time beside W."""
        new = torch.addmm(weight, weight, self.change().to(weight.dtype))
        return new.addmm_(self.up().to(weight.dtype), self.down().to(weight.dtype))

    def through(self, x: Float[Tensor, "*batch in"], layer: Callable[[Tensor], Tensor]) -> Float[Tensor, "*batch out"]:
        """layer(T x) + Delta x."""
        turned = x.to(autocast_dtype(x) or x.dtype)  # one copy for both products to keep
        y = layer(x + linear_with_rebuilt_weight(turned, self.change, self.cores("a")).to(x.dtype))
        inner = linear_with_rebuilt_weight(turned, self.down, self.cores("c"))
        return y + linear_with_rebuilt_weight(inner, self.up, self.cores("b")).to(y.dtype)

    def prefers_tokens(self, num_tokens: int) -> bool:
        """By the number of products: T x, in training with two in backward, or W T and the gradients of both."""
        out, in_ = self.out_features, self.in_features
        if torch.is_grad_enabled():
            return 3 * num_tokens * in_ <= num_tokens * out + 3 * in_ * out
        return num_tokens <= out

    def penalty(self, form: str) -> Tensor:
        """How far the transform's cores, or those of T T^T, are from those of the identity: a sum of norms."""
        cores, targets = self.cores("a"), self.identity_cores()
        if form == "orthogonal":
            cores, targets = [gram(core) for core in cores], [gram(core) for core in targets]
        pairs = zip(cores, targets, strict=True)
        return torch.stack([torch.linalg.vector_norm(a - b, dim=(0, 1)).sum() for a, b in pairs]).sum()


def with_slice(core: Core, value: float) -> Float[Tensor, "n n slices"]:
    """The slices of a core in one row, and one more, `value` times the identity."""
    identity = torch.full_like(core[:, 0, 0, 0], value).diag()
    return torch.cat([core.flatten(2), identity[:, :, None]], dim=2)


def chain(cores: list[Tensor]) -> Float[Tensor, "size r r"]:
    """The matrix products B_1[i_1] ... B_D[i_D] of all i, the first index fastest; in float32 at least."""
    ring, *others = map(at_least_float32, cores)
    for core in others:
        ring = torch.einsum("irs,kst->kirt", ring, core).flatten(0, 1)
    return ring


def gram(core: Core) -> Float[Tensor, "n n rank2 rank2"]:
    """A core of T T^T: the sum over l of A[i, l] kron A[j, l]."""
    return torch.einsum("ilrs,jltu->ijrtsu", core, core).flatten(4, 5).flatten(2, 3)


@cache
def split(size: int, num_factors: int) -> tuple[int, ...] | None:
    """`size` as that many factors above 1 with the least sum, in ascending order; None where it has too few.

    >>> split(640, 3), split(7, 2)
    ((8, 8, 10), None)
    """
    if num_factors == 1:
        return (size,) if size > 1 else None
    found = []
    for factor in range(2, int(size ** (1 / num_factors) + 1e-9) + 1):
        others = split(size // factor, num_factors - 1) if size % factor == 0 else None
        if others is not None and others[0] >= factor:
            found.append((factor, *others))
    return min(found, key=sum, default=None)


@register
@dataclass(kw_only=True)
class TLoRAConfig(AdapterConfig):
    """TLoRA: each pretrained weight times a trained dense matrix near the identity, plus a small residual.

    transform_rank: R, ring rank of the transform, 1 <= R; the paper uses 2.
    residual: "ring", or "lora" for LoRA's product of two factors (the paper's starred form, as we read it).
    r: of the residual, 1 <= r; the paper uses ring ranks of 4 and 6.
    num_factors: D, how many factors a size is split into; the paper uses 2 and 3.
    factors: sizes with the factors to use, in ascending order of stride, such as {640: [8, 8, 10]}; others are split
        as equally as they can be.
    strict: refuse a size of fewer than D prime factors; else it is split as far as it goes, and a prime size gives a
        transform of its square.
    init: "asymmetric" or "paper".
    penalty: weight of the penalty on the transform in the loss, 0 <= penalty.
    penalty_form: "identity": distance of its cores from the identity's; "orthogonal": the same for T T^T.

    Raises ValueError for values out of range, unknown words, and factors that do not fit.
    """

    method: ClassVar = TLoRA
    transform_rank: int = 2
    residual: Literal["ring", "lora"] = "ring"
    r: int = 6
    num_factors: int = 2
    factors: dict[int, list[int]] | None = None
    strict: bool = True
    init: Literal["asymmetric", "paper"] = "asymmetric"
    penalty: float = 0.0
    penalty_form: Literal["identity", "orthogonal"] = "identity"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("transform_rank", "r", "num_factors"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of tlora must be at least 1, got {getattr(self, name)}.")
        words = {"residual": ("ring", "lora"), "init": ("asymmetric", "paper")}
        for name, (one, other) in {**words, "penalty_form": ("identity", "orthogonal")}.items():
            if getattr(self, name) not in (one, other):
                raise ValueError(f"{name} of tlora must be {one!r} or {other!r}, got {getattr(self, name)!r}.")
        if self.penalty < 0:
            raise ValueError(f"penalty of tlora must be at least 0, got {self.penalty}.")
        if self.factors is not None:
            self.factors = {int(size): list(given) for size, given in self.factors.items()}  # JSON has no whole keys
            for size, given in self.factors.items():
                self._check(size, given)

    def _check(self, size: int, given: list[int]) -> None:
        if len(given) != self.num_factors:
            raise ValueError(
                f"factors of tlora must be num_factors={self.num_factors} numbers a size, got {given} for {size}."
            )
        if min(given) < 1 or prod(given) != size:
            raise ValueError(f"factors of tlora must multiply to the size, got {given} = {prod(given)} for {size}.")

    def split(self, size: int) -> tuple[int, ...]:
        """The factors of a size.

        Raises ValueError if it has too few and strict is set.
        """
        if self.factors and size in self.factors:
            return tuple(self.factors[size])
        if found := split(size, self.num_factors):
            return found
        if self.strict:
            raise ValueError(
                f"tlora cannot split the size {size} into {self.num_factors} factors above 1: leave the layer out of "
                "target_modules, lower num_factors, give factors, or set strict=False to split it as far as it goes."
            )
        return next((found for count in range(self.num_factors, 0, -1) if (found := split(size, count))), (size,))

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """penalty * the distances of all transforms that train."""
        transforms = [m for m in model.modules() if isinstance(m, TLoRA) and m.cores("a")[0].requires_grad]
        if not self.penalty or not transforms:
            return None
        return self.penalty * sum_of([one.penalty(self.penalty_form) for one in transforms])
