r"""MoLA: a mixture of LoRA experts, with a number of experts of its own for each layer.

Source   Gao et al. 2024, arXiv:2402.08562, Findings of NAACL 2025
Update   p = softmax(G x);  S = the k largest of p;  w_i = p_i / sum over S of p, for i in S
         y' = y + (alpha / r) sum over S of w_i B_i A_i drop(x)
         loss' = loss + balance * sum over layers of N sum_i f_i P_i, with f_i the share of all choices of all tokens
         that fell on expert i (a constant in backward) and P_i the mean of p_i over the tokens, padding left out
Shapes   G [N, in], A_i [r, in], B_i [out, r]; A stands as [N r, in] and B as [out, N r]
Start    A and G Kaiming, B = 0: exactly the pretrained model
Trains   N (r (in + out) + in) numbers a layer
Costs    the products of one LoRA of rank N r: all experts run for all tokens, in two matrix products without a shape
         that depends on the routing. Kept: x, p and, for the k experts chosen, their numbers and A_i x: N + k r numbers
         a token beside x. One byte more for each number of x under dropout
Differs  the balance loss has one term for each adapted linear layer, as in the paper; its code has one for each block,
         over the tokens of all its linear layers, and counts padding. The loss is added by a recipe only
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..errors import SettingError, did_you_mean
from ..modes import in_backward, in_training, is_aside, is_counted
from ..precision import autocast_dtype, autocast_off, wide_dtype
from ..real_tokens import learning_rows, real_tokens
from ..technique import Moment, Technique, sum_of
from .base import Adapter, AdapterConfig, linear_sizes, register
from .placement import place_in_stack

ALLOCATIONS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "rectangle": (5, 5, 5, 5),
        "triangle": (8, 6, 4, 2),
        "inverted_triangle": (2, 4, 6, 8),
        "diamond": (2, 8, 8, 2),
        "hourglass": (8, 2, 2, 8),
    }
)

Choices = tuple[Tensor, Tensor, Tensor | None]
"""p [..., N] with its graph, the numbers of the experts chosen [..., k], and which tokens learn."""

# Choices of the forward in hand, for each adapter with a balance loss in a recipe; None: of a call without gradients.
# Not on the adapters: a copy of a model must not collect what nobody takes.
_CHOICES: WeakKeyDictionary["Experts", list[Choices | None]] = WeakKeyDictionary()


def chosen_weights(p: Float[Tensor, "tokens experts"], chosen: Int[Tensor, "tokens k"]) -> Float[Tensor, "tokens k"]:
    """p of the chosen experts, scaled to sum up to 1."""
    of_chosen = p.gather(-1, chosen)
    return of_chosen / of_chosen.sum(-1, keepdim=True)


def spread(
    values: Float[Tensor, "tokens k r"], chosen: Int[Tensor, "tokens k"], num_experts: int
) -> Float[Tensor, "tokens all"]:
    """Values of the chosen experts at their places among all, zero for the others."""
    places = chosen[..., None].expand_as(values)
    return values.new_zeros(len(values), num_experts, values.shape[-1]).scatter(1, places, values).flatten(1)


def pick(values: Float[Tensor, "tokens all"], chosen: Int[Tensor, "tokens k"], r: int) -> Float[Tensor, "tokens k r"]:
    """The inverse of `spread`: the values of the chosen experts."""
    return values.unflatten(-1, (-1, r)).gather(1, chosen[..., None].expand(-1, -1, r))


class _Mixture(torch.autograd.Function):
    """y = scale * sum over the k chosen of w_i B_i A_i drop(x); also gives p and the choices.

    Matrix products run in `dtype`, the softmax in at least float32. Backward zeroes again what was not chosen instead
    of keeping the experts' outputs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        kept: Tensor | None,
        router: Tensor,
        a: Tensor,
        b: Tensor,
        k: int,
        scale: float,
        dropout: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_experts = len(router)
        logits = F.linear(x.to(dtype), router.to(dtype))
        p = logits.to(wide_dtype(dtype)).softmax(-1)
        chosen = p.topk(k).indices
        hidden = pick(F.linear(dropped(x, kept, dropout).to(dtype), a.to(dtype)), chosen, len(a) // num_experts)
        weights = (scale * chosen_weights(p, chosen)).to(dtype)
        y = F.linear(spread(weights[..., None] * hidden, chosen, num_experts), b.to(dtype))
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(x, kept, router, a, b, p, chosen.to(torch.int16), hidden)
        ctx.mark_non_differentiable(chosen)
        return y, p, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dp: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        with autocast_off(dy):
            return _Mixture._backward(ctx, dy, dp)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor, dp: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, router, a, b, p, chosen, hidden = ctx.saved_tensors
        needs_x, _, needs_router, needs_a, needs_b, *_ = ctx.needs_input_grad
        chosen, dtype, num_experts, r = chosen.long(), hidden.dtype, len(router), hidden.shape[-1]
        weights = chosen_weights(p, chosen)
        scaled = (ctx.scale * weights).to(dtype)[..., None]
        d_output = pick(dy @ b.to(dtype), chosen, r)  # of B_i A_i x, seen through B
        d_hidden = spread(scaled * d_output, chosen, num_experts)
        d_weights = ctx.scale * (d_output * hidden).sum(-1, dtype=p.dtype)
        d_chosen = (d_weights - (d_weights * weights).sum(-1, keepdim=True)) / p.gather(-1, chosen).sum(
            -1, keepdim=True
        )
        dp = dp.scatter_add(-1, chosen, d_chosen)
        d_logits = (p * (dp - (dp * p).sum(-1, keepdim=True))).to(dtype)
        dx = d_router = da = db = None
        if needs_x:
            dx = dropped(d_hidden @ a.to(dtype), kept, ctx.dropout) + d_logits @ router.to(dtype)
            dx = dx.to(x.dtype)
        if needs_router:
            d_router = (d_logits.T @ x.to(dtype)).to(router.dtype)
        if needs_a:
            da = (d_hidden.T @ dropped(x, kept, ctx.dropout).to(dtype)).to(a.dtype)
        if needs_b:
            db = (dy.T @ spread(scaled * hidden, chosen, num_experts)).to(b.dtype)
        return dx, None, d_router, da, db, None, None, None, None


def dropped(
    x: Float[Tensor, "tokens features"], kept: Bool[Tensor, "tokens features"] | None, dropout: float
) -> Float[Tensor, "tokens features"]:
    """Dropout of x by a mask that is drawn already; None: x itself."""
    return x if kept is None else x * kept / (1 - dropout)


class Experts(Adapter):
    """Experts and router of one adapter on one layer."""

    name = "mola"

    def __init__(self, base: nn.Module, config: "MoLAConfig", num_experts: int):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        self.k, self.dropout, self.balance = config.k, config.dropout, config.balance
        self.scale = config.alpha / (config.r**0.5 if config.use_rslora else config.r)
        self.router = nn.Parameter(torch.empty(num_experts, in_features))
        self.a = nn.Parameter(torch.empty(num_experts * config.r, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, num_experts * config.r))
        nn.init.kaiming_uniform_(self.router, a=5**0.5)
        nn.init.kaiming_uniform_(self.a, a=5**0.5)  # by the size of the input: the same as one expert at a time
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.b, a=5**0.5)

    @property
    def router_learns(self) -> bool:
        """Whether anything depends on p: the weight of an only choice is 1, whatever its p."""
        return len(self.router) > 1 and (self.k > 1 or self.balance > 0)

    def mixed(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The weighted sum of the chosen experts, in the adapter's own precision or autocast's."""
        rows = x.reshape(-1, x.shape[-1])
        kept = None
        if self.training and self.dropout:
            kept = torch.empty_like(rows, dtype=torch.bool).bernoulli_(1 - self.dropout)
        dtype = autocast_dtype(x) or self.a.dtype
        with autocast_off(x):
            y, p, chosen = _Mixture.apply(
                rows, kept, self.router, self.a, self.b, self.k, self.scale, self.dropout, dtype
            )
        batch = x.shape[:-1]
        self._collect(p.view(*batch, len(self.router)), chosen.view(*batch, self.k))
        return y.view(*batch, len(self.b))

    def _collect(self, p: Tensor, chosen: Tensor) -> None:
        """Note the choices for the balance loss, but not again when a block is run once more in backward."""
        if not in_training(self) or self not in _CHOICES or in_backward():
            return
        if is_counted():
            _CHOICES[self].append((p, chosen, learning_rows()))
        elif not _CHOICES[self] and not is_aside():
            _CHOICES[self].append(None)


class MoLA(Experts):
    """A mixture for each token, which is no change of the weight."""

    def new_output(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The adapted layer's output; `x` its input, `y` its own output."""
        return y + self.mixed(x).to(y.dtype)


class OneExpert(Experts):
    """LoRA, which can be merged: what is left where no layer has a second expert."""

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """(alpha / r) B A."""
        return self.scale * self.b @ self.a

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same through r numbers a token."""
        return self.mixed(x)


@register
@dataclass(kw_only=True)
class MoLAConfig(AdapterConfig):
    """MoLA: several LoRA experts on a layer, of which each token uses k; higher layers may have more of them.

    r: inner size of one expert, 1 <= r.
    alpha: the update is scaled by alpha / r. use_rslora: by alpha / sqrt(r) instead.
    k: experts a token uses, 1 <= k <= the number of experts of every layer; all of them: a soft mixture.
    experts: how many a layer has. A number: the same everywhere. "2-4-6-8": for as many groups of blocks of equal size,
        from the input to the output, of which the last takes the rest; in place of it one of the words rectangle
        (5-5-5-5), triangle (8-6-4-2), inverted_triangle (2-4-6-8), diamond (2-8-8-2), hourglass (8-2-2-8). A list: one
        number for each block. Encoder and decoder are divided each by itself.
    balance: weight of the loss that spreads tokens evenly over experts, 0 <= balance; 0 switches it off. A recipe adds
        it; without one, `get_peft_model` trains without it.
    dropout: on the input of the experts, not of the router, 0 <= dropout < 1; the paper takes 0.05.

    Raises ValueError for values out of range, more choices than experts, and words that are no allocation.
    """

    method: ClassVar = MoLA
    r: int = 8
    alpha: float = 16.0
    use_rslora: bool = False
    k: int = 2
    experts: int | str | list[int] = "2-4-6-8"
    balance: float = 1e-3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r of mola must be at least 1, got {self.r}.")
        if self.k < 1:
            raise ValueError(f"k of mola must be at least 1, got {self.k}.")
        if self.balance < 0:
            raise ValueError(f"balance of mola must be at least 0, got {self.balance}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of mola must be in [0, 1), got {self.dropout}.")
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"experts of mola must be at least 1 in every layer, got {self.experts!r}.")
        if self.k > min(self.counts):
            raise ValueError(
                f"k of mola must be at most the number of experts of every layer, got k {self.k} and experts "
                f"{self.experts!r}: a token cannot use more experts than there are."
            )
        if self.k == 1 < max(self.counts) and not self.balance:
            warnings.warn(
                "With k 1 the weight of the expert chosen is 1 whatever the router says: without balance the router of "
                "mola stays as it was drawn.",
                stacklevel=2,
            )

    @property
    def adapter_class(self) -> type[Adapter]:
        return MoLA if max(self.counts) > 1 else OneExpert

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of experts: one for all layers, one a group of blocks, or one a block.

        Raises ValueError for an unknown word.
        """
        if isinstance(self.experts, int):
            return (self.experts,)
        if not isinstance(self.experts, str):
            return tuple(self.experts)
        if re.fullmatch(r"\d+(-\d+)*", self.experts):
            return tuple(int(count) for count in self.experts.split("-"))
        if self.experts not in ALLOCATIONS:
            raise ValueError(
                f"experts of mola must be a number, a list of them, such as '2-4-6-8', or an allocation by name, got "
                f"{self.experts!r}. {did_you_mean(self.experts, ALLOCATIONS)}"
            )
        return ALLOCATIONS[self.experts]

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """The number of experts of the layer `key`, by the block it is in.

        Raises ValueError if it is in no list of blocks, or if that list does not fit `experts`.
        """
        counts = self.counts
        if isinstance(self.experts, int):
            return {"num_experts": self.experts}
        place = place_in_stack(model, key)
        if place is None:
            raise ValueError(
                f"experts of mola, {self.experts!r}, goes by the block a layer is in, and this layer is in no list of "
                "blocks; list it in exclude_modules, or give one number for all layers."
            )
        stack, index, num_blocks = place
        if not isinstance(self.experts, str):
            if len(counts) != num_blocks:
                raise ValueError(
                    f"experts of mola must have one number for each block of {stack}, which has {num_blocks}, got "
                    f"{len(counts)}."
                )
            return {"num_experts": counts[index]}
        if num_blocks < len(counts):
            raise ValueError(
                f"experts of mola, {self.experts!r}, makes {len(counts)} groups of the blocks of {stack}, which has "
                f"{num_blocks}; give a list of {num_blocks} numbers, or one number for all layers."
            )
        return {"num_experts": counts[min(index // (num_blocks // len(counts)), len(counts) - 1)]}

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse a balance loss where the routers' part in it would have no gradient.

        Raises SettingError.
        """
        hidden = [technique.name for technique in others if not technique.graph_in_blocks]
        if self.balance and hidden:
            raise SettingError(
                f"balance of mola adds a loss of what routers compute in blocks, which {hidden[0]} keeps out of the "
                "graph; set balance to 0."
            )

    def on_attached(self, model: nn.Module) -> None:
        """From here on a recipe takes what the routers chose after each forward."""
        _CHOICES.update({adapter: [] for adapter in adapters_in(model).values() if adapter.balance})

    def on_step_begin(self, moment: Moment) -> None:
        """Forget the choices of a forward that failed halfway."""
        for adapter in adapters_in(moment.model).values():
            _CHOICES.get(adapter, []).clear()

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """balance * the sum of the layers' balance losses over the tokens that are no padding.

        Raises ValueError if the routers ran without gradients, as under reentrant checkpointing.
        """
        terms, without_gradients = [], []
        for name, adapter in adapters_in(model).items():
            choices = _CHOICES.get(adapter, [])
            taken = [choice for choice in choices if choice is not None]
            if choices and not taken:
                without_gradients.append(name)
            for p, chosen, rows in taken:
                real = real_tokens(model, batch, name, p.shape[:-1], rows)
                real = None if real is None else real.view(p.shape[:-1])
                terms.append(adapter.balance * balance_loss(p, chosen, real))
            choices.clear()
        if without_gradients:
            raise ValueError(
                f"The balance loss of mola needs {without_gradients[0]} to run with gradients in forward; here its "
                "block runs without them, and again in backward, as reentrant checkpointing has it. Use the technique "
                "recompute, or set balance to 0."
            )
        return sum_of(terms) if terms else None

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """Routers that nothing depends on. Experts nobody chose are rows of zeros in the gradient of all experts."""
        return {f"{name}.router" for name, adapter in adapters_in(model).items() if not adapter.router_learns}


def adapters_in(model: nn.Module) -> dict[str, Experts]:
    """Every adapter of the method, by its name in the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def balance_loss(
    p: Float[Tensor, "*batch experts"], chosen: Int[Tensor, "*batch k"], real: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """N sum_i f_i P_i over the tokens where `real` is True: 1 where tokens are spread evenly, up to N / k.

    Source: eq. 4 to 6 of the Switch Transformer, arXiv:2101.03961, for k choices a token.
    """
    num_experts = p.shape[-1]
    counted = p.new_ones(*p.shape[:-1], 1) if real is None else real[..., None].to(p)
    tokens = counted.sum().clamp(min=1)
    routed = torch.zeros_like(p).scatter(-1, chosen, 1)
    share = (counted * routed).flatten(0, -2).sum(0) / (chosen.shape[-1] * tokens)
    mean = (counted * p).flatten(0, -2).sum(0) / tokens
    return num_experts * (share * mean).sum()
