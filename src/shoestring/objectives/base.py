"""What methods share that compute a language model's loss from what enters its output head, without logits.

In a forward in training with labels the head returns `LazyLogits`: what entered it, and what the model does to its
logits on their way to its own cross-entropy (soft-capping, scaling, casts, views, shifts), written down and not done.
There the method takes over. No file of a model is copied or changed, and no loss function replaced.
"""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakSet

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from ..errors import SettingError
from ..fakes import has_values
from ..forwards import forward_replaced
from ..modes import in_training
from ..precision import autocast_dtype
from ..real_tokens import NO_LABEL
from ..technique import Moment, Phase, Technique


class HeadLoss(Technique, ABC):
    """A technique that computes the cross-entropy over a vocabulary itself. A method writes `summed_loss`.

    Evaluation, generation and forwards without labels make logits as ever.
    """

    phase: ClassVar[Phase] = Phase.OBJECTIVE
    claims: ClassVar[frozenset[str]] = frozenset({"the output head"})
    loss_in_model: ClassVar[bool] = True
    removes: ClassVar[frozenset[str]] = frozenset({"logits"})
    _num_losses = 0
    _looked_at = False  # whether a first step has shown if there is an effect

    @abstractmethod
    def summed_loss(self, logits: LazyLogits, labels: Tensor, ignore_index: int, label_smoothing: float) -> Tensor:
        """The sum of the cross-entropies of rows whose label is not `ignore_index`; `logits` [rows, vocabulary]."""

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Let the output head return `LazyLogits` in training forwards with labels."""
        owner, head = find_head(model, self.name)
        self._num_losses = 0
        running: list[list[LazyLogits]] = []  # what the head returned in the forwards at work, innermost last

        def forward(plain: Callable[..., Any], module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not (in_training(module) and _given("labels", plain, args, kwargs)):
                return plain(*args, **kwargs)
            running.append([])
            try:
                return plain(*args, **kwargs)
            finally:
                for logits in running.pop():  # the model's output may outlive the backward
                    logits.release()

        def head_forward(plain: Callable[..., Any], module: nn.Linear, hidden: Tensor) -> Any:
            if not running:
                return plain(hidden)
            running[-1].append(logits := LazyLogits(self, hidden, module.weight, module.bias))
            return logits

        with forward_replaced(owner, forward), forward_replaced(head, head_forward):
            yield model

    def cross_entropy(
        self,
        logits: LazyLogits,
        labels: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = NO_LABEL,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """As `torch.nn.functional.cross_entropy`, for one label a row."""
        if weight is not None or size_average is not None or reduce is not None or reduction not in ("mean", "sum"):
            raise SettingError(
                f"{self.name} computes the mean or the sum of the cross-entropies without class weights, but the model "
                f"asks for weight={'given' if weight is not None else None} and reduction={reduction!r}; take "
                f"{self.name} out of the recipe."
            )
        if labels.is_floating_point() or len(logits.shape) != 2 or labels.shape != logits.shape[:1]:
            raise SettingError(
                f"{self.name} takes one label a row of logits, but labels of shape {list(labels.shape)} "
                f"({labels.dtype}) met logits of shape {list(logits.shape)}; take {self.name} out of the recipe."
            )
        if logits.weight is None:
            raise logits._wanted("a loss after the forward")
        self._num_losses += 1
        total = self.summed_loss(logits, labels, ignore_index, label_smoothing)
        if reduction == "sum":
            return total
        count = (labels != ignore_index).sum()
        # without a label the mean is NaN, as in torch, and its gradients are zero
        return torch.where(count > 0, total / count.clamp(min=1), torch.nan)

    def on_step_end(self, moment: Moment) -> None:
        """Say so if the first step did without this technique."""
        looked_at, self._looked_at = self._looked_at, True
        if not looked_at and not self._num_losses:
            warnings.warn(
                f"{self.name} has no effect: the loss was computed outside of the model. Use recipe_sft_trainer() in "
                "place of TRL's SFTTrainer; label smoothing and loss functions of a trainer need logits.",
                stacklevel=2,
            )


def find_head(model: nn.Module, name: str) -> tuple[PreTrainedModel, nn.Linear]:
    """The model that computes the loss and the linear layer that makes its logits, for the technique `name`.

    Raises SettingError if there is none, or one that is no plain linear layer.
    """
    inside = (m for m in model.modules() if isinstance(m, PreTrainedModel))
    owner = next((m for m in inside if m.get_output_embeddings() is not None), None)
    if owner is None:
        raise SettingError(
            f"{name} needs a model with an output head over a vocabulary, such as a causal, masked or "
            f"sequence-to-sequence language model; {type(model).__name__} has none. Take {name} out of the recipe."
        )
    head = owner.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):  # a whole copy of the head that peft trains
        head = head.modules_to_save[head.active_adapters[0]]
    where = next((path for path, module in owner.named_modules() if module is head), "the head")
    kind = type(head)
    if kind is nn.Linear and is_traceable_wrapper_subclass(head.weight):  # quantised or sharded
        kind = type(head.weight)
    if kind is not nn.Linear:
        raise SettingError(
            f"{name} needs a plain nn.Linear as output head, but {where} is of type {kind.__name__}: leave it out of "
            f"target_modules and of quantization (modules_to_save trains a copy of it), or leave out {name}."
        )
    return owner, head


def labelled_rows(labels: Tensor, ignore_index: int) -> Tensor:
    """Positions of the rows that count; all where labels have no values, as in a forward that is only planned."""
    if not has_values(labels):
        return torch.arange(len(labels), device=labels.device)
    return (labels != ignore_index).nonzero().squeeze(1)


def handed_on(ctx: Any, upstream: Tensor) -> list[Tensor | None]:
    """`ctx.gradients`, formed in the forward of a scalar, times what backward brings; once, if no graph is kept."""
    if ctx.gradients is None:
        raise RuntimeError("This loss has gone backward already; pass retain_graph=True the first time.")
    if torch._C._autograd._get_current_graph_task_keep_graph():  # backward may come again
        return [None if g is None else g * upstream for g in ctx.gradients]
    # in place, and let go of, so that a parameter takes the tensor itself as its gradient
    scaled = [None if g is None else g.mul_(upstream) for g in ctx.gradients]
    ctx.gradients = None
    return scaled


def _given(name: str, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a call passes something other than None as the argument `name`."""
    if name in kwargs or not args:
        return kwargs.get(name) is not None
    return inspect.signature(function).bind_partial(*args).arguments.get(name) is not None


@dataclass(frozen=True)
class Scale:
    """z -> z * factor, or z / factor."""

    factor: float | Tensor
    divide: bool = False

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """The new values, in place, and what `backward` needs."""
        return (z.div_(self.factor) if self.divide else z.mul_(self.factor)), None

    def backward(self, gradient: Tensor, kept: None) -> Tensor:
        """The gradient of what came in, in place."""
        return self.forward(gradient)[0]


@dataclass(frozen=True)
class Shift:
    """z -> z + values, one for each word of the vocabulary."""

    values: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """The new values, in place, and what `backward` needs."""
        return z.add_(self.values), None

    def backward(self, gradient: Tensor, kept: None) -> Tensor:
        """The gradient of what came in."""
        return gradient


@dataclass(frozen=True)
class Tanh:
    """z -> tanh(z)."""

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The new values, in place, and a copy of them for `backward`."""
        return z.tanh_(), z.clone()

    def backward(self, gradient: Tensor, kept: Tensor) -> Tensor:
        """The gradient of what came in, in place."""
        return gradient.mul_(kept.square_().neg_().add_(1).to(gradient.dtype))


@dataclass(frozen=True)
class Cast:
    """z -> z in another dtype."""

    dtype: torch.dtype
    before: torch.dtype

    def forward(self, z: Tensor) -> tuple[Tensor, None]:
        """The new values, and what `backward` needs."""
        return z.to(self.dtype), None

    def backward(self, gradient: Tensor, kept: None) -> Tensor:
        """The gradient of what came in."""
        return gradient.to(self.before)


Step = Scale | Shift | Tanh | Cast


class LazyLogits:
    """Logits that were not computed: the head's input, weight and bias, and the steps from its output to these logits.

    hidden: [..., width]; the logits are [..., vocabulary].
    steps: what happens to each element on the way, in order.

    Takes part in views, slices of rows, scalings, tanh, casts and `cross_entropy`; anything else raises SettingError.
    """

    def __init__(self, method: HeadLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.method, self.hidden, self.bias = method, hidden, bias
        self.weight: Tensor | None = weight
        self.steps: tuple[Step, ...] = ()
        self.vocabulary = weight.shape[0]
        self.device = hidden.device
        self.dtype = linear_dtype(hidden)
        self._family = WeakSet([self])  # and all that was made of it

    def release(self) -> None:
        """Let go of the tensors, as all do that were made of it; shapes stay known."""
        for logits in self._family:
            logits.hidden = torch.empty_like(logits.hidden, device="meta")
            logits.weight = logits.bias = None

    def _with(self, *steps: Step, hidden: Tensor | None = None) -> LazyLogits:
        new = copy.copy(self)
        self._family.add(new)
        new.hidden = self.hidden if hidden is None else hidden
        new.steps = (*self.steps, *steps)
        return new

    def __repr__(self) -> str:
        return f"LazyLogits({list(self.shape)}, not computed because of {self.method.name})"

    @property
    def shape(self) -> torch.Size:
        """[..., vocabulary]."""
        return torch.Size((*self.hidden.shape[:-1], self.vocabulary))

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one number of it."""
        return self.shape if dim is None else self.shape[dim]

    def _wanted(self, what: str) -> SettingError:
        name = self.method.name
        return SettingError(
            f"{name} makes no logits in training, but {what} wants them. Logits are there in evaluation mode "
            f"(model.eval()) and in forwards without labels; where training needs them, take {name} out of the recipe."
        )

    def contiguous(self, *args: Any, **kwargs: Any) -> LazyLogits:
        """These logits."""
        return self

    def view(self, *shape: Any) -> LazyLogits:
        """Other leading dimensions; the last one stays the vocabulary."""
        sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if not sizes or sizes[-1] != self.shape[-1]:
            raise self._wanted(f"view{sizes}, which splits the vocabulary of {self.shape[-1]},")
        return self._with(hidden=self.hidden.reshape(*sizes[:-1], self.hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index: Any) -> LazyLogits:
        """Rows; every word of the vocabulary has to stay."""
        parts = index if isinstance(index, tuple) else (index,)
        taken = sum(_dims_taken(part) for part in parts)
        in_vocabulary = taken >= self.ndim or any(part is Ellipsis for part in parts[:-1])
        if parts[-1] is None or (in_vocabulary and not (isinstance(parts[-1], slice) and parts[-1] == slice(None))):
            raise self._wanted("an index into the vocabulary")
        return self._with(hidden=self.hidden[index])

    def __setitem__(self, index: Any, value: Any) -> None:
        raise self._wanted("what writes into them")

    def to(self, *args: Any, **kwargs: Any) -> LazyLogits:
        """The logits in another dtype; they cannot change their device."""
        wanted = [*args, *kwargs.values()]
        if any(isinstance(w, (str, torch.device)) and torch.device(w) != self.device for w in wanted):
            raise self._wanted("a move to another device")
        dtype = next((w if isinstance(w, torch.dtype) else w.dtype for w in wanted if hasattr(w, "dtype")), None)
        dtype = next((w for w in wanted if isinstance(w, torch.dtype)), dtype)
        if dtype in (None, self.dtype):
            return self
        cast = self._with(Cast(dtype, self.dtype))
        cast.dtype = dtype
        return cast

    def float(self) -> LazyLogits:
        """The logits in float32."""
        return self.to(torch.float32)

    def tanh(self) -> LazyLogits:
        """The hyperbolic tangent of the logits."""
        return self._with(Tanh())

    def __mul__(self, other: Any) -> LazyLogits:
        return self._with(Scale(_fixed_number(self, other)))

    __rmul__ = mul = multiply = __mul__

    def __truediv__(self, other: Any) -> LazyLogits:
        return self._with(Scale(_fixed_number(self, other), divide=True))

    div = divide = true_divide = __truediv__

    def __add__(self, other: Any) -> LazyLogits:
        if not isinstance(other, Tensor) or other.requires_grad or other.numel() != self.shape[-1]:
            raise self._wanted("an addition of something else than a fixed bias for each word")
        promoted = self.to(torch.promote_types(self.dtype, other.dtype))
        return promoted._with(Shift(other.flatten()))

    __radd__ = add = __add__

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("__"):
            raise self._wanted(f"logits.{name}")
        raise AttributeError(f"LazyLogits has no attribute {name!r}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Functions of torch that were called with lazy logits."""
        kwargs = kwargs or {}
        own = next(a for a in (*args, *kwargs.values()) if isinstance(a, cls))
        if func is F.cross_entropy:
            labels = args[1] if len(args) > 1 else kwargs.pop("target")
            kwargs.pop("input", None)
            return own.method.cross_entropy(own, labels, *args[2:], **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ELEMENTWISE and len(args) <= 2 and not kwargs:
            return ELEMENTWISE[name](own, *(a for a in args if a is not own))
        raise own._wanted(f"torch's {name}()")


def linear_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of what a linear layer makes of `hidden`, autocast considered."""
    return autocast_dtype(hidden) or hidden.dtype


def _fixed_number(logits: LazyLogits, value: Any) -> float | Tensor:
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.requires_grad:
        return value.reshape(())
    raise logits._wanted("a scaling by something else than a fixed number")


def _dims_taken(part: Any) -> int:
    """How many dimensions one part of an index uses up."""
    if part is None or part is Ellipsis:
        return 0
    return part.ndim if isinstance(part, Tensor) and part.dtype is torch.bool else 1


ELEMENTWISE: dict[str, Callable[..., LazyLogits]] = {
    "tanh": operator.methodcaller("tanh"),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__"), operator.mul),
    **dict.fromkeys(("add", "__add__", "__radd__"), operator.add),
}
