"""The attention of stock models in the hands of a technique, through transformers' attention interface.

While redirected, a model's configs name an attention implementation of ours. It asks the handler that is active in the
running pass, and where there is none computes what the implementation set before would: evaluation, generation and
other models are untouched. Masks arrive as `TokenMask`, which makes the rows that are asked for instead of the whole
tokens x tokens matrix.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import SettingError
from ..fakes import has_values
from .stacks import NotThere, Stack

SUPPORTED = ("sdpa", "eager")
OURS = "shoestring_"  # in front of a redirected implementation's name

Handler = Callable[..., Tensor]
_HANDLER: ContextVar[Handler | None] = ContextVar("handler of attention", default=None)


_NO_TENSOR = "This recipe makes attention masks row by row; use recompute in its place for this model, which"


class TokenMask:
    """Which keys each query may see, made row by row.

    mask_function: transformers' rule of (batch, head, query, key) indices, True where visible.
    padding: [batch, keys], True for tokens; None where nothing is padded.
    """

    def __init__(
        self,
        batch_size: int,
        num_keys: int,
        mask_function: Callable[..., Any] = causal_mask_function,
        padding: Bool[Tensor, "batch keys"] | None = None,
        device: torch.device | str = "cpu",
        whole: Bool[Tensor, "batch _ queries keys"] | None = None,
    ):
        self.batch_size = batch_size
        self.num_keys = num_keys
        self.mask_function = mask_function
        self.padding = padding
        self.device = device
        self.whole = whole  # for rules that only work on the whole matrix
        self._made: list[tuple[Tensor, Tensor]] = []

    def __getitem__(self, index: Any) -> NoReturn:
        raise NotThere(f"{_NO_TENSOR} takes a part of it.")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # of copies and the like
            raise AttributeError(name)
        raise NotThere(f"{_NO_TENSOR} asks for its {name}.")

    def rows(self, queries: Int[Tensor, "batch kept"]) -> Bool[Tensor, "batch _ kept keys"]:
        """The keys visible from the given positions of each sample; made once for one tensor of positions."""
        for asked, made in self._made:
            if asked is queries:
                return made
        made = self._rows(queries)
        self._made.append((queries, made))
        return made

    def part(self, queries: slice, keys: slice) -> Bool[Tensor, "batch _ queries keys"]:
        """The keys of one range visible from the queries of another, the same for all samples; not remembered."""
        if self.whole is not None:
            return self.whole[:, :, queries, keys]
        batch = torch.arange(self.batch_size, device=self.device)[:, None, None, None]
        query = torch.arange(queries.start, queries.stop, device=self.device)[None, None, :, None]
        key = torch.arange(keys.start, keys.stop, device=self.device)[None, None, None, :]
        visible = self.mask_function(batch, torch.zeros_like(batch), query, key)
        if self.padding is not None:
            visible = visible & self.padding[:, None, None, keys]
        return visible.expand(self.batch_size, 1, queries.stop - queries.start, keys.stop - keys.start)

    def _rows(self, queries: Tensor) -> Tensor:
        if self.whole is not None:
            whole = self.whole.expand(queries.shape[0], *self.whole.shape[1:])
            where = queries[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3])
            return whole.gather(2, where)
        batch = torch.arange(queries.shape[0], device=self.device)[:, None, None, None]
        keys = torch.arange(self.num_keys, device=self.device)[None, None, None, :]
        visible = self.mask_function(batch, torch.zeros_like(batch), queries[:, None, :, None], keys)
        if self.padding is not None:
            visible = visible & self.padding[batch, keys]
        return visible.expand(queries.shape[0], 1, queries.shape[1], self.num_keys)


def visible_rows(mask: Any, queries: Int[Tensor, "batch kept"]) -> Tensor | None:
    """The rows of a mask for the given queries: of a `TokenMask`, or of a tensor [batch, heads, queries, keys]."""
    if mask is None or isinstance(mask, TokenMask):
        return None if mask is None else mask.rows(queries)
    if mask.shape[2] == 1:
        return mask
    mask = mask.expand(queries.shape[0], *mask.shape[1:])
    return mask.gather(2, queries[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


def additive(visible: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers added to scores: 0 where visible, the dtype's least number elsewhere."""
    if visible is None or visible.dtype is not torch.bool:
        return visible
    return torch.zeros_like(visible, dtype=like.dtype).masked_fill_(~visible, torch.finfo(like.dtype).min)


def attend(
    original: str,
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    value: Float[Tensor, "batch kv_heads keys value_width"],
    mask: Float[Tensor, "_ _ queries keys"] | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> Float[Tensor, "batch queries heads value_width"]:
    """Attention of `query` over all keys, as the implementation `original` computes it, under a mask that is added.

    Where it may be kept for backward, keys and values of grouped heads are not repeated: queries of one group stand
    behind each other instead.
    """
    if position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    if original == "eager":
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, dropout=dropout, scaling=scaling, **options)[0]
    if options.get("softcap") is not None:
        raise SettingError("sdpa attention cannot cap scores; load this model with attn_implementation='eager'.")
    (batch, heads, queries, width), groups = query.shape, query.shape[1] // key.shape[1]
    if groups > 1 and not torch.is_grad_enabled():  # the mask is larger than they are
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    elif groups > 1:
        query = query.reshape(batch, key.shape[1], groups * queries, width)
        mask = _per_group(mask, key.shape[1], groups)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=scaling)
    return out.reshape(batch, heads, queries, -1).transpose(1, 2).contiguous()


# masks per group, made once for all blocks: a mask is kept for backward, and so would be each copy
_GROUPED = WeakTensorKeyDictionary()


def _per_group(mask: Tensor | None, kv_heads: int, groups: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.shape[1] > 1:
        return mask.reshape(mask.shape[0], kv_heads, groups * mask.shape[2], mask.shape[3])
    if mask not in _GROUPED:
        _GROUPED[mask] = mask.repeat(1, 1, groups, 1)
    return _GROUPED[mask]


@contextmanager
def handled_by(handler: Handler | None) -> Iterator[None]:
    """Let `handler(original, module, query, key, value, mask, **options)` compute attention inside the context."""
    token = _HANDLER.set(handler)
    try:
        yield
    finally:
        _HANDLER.reset(token)


@contextmanager
def redirected(model: nn.Module) -> Iterator[None]:
    """Bring the attention of `model` under `handled_by` for the length of the context.

    Raises SettingError if the model computes attention outside of transformers' interface, or by an implementation
    that takes no mask of ours.
    """
    configs = _configs(model)
    originals = [config._attn_implementation for config in configs]
    for original in originals:
        if original not in SUPPORTED:
            raise SettingError(
                f"Attention implementation {original!r} takes no masks by row; load the model with "
                f"attn_implementation={' or '.join(map(repr, SUPPORTED))}."
            )
    try:
        for config, original in zip(configs, originals, strict=True):
            config._attn_implementation = _registered(original)
        yield
    finally:
        for config, original in zip(configs, originals, strict=True):
            config._attn_implementation = original


def attention_implementation(model: nn.Module, stack: Stack) -> str | None:
    """What computes attention in a stack, as its config has it, redirected or not; None if no config says so."""
    name = stack.name
    while name:
        name = name.rpartition(".")[0]
        config = getattr(model.get_submodule(name), "config", None)
        if (found := getattr(config, "_attn_implementation", None)) is not None:
            return found.removeprefix(OURS)
    return None


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) is not None:
            found[id(config)] = config
    if not found:
        raise SettingError(f"{type(model).__name__} does not use transformers' attention interface.")
    return list(found.values())


def _registered(original: str) -> str:
    name = original if original.startswith(OURS) else f"{OURS}{original}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention, original))
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, partial(_mask, original))
    return name


def _attention(
    original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    if (handler := _HANDLER.get()) is not None:
        return handler(original, module, query, key, value, mask, **options), None
    if isinstance(mask, TokenMask):
        positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
        options.setdefault("is_causal", False)
        mask = additive(mask.rows(positions), query)
    if original == "eager":
        eager = sys.modules[type(module).__module__].eager_attention_forward
        return eager(module, query, key, value, mask, **options)
    return ALL_ATTENTION_FUNCTIONS[original](module, query, key, value, mask, **options)


def _mask(
    original: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    stock = partial(
        ALL_MASK_ATTENTION_FUNCTIONS[original],
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        device=device,
    )
    if not by_rows():
        return stock(**options)
    nothing_hidden = attention_mask is None or (has_values(attention_mask) and bool(attention_mask.all()))
    sees_all = (window := options.get("local_size")) is None or kv_length < window
    if options.get("allow_is_bidirectional_skip") and nothing_hidden and sees_all:
        return None
    if use_vmap or q_offset or kv_offset:
        whole = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](
            **stock.keywords, **{**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        )
        return TokenMask(batch_size, kv_length, device=device, whole=whole)
    padding = None if attention_mask is None or nothing_hidden else attention_mask[:, :kv_length].bool()
    return TokenMask(batch_size, kv_length, mask_function, padding, device)


_BY_ROWS: ContextVar[bool] = ContextVar("masks are made by rows", default=False)


def by_rows() -> bool:
    """Whether masks are made as `TokenMask` just now."""
    return _BY_ROWS.get()


@contextmanager
def masks_by_rows() -> Iterator[None]:
    """Let models under `redirected` make `TokenMask`s inside the context."""
    token = _BY_ROWS.set(True)
    try:
        yield
    finally:
        _BY_ROWS.reset(token)
