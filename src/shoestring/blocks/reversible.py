r"""Reversible: two coupled streams whose blocks are inverted in backward, so that activations do not grow with depth.

Source   MEFT: Liao, Tan, Monz 2023, arXiv:2306.00477; reversible residual networks: Gomez et al. 2017, arXiv:1707.04585
Update   x1 = x2 = embeddings; each block: y1 = c1 x1 + F(x2), y2 = c2 x2 + G(y1)
         variant  F                  G                    c1, c2   next block gets
         1        block + adapter    adapter              c, 1     (y2, y1)
         2        adapter            block + adapter      1, c     (y2, y1)
         3        attention half     feed-forward half    c, c     (y1, y2)
         A(x) = W_up f(W_down x + b_down) + b_up; within a block it reads what the feed-forward part reads and is added
         to what that part gives, before residual and norm; in variant 3 one more stands on attention's projection
         exact: streams are integers round(x 2^16), c = 2^-shift: (X >> shift) + q(F); the bits shifted out are kept
         float: streams in float32 or finer, any c; see stream_arithmetic and reversible_stack
Shapes   W_down [r, width], W_up [width, r]
Start    W_down, W_up N(0, 0.02), biases 0; with c small the newest stream follows the pretrained model
Trains   2 width r + r + width numbers an adapter, two adapters a block, and the task head; the rest is frozen
Costs    kept: two streams in all, and shift / 8 bytes (rounded up to 1/8, 1/4, 1/2 or 1) for each number of a block's
         output, twice in variant 3; in backward one block's activations; time: one more forward
Differs  the output is the newest stream, not the mean of both: that starts nearer to the pretrained model. Exact mode
         and its factor 1/16 are ours; the published code has c = 0.1 in floating point. Adapters sit before the dropout
         of a sub-layer's output where the block has one there. Gradients are returned by the autograd function instead
         of being put into `.grad`, and the user's seed is kept
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..adapters.placement import freeze_but_head, layout_of
from ..errors import SettingError, did_you_mean
from ..fakes import has_values
from ..technique import Advised, Phase, Technique, register_technique
from ..whole_files import check_names, read_tensors, write_tensors
from .base import BlockTechnique
from .stacks import BlockCall, Stack, refuse_batch_norm, refuse_several_devices
from .stream_arithmetic import Factor, FixedPoint, Floating, StreamArithmetic
from .two_streams import Probe, TwoStreams

FILE = "reversible.safetensors"
OTHERS_CHOOSE_WHAT_TRAINS = frozenset({Phase.ADAPTER, Phase.PROMPT, Phase.SELECTION})


@register_technique
@dataclass(kw_only=True)
class Reversible(BlockTechnique):
    """Runs the blocks as two coupled streams, and inverts them in backward instead of keeping what they compute.

    The model becomes another function, in evaluation and generation too, which runs without a cache.

    variant: 1, 2 or 3; 3 is for blocks whose attention and feed-forward part follow each other.
    r: inner size of the adapters, 1 <= r.
    block_adapter: an adapter inside each block; without it LoRA or another adapter of the recipe may learn there.
    activation: of the adapters; None: the model's own. dropout: on their r numbers, 0 <= dropout < 1.
    adapter_norm: a trained layer norm before the adapter that is F or G by itself.
    mode: "exact" or "float".
    shift: exact: c = 2^-shift, 1 <= shift <= 8; larger starts nearer to the pretrained model and keeps more bits.
    stream_bits: exact: 32 or 64. fraction_bits: exact: bits behind the point.
    lam, beta: float: factors c1 and c2, not 0; None: 0.1 where the variant has c, else 1.
    segment_blocks: float: also keep both streams every so many blocks; None: only at the end.
    reversible_layers: blocks of each stack to invert; None: all; 0: none, the same function in ordinary autograd.
    placement: "bottom": the lower blocks are inverted, those above run as two streams in ordinary autograd.
        "frozen_bottom": the blocks below run as in the stock model, without adapters.
    ordinary_layers: frozen_bottom: of reversible_layers, how many at the top run in ordinary autograd instead.
    output: what leaves a stack: the "newest" stream, the "mean" of both, "sum" (newest + output_scale older), or
        "linear", a trained map of both that starts as the newest.
    train_head: also train what stands outside of the pretrained model, such as a new classifier. Where the recipe has
        adapters, prompts or a selection of weights, these decide what of the model trains.

    Raises SettingError for values out of range and for settings without effect in the chosen mode.
    """

    name: ClassVar[str] = "reversible"
    claims: ClassVar[frozenset[str]] = frozenset({"what the weights of blocks are read as"})
    advised = (
        Advised(30, "inputs of blocks are computed back instead of kept: a changed model with exact gradients, slower"),
    )
    graph_in_blocks: ClassVar[bool] = False
    training_only: ClassVar[bool] = False
    variant: Literal[1, 2, 3] = 1
    r: int = 8
    block_adapter: bool = True
    activation: str | None = None
    dropout: float = 0.0
    adapter_norm: bool = False
    mode: Literal["exact", "float"] = "exact"
    shift: int = 4
    stream_bits: Literal[32, 64] = 32
    fraction_bits: int = 16
    lam: float | None = None
    beta: float | None = None
    segment_blocks: int | None = None
    reversible_layers: int | None = None
    placement: Literal["bottom", "frozen_bottom"] = "bottom"
    ordinary_layers: int = 0
    output: Literal["newest", "mean", "sum", "linear"] = "newest"
    output_scale: float = 0.1
    train_head: bool = True

    def __post_init__(self) -> None:
        self._decides_what_trains = True
        self.probes: dict[str, Probe] = {}
        for name, allowed in (
            ("variant", (1, 2, 3)),
            ("mode", ("exact", "float")),
            ("stream_bits", (32, 64)),
            ("placement", ("bottom", "frozen_bottom")),
            ("output", ("newest", "mean", "sum", "linear")),
        ):
            if getattr(self, name) not in allowed:
                words = ", ".join(map(str, allowed))
                raise SettingError(f"{name} of reversible must be one of {words}, got {getattr(self, name)!r}.")
        for name, low, high in (
            ("r", 1, None),
            ("shift", 1, 8),
            ("fraction_bits", 1, self.stream_bits - 4),
            ("segment_blocks", 1, None),
            ("reversible_layers", 0, None),
            ("ordinary_layers", 0, None),
        ):
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                span = f"at least {low}" if high is None else f"from {low} to {high}"
                raise SettingError(f"{name} of reversible must be {span}, got {value}.")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout of reversible must be in [0, 1), got {self.dropout}.")
        if self.activation is not None and self.activation not in ACT2FN:
            raise SettingError(f"Unknown activation {self.activation!r}. {did_you_mean(self.activation, ACT2FN)}")
        self._refuse_settings_of_another_mode()

    def _refuse_settings_of_another_mode(self) -> None:
        for name in ("lam", "beta"):
            value = getattr(self, name)
            if value == 0:
                raise SettingError(f"{name} of reversible must not be 0: a stream times 0 cannot be taken back.")
            if value is not None and self.mode == "exact":
                raise SettingError(
                    f"{name} of reversible is for mode float; mode exact multiplies by powers of two only: set shift, "
                    f"such as 3 for 0.125; got {name}={value}."
                )
        if self.mode == "exact" and self.segment_blocks is not None:
            raise SettingError("segment_blocks of reversible is for mode float; mode exact makes no error to bound.")
        if self.mode == "float":
            for name in ("shift", "stream_bits", "fraction_bits"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise SettingError(f"{name} of reversible is for mode exact; set lam and beta in mode float.")
        if self.ordinary_layers and self.placement != "frozen_bottom":
            raise SettingError(
                "ordinary_layers of reversible is for placement frozen_bottom; with placement bottom all blocks above "
                "reversible_layers run in ordinary autograd."
            )
        if self.ordinary_layers and self.ordinary_layers > (self.reversible_layers or self.ordinary_layers):
            raise SettingError(
                f"ordinary_layers of reversible must be at most reversible_layers, {self.reversible_layers}, got "
                f"{self.ordinary_layers}."
            )
        if self.reversible_layers == 0 and self.placement == "frozen_bottom":
            raise SettingError(
                "reversible_layers of reversible must be at least 1 with placement frozen_bottom, got 0."
            )
        if self.output_scale != 0.1 and self.output != "sum":
            raise SettingError(f"output_scale of reversible is for output sum, got output {self.output}.")

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse recomputation, and leave to adapters, prompts and selections what of the model trains."""
        for other in others:
            if other.phase is Phase.RECOMPUTATION:
                raise SettingError(
                    f"{other.name} and reversible cannot be combined: reversible runs blocks again by itself; leave "
                    f"{other.name} out."
                )
        self._decides_what_trains = not any(other.phase in OTHERS_CHOOSE_WHAT_TRAINS for other in others)

    def set_task(self, peft_task_type: str) -> bool:
        """Whether a new head trains because of this technique."""
        return self._decides_what_trains and self.train_head

    def check(self, model: nn.Module, stacks: list[Stack]) -> None:
        """Refuse too many reversible_layers, unknown blocks and blocks whose samples depend on each other."""
        for stack in stacks:
            for name in ("reversible_layers", "ordinary_layers"):
                if (getattr(self, name) or 0) > len(stack):
                    raise SettingError(
                        f"{name} of reversible is {getattr(self, name)}, but {stack.name} has {len(stack)} blocks."
                    )
            refuse_batch_norm(stack, self.name)
            for index, block in enumerate(stack.blocks):
                if layout_of(block) is None:
                    raise SettingError(
                        f"{stack.name}.{index} is of type {type(block).__name__}, a block of unknown layout: "
                        "reversible does not know where its feed-forward part is."
                    )
            refuse_several_devices(stack, self.name)

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Register the adapters on the model as `reversible`, freeze what does not train, and run the streams."""
        if hasattr(model, self.name):
            raise SettingError(f"{type(model).__name__} has a part named reversible already.")
        trained = [(p, p.requires_grad) for p in model.parameters()]
        with ExitStack() as undo:
            undo.enter_context(super().attach(model))
            self.probes = {}
            self.streams = {stack.name: TwoStreams(self, model, stack) for stack in self.stacks}
            if self._decides_what_trains:
                undo.callback(lambda: [p.requires_grad_(on) for p, on in trained])
                freeze_but_head(model, self.train_head)
            for runner in self.streams.values():
                undo.enter_context(runner.hooked())
            self.adapters = nn.ModuleList(runner.adapters for runner in self.streams.values())
            model.add_module(self.name, self.adapters)
            undo.callback(lambda: model._modules.pop(self.name, None))
            yield model

    def run_stack(self, stack: Stack, calls: list[BlockCall]) -> Tensor:
        """What the two streams make of the hidden states."""
        runner = self.streams[stack.name]
        probed = stack.name in self.probes or not torch.is_grad_enabled() or not has_values(calls[0].hidden)
        if not probed and self.reversible_layers != 0:
            self.probes[stack.name] = runner.probe(calls)
        return runner.run(calls)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the adapters."""
        write_tensors(folder / FILE, self.adapters.state_dict())

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read the adapters.

        Raises SettingError if the file is missing or damaged, or holds others.
        """
        saved, _ = read_tensors(folder / FILE)
        check_names(folder / FILE, saved, self.adapters.state_dict())
        self.adapters.load_state_dict(saved)

    def arithmetic(self) -> StreamArithmetic:
        """The streams' numbers."""
        if self.mode == "exact":
            return FixedPoint(self.stream_bits, self.fraction_bits)
        return Floating()

    def factors(self) -> tuple[Factor, Factor]:
        """c1 and c2, as the arithmetic has them."""
        small, one = (self.shift, 0) if self.mode == "exact" else (0.1, 1)
        first, second = {1: (small, one), 2: (one, small), 3: (small, small)}[self.variant]
        return (first if self.lam is None else self.lam), (second if self.beta is None else self.beta)
