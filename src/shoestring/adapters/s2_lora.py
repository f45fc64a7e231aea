r"""S2-LoRA: sparsely shared LoRA.

Source   Liu, Qin, Peng, Lee 2023, arXiv:2309.11756
Update   W'_m = W_m + (alpha / r) B diag(l_m) A, with A and B shared by all layers of one shape
Shapes   W_m [out, in], A [r, in], B [out, r], l_m [r]
Start    A Kaiming. kaiming: B = 0, l = 1; adalora: B Gaussian, l = 0; both give W' = W
Trains   r (in + out) numbers a shape and r a layer
Costs    x and two [tokens, r] tensors kept at each layer
Differs  the paper leaves open how l becomes sparse and how shapes share; we share by (out, in) and shrink l by a
         proximal step after each optimizer step, which gives exact zeros; an L1 term in the loss is the alternative.
         Shrinking l while A and B grow would leave the update unchanged, so A and B decay by themselves
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..technique import Moment, sum_of
from .base import AdaptedLayer, Adapter, AdapterConfig, linear_sizes, register


class SharedFactors(nn.Module):
    """One pair A, B for each (out, in) among the adapted layers, made when the first such layer asks for it."""

    def __init__(self, config: "S2LoRAConfig"):
        super().__init__()
        self.r, self.init = config.r, config.init if config.init_weights else "random"

    def pair(self, out_features: int, in_features: int) -> tuple[str, str]:
        """The names of A [r, in] and B [out, r] for layers of this shape."""
        names = f"a_{out_features}x{in_features}", f"b_{out_features}x{in_features}"
        if names[0] not in self._parameters:
            a = torch.empty(self.r, in_features)
            b = torch.zeros(out_features, self.r)
            nn.init.kaiming_uniform_(a, a=5**0.5)
            if self.init != "kaiming":
                nn.init.normal_(b, std=0.02)
            self.register_parameter(names[0], nn.Parameter(a))
            self.register_parameter(names[1], nn.Parameter(b))
        return names


class S2LoRA(Adapter):
    """The coefficients l of one layer; A and B stand once for all layers of its shape."""

    name = "s2_lora"

    @classmethod
    def shared(cls, model: nn.Module, config: "S2LoRAConfig") -> nn.Module:
        """The factors of all shapes, empty at first."""
        return SharedFactors(config)

    def __init__(self, base: nn.Module, config: "S2LoRAConfig", factors: SharedFactors):
        super().__init__()
        self.names = factors.pair(*linear_sizes(base))
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        zero = config.init_weights and config.init == "adalora"
        self.coefficients = nn.Parameter(torch.zeros(config.r) if zero else torch.ones(config.r))

    def factors(self) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
        """A and B on this layer's device."""
        a, b = (getattr(self.shared_state[0], name) for name in self.names)  # plain tensors under FSDP
        return a.to(self.coefficients.device), b.to(self.coefficients.device)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """(alpha / r) B diag(l) A."""
        a, b = self.factors()
        return self.scale * (b * self.coefficients) @ a

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same through r numbers a token, without the [out, in] product."""
        a, b = self.factors()
        return F.linear(F.linear(x, a) * (self.scale * self.coefficients), b)


@register
@dataclass(kw_only=True)
class S2LoRAConfig(AdapterConfig):
    """S2-LoRA: one LoRA pair for all layers of a shape, and a sparse vector of coefficients a layer.

    r: inner size of the shared pair, 1 <= r.
    alpha: the update is scaled by alpha / r; None: alpha = r.
    sparsity: weight of the L1 norm of all coefficients, 0 <= sparsity; 1e-5 to 1e-3 is usual.
    sparsity_by: "proximal" shrinks coefficients after each step and reaches exact zeros; "penalty" adds to the loss.
    factor_decay: each step takes learning rate times this share off A and B, as AdamW's decay does; 0 <= factor_decay.
    init: "kaiming" or "adalora".

    Raises ValueError if r < 1, sparsity < 0, factor_decay < 0, or a word is unknown.
    """

    method: ClassVar = S2LoRA
    r: int = 32
    alpha: float | None = None
    sparsity: float = 1e-4
    sparsity_by: Literal["proximal", "penalty"] = "proximal"
    factor_decay: float = 0.01
    init: Literal["kaiming", "adalora"] = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"r of s2_lora must be at least 1, got {self.r}.")
        for name in ("sparsity", "factor_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} of s2_lora must be at least 0, got {getattr(self, name)}.")
        if self.sparsity_by not in ("proximal", "penalty"):
            raise ValueError(f"sparsity_by of s2_lora must be 'proximal' or 'penalty', got {self.sparsity_by!r}.")
        if self.init not in ("kaiming", "adalora"):
            raise ValueError(f"init of s2_lora must be 'kaiming' or 'adalora', got {self.init!r}.")

    def on_step_end(self, moment: Moment) -> None:
        """The proximal step of the L1 norm, l <- sign(l) max(|l| - learning_rate * sparsity, 0); the factors decay."""
        with torch.no_grad():
            if self.sparsity_by == "proximal" and self.sparsity:
                for vector in coefficients(moment.model):
                    vector.copy_(F.softshrink(vector, moment.learning_rate * self.sparsity))
            for factor in shared_factors(moment.model) if self.factor_decay else ():
                factor.mul_(1 - moment.learning_rate * self.factor_decay)

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """sparsity * sum |l|, where that is asked for in place of the proximal step."""
        if self.sparsity_by != "penalty" or not self.sparsity:
            return None
        return self.sparsity * sum_of([vector.abs().sum() for vector in coefficients(model)])


def coefficients(model: nn.Module) -> list[nn.Parameter]:
    """The vectors l that train, one a layer."""
    return [m.coefficients for m in model.modules() if isinstance(m, S2LoRA) and m.coefficients.requires_grad]


def shared_factors(model: nn.Module) -> list[nn.Parameter]:
    """The factors A and B that train, one pair a shape."""
    return [p for m in model.modules() if isinstance(m, SharedFactors) for p in m.parameters() if p.requires_grad]


def ranks_in_use(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """How many coefficients are not zero, by the name of each adapted layer: where the ranks went."""
    layers = ((name, m.adapters[adapter_name]) for name, m in _adapted(model, adapter_name))
    return {name: int((one.coefficients != 0).sum()) for name, one in layers if isinstance(one, S2LoRA)}


def _adapted(model: nn.Module, adapter_name: str) -> list[tuple[str, AdaptedLayer]]:
    named = model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, AdaptedLayer) and adapter_name in m.adapters]


def compact(model: nn.Module, adapter_name: str = "default") -> int:
    """Drop the ranks whose coefficient is zero in every layer that shares them; returns the r that is left.

    Outputs stay as they are. Every shape keeps as many ranks as the one that needs most, at least one, so that the
    adapter still has one r: it and alpha are set anew in its config, and `save_pretrained` then writes the smaller
    factors. For the end of training: an optimizer still holds the old tensors.

    Raises ValueError if the model has no S2-LoRA adapter of that name.
    """
    adapted = _adapted(model, adapter_name)
    layers = [one for _, m in adapted if isinstance(one := m.adapters[adapter_name], S2LoRA)]
    if not layers:
        raise ValueError(f"There is no s2_lora adapter named {adapter_name!r} in this {type(model).__name__}.")
    shapes: dict[tuple[str, str], list[S2LoRA]] = {}
    for layer in layers:
        shapes.setdefault(layer.names, []).append(layer)
    # ranks by the largest coefficient they have anywhere, so that those kept beyond need are zero everywhere
    size = {names: torch.stack([m.coefficients.detach().abs() for m in some]).amax(0) for names, some in shapes.items()}
    r = max(1, *(int((largest > 0).sum()) for largest in size.values()))
    for names, some in shapes.items():
        kept = size[names].topk(r).indices.sort().values
        a, b = some[0].factors()
        shared = some[0].shared_state[0]
        for name, value in zip(names, (a[kept], b[:, kept]), strict=True):
            trains = shared.get_parameter(name).requires_grad
            shared.register_parameter(name, nn.Parameter(value.detach().clone(), requires_grad=trains))
        for layer in some:
            fewer = layer.coefficients.detach()[kept].clone()
            layer.coefficients = nn.Parameter(fewer, requires_grad=layer.coefficients.requires_grad)
    known: list[Any] = [getattr(m, "peft_config", {}).get(adapter_name) for m in model.modules()]
    config = next(c for c in known if isinstance(c, S2LoRAConfig))
    config.alpha = None if config.alpha is None else config.alpha / config.r * r
    config.r = r
    return r
