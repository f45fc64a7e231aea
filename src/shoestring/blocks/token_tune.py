r"""TokenTune: back-propagate through a share of the tokens.

Source   Simoulin et al., EMNLP 2024, arXiv:2501.18824; score of "seek": TokenSeek, arXiv:2601.19739
Update   G: selected positions, U: the others. Token-wise parts of a block run on h_G with gradient, on h_U without.
         Attention: keys and values of all tokens, a_G = softmax(Q_G [K_G; K_U]^T / sqrt(d) + M_G) [V_G; V_U], with
         gradient to Q_G, K_G, V_G only; a_U likewise without gradient. The loss reads the outputs at G
Shapes   h_G [batch, kept, width], h_U [batch, tokens - kept, width]; K, V [batch, kv heads, tokens, head width]
Costs    kept for backward: the share f of everything token-wise, and K and V of all tokens in every block; time of a
         step about (1 + 2 f) / 3 of full training. Gradients are an approximation: tokens outside G are constants
Differs  f counts the first and last token, which are kept in it. Heads that pool over tokens do so over all of them, in
         training as in evaluation; the paper pools over G in training. Where a sample has labels, one of them is always
         drawn. Each token is computed once, so dropout makes one draw for all that see it
"""

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..adapters.base import taps_kept
from ..draws import undrawn
from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..modes import aside
from ..real_tokens import NO_LABEL, only_learning
from ..technique import Advised, register_technique
from ..wrappers import innermost
from .attention import additive, attend, handled_by, visible_rows
from .base import BlockTechnique, Pass
from .row_sparse import TokenPlaces, gradient_stopped, kept_by_rows, stopped_outside
from .stacks import (
    BlockCall,
    Stack,
    gather_tokens,
    refuse_several_devices,
    refuse_token_mixing,
    scatter_tokens,
    take_tokens,
)
from .token_selection import Selection, ends, seek_scores, select

SHIFTED = re.compile(r"labels\[[^\]]*1:\]")
UNSHIFTED = re.compile(r"CrossEntropyLoss\(|cross_entropy\(")


@dataclass
class _State:
    """What one pass knows: per stack its selection, and arguments and masks taken for a stream once for all blocks."""

    selections: dict[str, Selection] = field(default_factory=dict)
    taken: dict[tuple[str, int, int], tuple[Any, Any]] = field(default_factory=dict)
    scores: Tensor | None = None  # of the last stack's tokens, where they were not drawn at once
    compact: str | None = None  # the stack whose outputs are the selected rows only, gathered like the labels
    lengthen: bool = False  # its owner wants as many rows as went in, and shortens them after it
    compacted: bool = False  # that stack has run


class _AttentionIsDone(Exception):
    """The rest of the last block is of no use."""


@register_technique
@dataclass(kw_only=True)
class TokenTune(BlockTechnique):
    """Trains on a share of each sequence's tokens; every token is still seen.

    keep_fraction: share of tokens with gradient, 0 < f <= 1, rounded for each sample; at least one.
    select: "random" anew each step; "supervised", at random among tokens that have a label to predict; "seek", those
        TokenSeek scores highest, at the cost of one more forward.
    keep_ends: the first token is always selected, and in decoders the last; what classifiers read is among them, so
        only models with labels of tokens can do without.
    form: "streams", or "rows", which runs the stock blocks and stores only the selected rows of what they keep: the
        same gradients on any attention, but no time saved.
    seed: of the draws.

    Raises SettingError for other values, and for models whose blocks mix tokens other than by attention.
    """

    name: ClassVar[str] = "token_tune"
    instead: ClassVar[str] = "set form='rows' of token_tune"
    advised = (
        Advised(70, "gradients from three tokens in ten: faster a step, needs more steps", {"keep_fraction": 0.3}),
        Advised(
            75,
            "gradients from one token in ten: the least memory and time a step, needs more steps",
            {"keep_fraction": 0.1},
        ),
    )
    keep_fraction: float = 0.3
    select: Literal["random", "supervised", "seek"] = "random"
    keep_ends: bool = True
    form: Literal["streams", "rows"] = "streams"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep_fraction <= 1:
            raise SettingError(f"keep_fraction of token_tune must be above 0 and at most 1, got {self.keep_fraction}.")
        if self.select not in ("random", "supervised", "seek"):
            raise SettingError(f"select of token_tune must be random, supervised or seek, got {self.select!r}.")
        if self.form not in ("streams", "rows"):
            raise SettingError(f"form of token_tune must be streams or rows, got {self.form!r}.")
        if self.form == "rows" and self.select == "seek":
            raise SettingError("select='seek' of token_tune reads attention, which form='rows' does not; use streams.")
        self.handles_attention = self.form == "streams"
        self._share = 1.0

    @property
    def hides_states(self) -> bool:
        """In streams tokens stand in another order between blocks."""
        return self.form == "streams"

    def check(self, model: nn.Module, stacks: list[Stack]) -> None:
        for stack in stacks:
            refuse_token_mixing(stack, self.name)
            refuse_several_devices(stack, self.name)

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        self._generator = torch.Generator().manual_seed(self.seed)
        self._encodes_and_decodes = bool(
            getattr(getattr(innermost(model), "config", None), "is_encoder_decoder", False)
        )
        with super().attach(model) as attached, ExitStack() as undo:
            for stack in self.stacks:
                owner = model.get_submodule(stack.name.rpartition(".")[0])
                if _insists_on_length(owner):
                    undo.callback(owner.register_forward_hook(partial(self._shorten, stack)).remove)
            yield attached

    def _shorten(self, stack: Stack, owner: nn.Module, args: Any, outputs: Any) -> None:
        """Leave only the selected rows of what a model around a stack returns, if the stack itself could not."""
        if (current := self.current) is not None and getattr(current.state, "compact", None) == stack.name:
            kept = current.state.selections[stack.name].kept
            outputs.last_hidden_state = gather_tokens(outputs.last_hidden_state, kept)

    @property
    def encoder(self) -> Stack | None:
        """The stack whose outputs the last one attends to; None where there is none, whatever stacks there are."""
        return self.stacks[0] if self._encodes_and_decodes and len(self.stacks) > 1 else None

    @property
    def loss_share(self) -> float:
        return self._share

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])

    # Before the forward: which tokens, and their labels

    def begin(self, current: Pass) -> None:
        if self._probe is not None:
            current.state = self._probe
            return
        current.state = state = _State()
        self._share = 1.0
        scores = self._seek(current) if self.select == "seek" else None
        inputs, stack = current.inputs, self.stacks[-1]
        targets = self._targets(current.model, inputs)
        _refuse_padding_without_mask(current.model, inputs)
        if targets is None:
            if self.select == "supervised":
                raise SettingError("select='supervised' of token_tune needs labels of tokens; use random.")
            if not self.keep_ends:
                raise SettingError(
                    "keep_ends=False of token_tune needs labels of tokens: a head that reads the first or last token "
                    "would have no gradient."
                )
            state.scores = scores
            return
        allowed = self._allowed(inputs, stack, targets)
        if self.encoder is not None and inputs.get("decoder_attention_mask") is None:
            allowed &= (targets != NO_LABEL).flip(1).cumsum(1).flip(1) > 0  # decoders are padded after the last label
        supervised = (targets != NO_LABEL) & allowed
        if has_values(supervised) and not supervised.any():
            raise RunFailed(
                "token_tune got a batch without a single labelled token to predict. Leave such samples out of the "
                "data, or raise max_length if their answers were cut off."
            )
        selection = self._draw(stack, allowed, supervised, scores)
        state.selections[stack.name] = selection
        state.compact = stack.name
        state.lengthen = _insists_on_length(current.model.get_submodule(stack.name.rpartition(".")[0]))
        kept = targets.gather(1, selection.kept).masked_fill(~selection.valid, NO_LABEL)
        if has_values(kept):
            self._share = float((kept != NO_LABEL).sum() / supervised.sum())
        inputs["labels"] = kept
        if self._shifts(current.model):
            inputs["shift_labels"] = kept
        if inputs.get("num_items_in_batch") is not None:
            inputs["num_items_in_batch"] = inputs["num_items_in_batch"] * self._share

    def _targets(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor | None:
        """What each token of the last stack is to predict, [batch, tokens]; None if labels are of another form."""
        labels = inputs.get("labels")
        if inputs.get("shift_labels") is not None:
            return inputs["shift_labels"]
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return None
        if self.encoder is not None:
            if inputs.get("decoder_input_ids") is None and inputs.get("decoder_inputs_embeds") is None:
                inputs["decoder_input_ids"] = _decoder_inputs(model, labels)
            return labels
        tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if tokens is None or tokens.shape[:2] != labels.shape:
            return None
        return nn.functional.pad(labels[:, 1:], (0, 1), value=NO_LABEL) if self._shifts(model) else labels

    def _shifts(self, model: nn.Module) -> bool:
        """Whether the model's loss compares each token's output with the next token's label."""
        inner = innermost(model)
        if self.encoder is not None or not self.stacks[-1].causal or inner.get_output_embeddings() is None:
            return False
        source = inspect.getsource(type(inner).forward)
        if SHIFTED.search(source):
            raise SettingError(
                f"{type(inner).__name__} shifts labels by itself, so token_tune cannot give it those of the selected "
                "tokens; use a model whose forward leaves the loss to loss_function."
            )
        # decoders of encoder-decoders by themselves compare each output with the label at its own place
        return "loss_function" in source or not UNSHIFTED.search(source)

    def _allowed(self, inputs: dict[str, Any], stack: Stack, like: Tensor) -> Tensor:
        """True at tokens of a stack that are not padding."""
        decodes = self.encoder is not None and stack is self.stacks[-1]
        mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
        if isinstance(mask, Tensor) and mask.shape[-1:] == like.shape[1:2] and mask.numel() == like.shape[:2].numel():
            return mask.bool().to(like.device).view(like.shape[:2])  # choices of one question are samples of a stack
        # none, prepared per query, or of another axis (audio frames)
        return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device)

    def _draw(
        self, stack: Stack, allowed: Tensor, supervised: Tensor | None = None, scores: Tensor | None = None
    ) -> Selection:
        if scores is None:
            scores = torch.rand(allowed.shape, generator=self._generator).to(allowed.device)
        if self.select == "supervised" and supervised is not None:
            allowed = supervised
        forced = ends(allowed, last=stack.causal) if self.keep_ends else torch.zeros_like(allowed)
        if supervised is not None:  # a sample without one would teach nothing
            best = scores.masked_fill(~supervised, float("-inf")).argmax(1, keepdim=True)
            forced = forced.scatter(1, best, True) & allowed
        return select(scores, allowed, forced, self.keep_fraction)

    # The blocks

    def run(self, stack: Stack, call: BlockCall) -> Tensor:
        current = self.current
        assert current is not None
        state = current.state
        if isinstance(state, _Probe):
            return state.run(stack, call)
        if stack.name not in state.selections:
            allowed = self._allowed(current.inputs, stack, call.hidden)
            scores = state.scores if stack is self.stacks[-1] else None
            state.selections[stack.name] = self._draw(stack, allowed, scores=scores)
        if state.compacted and stack.name == state.compact and not current.ended:
            raise SettingError(
                f"This model runs {stack.name} several times, of which token_tune would take the first for the last; "
                "leave token_tune out where labels are of tokens."
            )
        state.compacted |= stack.name == state.compact and call.index == len(stack) - 1
        selection = state.selections[stack.name]
        if selection.order.shape[1] != call.hidden.shape[1]:
            raise SettingError(
                f"token_tune drew among {selection.order.shape[1]} tokens, but {stack.name} runs "
                f"{call.hidden.shape[1]}: learned prompts in front of the tokens cannot be combined with it."
            )
        if selection.everything:
            return call(call.hidden)
        encoded = None
        if self.encoder is not None and stack is self.stacks[-1]:
            encoded = state.selections.get(self.encoder.name)
        runs = _Streams(stack, call, state, encoded) if self.form == "streams" else _Rows(stack, call, state, encoded)
        return runs.run()

    # TokenSeek

    _probe: ClassVar[Any] = None

    def _seek(self, current: Pass) -> Tensor:
        """TokenSeek's score of each token of the last stack: one more forward, and the backward of its last block."""
        self._probe = probe = _Probe(self.stacks[-1])  # type: ignore[misc]
        try:
            with aside(), undrawn({p.device for p in current.model.parameters()}):
                loss = getattr(current.model(**current.inputs), "loss", None)
        finally:
            self._probe = None  # type: ignore[misc]
        if loss is None:
            raise SettingError("select='seek' of token_tune needs labels, from which the model computes a loss.")
        assert probe.hidden is not None
        assert probe.attention is not None
        (gradient,) = torch.autograd.grad(loss, probe.hidden)
        torch.clear_autocast_cache()  # weights cast without gradient must not serve the forward with gradient
        allowed = self._allowed(current.inputs, self.stacks[-1], gradient)
        return seek_scores(probe.attention.float(), gradient.float().abs().sum(-1), allowed)


class _Streams:
    """One block in two streams: selected tokens with gradient inside the attention of the others without."""

    def __init__(self, stack: Stack, call: BlockCall, state: _State, encoded: Selection | None):
        self.stack, self.call, self.state, self.encoded = stack, call, state, encoded
        self.selection = state.selections[stack.name]
        self.is_last = call.index == len(stack) - 1
        self.new: Tensor | None = None
        self.others: tuple[Tensor, Tensor] | None = None

    def run(self) -> Tensor:
        """The block's output, [batch, tokens, width]: selected tokens first, until the last block."""
        hidden, kept, rest = self.call.hidden, self.selection.kept, self.selection.rest
        if self.call.index == 0:
            self.selected, others = gather_tokens(hidden, kept), gather_tokens(hidden.detach(), rest)
        else:  # a copy, because what blocks keep of a view would keep all of it
            self.selected, others = hidden[:, : kept.shape[1]].clone(), hidden.detach()[:, kept.shape[1] :]
        new_others = hidden[:, :0]
        if rest.shape[1] == 0:  # but for tokens that fill up shorter samples, all are selected
            self.new = self._run_selected()
        else:
            with torch.no_grad(), handled_by(self._attend_others), suppress(_AttentionIsDone):
                new_others = self.call(others, **self._taken(rest))
        if self.new is None:
            raise SettingError(
                f"Attention of {self.stack.name} does not go through transformers' attention interface; set "
                "form='rows' of token_tune."
            )
        if self.is_last and self.state.compact == self.stack.name:
            return self.new if not self.state.lengthen else scatter_tokens(self.new, kept, hidden.shape[1])
        if not self.is_last:
            return torch.cat([self.new, new_others], 1)
        new = torch.where(self.selection.valid[:, :, None], self.new, self.new.detach())
        return gather_tokens(torch.cat([new, new_others], 1), self.selection.order.argsort(1))

    def _run_selected(self) -> Tensor:
        with handled_by(self._attend_selected), only_learning(self.selection.valid):
            return self.call(self.selected, **self._taken(self.selection.kept))

    def _attend_others(
        self, original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        rest = self.selection.rest
        if module in self.stack.cross_attentions:
            return attend(original, module, query, key, value, self._mask(mask, rest, query, False), **options)
        self.others = key, value
        if torch.is_autocast_enabled(query.device.type):
            torch.clear_autocast_cache()  # weights cast without gradient must not serve the stream with gradient
        block, ends_here = self.stack.blocks[self.call.index], self.is_last and self.state.compact == self.stack.name
        with torch.enable_grad(), nullcontext() if ends_here else taps_kept(block):
            self.new = self._run_selected()
        if ends_here:
            raise _AttentionIsDone
        key, value = self.everyone
        return attend(
            original,
            module,
            query,
            key.detach(),
            value.detach(),
            self._mask(mask, rest, query),
            **self._biased(options),
        )

    def _attend_selected(
        self, original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        kept = self.selection.kept
        if module in self.stack.cross_attentions:
            if self.encoded is not None:
                key, value = _constant_outside(key, self.encoded.mask), _constant_outside(value, self.encoded.mask)
            return attend(original, module, query, key, value, self._mask(mask, kept, query, False), **options)
        valid = self.selection.valid
        if self.selection.filled_up:
            key, value = _constant_outside(key, valid), _constant_outside(value, valid)
        self.everyone = key, value
        if self.others is not None:
            self.everyone = torch.cat([key, self.others[0]], 2), torch.cat([value, self.others[1]], 2)
        return attend(original, module, query, *self.everyone, self._mask(mask, kept, query), **self._biased(options))

    def _taken(self, index: Tensor) -> dict[str, Any]:
        """The block's arguments for the tokens at `index`; each is taken once for all blocks."""
        tokens = self.call.hidden.shape[1]
        return {
            name: value
            if name.startswith("encoder_")
            else self._once("argument", value, index, lambda v: take_tokens(v, index, tokens))
            for name, value in self.call.named.items()
        }

    def _mask(self, mask: Any, queries: Tensor, like: Tensor, reorder: bool = True) -> Tensor | None:
        """What is added to the scores of some queries, keys in the order of the streams."""

        def make(mask: Any) -> Tensor | None:
            # a tensor among the block's arguments has been taken by rows with them already
            taken = isinstance(mask, Tensor) and mask.shape[2] == queries.shape[1]
            visible = mask if taken else visible_rows(mask, queries)
            visible = self._reordered(visible) if reorder else visible
            return additive(visible, like)

        return self._once("mask", mask, queries, make)

    def _biased(self, options: dict[str, Any]) -> dict[str, Any]:
        bias = options.get("position_bias")
        if bias is None:
            return options
        return {**options, "position_bias": self._once("bias", bias, self.selection.kept, self._reordered)}

    def _reordered(self, rows: Tensor | None) -> Tensor | None:
        if rows is None or rows.shape[-1] == 1:
            return rows
        rows = rows.expand(self.selection.order.shape[0], *rows.shape[1:])
        return rows.gather(3, self.selection.order[:, None, None, :].expand(rows.shape))

    def _once(self, what: str, value: Any, index: Tensor, make: Any) -> Any:
        key = what, id(value), id(index)
        if key in self.state.taken:
            return self.state.taken[key][1]
        made = make(value)
        if not (isinstance(made, Tensor) and made.requires_grad):  # its graph is the block's own, for recomputation
            self.state.taken[key] = value, made
        return made


class _Rows:
    """One stock block that keeps only the selected rows."""

    def __init__(self, stack: Stack, call: BlockCall, state: _State, encoded: Selection | None):
        self.stack, self.call, self.state, self.encoded = stack, call, state, encoded
        self.selection = state.selections[stack.name]

    def run(self) -> Tensor:
        hidden, mask, selection = self.call.hidden, self.selection.mask, self.selection
        block = self.stack.blocks[self.call.index]
        states = self.call.named.get("encoder_hidden_states")
        if states is not None and states.shape[1] == hidden.shape[1]:
            raise SettingError(
                "form='rows' of token_tune cannot tell encoder and decoder tokens apart where they are equally many; "
                "use form='streams'."
            )

        masks = [mask] if states is None or self.encoded is None else [mask, self.encoded.mask]
        tables = [x for x in tree_leaves(self.call.named) if isinstance(x, Tensor) and x.dim() == 2]
        places = TokenPlaces(masks, tables)
        with gradient_stopped(block, places), kept_by_rows(block, selection, places), only_learning(mask):
            new = self.call(hidden)
        if self.call.index < len(self.stack) - 1:
            return new
        if self.state.compact == self.stack.name and not self.state.lengthen:
            return gather_tokens(new, selection.kept)
        return stopped_outside(new, mask)


class _Probe:
    """A forward without gradient up to the last block, which is watched."""

    def __init__(self, stack: Stack):
        self.stack = stack
        self.hidden: Tensor | None = None
        self.attention: Tensor | None = None

    def run(self, stack: Stack, call: BlockCall) -> Tensor:
        if stack is not self.stack or call.index < len(stack) - 1:
            with torch.no_grad():
                return call(call.hidden)
        self.hidden = call.hidden.detach().requires_grad_()
        with handled_by(self._watch):
            return call(self.hidden)

    def _watch(
        self, original: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
    ) -> Tensor:
        positions = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
        rows = additive(visible_rows(mask, positions), query)
        if module not in self.stack.cross_attentions:
            with torch.no_grad():
                self.attention = _received(query, key, rows, options)
        return attend(original, module, query, key, value, rows, **options)


def _received(query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The attention each key receives, summed over queries, mean over heads: [batch, keys]."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    total = query.new_zeros(query.shape[0], key.shape[2])
    for start in range(0, query.shape[2], 128):
        rows = slice(start, start + 128)
        scores = query[:, :, rows] @ key.transpose(2, 3) * scaling
        for added in (mask, options.get("position_bias")):
            if added is not None:
                scores = scores + (added[:, :, rows] if added.shape[2] > 1 else added)
        total += scores.softmax(-1).mean(1).sum(1)
    return total


def _constant_outside(x: Tensor, mask: Tensor) -> Tensor:
    """Keys or values, [batch, heads, tokens, width], without gradient where `mask`, [batch, tokens], is False."""
    return torch.where(mask[:, None, :, None], x, x.detach())


def _insists_on_length(owner: nn.Module) -> bool:
    """Whether the model around a stack reshapes what comes out to the number of tokens that went in, as GPT-2 does."""
    return "output_shape" in inspect.getsource(type(owner).forward)


def _refuse_padding_without_mask(model: nn.Module, inputs: dict[str, Any]) -> None:
    config, ids = getattr(model, "config", None), inputs.get("input_ids")
    padding = getattr(config, "pad_token_id", None)
    if inputs.get("attention_mask") is not None or ids is None or ids.dim() != 2 or padding is None:
        return
    if any(padding == getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "sep_token_id")):
        return
    if has_values(ids) and bool((ids[:, [0, -1]] == padding).any()):
        raise SettingError(
            "token_tune got padded input_ids without an attention_mask, and padding must not be selected; pass the "
            "attention_mask that the tokenizer returns."
        )


def _decoder_inputs(model: nn.Module, labels: Tensor) -> Tensor:
    """What a decoder reads to predict `labels`: the same, one to the right."""
    inner = innermost(model)
    if hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        return inner.prepare_decoder_input_ids_from_labels(labels=labels)
    config = inner.config
    shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=config.decoder_start_token_id)
    return shifted.masked_fill(shifted == NO_LABEL, config.pad_token_id)
