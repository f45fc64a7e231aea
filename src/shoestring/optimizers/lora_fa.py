r"""LoRA-FA: LoRA with A frozen at its random start, so that a layer keeps x A^T [n, r] for backward and not x [n, d].

Source   Zhang et al. 2023, arXiv:2308.03303; the update is peft's LoraFAOptimizer
Update   the gradient of B is multiplied by (A A^T)^-1 / s^2, with s the adapter's scale, then AdamW's update
Shapes   x [n, in], A [r, in], B [out, r]
Trains   B: r out numbers a layer; and whatever else of the model trains, by AdamW
Costs    AdamW's two moments for B only. lora_dropout above 0 keeps a mask as large as x, and so most of the memory; so
         does a base in 16 bits whose adapters are in float32, since x is cast to their dtype, while the cast lasts.
         Where the device can, peft multiplies the gradient in bfloat16
Differs  peft's function pairs A with B by the order of parameter names and puts all weights, frozen ones too, into one
         group. Here each pair is made from its layer, so biases and heads may train beside it; groups, weight
         decay and betas are the run's. eps is 1e-6 as in peft, not the run's adam_epsilon
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer

from ..errors import SettingError
from ..technique import NUMBERS_HELD, Phase, Technique, register_technique

if TYPE_CHECKING:
    from transformers import TrainingArguments

BY_PARAMETER = ("params", "names", "scaling_factors")  # lists of a group


@dataclass(frozen=True)
class Pair:
    """The factors of one LoRA on one linear layer, and the scale of their product."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float


@register_technique
@dataclass
class LoraFA(Technique):
    """Freezes A of every LoRA in the recipe and trains B by peft's LoRA-FA optimizer.

    eps: what AdamW adds to the root of the second moment.

    Raises SettingError if eps is not positive; on attaching, if the model has no LoRA on linear layers, or one whose
    product is not s B A (DoRA, experts, convolutions, embeddings).
    """

    name: ClassVar[str] = "lora_fa"
    phase: ClassVar[Phase] = Phase.OPTIMIZER
    claims: ClassVar[frozenset[str]] = frozenset({"the optimizer"})
    needs: ClassVar[frozenset[Phase]] = frozenset({Phase.ADAPTER})
    holds: ClassVar[frozenset[str]] = frozenset({NUMBERS_HELD})  # its state is kept by name, and not by parameter
    removes: ClassVar[frozenset[str]] = frozenset({"inputs of trained weights"})
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise SettingError(f"eps of lora_fa must be positive, got {self.eps}.")
        self.pairs: list[Pair] = []

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Freeze A wherever it trains."""
        self.pairs = lora_pairs(model)
        trained = [pair.a for pair in self.pairs if pair.a.requires_grad]
        for a in trained:
            a.requires_grad_(False)
        try:
            yield model
        finally:
            for a in trained:
                a.requires_grad_(True)
            self.pairs = []

    def make_optimizer(
        self, model: nn.Module, groups: list[dict[str, Any]], arguments: "TrainingArguments"
    ) -> Optimizer:
        """peft's optimizer, with the groups of the run and A put before each B."""
        if arguments.optim != type(arguments).default_optim and arguments.optim != "adamw_torch":
            warnings.warn(f"lora_fa brings its own optimizer: optim={arguments.optim} has no effect.")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        pairs = {id(pair.b): pair for pair in self.pairs if pair.b.requires_grad}
        if lost := pairs.keys() - {id(parameter) for group in groups for parameter in group["params"]}:
            raise SettingError(
                f"lora_fa needs whole factors, but {len(lost)} of {len(pairs)} B are not among the weights "
                "the optimizer is given: train without FSDP."
            )
        named_groups: Any = [_named_group(group, names, pairs) for group in groups]
        return LoraFAOfParts(
            named_groups,
            lr=arguments.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=self.eps,
            weight_decay=arguments.weight_decay,
        )


class LoraFAOfParts(LoraFAOptimizer):
    """peft's, also where a step gives some B no gradient, and resumed on the device of its weights."""

    def step(self, closure: Any = None) -> Any:
        """As peft's, of the pairs whose B has a gradient."""
        whole = [{key: group[key] for key in BY_PARAMETER} for group in self.param_groups]
        try:
            for group in self.param_groups:
                pairs = list(zip(group["names"], group["params"], strict=True))
                idle = {name[:-1] for name, p in pairs if name.endswith(".lora_B") and p.grad is None}
                left = [place for place, (name, _) in enumerate(pairs) if name[:-1] not in idle]
                group.update({key: [group[key][place] for place in left] for key in BY_PARAMETER})
            return super().step(closure)
        finally:
            for group, lists in zip(self.param_groups, whole, strict=True):
                group.update(lists)

    def load_state_dict(self, state_dict: Any) -> None:
        """As ever; torch moves the state of parameters alone to their device, and this one is kept by name."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                pair, is_pair, _ = name.partition("lora")
                own = self.state.get(pair + is_pair, {})
                own.update({key: each.to(parameter.device) for key, each in own.items() if torch.is_tensor(each)})


def _named_group(group: dict[str, Any], names: dict[int, str], pairs: dict[int, Pair]) -> dict[str, Any]:
    """The group as peft's optimizer reads it: two parameters in a row named "lora" are A and B of one layer."""
    params: list[nn.Parameter] = []
    keys: list[str] = []
    scales: list[float | None] = []
    for parameter in group["params"]:
        key = names[id(parameter)].replace("lora", "low_rank")
        pair = pairs.get(id(parameter))
        params += [parameter] if pair is None else [pair.a, pair.b]
        # the optimizer keeps its state under what stands before "lora", so that must differ between pairs
        keys += [key] if pair is None else [f"{key}.lora_A", f"{key}.lora_B"]
        scales += [None] if pair is None else [pair.scale] * 2
    return {**group, "params": params, "names": keys, "scaling_factors": scales}


def lora_pairs(model: nn.Module) -> list[Pair]:
    """The LoRAs of the model, of every layer and adapter.

    Raises SettingError if there are none, or if one is of a kind that LoRA-FA's update does not hold for.
    """
    pairs = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        _refuse_other_kinds(name, layer)
        for adapter in layer.lora_A:
            a: Any = layer.lora_A[adapter].weight
            b: Any = layer.lora_B[adapter].weight
            if a.dtype not in (torch.float32, torch.float64):
                raise SettingError(f"lora_fa needs adapters in float32, but A of {name} is {a.dtype}: convert them.")
            pairs.append(Pair(a, b, layer.scaling[adapter]))
    if not pairs:
        raise SettingError("lora_fa freezes A of LoRA, but the recipe has no `lora`; add one.")
    return pairs


def _refuse_other_kinds(name: str, layer: LoraLayer) -> None:
    kind, setting = None, "target_modules"
    if len(layer.lora_embedding_A):
        kind = "an embedding"
    elif layer.lora_variant:
        kind = f"a layer with the LoRA variant {type(next(iter(layer.lora_variant.values()))).__name__}"
    elif (experts := getattr(layer, "num_experts", 1)) > 1:
        kind, setting = f"of {experts} experts, whose B A is no product of the whole", "target_parameters"
    elif any(not isinstance(a, nn.Linear) for a in layer.lora_A.values()):
        kind = f"a layer of the class {type(layer).__name__}"
    if kind is not None:
        raise SettingError(
            f"lora_fa works on LoRA of linear layers, but {name} is {kind}: take it out of {setting}, or lora_fa out "
            "of the recipe."
        )
