r"""Lean MLP: activation functions and gated products are formed again in backward from what they read.

Source   selective recomputation, Korthikanti et al. 2022, arXiv:2205.05198; the fused gated unit of Liger-Kernel,
         arXiv:2410.10989, without its kernels
Update   none: y = f(g) * u or y = f(g), to the bit, and the same gradients
Shapes   g, u, y [..., ff]
Costs    g and u are all that a gated block keeps at width ff; without this f(g) too, and y where the layer after it
         keeps its input: one that trains, or has a LoRA whose A trains. A block that is not gated keeps g in place of g
         and y. Backward forms f(g) twice more and the product once: some passes over elements, and no matrix product
Differs  the layer after it gives up y, and casts of y for adapters in another dtype, only if it reads y itself: not
         behind dropout above 0. Experts of a mixture stay as they are
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import activations as hf
from transformers.pytorch_utils import Conv1D

from ..errors import SettingError
from ..feed_forward import experts_activation, gated_product, is_elementwise
from ..precision import autocast_now
from ..technique import Advised, Phase, Technique, register_technique
from .own_backward import training_forwards

Function = Callable[..., Tensor]

_KEEP_RESULT = {nn.ReLU, nn.Sigmoid, nn.Tanh, hf.LinearActivation}
"""What keeps its result for backward, as the next layer does: nothing to gain unless a product follows."""

_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}


class _Formed(torch.autograd.Function):
    """An elementwise function of tensors; keeps them, and can form its result from them again."""

    @staticmethod
    def forward(ctx: Any, function: Function, first: Callable[[], Tensor], *read: Tensor) -> Tensor:
        """The result, by `first`, which is `function(*read)` with the work that was done already."""
        ctx.function, ctx.autocast, ctx.unpacked = function, autocast_now(read[0].device.type), None
        ctx.save_for_backward(*read)
        return first()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        read = [t.detach().requires_grad_(need) for t, need in zip(_read_by(ctx), needs, strict=True)]
        ctx.unpacked = None
        with torch.enable_grad(), ctx.autocast():
            result = ctx.function(*read)
        wanted = [t for t in read if t.requires_grad]
        found = iter(torch.autograd.grad(result, wanted, gradients[0]))
        return None, None, *(next(found) if need else None for need in needs)


def _read_by(node: Any) -> tuple[Tensor, ...]:
    """What the node keeps; unpacked once for those who form its result and itself, as torch's checkpoint asks."""
    if node.unpacked is None:
        node.unpacked = node.saved_tensors
    return node.unpacked


class _Gate(TorchFunctionMode):
    """Inside one gated block: the product with an activation's result keeps what the activation read."""

    def __init__(self) -> None:
        super().__init__()
        self.activation: tuple[Tensor, Tensor, Function] | None = None  # result, what it read, the function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and self.activation is not None and not kwargs:
            result, read, function = self.activation
            factors = [t for t in args if t is not result]
            if len(factors) == 1 and isinstance(factors[0], Tensor) and factors[0].shape == result.shape:
                self.activation = None  # the result is free while the next layer runs
                return _gated(function, result, read, factors[0])
        return func(*args, **(kwargs or {}))


def _gated(function: Function, result: Tensor, read: Tensor, factor: Tensor) -> Tensor:
    value = result.detach()
    return _Formed.apply(lambda g, u: function(g) * u, lambda: value * factor, read, factor)


class _Again(NamedTuple):
    """A kept tensor that is formed again when it is needed: the result of `node`, cast and reshaped."""

    node: Any
    size: torch.Size
    dtype: torch.dtype

    def form(self) -> Tensor:
        with torch.no_grad(), self.node.autocast():
            result = self.node.function(*_read_by(self.node))
        return result.to(self.dtype).reshape(self.size)


_RESHAPED_OR_CAST = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "ToCopyBackward0"}


def _is_result(tensor: Tensor, node: Any) -> bool:
    """Whether the tensor is what `node` gave, untouched but for its shape and dtype."""
    step = tensor.grad_fn
    while step is not None and step is not node and step.name() in _RESHAPED_OR_CAST:
        step = step.next_functions[0][0]
    return step is node and tensor._version == 0 and tensor.is_contiguous()


def _reading(module: nn.Module, own: Function, *args: Any, **kwargs: Any) -> Any:
    """The layer's own forward, which keeps of a result that can be formed again only how."""
    node = args[0].grad_fn if args and isinstance(args[0], Tensor) else None
    if not isinstance(node, _Formed._backward_cls):
        return own(*args, **kwargs)
    # only the innermost pair of hooks is called, so what is not ours is handed to the pair around this one
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        if _is_result(tensor, node):
            return _Again(node, tensor.size(), tensor.dtype)
        if outer is not None:
            return outer[0](tensor)
        return tensor if tensor.is_leaf else tensor.detach()  # a node that holds its own result would never die

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, _Again):
            return packed.form()
        return packed if outer is None else outer[1](packed)

    with saved_tensors_hooks(pack, unpack):
        return own(*args, **kwargs)


@register_technique
@dataclass
class LeanMLP(Technique):
    """MLP blocks keep what their activation function reads, and form its result and the gated product again.

    Finds activation modules and the blocks that multiply with their results by trying them on stand-ins for their
    layers. Raises SettingError if there is none to gain from.
    """

    name: ClassVar[str] = "lean_mlp"
    advised = (Advised(11, "feed-forward layers keep less; exact, hardly slower"),)
    phase: ClassVar[Phase] = Phase.ACTIVATION
    exact: ClassVar[bool] = True
    claims: ClassVar[frozenset[str]] = frozenset({"the activation functions of the blocks"})
    removes: ClassVar[frozenset[str]] = frozenset({"activation outputs", "gated products"})

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Replace the forwards of gated blocks, activation functions and the layers that may read their results."""
        gated = {block: found.activation for block in model.modules() if (found := gated_product(block)) is not None}
        gated |= {block: one for block in model.modules() if (one := experts_activation(block)) is not None}
        plain = {m for m in model.modules() if is_elementwise(m) and type(m) not in _KEEP_RESULT}
        if not gated and not plain:
            raise SettingError(
                f"lean_mlp found nothing to gain from in {type(model).__name__}: it looks for modules of activation "
                "functions such as GELUActivation and SiLUActivation. Leave it out for this model."
            )
        gates: list[_Gate] = []  # of the blocks that run now, outermost first
        forwards = {m: _reading for m in model.modules() if isinstance(m, nn.Linear | Conv1D | BaseTunerLayer)}
        forwards |= dict.fromkeys(plain | set(gated.values()), _activation_forward(gates))
        forwards |= dict.fromkeys(gated, _block_forward(gates))
        with training_forwards(forwards):
            yield model


def _activation_forward(gates: list[_Gate]) -> Function:
    def forward(module: nn.Module, own: Function, g: Tensor) -> Tensor:
        if not g.requires_grad:
            return own(g)
        result = _Formed.apply(own, lambda: own(g), g)
        if gates:
            gates[-1].activation = (result, g, own)
        return result

    return forward


def _block_forward(gates: list[_Gate]) -> Function:
    def forward(module: nn.Module, own: Function, *args: Any, **kwargs: Any) -> Any:
        gates.append(_Gate())
        try:
            with gates[-1]:
                return own(*args, **kwargs)
        finally:
            gates.pop()

    return forward
