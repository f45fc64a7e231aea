"""Recompute: keep only what enters a block and run the block again in backward.

Source   Chen et al. 2016, arXiv:1604.06174; selective form: Korthikanti et al. 2022, arXiv:2205.05198
Update   none: gradients are those of the stock model, dropout included
Costs    keeps one [batch, tokens, width] tensor a block, and one block's activations while it is run again; one more
         forward, about a third of a step. `keep="attention"` keeps attention's output too, as much again, and does not
         run attention twice. `every=2` runs only every second block again. `segments=s` keeps s such tensors a stack,
         and in backward those inside one segment: about 2 sqrt(blocks) at s = sqrt(blocks), for one more forward
Differs  never reentrant, so frozen inputs and frozen blocks are no special case
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..errors import SettingError
from ..technique import Advised, Phase, register_technique
from .attention import attention_implementation
from .base import BlockTechnique, running_passes, within
from .stacks import BlockCall, Stack, refuse_batch_norm

ATTENTION = frozenset(name for name in dir(torch.ops.aten) if name.startswith("_scaled_dot_product"))


@register_technique
@dataclass(kw_only=True)
class Recompute(BlockTechnique):
    """Runs blocks again in backward instead of keeping what they compute.

    keep: "nothing" of a block, or "attention", the output of its attention.
    every: run every n-th block again, 1 <= every; 1 for all.
    segments: groups of blocks of which only the first input is kept, their own inputs being found again in backward;
        0 for none.

    Raises SettingError for other values, and for keep="attention" where attention is not torch's sdpa.
    """

    name: ClassVar[str] = "recompute"
    advised = (Advised(20, "blocks run again in backward: about a third more time, exact"),)
    phase: ClassVar[Phase] = Phase.RECOMPUTATION
    exact: ClassVar[bool] = True
    keep: Literal["nothing", "attention"] = "nothing"
    every: int = 1
    segments: int = 0

    def __post_init__(self) -> None:
        if self.keep not in ("nothing", "attention"):
            raise SettingError(f"keep of recompute must be nothing or attention, got {self.keep!r}.")
        if self.every < 1:
            raise SettingError(f"every of recompute must be at least 1, got {self.every}.")
        if self.segments < 0:
            raise SettingError(f"segments of recompute must be 0 or more, got {self.segments}.")
        if self.segments and (self.every > 1 or self.keep != "nothing"):
            raise SettingError("segments of recompute run all blocks again and keep nothing; leave out every and keep.")

    def check(self, model: nn.Module, stacks: list[Stack]) -> None:
        for stack in stacks:
            refuse_batch_norm(stack, self.name)
        for stack in stacks if self.keep == "attention" else ():
            computed_by = attention_implementation(model, stack)
            if computed_by not in (None, "sdpa"):
                raise SettingError(
                    f"keep='attention' of recompute finds the output of torch's sdpa only, but attention of "
                    f"{stack.name} is {computed_by!r}; load the model with attn_implementation='sdpa', or set "
                    "keep='nothing'."
                )

    @property
    def runs_whole_stacks(self) -> bool:
        return self.segments > 0

    def run_stack(self, stack: Stack, calls: list[BlockCall]) -> Tensor:
        hidden, size = calls[0].hidden, math.ceil(len(calls) / self.segments)
        for start in range(0, len(calls), size):
            hidden = self._again(partial(self._segment, calls[start : start + size]), hidden)
        return hidden

    def _segment(self, calls: list[BlockCall], hidden: Tensor) -> Tensor:
        for call in calls:
            hidden = self._again(call, hidden)
        return hidden

    def run(self, stack: Stack, call: BlockCall) -> Tensor:
        return call(call.hidden) if call.index % self.every else self._again(call, call.hidden)

    def _again(self, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """`compute(hidden)`, kept as its input and computed again in backward, within the passes of now."""
        passes = running_passes()

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            if self.keep == "nothing":
                return within(passes), within(passes)
            first, again = create_selective_checkpoint_contexts(_keep_attention)
            return _both(within(passes), first), _both(within(passes), again)

        return checkpoint(compute, hidden, use_reentrant=False, context_fn=contexts)


def _keep_attention(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation.overloadpacket.__name__ in ATTENTION and not _draws_dropout(operation, args, kwargs)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _draws_dropout(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether attention draws what it drops by itself, as on GPUs: when it is not run again, later draws are others."""
    names = [argument.name for argument in operation._schema.arguments]
    return bool((dict(zip(names, args, strict=False)) | kwargs).get("dropout_p", 0.0))


@contextmanager
def _both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    with outer, inner:
        yield
