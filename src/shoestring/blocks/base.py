"""Blocks: techniques that change how the transformer blocks of a stock model run forward and backward.

A technique writes one of two functions. `run` computes one block's output from its call and is all that recomputation
needs. `run_stack` computes a whole stack at once from the calls of all its blocks, for techniques whose blocks share
state: the stock loop calls block after block as ever, each but the last only notes what it was called with, and the
last returns what the stack computes.

Both run inside a pass: one training forward of the model, from `begin` to `end`. Outside of a pass, in evaluation and
generation, blocks run as they are. What is run again in backward belongs to the pass it was first run in.
"""

import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SettingError
from ..forwards import forward_swapped
from ..technique import Phase, Technique
from ..wrappers import innermost
from .attention import masks_by_rows, redirected
from .stacks import (
    BlockCall,
    NotedForward,
    Stack,
    Unread,
    bind,
    find_stacks,
    first_relative_bias,
    refuse_own_attention,
)

_NO_CACHE = (
    "{name} runs whole sequences and keeps no keys and values: pass use_cache=False, and no past_key_values, as prefix "
    "tuning does."
)

_PASSES: contextvars.ContextVar[Mapping[int, "Pass"]] = contextvars.ContextVar(
    "passes of techniques", default=MappingProxyType({})
)


@dataclass
class Pass:
    """One forward of the model.

    model: the one called. inputs: its arguments by name. state: whatever the technique keeps for this pass.
    calls: of blocks that wait for the last of their stack, by the stack's name. undo: left when the forward ends.
    ended: the forward has, so that what runs now is recomputed in backward.
    """

    model: nn.Module
    inputs: dict[str, Any]
    state: Any = None
    calls: dict[str, list[BlockCall]] = field(default_factory=dict)
    undo: ExitStack = field(default_factory=ExitStack)
    ended: bool = False


class BlockTechnique(Technique):
    """Changes how blocks run. A subclass overrides `run` or `run_stack`, and where needed `begin`, `end` and `check`.

    stacks: those of the model it is attached to.
    training_only: evaluation and generation run the stock blocks.
    handles_attention: the model's attention goes through `attention.handled_by`.
    instead: what to do where that cannot be, for the message.
    """

    phase: ClassVar[Phase] = Phase.BLOCK
    alone_in_phase: ClassVar[bool] = True
    removes: ClassVar[frozenset[str]] = frozenset({"block activations"})
    stacks: list[Stack]
    training_only: ClassVar[bool] = True
    handles_attention: bool = False
    instead: ClassVar[str] = "use recompute instead"

    def check(self, model: nn.Module, stacks: list[Stack]) -> None:
        """Raise SettingError where this model cannot be run this way."""

    def begin(self, current: Pass) -> None:
        """A pass begins; `current.inputs` may be changed."""

    def end(self, current: Pass, outputs: Any) -> Any:
        """A pass has ended; returns the model's outputs. Not called if the forward raised."""
        return outputs

    def run(self, stack: Stack, call: BlockCall) -> Tensor:
        """The hidden states after one block."""
        return call(call.hidden)

    def run_stack(self, stack: Stack, calls: list[BlockCall]) -> Tensor:
        """The hidden states after the whole stack; `calls[0].hidden` is what enters it."""
        raise NotImplementedError

    @property
    def runs_whole_stacks(self) -> bool:
        """Whether `run_stack` is written, so that blocks wait for the last one."""
        return type(self).run_stack is not BlockTechnique.run_stack

    @property
    def hides_states(self) -> bool:
        """Whether what blocks return is not what the stock ones do, so that nobody may read it but the next block."""
        return self.runs_whole_stacks

    @property
    def current(self) -> "Pass | None":
        """The pass that is running, or whose blocks are run again in backward."""
        return _PASSES.get().get(id(self))

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        self.stacks = stacks = find_stacks(model)
        self.check(model, stacks)
        with ExitStack() as undo:
            if self.handles_attention:
                undo.enter_context(redirected(model))
            for stack in stacks:
                if self.handles_attention:
                    refuse_own_attention(stack, self.name, self.instead)
                for index, block in enumerate(stack.blocks):
                    undo.enter_context(forward_swapped(block, partial(self._block, stack, index, block, block.forward)))
            if self.hides_states:
                for name, module in _around(model, stacks):
                    undo.callback(module.register_forward_pre_hook(self._refuse_reader(name), with_kwargs=True).remove)
            beginnings = [model]
            if not self.training_only:  # generation calls parts of the model by themselves, such as its encoder
                beginnings += [model.get_submodule(stack.name.rpartition(".")[0]) for stack in stacks]
            for module in dict.fromkeys(beginnings):
                undo.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(self._after, with_kwargs=True, always_call=True).remove)
            undo.callback(self._leave)
            yield model

    def _refuse_reader(self, name: str) -> Callable[..., None]:
        """A pre-hook on the module `name` around a stack, which is asked for states between blocks, or of attention."""

        def refuse(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            for wanted in ("output_hidden_states", "output_attentions") if self.current is not None else ():
                given = kwargs.get(wanted)
                if getattr(getattr(module, "config", None), wanted, False) if given is None else given:
                    raise SettingError(
                        f"{self.name} does not have what blocks return in stock models, and this model reads it: "
                        f"{wanted} is set for {name}. Use recompute without segments in its place."
                    )

        return refuse

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.current is not None and self.current.model is model:
            self._leave()  # torch calls no hook after KeyboardInterrupt
        if self.current is not None or (self.training_only and not (model.training and torch.is_grad_enabled())):
            return None
        current = Pass(model, {**_named(model, args), **kwargs})
        _refuse_calls_that_need_stock_blocks(self, model, current.inputs)
        with ExitStack() as undo:  # undone at once if something here raises, by _after otherwise
            undo.enter_context(_without_cache(model))
            self.begin(current)
            if self.handles_attention:
                undo.enter_context(masks_by_rows())
            _PASSES.set({**_PASSES.get(), id(self): current})
            current.undo = undo.pop_all()
        return (), current.inputs

    def _after(self, model: nn.Module, args: Any, kwargs: Any, outputs: Any = None) -> Any:
        if (current := self.current) is None or current.model is not model:
            return None
        self._leave()
        return None if outputs is None else self.end(current, outputs)

    def _leave(self) -> None:
        """End the pass that is running, if one is."""
        if (current := self.current) is not None:
            _PASSES.set({technique: other for technique, other in _PASSES.get().items() if technique != id(self)})
            current.undo.close()
            current.calls.clear()
            current.ended = True

    def _block(
        self, stack: Stack, index: int, block: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if (current := self.current) is None:
            return forward(*args, **kwargs)
        hidden, named = bind(block, args, kwargs)
        if any(named.get(name) is not None for name in ("past_key_values", "layer_past")):
            raise SettingError(_NO_CACHE.format(name=self.name))
        for value in named.values():
            if isinstance(value, Unread):
                value.refuse()
        noted = NotedForward(block, forward, self.name)
        call = BlockCall(index, noted, hidden, named)
        biases: tuple[Any, ...] | None = None
        if "position_bias" in named:  # T5: the first block makes the bias that all use, and hands it on
            if named["position_bias"] is None and (relative := first_relative_bias(block)) is not None:
                make_bias: Any = relative.compute_bias
                bias = make_bias(hidden.shape[1], hidden.shape[1], device=hidden.device)
                call = call.with_named(position_bias=bias)
            if call.named["position_bias"] is not None:
                biases = (call.named["position_bias"], named.get("encoder_decoder_position_bias"))
        if not self.runs_whole_stacks:
            new = self.run(stack, call)
        else:
            calls = current.calls.setdefault(stack.name, [])
            if calls and hidden is not calls[-1].hidden:
                raise SettingError(
                    f"The model changes what {type(block).__name__} of {stack.name} returns before the next one reads "
                    f"it, which {self.name} would leave out; leave {self.name} out for this model, or take recompute "
                    "without segments."
                )
            calls.append(call)
            new = hidden
            if index == len(stack) - 1:
                if len(calls) != len(stack):
                    raise SettingError(
                        f"{stack.name} ran {len(calls)} of its {len(stack)} blocks; set layerdrop of the model to 0, "
                        f"{self.name} needs all of them."
                    )
                new = self.run_stack(stack, current.calls.pop(stack.name))  # as ALBERT, a model may run it again
        beside = noted.beside if biases is None else biases
        return new if beside is None else (new, *beside)


def _around(model: nn.Module, stacks: list[Stack]) -> Iterator[tuple[str, nn.Module]]:
    """The models inside of this one that have a stack in them. Parts of models, as in DeBERTa, may list all states."""
    names = {stack.name.rsplit(".", depth)[0] for stack in stacks for depth in range(1, stack.name.count(".") + 1)}
    for name in sorted(names):
        if isinstance(module := model.get_submodule(name), PreTrainedModel):
            yield name, module


@contextmanager
def within(passes: Mapping[int, Pass]) -> Iterator[None]:
    """Run blocks as parts of passes that were noted by `running_passes`."""
    token = _PASSES.set(passes)
    try:
        yield
    finally:
        _PASSES.reset(token)


def running_passes() -> Mapping[int, Pass]:
    """The passes that are running now, of all techniques, for `within`."""
    return _PASSES.get()


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keep stock models from filling a cache of keys and values in training, as their configs would have it."""
    configs: list[Any] = [c for m in model.modules() if getattr(c := getattr(m, "config", None), "use_cache", False)]
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of the model by name; wrappers such as PeftModel name only what the model inside does."""
    if not args:
        return {}
    names = list(inspect.signature(type(innermost(model)).forward).parameters)[1:]
    return dict(zip(names, args, strict=False))


def _refuse_calls_that_need_stock_blocks(technique: BlockTechnique, model: nn.Module, inputs: dict[str, Any]) -> None:
    name = technique.name
    if inputs.get("use_cache") or inputs.get("past_key_values") is not None:
        raise SettingError(_NO_CACHE.format(name=name))
    config = getattr(model, "config", None)
    for wanted in ("output_attentions", "output_hidden_states", "output_router_logits"):
        given = inputs.get(wanted)
        if getattr(config, wanted, False) if given is None else given:
            where = "ask for it in evaluation, or " if technique.training_only else ""
            raise SettingError(f"{wanted} is not there under {name}; {where}leave it out.")
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise SettingError(
            f"gradient_checkpointing of the trainer runs blocks again without {name}; switch it off and add the "
            "technique recompute to the recipe."
        )
