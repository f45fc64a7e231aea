"""What is kept for backward, module by module: why, whether a trained weight needs it, and what would remove it.

Method   When a backward begins, every storage that the ledger counts as kept is looked up in autograd's graph: which
         nodes keep it, of which input, for whose gradient. Sums are the ledger's, so they agree with it to the byte.
Needed   The input of a weight that trains; and what passes a gradient on to a lower one: q, k, v of attention, the
         input of an activation function or of a norm. Nothing is needed that leads to no trained weight.
Spare    Kept although a trained weight's gradient does not need it in this form: it can be formed again, element by
         element or row by row, from what is needed; it stands there twice; a seed replaces it; or the same gradient can
         be had without it (logits in chunks, fused attention). What is left after removing all of it is enough.
Misses   Tensors that a saved-tensor hook put into another form, and those that Python holds beside the graph, such as
         the inputs of a checkpointed block, are counted and named so, and never called spare. Values decide what is a
         dropout mask and whether two masks are equal, so fake tensors tell neither. Weight arithmetic between a kept
         tensor and the weight it serves (DoRA) is reported as passing gradients.
"""

import re
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from ..modes import in_backward
from ..technique import TECHNIQUES
from .graph import COPIES, VIEWS, Edge, Graph, Places, Slot, kind_of, source, storage_keys, through
from .ledger import Ledger

Need = Literal["trained weight", "passing gradients", "nothing", "unknown"]


@dataclass(frozen=True)
class Kind:
    """What a kept tensor is.

    spare: kept although no trained weight needs it in this form.
    why: one line for people.
    setting: what removes it without a technique.
    """

    spare: bool
    why: str
    setting: str = ""


KINDS = {
    "inputs of trained weights": Kind(False, "the gradient of a weight is formed from its input"),
    "activation inputs": Kind(False, "the slope of an activation function is taken at its input"),
    "norm inputs": Kind(False, "a norm passes gradients by its input"),
    "norm statistics": Kind(False, "one or two numbers a row, to form a norm's output again"),
    "attention inputs": Kind(False, "q, k and v pass gradients to each other"),
    "attention outputs": Kind(False, "with one number a row, to form the probabilities again"),
    "factors": Kind(False, "each factor of a product passes the other's gradient"),
    "loss": Kind(False, "labels and the like"),
    "other": Kind(False, "an operation with no rule of its own"),
    "packed": Kind(False, "stored in another form by a saved-tensor hook"),
    "beside the graph": Kind(False, "held by Python: inputs of recomputed blocks, a cache"),
    "logits": Kind(True, "the loss can be taken over chunks of rows"),
    "attention probabilities": Kind(
        True,
        "fused attention forms them again from q and k",
        "attn_implementation sdpa; on CPU also dropout 0",
    ),
    "repeated heads": Kind(True, "keys and values copied for each query head of a group"),
    "activation outputs": Kind(True, "formed again from the activation's input, which is kept"),
    "gated products": Kind(True, "formed again from their two factors, which are kept"),
    "normalised inputs": Kind(True, "formed again from the norm's input and statistics"),
    "norm inputs beside outputs": Kind(True, "the norm's output is kept too, and passes gradients as well"),
    "dropout masks": Kind(True, "a seed draws them again", "dropout 0"),
    "dropout outputs": Kind(True, "formed again from the input and a seed; adapters could share one", "dropout 0"),
    "copies": Kind(True, "the same values are kept already, here or in another dtype"),
    "inputs of frozen layers": Kind(True, "only the gradient of a weight that is frozen needs them"),
    "unused gradient paths": Kind(
        True, "no weight below trains", "no enable_input_require_grads, no inputs that require gradients"
    ),
}

# Words for `Technique.removes` that are no kinds.
BLOCKS = "block activations"  # every kind, inside the blocks of a model
EVERYTHING = "everything kept"  # every kind, everywhere
REMOVABLE = frozenset({*KINDS, BLOCKS, EVERYTHING})

# fmt: off
_ACTIVATIONS = frozenset({
    "Silu", "Gelu", "Relu", "Tanh", "Sigmoid", "Elu", "LeakyRelu", "Softplus", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Mish", "LogSigmoid", "Glu", "Threshold", "Clamp", "Abs", "Exp",
})
# fmt: on
_NORMS = frozenset({"NativeLayerNorm", "FusedRmsNorm"})
# Formed again at the cost of reading the inputs once.
_CHEAP = _ACTIVATIONS | _NORMS | VIEWS | COPIES | {"Add", "Sub", "Neg", "Mul", "Div", "NativeDropout", "Pow", "Sqrt"}
_SOFTMAXES = frozenset({"Softmax", "SafeSoftmax"})
_LOSSES = frozenset({"LogSoftmax", "NllLoss", "NllLoss2D", "CrossEntropyLoss", "Logsumexp"})
_RESULTS = frozenset({"result", "result0", "output"})
_FIRST = ("inputs of trained weights", "attention inputs", "attention outputs", "activation inputs", "norm inputs")


@dataclass(frozen=True)
class KeptRow:
    """Kept tensors of one kind in one module.

    module: path of the module whose operation keeps them; "" outside all modules.
    need: what they are needed for, spare ones too, which are needed in another form; "unknown" beside the graph.
    num_bytes, num_tensors: of distinct storages; a storage of which a part is spare counts as a tensor in both rows.
    in_block: the module belongs to a stack of blocks.
    operation: the node of autograd's graph, for kind "other".
    removed_by, reduced_by: techniques that leave the gradients as they are, and those that do not.
    """

    module: str
    kind: str
    need: Need
    num_bytes: int
    num_tensors: int
    in_block: bool
    operation: str = ""
    removed_by: tuple[str, ...] = ()
    reduced_by: tuple[str, ...] = ()

    @property
    def spare(self) -> bool:
        """Whether no trained weight needs it in this form."""
        return KINDS[self.kind].spare


@dataclass(frozen=True)
class KeptReport:
    """What one backward found kept; rows sum to `saved_bytes`, which is the ledger's."""

    rows: tuple[KeptRow, ...]
    saved_bytes: int

    @property
    def spare_bytes(self) -> int:
        """Bytes that no trained weight needs in this form."""
        return sum(row.num_bytes for row in self.rows if row.spare)

    def bytes_of(self, kind: str, module: str = "") -> int:
        """Bytes of one kind, in modules whose path contains `module`."""
        return sum(row.num_bytes for row in self.rows if row.kind == kind and module in row.module)

    def by_kind(self) -> tuple[KeptRow, ...]:
        """One row a kind and need, spare ones first, then the largest; `module` is empty."""
        return _summed(replace(row, module="") for row in self.rows)

    def by_module(self) -> tuple[KeptRow, ...]:
        """Rows with block numbers replaced by `*` and summed, spare ones first, then the largest."""
        return _summed(replace(row, module=re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values, with every row as it is."""
        rows = [asdict(row) | {"spare": row.spare} for row in self.rows]
        return {"saved_bytes": self.saved_bytes, "spare_bytes": self.spare_bytes, "rows": rows}


class Kept:
    """Watches the backward passes of a running ledger and explains the one that had most kept.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
    >>> ledger = Ledger(model)
    >>> with ledger, Kept(ledger) as kept:
    ...     model(torch.ones(5, 3)).sum().backward()
    >>> [(row.module, row.kind, row.num_bytes) for row in kept.report().by_module()]
    [('2', 'activation outputs', 80), ('1', 'activation inputs', 80)]
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self._report: KeptReport | None = None

    def __enter__(self) -> "Kept":
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to watch, with no report."""
        self._report = None
        self._places = Places(self.ledger.model)
        with ExitStack() as undo:
            undo.callback(register_module_forward_pre_hook(self._places.enter).remove)
            undo.callback(register_module_forward_hook(self._places.leave, always_call=True).remove)
            undo.enter_context(_backward_told_to(self._backward_begins))
            self._undo = undo.pop_all()

    def stop(self) -> None:
        """Leave no hook behind."""
        self._undo.close()

    def report(self) -> KeptReport:
        """The backward that had most kept. Raises RuntimeError if none began since start()."""
        if self._report is None:
            raise RuntimeError(
                "No backward was seen; run a step with loss.backward() inside `with ledger, Kept(ledger):`."
            )
        return self._report

    def _backward_begins(self, roots: list[Tensor]) -> None:
        if in_backward():  # a backward within a backward, such as of a recomputed block
            return
        kept = self.ledger.kept()
        total = sum(size for _, size, _ in kept)
        if self._report is not None and total <= self._report.saved_bytes:
            return
        with _disable_current_modes(), torch.no_grad():
            trained = {id(p) for p in self.ledger.model.parameters() if p.requires_grad}
            explained = _Explanation(Graph(roots, trained), self._places, self.ledger.model, kept)
            self._report = KeptReport(_summed(explained.rows()), total)


class _Explanation:
    """Why each kept storage is kept."""

    def __init__(
        self, graph: Graph, places: Places, model: nn.Module, kept: list[tuple[torch.UntypedStorage, int, str]]
    ):
        self.graph, self.places = graph, places
        self.kept = {id(storage): (size, born_in) for storage, size, born_in in kept}
        leaves = ((name, module) for name, module in model.named_modules() if not any(module.children()))
        self._classes = {name: type(module).__name__.lower() for name, module in leaves}
        self._stacks = [f"{n}." for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        self.uses: dict[int, list[Slot]] = {}
        self.made: dict[Edge, int] = {}  # where a kept storage was made
        for slot in graph.slots():
            for key in storage_keys(slot.tensor):
                if key in self.kept:
                    self.uses.setdefault(key, []).append(slot)
                    if not slot.packed and (edge := _origin(slot)) is not None:
                        self.made.setdefault(edge, key)
        self._norm_sizes: dict[Any, int] = {}  # of each call of a norm, the largest tensor it keeps
        for slot in (slot for uses in self.uses.values() for slot in uses):
            if (norm := self._norm(slot.node)) is not None:
                self._norm_sizes[norm] = max(self._norm_sizes.get(norm, 0), slot.tensor.numel())
        self._masks = {key for key, uses in self.uses.items() if any(self._is_mask(slot) for slot in uses)}
        self._dropouts = {slot.node for key in self._masks for slot in self.uses[key]}
        self._norms_with_output = self._find_norms_with_output()
        self._first_of: dict[Any, int] = {}  # of storages that hold the same values, the one that stays

    def rows(self) -> list[KeptRow]:
        """One row a storage, two where a part of it is spare."""
        rows = []
        for key, (size, born_in) in self.kept.items():
            place, need, parts, operation = self._explain(key, size, born_in)
            in_block = any(place.startswith(stack) for stack in self._stacks)
            for kind, num_bytes in parts.items():
                against = techniques_against({kind, EVERYTHING, BLOCKS} if in_block else {kind, EVERYTHING})
                shown = operation if kind == "other" else ""
                rows.append(KeptRow(place, kind, need, num_bytes, 1, in_block, shown, *against))
        return rows

    def _explain(self, key: int, size: int, born_in: str) -> tuple[str, Need, dict[str, int], str]:
        """The module that keeps it, what it is needed for, bytes by kind, and the operation."""
        uses = self.uses.get(key)
        if not uses:
            return born_in, "unknown", {"beside the graph": size}, ""
        needed = [slot for slot in uses if any(self.graph.reaches_trained(edge) for edge in slot.serves)]
        direct = any(self.graph.is_weight(edge) for slot in needed for edge in slot.serves)
        need: Need = "trained weight" if direct else "passing gradients"
        chosen, parts = (needed or uses)[0], {}
        if not needed:
            need = "nothing"
            serves_none = all(edge[0] is None for slot in uses for edge in slot.serves)
            parts = {"inputs of frozen layers" if serves_none else "unused gradient paths": size}
        elif not (plain := [slot for slot in needed if not slot.packed]):
            parts = {"packed": size}
        else:
            chosen, kind = self._kind(key, plain, born_in)
            repeats = max(map(_repeats, plain)) if kind == "attention inputs" else 1
            parts = {kind: size // repeats}
            if repeats > 1:
                parts["repeated heads"] = size - size // repeats
        return self.places.of(chosen.node)[0], need, parts, kind_of(chosen.node)

    def _kind(self, key: int, uses: list[Slot], born_in: str) -> tuple[Slot, str]:
        """The kind, and the use it shows in."""
        if key in self._masks:
            return uses[0], "dropout masks"
        by_use = {self._kind_of_use(slot): slot for slot in reversed(uses)}
        for kind in ("logits", "attention probabilities"):
            if kind in by_use:
                return by_use[kind], kind
        again = self._formed_again(key, uses, born_in)
        if again is not None:
            return uses[0], again
        if set(by_use) == {"norm inputs"} and all(self._norm(s.node) in self._norms_with_output for s in uses):
            return uses[0], "norm inputs beside outputs"
        kind = next((kind for kind in _FIRST if kind in by_use), next(iter(by_use)))
        return by_use[kind], kind

    def _kind_of_use(self, slot: Slot) -> str:
        operation, norm = kind_of(slot.node), self._norm(slot.node)
        if operation in _LOSSES:
            rows_of_logits = slot.name in ("self", "result") and slot.tensor.ndim > 1
            return "logits" if rows_of_logits else "loss"
        if operation in _SOFTMAXES or (operation in ("Bmm", "Mul") and self._is_probabilities(slot)):
            return "attention probabilities" if slot.tensor.ndim > 2 else "other"
        if any(self.graph.is_weight(edge) for edge in slot.serves) and slot.value is not None and norm is None:
            return "inputs of trained weights"
        if operation in _ACTIVATIONS or self._in_activation(slot.node):
            return "activation inputs"
        if norm is not None:
            return "norm inputs" if slot.tensor.numel() == self._norm_sizes[norm] else "norm statistics"
        if operation.startswith("ScaledDotProduct"):
            return "attention inputs" if slot.name in ("query", "key", "value") else "attention outputs"
        if operation in ("Bmm", "Baddbmm"):
            return "attention inputs"
        if any(self.graph.is_weight(edge) for edge in slot.serves):
            return "inputs of trained weights"
        return "factors" if operation in ("Mul", "Div") else "other"

    # What can be formed again

    def _formed_again(self, key: int, uses: list[Slot], born_in: str) -> str | None:
        origins = [edge for slot in uses if (edge := _origin(slot)) is not None]
        if not origins:
            return self._repeated_constant(key, uses, born_in)
        edge = origins[0]
        if self._is_dropout(edge[0]):
            below = source(edge[0].next_functions[0])
            spare = self._available(below) or self._comes_second(("dropped", below), key)
            return "dropout outputs" if spare else None
        if kind_of(edge[0]) in COPIES:
            edge = through(edge, VIEWS | COPIES)
            if edge in self.made or self._comes_second(("copied", edge), key):
                return "copies"
            if edge[0] is None:
                return None
        operation, inputs = kind_of(edge[0]), edge[0].next_functions
        norm = self._norm(edge[0])
        if norm is not None:
            inside = all(self._norm(slot.node) == norm for slot in uses)
            return "normalised inputs" if inside and operation in _CHEAP and all(map(self._available, inputs)) else None
        if operation not in _CHEAP or not all(map(self._available, inputs)):
            return None
        if operation in _ACTIVATIONS or self._in_activation(edge[0]):
            return "activation outputs"
        return "gated products" if all(below is not None for below, _ in inputs) else "copies"

    def _repeated_constant(self, key: int, uses: list[Slot], born_in: str) -> str | None:
        """For a tensor without gradient: a copy of one dropped before in the same block, or of an equal one."""
        tensor = uses[0].tensor
        if "dropout" in self._classes.get(born_in, ""):
            block = next((s + born_in[len(s) :].split(".")[0] for s in self._stacks if born_in.startswith(s)), "")
            return "dropout outputs" if self._comes_second(("dropped", block, tensor.shape), key) else None
        values = _fingerprint(tensor)
        if values is None:
            return None
        first = self._first_of.setdefault(values, key)
        equal = first != key and any(torch.equal(slot.tensor, tensor) for slot in self.uses[first])
        return "copies" if equal else None

    def _available(self, edge: Edge, depth: int = 8) -> bool:
        """Whether an input is kept, or can be formed again from what is."""
        node, _ = edge = source(edge)
        if node is None or edge in self.made or not node.next_functions:
            return True
        if depth == 0 or kind_of(node) not in _CHEAP:
            return False
        return all(self._available(below, depth - 1) for below in node.next_functions)

    def _comes_second(self, values: Any, key: int) -> bool:
        return self._first_of.setdefault(values, key) != key

    def _is_mask(self, slot: Slot) -> bool:
        operation = kind_of(slot.node)
        if slot.packed or operation not in ("Mul", "NativeDropout") or not self._is_constant(slot):
            return False
        in_dropout = "dropout" in self._classes.get(self.places.of(slot.node)[0], "")
        return operation == "NativeDropout" or in_dropout or _is_scaled_mask(slot.tensor)

    def _is_constant(self, slot: Slot) -> bool:
        return slot.value is None or slot.value[0] is None

    def _is_dropout(self, node: Any) -> bool:
        return node in self._dropouts

    def _is_probabilities(self, slot: Slot) -> bool:
        edge = source(slot.value) if slot.value is not None else (None, 0)
        while edge[0] is not None and (kind_of(edge[0]) in COPIES or self._is_dropout(edge[0])):
            edge = source(edge[0].next_functions[0])
        return edge[0] is not None and kind_of(edge[0]) in _SOFTMAXES

    def _in_activation(self, node: Any) -> bool:
        """Whether the node belongs to a module of an activation function that is made of several operations."""
        name = self._classes.get(self.places.of(node)[0], "")
        return any(word in name for word in ("activation", "gelu", "silu", "swish", "mish"))

    # Norms

    def _norm(self, node: Any) -> Any:
        """What identifies the call of a norm that the node belongs to; None if to none."""
        place = self.places.of(node)
        if "norm" in self._classes.get(place[0], ""):
            return place
        return node if kind_of(node) in _NORMS else None

    def _find_norms_with_output(self) -> set[Any]:
        """Norms whose output is kept, by another node than theirs and not only for the sake of a dropout."""
        found = set()
        for uses in self.uses.values():
            for slot in uses:
                if slot.value is None or slot.packed:
                    continue
                maker = through(slot.value, VIEWS | COPIES)[0]
                norm = self._norm(maker) if maker is not None else None
                if norm is not None and self._norm(slot.node) != norm:
                    found.add(norm)
        return found


def techniques_against(words: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of registered techniques that say they remove one of these: those that are exact, and the others."""
    found = sorted(cls.name for cls in TECHNIQUES.values() if cls.removes & words)
    exact = tuple(name for name in found if TECHNIQUES[name].exact)
    return exact, tuple(name for name in found if name not in exact)


@contextmanager
def _backward_told_to(tell: Any) -> Any:
    """Call `tell` with the roots before each torch.autograd.backward, which Tensor.backward goes through."""
    backward = torch.autograd.backward

    def tell_and_run(tensors: Any, *args: Any, **kwargs: Any) -> None:
        tell([tensors] if isinstance(tensors, Tensor) else [t for t in tensors if isinstance(t, Tensor)])
        backward(tensors, *args, **kwargs)

    torch.autograd.backward = tell_and_run
    try:
        yield
    finally:
        torch.autograd.backward = backward


def _origin(slot: Slot) -> Edge | None:
    """Where the slot's storage was made; None for what needs no gradient."""
    if slot.value is None:
        return (slot.node, 0) if slot.name in _RESULTS else None
    edge = source(slot.value)
    return edge if edge[0] is not None else None


def _repeats(slot: Slot) -> int:
    """How often values stand in a slot because heads were expanded and then copied."""
    edge, copied, numel = slot.value, False, slot.tensor.numel()
    repeats = 1
    while edge is not None and edge[0] is not None and kind_of(edge[0]) in VIEWS | {"Clone"}:
        node = edge[0]
        copied = copied or kind_of(node) == "Clone"
        if kind_of(node) == "Expand" and copied:
            before = torch.Size(node._saved_self_sym_sizes).numel()
            repeats = max(repeats, numel // before) if numel % before == 0 else repeats
        edge = node.next_functions[0]
    return repeats


def _is_scaled_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds zeros and one value above 1, as dropout multiplies by."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.ndim < 2 or not tensor.is_floating_point():
        return False
    largest = tensor.max()
    return bool(largest > 1) and bool(((tensor == 0) | (tensor == largest)).all())


def _fingerprint(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for tensors that may be equal; None where values are unknown or all the same."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.numel() < 2:
        return None
    flat = tensor.reshape(-1)
    if bool((flat == flat[0]).all()):
        return None
    sample = flat[:: max(1, flat.numel() // 64)].double()
    return (tuple(tensor.shape), tensor.dtype, *sample.tolist())


def _summed(rows: Iterable[KeptRow]) -> tuple[KeptRow, ...]:
    """Rows that differ in their sizes only as one, spare ones first, then the largest."""
    sums: dict[KeptRow, list[int]] = {}
    for row in rows:
        total = sums.setdefault(replace(row, num_bytes=0, num_tensors=0), [0, 0])
        total[0] += row.num_bytes
        total[1] += row.num_tensors
    found = [replace(row, num_bytes=size, num_tensors=count) for row, (size, count) in sums.items()]
    return tuple(sorted(found, key=lambda row: (not row.spare, -row.num_bytes)))
