"""Stacks of transformer blocks: where they are in a model, and what one call of a block was given.

A stack is the list of equal blocks on one side of the model, so an encoder-decoder model has two. The blocks are the
model's own, whatever adapters sit inside them.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NoReturn

import torch
from jaxtyping import Int, Shaped
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from ..adapters.placement import stacks as lists_of_equal_modules
from ..errors import SettingError
from ..fakes import has_values

CROSS_ATTENTION = re.compile(r"cross_?att|encoder_attn|encdecattention", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """One list of blocks. `name` is its dotted name in the model, `causal` whether tokens see earlier ones only."""

    name: str
    blocks: nn.ModuleList
    causal: bool
    cross_attentions: frozenset[nn.Module]

    def __len__(self) -> int:
        return len(self.blocks)


@dataclass(frozen=True)
class BlockCall:
    """What one block was called with.

    hidden: [batch, tokens, width]. named: every other argument by name. forward: the block's own forward.
    """

    index: int
    forward: Callable[..., Any]
    hidden: Tensor
    named: dict[str, Any] = field(default_factory=dict)

    def __call__(self, hidden: Tensor, **named: Any) -> Tensor:
        """The block's new hidden states; `named` replaces arguments."""
        return hidden_in(self.forward(hidden, **{**self.named, **named}))

    def with_named(self, **named: Any) -> "BlockCall":
        """The same call with arguments replaced."""
        return replace(self, named={**self.named, **named})


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a model in the order it runs them, encoder first.

    Raises SettingError if it has none, naming what was looked for.
    """
    lists = [
        (name, blocks)
        for name, blocks in lists_of_equal_modules(model)
        if _attentions(blocks[0]) and not is_attention(blocks[0]) and not isinstance(blocks[0], nn.ModuleList)
    ]
    outermost = [
        (name, blocks) for name, blocks in lists if not any(name.startswith(f"{outer}.") for outer, _ in lists)
    ]
    marked = [item for item in outermost if isinstance(item[1][0], GradientCheckpointingLayer)]
    if not (found := marked or outermost):
        raise SettingError(
            f"{type(model).__name__} has no list of equal transformer blocks with attention, which techniques that "
            "change how blocks run need."
        )
    return [_stack(name, blocks) for name, blocks in found]


def _stack(name: str, blocks: nn.ModuleList) -> Stack:
    own = [m for n, m in _attentions(blocks[0]) if not CROSS_ATTENTION.search(n)]
    said = [getattr(m, flag) for m in own for flag in ("is_causal", "is_decoder") if hasattr(m, flag)]
    causal = any(map(bool, said)) if said else _masks_are_causal(blocks[0])
    cross = frozenset(m for block in blocks for n, m in _attentions(block) if CROSS_ATTENTION.search(n))
    return Stack(name, blocks, causal, cross)


def _masks_are_causal(block: nn.Module) -> bool:
    """Whether attention that does not say so itself is causal: by a mask of its own, or, such as Bloom's, by the only
    masks that its file makes.
    """
    buffers = (buffer for _, attention in _attentions(block) for buffer in attention.buffers(recurse=False))
    if any(map(_is_causal_mask, buffers)):
        return True
    others = ("create_bidirectional_mask", "ALL_ATTENTION_FUNCTIONS")
    return _code_has(block, "create_causal_mask") and not any(_code_has(block, name) for name in others)


def _is_causal_mask(buffer: Tensor) -> bool:
    """Whether it is one mask of tokens by tokens, with nothing after the token itself."""
    tokens = buffer.shape[-1] if buffer.dim() > 1 else 1
    is_table = buffer.dtype == torch.int64  # of places in it, as of relative positions
    if is_table or tokens == 1 or buffer.shape[-2] != tokens or buffer.numel() != tokens**2:
        return False
    return not has_values(buffer) or bool(buffer.tril(-1).any() and not buffer.triu(1).any())


def _code_has(block: nn.Module, name: str) -> bool:
    """Whether a file that defines a block's attention, or what that inherits from, knows `name`."""
    classes = {c for _, attention in _attentions(block) for c in type(attention).__mro__}
    return any(hasattr(sys.modules.get(c.__module__), name) for c in classes)


def refuse_own_attention(stack: Stack, technique: str, instead: str) -> None:
    """Raise SettingError where blocks compute attention outside of transformers' attention interface."""
    block = stack.blocks[0]
    if not _code_has(block, "ALL_ATTENTION_FUNCTIONS"):
        raise SettingError(
            f"{technique} computes attention by itself, but {type(block).__name__} of {stack.name} does not call it "
            f"through transformers' attention interface; {instead}."
        )


def _attentions(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of a block whose class is named as attention, with their names."""
    return [(name, module) for name, module in block.named_modules() if is_attention(module)]


def is_attention(module: nn.Module) -> bool:
    """Whether the class of a module is named as attention."""
    return "attention" in type(module).__name__.lower()


def attentions(block: nn.Module) -> list[nn.Module]:
    """The modules of a block that are attention; one may be inside of another."""
    return [module for _, module in _attentions(block)]


def attention_layers(block: nn.Module) -> list[nn.Module]:
    """The layers inside a block's attention: modules that hold no others, and adapted layers as one."""
    found: dict[int, nn.Module] = {}
    for attention in attentions(block):
        _collect_layers(attention, found)
    return list(found.values())


def _collect_layers(module: nn.Module, found: dict[int, nn.Module]) -> None:
    adapted = isinstance(module, BaseTunerLayer) and not attentions(module)
    children = list(module.children())
    if adapted or not (children or is_attention(module)):
        found[id(module)] = module
        return
    for child in children:
        _collect_layers(child, found)


def _signature(block_class: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(block_class.forward)


def bind(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states among a block's arguments, and all others by name."""
    bound = _signature(type(block)).bind(block, *args, **kwargs)
    named: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        kind = _signature(type(block)).parameters[name].kind
        named.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
    first = next(iter(named))
    return named.pop(first), named


def hidden_in(output: Any) -> Tensor:
    """The hidden states in what a block returned."""
    return output if isinstance(output, Tensor) else output[0]


class NotThere(SettingError, AttributeError):
    """A model asks what stands in for a tensor for more than it can give; hasattr() answers no."""


class Unread:
    """In place of what a block returned beside the hidden states: stands for it as long as nothing reads it."""

    def __init__(self, block: nn.Module, technique: str):
        self.block = type(block).__name__
        self.technique = technique

    def refuse(self) -> NoReturn:
        """Raise SettingError."""
        raise SettingError(
            f"{self.block} hands on more than hidden states, which {self.technique} cannot do; leave "
            f"{self.technique} out for this model."
        )

    def __getitem__(self, index: Any) -> NoReturn:
        self.refuse()

    def __iter__(self) -> NoReturn:
        self.refuse()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # of copies and the like
            raise AttributeError(name)
        try:
            self.refuse()
        except SettingError as error:
            raise NotThere(str(error)) from None

    @classmethod
    def __torch_function__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls)).refuse()


class NotedForward:
    """A block's forward that notes what it returns beside the hidden states.

    beside: `Unread` for each further part, None for those that are None; None where it returns the hidden states alone.
        Before it ran, what its code shows.
    """

    def __init__(self, block: nn.Module, forward: Callable[..., Any], technique: str):
        self.forward = forward
        self.unread = Unread(block, technique)
        length = _length_in_code(type(block).forward)
        self.beside: tuple[Unread | None, ...] | None = None if length is None else (self.unread,) * (length - 1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        self.beside = None
        if isinstance(output, (tuple, list)):
            self.beside = tuple(None if part is None else self.unread for part in output[1:])
        return output


@cache
def _length_in_code(forward: Callable[..., Any]) -> int | None:
    """How long a tuple or list a block's forward returns; None if it returns none, or if its code does not show it.

    Of one that others are added to, what it has without them.
    """
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError):  # of a class that stands in no file
        return None
    assigned = {
        target.id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }

    def length(value: Any) -> int | None:
        value = assigned.get(value.id) if isinstance(value, ast.Name) else value
        value = value.left if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add) else value
        literal = isinstance(value, (ast.Tuple, ast.List)) and not any(isinstance(e, ast.Starred) for e in value.elts)
        return len(value.elts) if literal else None

    lengths = {length(node.value) for node in ast.walk(function) if isinstance(node, ast.Return)}
    return lengths.pop() if len(lengths) == 1 else None


def gather_tokens(x: Shaped[Tensor, "_ tokens *rest"], index: Int[Tensor, "batch kept"]) -> Tensor:
    """`x` at the given token positions of each sample, [batch, kept, *rest]; a batch of 1 in `x` serves all samples."""
    rest = x.shape[2:]
    where = index.view(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)
    return x.expand(index.shape[0], *x.shape[1:]).gather(1, where)


def scatter_tokens(
    rows: Shaped[Tensor, "batch kept *rest"], index: Int[Tensor, "batch kept"], num_tokens: int
) -> Tensor:
    """The inverse of `gather_tokens`: [batch, num_tokens, *rest] with `rows` at the given positions and 0 elsewhere."""
    rest = rows.shape[2:]
    where = index.view(*index.shape, *(1 for _ in rest)).expand(*index.shape, *rest)
    return rows.new_zeros(index.shape[0], num_tokens, *rest).scatter(1, where, rows)


def take_tokens(value: Any, index: Int[Tensor, "batch kept"], num_tokens: int) -> Any:
    """An argument of a block for some of its tokens: what runs along the token axis is gathered, the rest is as it was.

    Tuples, lists and dicts are looked into. See `token_axis`.
    """
    if isinstance(value, dict):
        return {key: take_tokens(item, index, num_tokens) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(take_tokens(item, index, num_tokens) for item in value)
    axis = token_axis(value, num_tokens)
    if axis is None:
        return value
    if axis == 0:
        return value[index]
    if axis == 1:
        return gather_tokens(value, index)
    heads_first = value.expand(index.shape[0], *value.shape[1:]).transpose(1, 2)
    return gather_tokens(heads_first, index).transpose(1, 2)


def token_axis(value: Any, num_tokens: int) -> int | None:
    """The axis of a block's argument that runs along the tokens, or None.

    There is one in tensors [tokens], [batch, tokens, ...] and [tokens, width], and in [batch, heads, tokens, keys].
    """
    if not isinstance(value, Tensor):
        return None
    if value.dim() == 4:
        return 2 if value.shape[2] == num_tokens else None
    if value.dim() in (2, 3) and value.shape[1] == num_tokens:
        return 1
    return 0 if value.dim() in (1, 2) and value.shape[0] == num_tokens else None


def first_relative_bias(block: nn.Module) -> nn.Module | None:
    """The attention of a block that makes the bias by relative position for the whole stack (T5), or None."""
    return next((m for m in block.modules() if getattr(m, "has_relative_attention_bias", False)), None)


MIXING = re.compile(r"BatchNorm|Mamba|SSM(?!LP)|RWKV|Hyena|DeltaNet|ShortConv|LSTM|GRU|Recurrent", re.IGNORECASE)
ROUTING = re.compile(r"MoE|MoeBlock|SparseMoe|Router|Experts", re.IGNORECASE)


def refuse_several_devices(stack: Stack, technique: str) -> None:
    """Raise SettingError where the blocks of a stack lie on several devices."""
    if len(devices := {str(p.device) for p in stack.blocks.parameters()}) > 1:
        raise SettingError(
            f"{stack.name} lies on {' and '.join(sorted(devices))}; {technique} runs a stack on one device."
        )


def refuse_batch_norm(stack: Stack, technique: str) -> None:
    """Raise SettingError where running statistics of blocks would count a batch that is run again twice."""
    for name, module in stack.blocks.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            raise SettingError(
                f"{stack.name}.{name} is a {type(module).__name__}, whose running statistics would count each batch "
                f"twice; {technique} cannot run such blocks."
            )


def refuse_token_mixing(stack: Stack, technique: str) -> None:
    """Raise SettingError where blocks mix tokens other than by attention, or route each token by what others do."""
    for name, module in stack.blocks.named_modules():  # of all blocks: in some models the first are unlike the others
        what = type(module).__name__
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and max(module.kernel_size) > 1:
            reason = "mixes neighbouring tokens"
        elif MIXING.search(what):
            reason = "couples tokens or samples"
        elif ROUTING.search(what):
            reason = "routes tokens to experts, with a balance over all of them"
        else:
            continue
        raise SettingError(
            f"{technique} needs blocks in which tokens meet in attention only, but {stack.name}.{name} ({what}) "
            f"{reason}; use recompute instead."
        )
