"""Autograd's graph, read without running it: what each node keeps, of which input, and for whose gradient.

A slot is one tensor that one node keeps. Autograd's nodes name their slots after the arguments of the operation, so
for a product of matrices, `self` is input 0 and is needed for the gradient of input 1. Tensors are known by the storage
they stand on; views are looked through. Slots packed by saved-tensor hooks are read as packed, never unpacked.
"""

import bisect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .storages import storages_of, tensors_in

Edge = tuple[Any, int]  # the node that made an input, and which of its outputs; (None, 0) for what needs no gradient

# node: {slot: (input it is the value of, or None; inputs whose gradients need it)}
_SLOTS: dict[str, dict[str, tuple[int | None, tuple[int, ...]]]] = {
    "Mm": {"self": (0, (1,)), "mat2": (1, (0,))},
    "Bmm": {"self": (0, (1,)), "mat2": (1, (0,))},
    "Addmm": {"mat1": (1, (2,)), "mat2": (2, (1,))},
    "Baddbmm": {"batch1": (1, (2,)), "batch2": (2, (1,))},
    "Linear": {"input": (0, (1,)), "weight": (1, (0,))},
    "Convolution": {"input": (0, (1,)), "weight": (1, (0,))},
    "Mul": {"self": (0, (1,)), "other": (1, (0,))},
    "Div": {"self": (0, (1,)), "other": (1, (0, 1))},
    "NativeLayerNorm": {"input": (0, (0, 1)), "weight": (1, (0,)), "bias": (2, ())},
    "FusedRmsNorm": {"input": (0, (0, 1)), "weight": (1, (0,))},
}
_FIRST_INPUTS = ("self", "input", "query", "vec")  # slots of other nodes that are named after an input
_LATER_INPUTS = {"other": 1, "key": 1, "value": 2}
# fmt: off
VIEWS = frozenset({
    "Alias", "AsStrided", "Detach", "Diagonal", "Expand", "Permute", "ReshapeAlias", "Select", "Slice",
    "Split", "SplitWithSizes", "Squeeze", "T", "Transpose", "Unbind", "UnsafeSplit", "UnsafeView", "Unsqueeze", "View",
})
# fmt: on
COPIES = frozenset({"Clone", "ToCopy"})


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor that one node keeps.

    value: the edge it came in by; None if the node made it, as softmax keeps its result.
    serves: edges whose gradients need it.
    tensor: the tensor, or one that stands in what a hook made of it (`packed`).
    """

    node: Any
    name: str
    value: Edge | None
    serves: tuple[Edge, ...]
    tensor: Tensor
    packed: bool


def kind_of(node: Any) -> str:
    """The operation of a node: `MulBackward0` is "Mul"."""
    return re.sub(r"Backward\d*$", "", node.name().rpartition("::")[2])


class Graph:
    """The graph below `roots`, and which of it leads to weights that train."""

    def __init__(self, roots: list[Tensor], trained: set[int]):
        self._trained = trained
        self.nodes = _inputs_first([root.grad_fn for root in roots if root.grad_fn is not None])
        self._useful: set[Any] = set()
        for node in self.nodes:
            if self.is_trained(node) or any(below in self._useful for below, _ in node.next_functions):
                self._useful.add(node)

    def is_trained(self, node: Any) -> bool:
        """Whether the node collects the gradient of a weight that trains."""
        return id(getattr(node, "variable", None)) in self._trained

    def reaches_trained(self, edge: Edge) -> bool:
        """Whether a gradient sent along the edge ends in a weight that trains."""
        return edge[0] in self._useful

    def is_weight(self, edge: Edge) -> bool:
        """Whether the edge comes straight from a weight that trains, with no more than views and copies between."""
        node = through(edge, VIEWS | COPIES)[0]
        return node is not None and self.is_trained(node)

    def slots(self) -> Iterator[Slot]:
        """All tensors that nodes keep."""
        for node in self.nodes:
            for name, saved in _saved(node):
                content = saved if isinstance(saved, Tensor) else saved.data
                for tensor in tensors_in(content):
                    yield Slot(node, name, *_edges(node, name), tensor, packed=content is not tensor)


def through(edge: Edge, kinds: frozenset[str]) -> Edge:
    """The edge that an edge leads to when nodes of these kinds, which have one input, are looked through."""
    while edge[0] is not None and kind_of(edge[0]) in kinds:
        below = [e for e in edge[0].next_functions if e[0] is not None]
        if len(below) != 1:
            break
        edge = below[0]
    return edge


def source(edge: Edge) -> Edge:
    """Where the storage that comes in by an edge was made."""
    return through(edge, VIEWS)


def storage_keys(tensor: Tensor) -> list[int]:
    """Identities of the storages a tensor stands on, valid while they live."""
    return [id(storage) for storage in storages_of(tensor)]


class Places:
    """Which module each node was made in, from autograd's running number of nodes when modules begin and end."""

    def __init__(self, model: nn.Module):
        self._paths = {id(module): name for name, module in model.named_modules()}
        self._open: list[tuple[int, tuple[str, int]]] = []
        self._calls = 0
        self._events: list[tuple[int, tuple[str, int]]] = []

    def enter(self, module: nn.Module, *seen: Any) -> None:
        """A module begins; a forward pre-hook."""
        if id(module) in self._paths:
            self._calls += 1
            self._open.append((id(module), (self._paths[id(module)], self._calls)))
            self._note()

    def leave(self, module: nn.Module, *seen: Any) -> None:
        """A module ends; a forward hook that is always called."""
        if any(key == id(module) for key, _ in self._open):
            while self._open.pop()[0] != id(module):
                pass  # modules that an exception left
            self._note()

    def of(self, node: Any) -> tuple[str, int]:
        """The innermost module's path and the number of its call; ("", 0) outside of all."""
        seen = bisect.bisect_right(self._events, node._sequence_nr(), key=lambda event: event[0])
        return self._events[seen - 1][1] if seen else ("", 0)

    def _note(self) -> None:
        self._events.append((torch._C._autograd._get_sequence_nr(), self._open[-1][1] if self._open else ("", 0)))


def _inputs_first(roots: list[Any]) -> list[Any]:
    """All nodes below the roots, each after those it leads to."""
    order: list[Any] = []
    seen: set[Any] = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, finished = stack.pop()
        if finished:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(below, False) for below, _ in node.next_functions if below is not None]
    return order


def _saved(node: Any) -> Iterator[tuple[str, Any]]:
    """Names and autograd's handles of what a node keeps, and tensors in attributes of a Python function's context."""
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            held = getattr(node, name)
            for one in held if isinstance(held, (tuple, list)) else (held,):
                if one is not None:
                    yield name.removeprefix("_raw_saved_"), one
    for name, value in getattr(node, "__dict__", {}).items():
        for tensor in tensors_in(value):
            yield name, tensor


def _edges(node: Any, name: str) -> tuple[Edge | None, tuple[Edge, ...]]:
    """The edge a slot's value came in by, None if the node made it, and the edges whose gradients need it."""
    inputs = node.next_functions
    known = _SLOTS.get(kind_of(node), {}).get(name)
    if known is not None:
        index, serves = known
        chosen = tuple(inputs[i] for i in serves if i < len(inputs))
    else:
        index = 0 if name in _FIRST_INPUTS else _LATER_INPUTS.get(name)
        chosen = tuple(inputs)
    return (inputs[index] if index is not None and index < len(inputs) else None), chosen
