r"""Bottleneck adapters: Houlsby, Pfeiffer, parallel, AdaptFormer.

Source   Houlsby et al. 2019, arXiv:1902.00751; Pfeiffer et al. 2021, arXiv:2005.00247; parallel: He et al. 2022,
         arXiv:2110.04366; AdaptFormer: Chen et al. 2022, arXiv:2205.13535
Update   A(x) = s (W_up f(W_down x + b_down) + b_up); with x the residual stream and o what a sub-layer adds to it,
         houlsby      o + A(o) in place of o, after attention and after the feed-forward part
         pfeiffer     o + A(x + o) after the feed-forward part; post-LN blocks: LN(z + A(LN(z))) with z = x + o
         parallel     o + A(x) after the feed-forward part; x before its norm
         adaptformer  parallel with r = 64, s = 0.1 and dropout 0.1
Shapes   W_down [r, in], W_up [out, r]; in = out = width but where `parallel` reads another layer's input
Start    lora: W_down Kaiming, W_up = 0, exactly the pretrained model; bert: both N(0, 0.02) and houlsby: both
         N(0, 0.01) cut at two deviations, close to it; biases 0
Trains   2 D r + r + D numbers an adapter; two adapters a block for houlsby, one for the others
Costs    two [tokens, r] tensors kept at each adapter, and its input where nothing else keeps it; one more pass of the
         last norm for pfeiffer in post-LN blocks; cannot be merged
Differs  where a block drops out a sub-layer's output (BERT, GPT-2) the adapter sits on the projection, before the
         dropout, which then acts on o + A(.); without dropout, and so at inference, nothing differs. Blocks with norms
         or scales after a sub-layer (Gemma, DINOv2) are adapted after those. Blocks that add attention and feed-forward
         part together (Phi) have no x + o: pfeiffer is o + A(o) there. The convolutional and transformer adapters for
         music models are not here
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import did_you_mean
from ..precision import autocast_dtype
from .base import Adapter, AdapterConfig, has_linear_weight, linear_sizes, register
from .placement import block_around, find_blocks, has_module


@dataclass(frozen=True)
class Defaults:
    """What one form uses for settings that are None: r, or else the width divided by `reduction_factor`."""

    activation: str
    init: str
    r: int | None = None
    reduction_factor: int = 1
    scale: float = 1.0
    dropout: float = 0.0


FORMS = {
    "houlsby": Defaults(activation="swish", init="bert", reduction_factor=16),
    "pfeiffer": Defaults(activation="relu", init="bert", reduction_factor=16),
    "parallel": Defaults(activation="relu", init="lora", reduction_factor=2),
    "adaptformer": Defaults(activation="relu", init="lora", r=64, scale=0.1, dropout=0.1),
}


class Bottleneck(Adapter):
    """Down-projection, activation and up-projection of one adapter on one layer."""

    name = "bottleneck"

    @classmethod
    def can_adapt(cls, layer: nn.Module) -> bool:
        """Linear layers, and modules with nothing but vectors of one size: norms and layer scales."""
        sizes = {tuple(p.shape) for p in layer.parameters()}
        return super().can_adapt(layer) or (len(sizes) == 1 and len(next(iter(sizes))) == 1)

    def __init__(self, base: nn.Module, config: "BottleneckConfig", tap: nn.Module | None = None):
        super().__init__()
        defaults = FORMS[config.form]
        out_features, in_features = widths(base)
        self.form, self.taps = config.form, tap is not None
        self.after_norm = config.form == "pfeiffer" and tap is None and not has_linear_weight(base)
        self.alone = self.after_norm
        if config.form in ("houlsby", "pfeiffer") or self.taps:
            in_features = out_features  # reads the output, or the stream that the output is added to
        r = config.inner_size(out_features)
        self.activation: Callable[[Tensor], Tensor] = ACT2FN[config.activation or defaults.activation]
        self.dropout = defaults.dropout if config.dropout is None else config.dropout
        self.down = nn.Parameter(torch.empty(r, in_features))
        self.b_down = nn.Parameter(torch.zeros(r))
        self.up = nn.Parameter(torch.zeros(out_features, r))
        self.b_up = nn.Parameter(torch.zeros(out_features))
        self.gain = self.shift = None
        if config.norm:
            self.gain = nn.Parameter(torch.ones(in_features))
            self.shift = nn.Parameter(torch.zeros(in_features))
        self.scale: nn.Parameter | float = defaults.scale if config.scale is None else 1.0
        if config.scale == "learned":
            self.scale = nn.Parameter(torch.ones(1))  # one number, but FSDP takes no scalars
        elif config.scale is not None:
            self.scale = float(config.scale)
        self._set_start((config.init or defaults.init) if config.init_weights else "random")

    def _set_start(self, init: str) -> None:
        if init == "bert":
            nn.init.normal_(self.down, std=0.02)
            nn.init.normal_(self.up, std=0.02)
        elif init == "houlsby":
            nn.init.trunc_normal_(self.down, std=0.01, a=-0.02, b=0.02)
            nn.init.trunc_normal_(self.up, std=0.01, a=-0.02, b=0.02)
        else:
            nn.init.kaiming_uniform_(self.down, a=5**0.5)
        if init == "random":
            nn.init.kaiming_uniform_(self.up, a=5**0.5)
            nn.init.normal_(self.b_down, std=0.1)
            nn.init.normal_(self.b_up, std=0.1)

    @property
    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Of all its parameters; a norm of its own needs every input."""
        of_input = "" if self.taps else "in"  # the stream is never sliced
        read = of_input if self.form in ("parallel", "adaptformer") else "read"
        if self.gain is not None and read == "in":
            return {}
        axes = {"down": ("rank", read), "b_down": ("rank",), "up": ("out", "rank"), "b_up": ("out",)}
        others = {"gain": (read,), "shift": (read,), "scale": ("",)}
        return axes | {name: axis for name, axis in others.items() if name in self._parameters}

    def branch(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """A(x), in the adapter's own precision or autocast's."""
        if autocast_dtype(x) is None:
            x = x.to(self.down.dtype)
        if self.gain is not None:
            x = F.layer_norm(x, self.gain.shape, self.gain, self.shift)
        hidden = self.activation(F.linear(x, self.down, self.b_down))
        return self.scale * F.linear(F.dropout(hidden, self.dropout, self.training), self.up, self.b_up)

    def new_output(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """The adapted layer's output; `x` its input, `y` its own output."""
        if self.after_norm:
            return base(x + self.branch(y).to(x.dtype))
        if self.form == "houlsby" or (self.form == "pfeiffer" and not self.taps):
            return y + self.branch(y).to(y.dtype)
        stream = self._stream() if self.taps else x
        if self.form == "pfeiffer":
            return y + self.branch(stream + y).to(y.dtype)
        return y + self.branch(stream).to(y.dtype)

    def _stream(self) -> Tensor:
        if self.tapped is None:
            raise RuntimeError(
                "A bottleneck adapter found no input of the module it reads: that module was not called before the "
                "adapted layer. Another adapter may stand in its place; put bottleneck after that one in the recipe."
            )
        return self.tapped


def widths(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer or of a module of vectors, which has the same for both."""
    if has_linear_weight(layer):
        return linear_sizes(layer)
    width = prod(next(layer.parameters()).shape)
    return width, width


@register
@dataclass(kw_only=True)
class BottleneckConfig(AdapterConfig):
    """Bottleneck adapters: a small trained two-layer network added in each block, which stays frozen.

    Settings that are None take the form's own value:
    houlsby r = width / 16, swish, scale 1, init bert; pfeiffer the same with relu; parallel r = width / 2, relu,
    scale 1, init lora; adaptformer r = 64, relu, scale 0.1, init lora, dropout 0.1.

    form: "houlsby", "pfeiffer", "parallel" or "adaptformer".
    r: inner size, 1 <= r. reduction_factor: in place of r, the width divided by it, which must leave no rest.
    activation: a name that transformers knows, such as "relu", "gelu", "swish".
    scale: a number, or "learned" (starts at 1); 4 is usual for parallel in summarisation.
    init: "lora" starts as the pretrained model, exactly; "bert" and "houlsby" start close to it.
    dropout: on the inner r numbers, 0 <= dropout < 1.
    norm: a trained layer norm of the adapter's own before it.
    cross_attention: houlsby only: also after attention to an encoder, where target_modules is None.
    reads: name of a module, inside the block, whose input is the residual stream that pfeiffer and parallel read;
        None: found in known blocks. A layer for which there is none is read itself: pfeiffer reads its output
        (o + A(o)), parallel its input.

    Raises ValueError for values out of range, unknown words, and settings without effect in the chosen form.
    """

    method: ClassVar = Bottleneck
    form: Literal["houlsby", "pfeiffer", "parallel", "adaptformer"] = "parallel"
    r: int | None = None
    reduction_factor: int | None = None
    activation: str | None = None
    scale: float | Literal["learned"] | None = None
    init: Literal["lora", "bert", "houlsby"] | None = None
    dropout: float | None = None
    norm: bool = False
    cross_attention: bool = False
    reads: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("form", tuple(FORMS)), ("init", ("lora", "bert", "houlsby", None))):
            if getattr(self, name) not in allowed:
                words = ", ".join(repr(word) for word in allowed if word)
                raise ValueError(f"{name} of bottleneck must be one of {words}, got {getattr(self, name)!r}.")
        for name in ("r", "reduction_factor"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} of bottleneck must be a whole number of at least 1, got {value!r}.")
        if self.r is not None and self.reduction_factor is not None:
            raise ValueError("r and reduction_factor of bottleneck both set the inner size; give one of them.")
        if self.activation is not None and self.activation not in ACT2FN:
            raise ValueError(
                f"Unknown activation {self.activation!r} of bottleneck. {did_you_mean(str(self.activation), ACT2FN)}"
            )
        if self.scale != "learned" and not (self.scale is None or isinstance(self.scale, (int, float))):
            raise ValueError(f"scale of bottleneck must be a number or 'learned', got {self.scale!r}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of bottleneck must be in [0, 1), got {self.dropout}.")
        if self.cross_attention and self.form != "houlsby":
            raise ValueError(f"cross_attention of bottleneck is for the houlsby form only, got form {self.form!r}.")
        if self.reads is not None and self.form == "houlsby":
            raise ValueError("reads of bottleneck has no effect in the houlsby form, which reads the adapted layer.")

    def inner_size(self, width: int) -> int:
        """r for a layer of this width.

        Raises ValueError if reduction_factor was given and does not divide the width.
        """
        if self.r is not None:
            return self.r
        if self.reduction_factor is not None:
            if width % self.reduction_factor:
                raise ValueError(
                    f"reduction_factor of bottleneck must divide the width {width}, got {self.reduction_factor}; "
                    "or give r."
                )
            return width // self.reduction_factor
        defaults = FORMS[self.form]
        return defaults.r or max(1, width // defaults.reduction_factor)

    def default_targets(self, model: nn.Module) -> set[str]:
        """The places of the form in every block of a known layout.

        Raises ValueError if the model has no such block, no cross-attention where that is asked for, or no block of
        an index in layers_to_transform.
        """
        blocks = find_blocks(model)
        chosen = self.layers_to_transform
        wanted = {chosen} if isinstance(chosen, int) else set(chosen or ())
        index = {name: int(name.rsplit(".", 1)[-1]) for name, _, _ in blocks}
        if missing := sorted(wanted - set(index.values())):
            raise ValueError(f"layers_to_transform of bottleneck: {type(model).__name__} has no block {missing[0]}.")
        if chosen is not None:
            blocks = [found for found in blocks if index[found[0]] in wanted]
        targets = set()
        for name, block, layout in blocks:
            if self.form == "houlsby":
                parts = [layout.attention, layout.feedforward]
                if self.cross_attention and layout.cross_attention and has_module(block, layout.cross_attention):
                    parts.append(layout.cross_attention)
            elif self.form == "pfeiffer" and layout.last_norm:
                parts = [layout.last_norm]
            else:
                parts = [layout.feedforward]
            targets |= {f"{name}.{part}" for part in parts}
        if self.cross_attention and len(targets) == 2 * len(blocks):
            raise ValueError(f"cross_attention of bottleneck: {type(model).__name__} has no cross-attention.")
        return targets

    def tap(self, model: nn.Module, key: str) -> str | None:
        """The module whose input is the residual stream that the adapter on `key` reads."""
        if self.form == "houlsby":
            return None
        if self.reads is not None:
            return self._given_tap(model, key)
        block = block_around(model, key)
        if block is None:
            return None
        name, layout = block
        if key != f"{name}.{layout.feedforward}" or (self.form == "pfeiffer" and (layout.last_norm or layout.parallel)):
            return None
        return f"{name}.{layout.entry}"

    def _given_tap(self, model: nn.Module, key: str) -> str:
        """`reads` inside the smallest module around `key` that has it."""
        parts = key.split(".")
        for length in range(len(parts) - 1, -1, -1):
            name = ".".join([*parts[:length], str(self.reads)])
            if has_module(model, name):
                return name
        raise ValueError(f"reads of bottleneck: no module around {key} has a part named {self.reads!r}.")
