"""Operations: counts the arithmetic of training steps and the bytes that it moves, by phase and dtype.

Method   A dispatch mode sees each operation. Its floating point operations come from torch's own formulas
         (`torch.utils.flop_counter`); its bytes are what it reads and writes once, views being free.
Counts   Two operations a multiply-add, in matrix products, convolutions and attention. Attention counts its whole
         square, masked or causal as it may be. Operations on elements count as bytes, which is what they cost.
Phases   Forward is while a module runs, recomputation while one runs in backward or gradients are on there, optimizer
         while one steps; other is the rest (clipping, a loss outside the model). Under `create_graph=True` gradients
         are on in all of backward, so that all of it counts as recomputation.
Bytes    A look-up reads the rows it takes and not its table. What stays in a cache between two operations counts at
         each; so does what a compiler would fuse. Transfers between devices count as any copy.
Fake     Needs no values: enter it inside `FakeTensorMode`, beside a `Ledger` or without one.
Differs  torch's formulas leave out attention on CPU, products with vectors and integer matrices, which are here; and
         they take a grouped convolution's backward for one without groups.
"""

import functools
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils import flop_counter

from ..modes import in_backward
from .every_operation import EveryOperation
from .storages import operands, storages_of

OperationPhase = Literal["forward", "recomputation", "backward", "optimizer", "other"]
OPERATION_PHASES: tuple[OperationPhase, ...] = ("forward", "recomputation", "backward", "optimizer", "other")

Counts = Mapping[OperationPhase, Mapping[str, float]]

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """What a piece of training computes and moves; phase -> dtype -> number, and no zeros.

    flops: floating point operations, by the dtype of what is multiplied.
    moved_bytes: bytes read and written, by the dtype of the tensors.

    They add, subtract and scale, so that of a model of n equal blocks is `embedding + n * block`:

    >>> one, two = Operations({"forward": {"float32": 5}}), Operations({"forward": {"float32": 7}})
    >>> (one + 9 * (two - one)).flops  # ten blocks, from one and two of them
    {'forward': {'float32': 23}}
    """

    flops: Counts = field(default_factory=dict)
    moved_bytes: Counts = field(default_factory=dict)

    def __add__(self, other: "Operations") -> "Operations":
        return Operations(_sum(self.flops, other.flops), _sum(self.moved_bytes, other.moved_bytes))

    def __sub__(self, other: "Operations") -> "Operations":
        return self + -1 * other

    def __mul__(self, times: float) -> "Operations":
        return Operations(_scaled(self.flops, times), _scaled(self.moved_bytes, times))

    __rmul__ = __mul__

    def renamed(self, dtype: str, other: str) -> "Operations":
        """With what is counted for one dtype counted for another, which has no counts of its own."""
        names = {dtype: other}
        flops, moved = (
            {phase: {names.get(name, name): count for name, count in counts.items()} for phase, counts in all_.items()}
            for all_ in (self.flops, self.moved_bytes)
        )
        return Operations(flops, moved)

    @property
    def total_flops(self) -> float:
        """Floating point operations of all phases and dtypes."""
        return sum(self.flops_in(phase) for phase in OPERATION_PHASES)

    @property
    def total_moved_bytes(self) -> float:
        """Bytes moved in all phases."""
        return sum(self.moved_bytes_in(phase) for phase in OPERATION_PHASES)

    def flops_in(self, phase: OperationPhase) -> float:
        """Floating point operations of one phase, of all dtypes."""
        return sum(self.flops.get(phase, {}).values())

    def moved_bytes_in(self, phase: OperationPhase) -> float:
        """Bytes moved in one phase."""
        return sum(self.moved_bytes.get(phase, {}).values())

    def to_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """The counts as plain JSON values."""
        return {
            "flops": {phase: dict(counts) for phase, counts in self.flops.items()},
            "moved_bytes": {phase: dict(counts) for phase, counts in self.moved_bytes.items()},
        }


class OperationCounter:
    """Counts the operations of what runs inside it; entering again begins anew.

    >>> layer, counter = nn.Linear(3, 2, bias=False), OperationCounter()
    >>> with counter:
    ...     layer(torch.ones(5, 3)).sum().backward()
    >>> counter.operations().flops  # 2 x 5 x 3 x 2 each: the product, and the gradient of the weight
    {'forward': {'float32': 60}, 'backward': {'float32': 60}}
    """

    def __init__(self) -> None:
        self._flops: dict[OperationPhase, dict[str, float]] = {}
        self._moved: dict[OperationPhase, dict[str, float]] = {}
        self._modules: list[nn.Module] = []  # those running now, outermost first
        self._in_optimizer = False

    def __enter__(self) -> "OperationCounter":
        self._flops, self._moved, self._modules, self._in_optimizer = {}, {}, [], False
        with ExitStack() as undo:  # undone at once if something here raises
            for handle in (
                register_module_forward_pre_hook(self._before_module),
                register_module_forward_hook(self._after_module, always_call=True),
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ):
                undo.callback(handle.remove)
            undo.enter_context(EveryOperation(self._operation))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def operations(self) -> Operations:
        """What was counted so far."""
        return Operations(_scaled(self._flops, 1), _scaled(self._moved, 1))

    def _before_module(self, module: nn.Module, args: Any) -> None:
        if not self._modules and not in_backward():
            self._in_optimizer = False  # a step that raised has not said that it ended
        self._modules.append(module)

    def _after_module(self, module: nn.Module, args: Any, outputs: Any) -> None:
        if any(running is module for running in self._modules):
            while self._modules.pop() is not module:
                pass  # modules that an exception left without a call of this hook

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._in_optimizer = True

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._in_optimizer = False

    def _phase(self) -> OperationPhase:
        if in_backward():
            return "recomputation" if self._modules or torch.is_grad_enabled() else "backward"
        if self._modules:
            return "forward"
        return "optimizer" if self._in_optimizer else "other"

    def _operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        phase = self._phase()
        result = func(*args, **kwargs)
        if not func.is_view:
            formula = _FORMULAS.get(func._overloadpacket) or _FORMULAS_BY_NAME.get(str(func._overloadpacket))
            if formula is not None:
                dtype = _name(operands(args)[0].dtype)
                _count(self._flops, phase, dtype, formula(*args, **kwargs, out_val=result))
            for tensor, moved in _moved(func, args, kwargs, result):
                _count(self._moved, phase, _name(tensor.dtype), moved)
        return result


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Counts: phase -> dtype -> number


def _count(counts: dict[OperationPhase, dict[str, float]], phase: OperationPhase, dtype: str, number: float) -> None:
    if number:
        in_phase = counts.setdefault(phase, {})
        in_phase[dtype] = in_phase.get(dtype, 0) + number


def _sum(a: Counts, b: Counts) -> Counts:
    total: dict[OperationPhase, dict[str, float]] = {}
    for counts in (a, b):
        for phase, by_dtype in counts.items():
            for dtype, number in by_dtype.items():
                _count(total, phase, dtype, number)
    return _scaled(total, 1)


def _scaled(counts: Counts, times: float) -> Counts:
    """The counts times a number, without zeros and in the order of the phases."""
    scaled: dict[OperationPhase, dict[str, float]] = {}
    for phase in OPERATION_PHASES:
        for dtype, number in counts.get(phase, {}).items():
            _count(scaled, phase, dtype, times * number)
    return scaled


# Floating point operations: what torch's formulas leave out


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


def _two_for_each_multiplied(a: Tensor, b: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    """Of `a @ b`, either of which may be a vector."""
    return 2 * a.numel() * (b.shape[-1] if b.dim() > 1 else 1)


def _added_to_a_product(c: Tensor, a: Tensor, b: Tensor, *args: Any, out_val: Tensor, **kwargs: Any) -> int:
    return _two_for_each_multiplied(a, b, out_val=out_val)


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, *args: Any, out_val: Any, **kwargs: Any) -> int:
    """Each of the gradients of x and of the weight costs as much as the convolution."""
    transposed, output_mask = args[4], args[7]
    return sum(output_mask[:2]) * flop_counter.conv_flop_count(x.shape, weight.shape, grad.shape, transposed)  # type: ignore[arg-type]


_FORMULAS: dict[Any, Any] = {
    **flop_counter.flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
    aten.convolution_backward: _convolution_backward,
    aten._int_mm: _two_for_each_multiplied,
    aten.mv: _two_for_each_multiplied,
    aten.dot: _two_for_each_multiplied,
    aten.addmv: _added_to_a_product,
}


def _product_with_packed(a: Tensor, packed: Tensor, shape: Any, *args: Any, **kwargs: Any) -> int:
    """Of a @ b.T, where b of this shape is packed."""
    return 2 * a.numel() * int(shape[0])


# Of libraries that may be missing
_FORMULAS_BY_NAME: dict[str, Any] = {
    "bitsandbytes.gemm_4bit": _product_with_packed,
    "bitsandbytes.int8_scaled_mm": lambda a, b, *args, **kwargs: _product_with_packed(a, b, b.shape),
    "bitsandbytes.int8_mixed_scaled_mm": lambda a, _, b, *args, **kwargs: _product_with_packed(a, b, b.shape),
}


# Bytes

# Which overwrite their first tensor, or ask it for a shape only
_FIRST_IS_NOT_READ = {
    *(
        aten.copy_,
        aten.fill_,
        aten.zero_,
        aten.normal_,
        aten.uniform_,
        aten.bernoulli_,
        aten.exponential_,
        aten.random_,
    ),
    *(aten._foreach_copy_, aten._foreach_zero_),
    *(aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_zeros, aten.new_ones, aten.new_full),
}
_WRITE_NOTHING = {
    *(aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided),
    *(aten._unsafe_view, aten.lift_fresh),
}
# Which read of their first tensor as many elements as they return
_LOOK_UPS = {aten.embedding, aten.index, aten.index_select, aten.gather, aten.nll_loss_forward, aten.nll_loss2d_forward}
# Which change of their first tensor as many elements as they are given
_SCATTERS = {
    aten.index_put_,
    aten._index_put_impl_,
    aten.index_add_,
    aten.index_copy_,
    aten.scatter_,
    aten.scatter_add_,
}


@functools.cache
def _written(func: Any) -> frozenset[str]:
    """Names of the arguments that an operation changes."""
    return frozenset(a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def _names(func: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in func._schema.arguments)


def _moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> list[tuple[Tensor, int]]:
    """Each tensor that an operation reads or writes, with the bytes; one that it changes stands there twice."""
    packet = func._overloadpacket
    if packet in _WRITE_NOTHING:
        return []
    given = operands((*args, *kwargs.values()))
    made = operands((result,))
    if not _written(func):
        known = {storage._cdata for tensor in given for storage in storages_of(tensor)}
        made = [tensor for tensor in made if not all(s._cdata in known for s in storages_of(tensor))]
        if not made:
            return []  # views, questions about a tensor, and what returns what it was given
    written = [] if _written(func) else [(tensor, _bytes(tensor)) for tensor in made]
    read: list[tuple[Tensor, int]] = []
    for place, (name, value) in enumerate([*zip(_names(func), args, strict=False), *kwargs.items()]):
        most = _most_touched(packet, given, made) if place == 0 else math.inf
        for tensor in operands((value,)):
            touched = int(min(_bytes(tensor), most * tensor.element_size()))
            if name in _written(func):
                written.append((tensor, touched))
            if name != "out" and not (place == 0 and packet in _FIRST_IS_NOT_READ):
                read.append((tensor, touched))
    return read + written


def _most_touched(packet: Any, given: list[Tensor], made: list[Tensor]) -> float:
    """How many elements of its first tensor an operation can touch."""
    if packet in _LOOK_UPS and made:
        return made[0].numel()
    if packet in _SCATTERS:
        return max((tensor.numel() for tensor in given[1:]), default=0)
    return math.inf


def _bytes(tensor: Tensor) -> int:
    """Bytes of the distinct elements of a tensor: an expanded dimension counts once."""
    if tensor.layout is not torch.strided:
        return sum(storage.nbytes() for storage in storages_of(tensor))
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride or not size else 1 for size, stride in sizes) * tensor.element_size()
