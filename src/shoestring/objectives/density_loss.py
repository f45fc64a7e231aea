r"""Density loss: feed-forward parts learn to have more zeros between their two layers.

Source   "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers",
         arXiv:2402.01911, AAAI 2025
Update   loss + weight * sum over stacks of the mean over layers and samples of d;
         d = mean over the tokens of a sample and over neurons of z^2 / (z^2 + epsilon), in float32
         d d / dz = 2 z epsilon / (z^2 + epsilon)^2 over the count; for epsilon -> 0, d is the share of z != 0
Shapes   z [batch, tokens, ff]: what comes out of the activation function, or of the gated product
Costs    z of every layer until backward, which most layers keep anyway: activation functions whose result is zero keep
         it, and so does the layer after one if it trains or has a LoRA. Passes over elements, an eighth at a time. No
         step gets faster: dense products do not skip zeros
Differs  padding does not count (in the public code it does); what is measured in evaluation is told both ways. epsilon
         may begin large and fall, since no push reaches numbers far above its root. The adaptive form, which removes
         blocks, is not here: its formula is not public
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

from ..blocks.stacks import find_stacks
from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..feed_forward import gated_product, is_elementwise
from ..modes import in_training, is_counted
from ..precision import at_least_float32
from ..real_tokens import learning_rows, real_tokens
from ..technique import Moment, Phase, Technique, register_technique, sum_of

CHUNKS = 8
ZEROES = "ReLU, squared ReLU, ReLU6, hard swish, and GELU where it rounds to zero"


class Place(NamedTuple):
    """Where z of one layer is seen.

    stack: the list of blocks it is in. name: of the module that is hooked. at: whether z comes in there, or goes out.
    """

    stack: str
    name: str
    module: nn.Module
    at: Literal["input", "output"]


class Seen(NamedTuple):
    """What one layer showed in one forward: for each token a share in [0, 1]; None: it ran without gradients.

    rows: which tokens learn, as `learning_rows` gives them.
    """

    place: Place
    shares: Tensor | None
    rows: Tensor | None


@register_technique
@dataclass
class DensityLoss(Technique):
    """A penalty on activations that are not zero, on every feed-forward part of the model.

    weight: of the penalty, at least 0; 0: nothing but the measurement in evaluation.
    epsilon: above 0; the paper's is 1e-7.
    start_epsilon: where epsilon begins; it falls by equal factors to `epsilon` at the end of the run. None: no fall.
    of: in gated blocks, the "product" that enters the last layer, or the "gate" alone.

    Evaluation reports the exact share of z != 0: `density`, its mean over layers, the same with padding, and each
    layer's. For activation functions that give exact zeros: ReLU, squared ReLU, ReLU6, hard swish, and GELU, which
    rounds to zero below about -5.5 in float32.

    Raises SettingError for values out of range and, when attached, for models without activation functions that can be
    read in every block, and for functions that are never zero (SiLU, quick GELU, tanh). Ends the run at z that is NaN.
    """

    name: ClassVar[str] = "density_loss"
    phase: ClassVar[Phase] = Phase.OBJECTIVE

    weight: float = 1.0
    epsilon: float = 1e-7
    start_epsilon: float | None = None
    of: Literal["product", "gate"] = "product"

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise SettingError(f"weight of density_loss must be at least 0, got {self.weight}.")
        if not self.epsilon > 0:
            raise SettingError(f"epsilon of density_loss must be above 0, got {self.epsilon}.")
        if self.start_epsilon is not None and not self.start_epsilon >= self.epsilon:
            raise SettingError(
                f"start_epsilon of density_loss must be at least epsilon, {self.epsilon}, got {self.start_epsilon}."
            )
        if self.of not in ("product", "gate"):
            raise SettingError(f"of of density_loss must be 'product' or 'gate', got {self.of!r}.")
        self._now = self.epsilon if self.start_epsilon is None else self.start_epsilon
        self._running: list[Seen] | None = None  # of the forward that runs now; in backward, blocks may run again
        self._trained: list[Seen] = []
        self._measured: dict[Place, Tensor] = {}

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse what keeps blocks out of the graph of the loss."""
        hidden = [technique.name for technique in others if not technique.graph_in_blocks]
        if self.weight and hidden:
            raise SettingError(
                f"density_loss adds a loss of what blocks compute, which {hidden[0]} keeps out of the graph; leave one "
                "of them out."
            )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Look at z of every layer while the model runs."""
        places = find_places(model, self.of)
        self._measured = {place: torch.zeros(4) for place in places}
        hooks = [_hook(place, self._look) for place in places]

        def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module is model:
                self._running = []

        def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], outputs: Any) -> None:
            if module is not model:
                return
            seen, self._running = self._running or [], None
            if outputs is None:  # the forward failed
                return
            if not in_training(module):
                self._count(model, kwargs, seen)
            elif self.weight and is_counted():
                self._trained = seen

        hooks.append(model.register_forward_pre_hook(begin, with_kwargs=True))
        hooks.append(model.register_forward_hook(end, with_kwargs=True, always_call=True))
        try:
            yield model
        finally:
            for hook in hooks:
                hook.remove()
            self._running, self._trained, self._measured = None, [], {}

    def _look(self, place: Place, z: Tensor) -> None:
        """Note the share of one layer; also where a block runs again in backward, which has to do the same work."""
        shares = None
        if not in_training(place.module):
            shares = (z != 0).mean(-1, dtype=torch.float32)
        elif self.weight and is_counted():
            shares = soft_density(z, self._now)
        if self._running is not None:
            self._running.append(Seen(place, shares, learning_rows()))

    def on_step_begin(self, moment: Moment) -> None:
        """Let epsilon fall, and forget a forward that no loss came of."""
        self._trained = []
        if self.start_epsilon is None:
            return
        if not moment.num_steps:
            raise SettingError(
                "start_epsilon of density_loss falls over the steps of the run, whose number is not known here; leave "
                "it out, or train with a trainer."
            )
        self._now = self.start_epsilon * (self.epsilon / self.start_epsilon) ** (moment.step / moment.num_steps)

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """weight * the sum over stacks of the mean soft density of their layers.

        Raises ValueError if blocks ran without gradients, as under reentrant checkpointing.
        """
        if not self.weight:
            return None
        seen, self._trained = self._trained, []
        of_stack: dict[str, list[Tensor]] = defaultdict(list)
        for place, shares, rows in seen:
            if shares is not None:
                real = real_tokens(model, batch, place.name, shares.shape, rows)
                shares = shares if real is None else shares.view(real.shape)
                of_stack[place.stack].append(mean_of_samples(shares, real))
        if not of_stack:
            raise ValueError(
                "density_loss needs activations with gradients in forward; here blocks run without them, and again in "
                "backward, as reentrant checkpointing has it. Use the technique recompute, or set weight to 0."
            )
        means = [torch.stack([term.to(terms[0]) for term in terms]).mean() for terms in of_stack.values()]
        penalty = self.weight * sum_of(means)
        if has_values(penalty) and not torch.isfinite(penalty):
            wrong = next(p.name for p, shares, _ in seen if shares is not None and not torch.isfinite(shares).all())
            raise RunFailed(
                f"The activations at {wrong} hold NaN or Inf, so that density_loss has no value: lower "
                "train.learning_rate, or train in bf16 in place of fp16."
            )
        return penalty

    @torch.no_grad()
    def _count(self, model: nn.Module, batch: Mapping[str, Any], seen: list[Seen]) -> None:
        """Add shares and numbers of tokens, without padding and with it, to what was measured so far."""
        for place, shares, _ in seen:
            if shares is not None:
                real = real_tokens(model, batch, place.name, shares.shape)
                real = (
                    torch.ones_like(shares, dtype=torch.bool)
                    if real is None
                    else real.to(shares.device).view_as(shares)
                )
                counted = torch.stack([(shares * real).sum(), real.sum(), shares.sum(), torch.ones_like(shares).sum()])
                self._measured[place] = self._measured[place].to(counted.device, torch.float64) + counted

    def measured(self) -> dict[str, float]:
        """The exact share of z != 0 since the last call, as a mean over layers and for each of them."""
        taken = {place: sums for place, sums in self._measured.items() if has_values(sums) and sums[1] > 0}
        self._measured = {place: torch.zeros(4) for place in self._measured}
        if not taken:
            return {}
        density = {place: float(sums[0] / sums[1]) for place, sums in taken.items()}
        padded = [float(sums[2] / sums[3]) for sums in taken.values()]
        return {
            "density": sum(density.values()) / len(density),
            "density_with_padding": sum(padded) / len(padded),
            **{f"density_of_{place.name.rpartition('base_model.model.')[2]}": s for place, s in density.items()},
        }


def _hook(place: Place, look: Callable[[Place, Tensor], None]) -> torch.utils.hooks.RemovableHandle:
    if place.at == "input":
        return place.module.register_forward_pre_hook(lambda module, args: look(place, args[0]))
    return place.module.register_forward_hook(lambda module, args, output: look(place, output))


def find_places(model: nn.Module, of: Literal["product", "gate"] = "product") -> list[Place]:
    """Where z of each feed-forward part is to be seen, in the order of the model.

    Raises SettingError for a block that shows none, and for an activation function that is never zero.
    """
    inside_adapters = {
        module
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for module in set(layer.modules()) - set(layer.get_base_layer().modules())
    }
    places = []
    for stack in find_stacks(model):
        for index, block in enumerate(stack.blocks):
            where = f"{stack.name}.{index}"
            found = [
                _place(stack.name, where, block, name, of)
                for name, module in block.named_modules()
                if is_elementwise(module) and module not in inside_adapters
            ]
            if not found:
                raise SettingError(
                    f"density_loss found no activation function in {where} ({type(block).__name__}): it reads modules "
                    "such as nn.ReLU and GELUActivation, and cannot see into fused feed-forward layers or plain "
                    "function calls. Leave it out, or load the model without fused kernels."
                )
            places += found
    return places


def _place(stack: str, where: str, block: nn.Module, name: str, of: str) -> Place:
    activation, parent = block.get_submodule(name), block.get_submodule(name.rpartition(".")[0])
    if any(True for _ in parent.parameters(recurse=False)):
        raise SettingError(
            f"density_loss cannot read the feed-forward layers of {where}: {type(parent).__name__} computes with "
            "weights of its own, as experts of a mixture and fused layers do. Leave it out for this model."
        )
    if not gives_zeros(activation):
        raise SettingError(
            f"density_loss counts zeros, but {type(activation).__name__} in {where} is never exactly zero; it is for "
            f"{ZEROES}. Leave it out for this model."
        )
    product = gated_product(parent) if of == "product" else None
    if product is None:
        return Place(stack, f"{where}.{name}", activation, "output")
    reader = next(n for n, module in block.named_modules() if module is product.reader)
    return Place(stack, f"{where}.{reader}", product.reader, "input")


def gives_zeros(activation: nn.Module) -> bool:
    """Whether an activation function is exactly zero for some negative inputs, found by trying it in float32."""
    with unset_fake_temporarily(), torch.no_grad():  # the values count, also where the model has none
        return bool((activation.forward(torch.linspace(-12, -0.5, 47, device="cpu")) == 0).any())


def soft_density(z: Float[Tensor, "*batch ff"], epsilon: float) -> Float[Tensor, "*batch"]:
    """The mean over neurons of z^2 / (z^2 + epsilon), in float32 or wider."""
    shares: Tensor = _SoftDensity.apply(z, epsilon)
    return shares


def mean_of_samples(shares: Float[Tensor, "*batch"], real: Bool[Tensor, "*batch"] | None) -> Float[Tensor, ""]:
    """The mean over samples of the mean over their real tokens, None for all; samples without any do not count."""
    if real is None:
        return shares.mean()
    real = real.to(shares.device)
    tokens = real.flatten(1).sum(1)
    of_sample = (shares * real).flatten(1).sum(1) / tokens.clamp(min=1)
    return of_sample.sum() / (tokens > 0).sum().clamp(min=1)


class _SoftDensity(torch.autograd.Function):
    """Keeps z and forms everything else again, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon = epsilon
        ctx.save_for_backward(z)
        squares = (at_least_float32(rows).square() for rows in z.flatten(0, -2).chunk(CHUNKS))
        return torch.cat([(s / (s + epsilon)).mean(-1) for s in squares]).view(z.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (z,) = ctx.saved_tensors
        gradient = z.new_empty(z.shape)
        parts = zip(
            *(x.chunk(CHUNKS) for x in (z.flatten(0, -2), upstream.flatten(), gradient.flatten(0, -2))), strict=True
        )
        for rows, of_rows, out in parts:
            wide = at_least_float32(rows)
            below = wide.square() + ctx.epsilon
            slope = (2 / z.shape[-1]) * (wide / below) * (ctx.epsilon / below)  # whose square would underflow
            out.copy_(slope * of_rows[:, None])
        return gradient, None
