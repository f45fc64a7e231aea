r"""ALoRE: low-rank experts as sums of Kronecker products, before frozen linear layers.

Source   Du et al. 2024, arXiv:2412.08341
Code     none published
Update   x' = x + s (W_up (W_down x + c_down) + c_up), y = W0 x' + b
         W_down = sum_i P_i kron Q_i, W_up = sum_i R_i kron S_i, over n experts
         per_expert: the sum of (R_i kron S_i) ((P_i kron Q_i) x + c_down), without products of two experts
Shapes   x [in], W_down [r, in], W_up [in, r]; P_i, R_i [n, n], Q_i [r / n, in / n], S_i [in / n, r / n]
Start    S_i = 0 and c = 0, so that x' = x; Q_i Kaiming; P_i normal with deviation 1 / n, R_i 1 / sqrt(n)
Trains   2 r in / n + 2 n^3 numbers an adapter, r + in more with biases. Layers of one parent that read one x (query,
         key and value; gate and up) share an adapter
Costs    x kept at a layer; two thin products a token, formed at each layer that shares an adapter, and six in backward,
         two of them those of forward again. Merged exactly, b' = b + W0 s (W_up c_down + c_up), at no cost after
Differs  shapes, start and defaults are our reading of a paper that gives no code. P_i and R_i are drawn so wide that
         W_down has the variance of LoRA's first factor, and W_up moves by about the learning rate
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..precision import at_least_float32
from .base import Adapter, AdapterConfig, keeping_only_input, linear_sizes, register
from .placement import input_group, input_layers


class Experts(nn.Module):
    """The experts of all adapters; those of one are made when its first layer asks for them."""

    def __init__(self, model: nn.Module, config: "ALoREConfig"):
        super().__init__()
        self.n, self.inner, self.has_bias = config.num_experts, config.r, config.has_bias
        self.zero_start = config.init_weights
        self.groups = {id(module): input_group(name) for name, module in model.named_modules()}

    def of(self, layer: nn.Module) -> dict[str, str]:
        """The names here of P, Q, R, S and the biases of a layer.

        Raises ValueError if the experts do not divide the layer's input.
        """
        n, width = self.n, linear_sizes(layer)[1]
        if width % n:
            raise ValueError(f"num_experts of alore must divide the layer's input of {width} numbers, got {n}.")
        shapes: dict[str, tuple[int, ...]] = {
            "p": (n, n, n),
            "q": (n, self.inner // n, width // n),
            "r": (n, n, n),
            "s": (n, width // n, self.inner // n),
        }
        if self.has_bias:
            shapes |= {"c_down": (self.inner,), "c_up": (width,)}
        group = self.groups[id(layer)].replace(".", "-")
        names = {part: f"{part}_{group}_{width}" for part in shapes}
        if names["p"] not in self._parameters:
            for part, shape in shapes.items():
                self.register_parameter(names[part], nn.Parameter(self._start(part, shape)))
        return names

    def _start(self, part: str, shape: tuple[int, ...]) -> Tensor:
        """The values that one part starts with, of all experts."""
        value = torch.zeros(shape)
        if part in ("p", "r"):
            nn.init.normal_(value, std=1 / self.n if part == "p" else self.n**-0.5)
        elif part == "q" or (part == "s" and not self.zero_start):
            for one in value:
                nn.init.kaiming_uniform_(one, a=5**0.5)
        elif not self.zero_start:
            nn.init.normal_(value, std=0.1)
        return value


class ALoRE(Adapter):
    """The experts in front of one layer; they stand once for all layers that read the same x."""

    name = "alore"

    @classmethod
    def shared(cls, model: nn.Module, config: "ALoREConfig") -> nn.Module:
        """The experts of all adapters, none at first."""
        return Experts(model, config)

    def __init__(self, base: nn.Module, config: "ALoREConfig", experts: Experts):
        super().__init__()
        self.names = experts.of(base)
        self.scale, self.per_expert = config.scale, config.aggregate == "per_expert"

    def part(self, name: str) -> Tensor:
        """One of P, Q, R, S [expert, ...] and the biases."""
        return getattr(self.shared_state[0], self.names[name])  # a plain tensor under FSDP

    def down(self) -> Float[Tensor, "inner in"]:
        """The sum of all P_i kron Q_i, or with `per_expert` one below the other; in float32 at least."""
        form = "ipm,iak->ipamk" if self.per_expert else "ipm,iak->pamk"
        product = torch.einsum(form, *map(at_least_float32, (self.part("p"), self.part("q"))))
        return product.flatten(-2).flatten(0, -2)

    def up(self) -> Float[Tensor, "in inner"]:
        """The sum of all R_i kron S_i, or with `per_expert` one beside the other; in float32 at least."""
        form = "ipm,iak->paimk" if self.per_expert else "ipm,iak->pamk"
        product = torch.einsum(form, *map(at_least_float32, (self.part("r"), self.part("s"))))
        return product.flatten(2).flatten(0, 1)

    def biases(self) -> tuple[Tensor | None, Tensor | None]:
        """c_down, once for each expert with `per_expert`, and c_up; None without biases."""
        if "c_up" not in self.names:
            return None, None
        c_down, c_up = at_least_float32(self.part("c_down")), at_least_float32(self.part("c_up"))
        return c_down.repeat(len(self.part("p"))) if self.per_expert else c_down, c_up

    def branch(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch in"]:
        """s (W_up (W_down x + c_down) + c_up), in x's dtype."""
        c_down, c_up = (None if c is None else c.to(x.dtype) for c in self.biases())
        inner = F.linear(x, self.down().to(x.dtype), c_down)
        return F.linear(inner, (self.scale * self.up()).to(x.dtype), None if c_up is None else self.scale * c_up)

    def through(self, x: Float[Tensor, "*batch in"], layer: Callable[[Tensor], Tensor]) -> Float[Tensor, "*batch out"]:
        """layer(x')."""
        return layer(x + keeping_only_input(x, self.branch, [self.part(name) for name in self.names]).to(x.dtype))

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """W (I + s W_up W_down)."""
        return weight + (weight @ (self.scale * self.up()).to(weight.dtype)) @ self.down().to(weight.dtype)

    def new_bias(self, weight: Float[Tensor, "out in"], bias: Tensor | None) -> Tensor | None:
        """b + W s (W_up c_down + c_up)."""
        c_down, c_up = self.biases()
        if c_down is None or c_up is None:
            return bias
        added = weight @ (self.scale * (self.up() @ c_down + c_up)).to(weight.dtype)
        return added if bias is None else bias + added


@register
@dataclass(kw_only=True)
class ALoREConfig(AdapterConfig):
    """ALoRE: low-rank experts between a norm and the frozen layers that read it, merged into these after training.

    target_modules: linear layers; None: those that read what enters attention and the feed-forward part.
    num_experts: n, 1 <= n; it must divide r and the input of each layer. 2 n^3 numbers train: keep it at 8 or less.
    r: inner size of the bottleneck, num_experts <= r.
    scale: s; the best differs from task to task, 0.1, 0.5, 1, 5 and 10 are worth a try.
    aggregate: "sum_then_compose": the experts are added up in both layers; "per_expert": each has a bottleneck of
        its own, without products of two experts.
    has_bias: trained biases after both layers; they merge into layers with a bias only.

    Raises ValueError for values out of range, an unknown word, and num_experts that does not divide r.
    """

    method: ClassVar = ALoRE
    num_experts: int = 4
    r: int = 16
    scale: float = 1.0
    aggregate: Literal["sum_then_compose", "per_expert"] = "sum_then_compose"
    has_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts < 1:
            raise ValueError(f"num_experts of alore must be at least 1, got {self.num_experts}.")
        if self.r < self.num_experts or self.r % self.num_experts:
            raise ValueError(
                f"r of alore must be a multiple of num_experts={self.num_experts} and at least that, got {self.r}."
            )
        if self.scale == 0:
            raise ValueError("scale of alore must not be 0, which would leave the model as it is for good.")
        if self.aggregate not in ("sum_then_compose", "per_expert"):
            raise ValueError(f"aggregate of alore must be 'sum_then_compose' or 'per_expert', got {self.aggregate!r}.")

    def default_targets(self, model: nn.Module) -> set[str]:
        """The layers that read what enters attention and the feed-forward part, in the blocks asked for.

        Raises ValueError if the model has none.
        """
        chosen = self.layers_to_transform
        wanted = None if chosen is None else {chosen} if isinstance(chosen, int) else set(chosen)
        found = {name for name, block in input_layers(model).items() if wanted is None or block in wanted}
        if not found:
            blocks = "" if wanted is None else f" in blocks {sorted(wanted)}"
            raise ValueError(
                f"{type(model).__name__} has no list of equal blocks with layers of a name known to read what enters "
                f"attention or the feed-forward part{blocks}; set target_modules of alore to the layers to adapt."
            )
        return found
