"""Rehearsal: one step of a real trainer with a real recipe, on tensors without values, counted by the ledger.

Method   The model is made from its configuration, the recipe attached and the trainer started as in a run, all under
         `Valueless`. Nothing is computed, and what a run would allocate is counted; no technique or trainer has a
         formula here. The optimizer first steps on gradients made up for it, so that its state is there in the step
         that is counted, as in all steps of a run but the first.
Batch    Every sequence has the full length, so there is no padding and no mask for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..blocks.stacks import find_stacks
from ..errors import SettingError
from ..fakes import Valueless
from ..memory import MemoryReport
from ..memory.operations import OperationCounter, Operations
from ..memory.storages import main_device, storage_sizes, storages_of, weight_tensors
from ..recipe import Recipe, attached_to
from ..training.observe import StepMemory
from ..training.quantised import numbers_in
from .sharding import Units

NO_FAKES = (
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.DataDependentOutputException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    NotImplementedError,
)


@dataclass(frozen=True)
class Work:
    """One step to rehearse, as functions that make its parts.

    make_model: the model, without values where they are called under `Valueless`.
    make_trainer: its trainer, given the model with the recipe attached, a folder and callbacks; trains one step.
    make_batch: model inputs of one micro-batch.
    """

    recipe: Recipe
    make_model: Callable[[], nn.Module]
    make_trainer: Callable[[nn.Module, str, Sequence[TrainerCallback]], Trainer]
    make_batch: Callable[[nn.Module], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Rehearsed:
    """What one step took.

    adapter_bytes: weights that the recipe added. largest_weight_bytes: of the one parameter with most.
    trained_sizes: numbers in each parameter that trains, but for those in `embedding_sizes`: the trained weights of
    nn.Embedding, heads tied to them included. total_parameters: numbers in all parameters. units: for sharding.
    """

    memory: MemoryReport
    operations: Operations | None
    adapter_bytes: int
    largest_weight_bytes: int
    trained_sizes: tuple[int, ...]
    embedding_sizes: tuple[int, ...]
    total_parameters: int
    units: Units

    @property
    def trained_parameters(self) -> int:
        """Numbers that train."""
        return sum(self.trained_sizes) + sum(self.embedding_sizes)


def rehearse(work: Work, *, count_operations: bool = False) -> Rehearsed:
    """The step on tensors without values.

    Raises SettingError, naming the technique, if one needs values.
    """
    with _imports_not_searched():
        try:
            return run_one_step(work, count_operations=count_operations, mode=Valueless())
        except NO_FAKES as error:
            raise SettingError(_without_values(work, error)) from error


@contextmanager
def _imports_not_searched() -> Iterator[None]:
    """The ledger collects garbage first, which takes a second for all that is imported."""
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


def run_one_step(
    work: Work, *, count_operations: bool = False, mode: AbstractContextManager[Any] | None = None
) -> Rehearsed:
    """The step on real tensors; or on those of `mode`."""
    operations = OperationCounter() if count_operations else None
    memory = _CountedStep(operations)
    with TemporaryDirectory() as folder, mode or nullcontext():
        base = work.make_model()
        known = _Known(base)
        model = work.recipe.apply(base)
        try:
            trainer = work.make_trainer(model, folder, [_PrimedOptimizer(), memory])
            batches = [work.make_batch(model) for _ in range(trainer.args.gradient_accumulation_steps)]
            trainer.get_train_dataloader = lambda: batches
            trainer.held_out_batch = lambda seed: batches[0]
            parameters = list(trainer.model.parameters())  # of the trainer, which may put new ones in their place
            added = {id(s): s.nbytes() for p in parameters if p not in known for s in storages_of(p)}
            largest = max(p.nbytes for p in parameters)
            embeddings = {id(m.weight) for m in trainer.model.modules() if isinstance(m, nn.Embedding)}
            trained = tuple(p.numel() for p in parameters if p.requires_grad and id(p) not in embeddings)
            of_embeddings = tuple(p.numel() for p in parameters if p.requires_grad and id(p) in embeddings)
            total, units = sum(map(numbers_in, parameters)), _units(base)
            try:
                trainer.train()
            finally:
                memory.abandon()
        finally:
            attached_to(model).detach()
    assert memory.report is not None
    counted = operations.operations() if operations else None
    return Rehearsed(memory.report, counted, sum(added.values()), largest, trained, of_embeddings, total, units)


class _Known:
    """The weights of a model, whatever values or wrappers they get later; keeps none of them alive."""

    def __init__(self, model: nn.Module):
        tensors = list(weight_tensors(model))
        # but for wrappers: torch moves a module by swapping them, which it does not where something refers to one
        plain = [tensor for tensor in tensors if not is_traceable_wrapper_subclass(tensor)]
        self._tensors = WeakTensorKeyDictionary([(tensor, None) for tensor in plain])
        # weakly, as an identity comes again once its storage is gone
        self._storages = {id(storage): weakref.ref(storage) for tensor in tensors for storage in storages_of(tensor)}

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._tensors or any(self._is_known(storage) for storage in storages_of(tensor))

    def _is_known(self, storage: torch.UntypedStorage) -> bool:
        known = self._storages.get(id(storage))
        return known is not None and known() is storage


def _units(model: nn.Module) -> Units:
    """Blocks of all stacks as units; a model without any is one."""
    weights = sum(storage_sizes(model.parameters(), main_device(model)).values())
    try:
        blocks = [block for stack in find_stacks(model) for block in stack.blocks]
    except SettingError:
        return Units(weights, 0)
    sizes = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    return Units(max(sizes), weights - sum(sizes))


class _PrimedOptimizer(TrainerCallback):
    """Lets the optimizer make its state before the step that is counted."""

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step on gradients of nothing."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0 * group["lr"]
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


class _CountedStep(StepMemory):
    """The ledger over one step, inside a counter of operations if there is one."""

    def __init__(self, operations: OperationCounter | None):
        super().__init__()
        self._operations = operations

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._operations is not None:
            self._operations.__enter__()
        super().on_step_begin(*args, **kwargs)

    def abandon(self) -> None:
        counting = self.watching and self._operations is not None
        super().abandon()
        if counting:
            self._operations.__exit__(None, None, None)  # type: ignore[union-attr]


def _without_values(work: Work, error: Exception) -> str:
    """What to tell where a step cannot run without values: which technique it is, found by leaving each out."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    for culprit in work.recipe.techniques:
        others = Recipe(*(t for t in work.recipe.techniques if t is not culprit))
        try:
            rest = run_one_step(replace(work, recipe=others), mode=Valueless())
        except (*NO_FAKES, ValueError, RuntimeError):
            continue
        return (
            f"{culprit.name} computes with values that are not there before the model is loaded ({reason}), so it "
            f"cannot be predicted; without it the peak is {rest.memory.peak_bytes / 2**30:.3g} GiB. Run "
            "`shoestring measure` for the real step."
        )
    return f"This model cannot run without values ({reason}); run `shoestring measure` for the real step."
