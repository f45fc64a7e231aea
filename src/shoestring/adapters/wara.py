r"""WaRA: wavelet low-rank adaptation, on the weight, on a grid of image tokens, or in a fixed basis.

Source   Heidari et al. 2025, arXiv:2506.24092
Update   weight: W' = W + s H_out^T blockdiag(B A, ..., B A) H_in, H_n the orthonormal wavelet transform of n features
         and s = alpha / r; one block for each of its J + 1 bands, each with a pair of its own if per_band
         grid: y' = y + s B D^-1(g * D(A x)) on patch tokens, D the transform over height and width
         tiny: W' = W + s U M V^T, with U S V^T the SVD of W cut after r
Shapes   weight: A [r, in / 2], B [out / 2, r]; per_band: A [r, in], B [out, r], with one part a band. grid: A [r, in],
         B [out, r], g [3 J + 1]. tiny: U [out, r], V [in, r], M [r, r] or its diagonal [r]
Start    A Kaiming, B = 0, g = 1, M = 0: all give W' = W
Trains   weight: r (in + out) / 2 numbers a layer, where odd sizes count as the next even ones; per_band: r (in + out).
         grid: r (in + out) + 3 J + 1. tiny: r^2, or r
Costs    x and one [tokens, (J + 1) r] tensor kept at each layer. H acts on A and B, not on tokens, in forward
         and again in backward: as many products a token as LoRA of rank (J + 1) r. grid: x and two [tokens, r] tensors
         for one level. tiny: one [tokens, r] tensor, not x; a full SVD of W at the start
Differs  the paper gives the update of the weight form and its shapes; start, scale, one level, odd sizes and what tiny
         trains are our reading. Its transform over tokens cancels in the weight form, where all bands share one pair,
         and does in the grid form while all g are equal: that is LoRA. Gains g are our reading of what makes it differ
"""

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..precision import at_least_float32, autocast_dtype
from . import wavelets
from .base import Adapter, AdapterConfig, linear_sizes, linear_with_rebuilt_weight, register


class WaRA(Adapter):
    """The weight form: factors on the bands of the input and output features."""

    name = "wara"

    def __init__(self, base: nn.Module, config: "WaRAConfig"):
        super().__init__()
        self.sizes = out_features, in_features = linear_sizes(base)
        self.bands = [wavelets.band_sizes(size, config.levels) for size in self.sizes]
        config.check_rank(self.sizes, min(self.bands[0] + self.bands[1]))
        config.check_divides("out_features", out_features)
        config.check_divides("in_features", in_features)
        self.scale, self.dropout, self.filter = config.scale, config.dropout, wavelets.low_pass(config.wavelet)
        self.per_band = config.per_band
        rows, columns = (sum(bands) if config.per_band else bands[0] for bands in self.bands)
        self.a = nn.Parameter(torch.empty(config.r, columns))
        self.b = nn.Parameter(torch.zeros(rows, config.r))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.b, a=5**0.5)

    def down(self) -> Float[Tensor, "ranks in"]:
        """blockdiag(A, ..., A) H_in: what A takes from each band, as directions of the features themselves."""
        return self._on_features(self.a, 1)

    def up(self) -> Float[Tensor, "out ranks"]:
        """s H_out^T blockdiag(B, ..., B)."""
        return self.scale * self._on_features(self.b.T, 0).T

    def _on_features(self, rows: Float[Tensor, "r coefficients"], side: int) -> Float[Tensor, "ranks features"]:
        bands = self.bands[side]
        parts = rows.split(bands, dim=1) if self.per_band else [rows] * len(bands)
        return wavelets.rows_of_bands(parts, self.filter, self.sizes[side])

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """s H_out^T blockdiag(B A, ..., B A) H_in."""
        return self.up() @ self.down()

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same through (J + 1) r numbers a token, with both factors transformed anew in backward."""
        x = F.dropout(x, self.dropout, self.training)
        return linear_with_rebuilt_weight(linear_with_rebuilt_weight(x, self.down, [self.a]), self.up, [self.b])


class GridWaRA(Adapter):
    """The grid form: a low-rank update whose bands over height and width have gains."""

    name = "wara"
    cannot = MappingProxyType(
        {
            "check_any_shape_of_batch": "single tokens have no place on a grid",
            "check_gradients_are_those_of_the_output": "the check takes three tokens, which are no grid",
            "check_weights_of_the_layers_train_too": "the check takes three tokens, which are no grid",
        }
    )

    def __init__(self, base: nn.Module, config: "WaRAConfig"):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        config.check_rank((out_features, in_features), min(out_features, in_features))
        self.scale, self.dropout, self.filter = config.scale, config.dropout, wavelets.low_pass(config.wavelet)
        self.grid, self.num_prefix_tokens = tuple(config.grid or ()), config.num_prefix_tokens
        self.a = nn.Parameter(torch.empty(config.r, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, config.r))
        self.gains = nn.Parameter(torch.ones(3 * config.levels + 1))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)
        if not config.init_weights:
            nn.init.kaiming_uniform_(self.b, a=5**0.5)
            nn.init.normal_(self.gains, mean=1, std=0.5)

    def new_output(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y, plus the update on patch tokens.

        Raises ValueError if the number of tokens is not that of the prefix and the grid.
        """
        prefix, (height, width) = self.num_prefix_tokens, self.grid
        tokens = x.shape[-2] if x.dim() > 1 else 1
        if tokens != prefix + height * width:
            raise ValueError(
                f"wara in its grid form takes {prefix} + {height} * {width} = {prefix + height * width} tokens, got "
                f"{tokens}; set num_prefix_tokens and grid to what the adapted layer gets."
            )
        if autocast_dtype(x) is None:
            x = x.to(self.a.dtype)
        # all tokens go through A, since without the prefix x would have to be copied, and the copy kept
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.a).to(self.a.dtype)
        image = inner[..., prefix:, :].mT.unflatten(-1, (height, width))
        inner = wavelets.scale_bands(image, self.gains, self.filter).flatten(-2).mT
        return y + F.linear(F.pad(self.scale * inner, (0, 0, prefix, 0)), self.b).to(y.dtype)


class TinyWaRA(Adapter):
    """The tiny form: coefficients in the basis of the weight's largest singular vectors, which is saved with them."""

    name = "wara"

    def __init__(self, base: nn.Module, config: "WaRAConfig"):
        super().__init__()
        out_features, in_features = linear_sizes(base)
        config.check_rank((out_features, in_features), min(out_features, in_features))
        self.scale, self.dropout, self.diagonal = config.scale, config.dropout, config.core == "diagonal"
        self.core = nn.Parameter(torch.zeros(config.r) if self.diagonal else torch.zeros(config.r, config.r))
        self.register_buffer("u", torch.zeros(out_features, config.r))
        self.register_buffer("v", torch.zeros(in_features, config.r))
        if not config.init_weights:
            for tensor in (self.u, self.v):
                nn.init.orthogonal_(tensor)
            nn.init.normal_(self.core)

    def start(self, weight: Float[Tensor, "out in"]) -> None:
        """U and V of the pretrained weight, in single precision at least."""
        r = len(self.core)
        u, _, v = torch.linalg.svd(at_least_float32(weight), full_matrices=False)
        self.u, self.v = u[:, :r].contiguous(), v[:r].T.contiguous()

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """s U M V^T."""
        core = torch.diag(self.core) if self.diagonal else self.core
        return self.scale * self.u.to(core.dtype) @ core @ self.v.to(core.dtype).T

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same through r numbers a token."""
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.v.to(x.dtype).T)
        inner = inner * self.core if self.diagonal else F.linear(inner, self.core)
        return F.linear(self.scale * inner, self.u.to(x.dtype))


FORMS: dict[str, type[Adapter]] = {"weight": WaRA, "grid": GridWaRA, "tiny": TinyWaRA}
ONLY_IN = {
    "wavelet": ("weight", "grid"),
    "levels": ("weight", "grid"),
    "strict": ("weight", "grid"),
    "per_band": ("weight",),
    "grid": ("grid",),
    "num_prefix_tokens": ("grid",),
    "core": ("tiny",),
}


@register
@dataclass(kw_only=True)
class WaRAConfig(AdapterConfig):
    """WaRA: low-rank factors on the wavelet bands of features, which give twice their rank.

    form: "weight"; "grid" for image tokens, which cannot be merged; "tiny" trains r^2 numbers a layer.
    r: inner size, 1 <= r; at most min(in, out), in the weight form min(in, out) / 2^levels rounded up.
    alpha: the update is scaled by alpha / r; None: alpha = r.
    dropout: on the adapter's input, 0 <= dropout < 1.
    wavelet: "haar", or with PyWavelets an orthogonal one, such as "db2", "sym4", "coif1"; not in tiny.
    levels: how often the low band is split, 1 <= levels; above 1 the weight form needs per_band. Not in tiny.
    strict: refuse sizes that 2^levels does not divide, in place of filling them up with zeros; not in tiny.
    per_band: weight form only: factors of its own for each band.
    grid: grid form only: [height, width] of the patch tokens.
    num_prefix_tokens: grid form only: tokens before the patches, such as a class token; they stay as they are.
    core: tiny form only: "full" trains M, "diagonal" its diagonal.

    Raises ValueError for values out of range, unknown words, and settings without effect in the chosen form.
    """

    method: ClassVar = WaRA
    form: Literal["weight", "grid", "tiny"] = "weight"
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    wavelet: str = "haar"
    levels: int = 1
    strict: bool = False
    per_band: bool = False
    grid: list[int] | None = None
    num_prefix_tokens: int = 1
    core: Literal["full", "diagonal"] = "full"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in FORMS:
            raise ValueError(f"form of wara must be 'weight', 'grid' or 'tiny', got {self.form!r}.")
        if self.core not in ("full", "diagonal"):
            raise ValueError(f"core of wara must be 'full' or 'diagonal', got {self.core!r}.")
        for name, least in (("r", 1), ("levels", 1), ("num_prefix_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} of wara must be a whole number of at least {least}, got {value!r}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout of wara must be in [0, 1), got {self.dropout}.")
        defaults = {field.name: field.default for field in fields(self)}
        for name, forms in ONLY_IN.items():
            if self.form not in forms and getattr(self, name) != defaults[name]:
                raise ValueError(f"{name} of wara has no effect in the {self.form} form; leave it out.")
        wavelets.low_pass(self.wavelet)
        if self.form == "weight" and self.levels > 1 and not self.per_band:
            raise ValueError(
                f"levels of wara above 1 give bands of unequal sizes, which cannot share factors: with "
                f"levels={self.levels} set per_band=True."
            )
        if self.form == "grid":
            self._check_grid()

    def _check_grid(self) -> None:
        least, grid = 2**self.levels, self.grid
        if not isinstance(grid, (list, tuple)) or len(grid) != 2 or not all(isinstance(n, int) for n in grid):
            raise ValueError(
                f"grid of wara must be [height, width] of the patch tokens in the grid form, got {grid!r}; an image of "
                "224 pixels in patches of 14 has [16, 16]."
            )
        if min(grid) < least:
            raise ValueError(f"grid of wara must have at least 2^levels = {least} tokens each way, got {list(grid)}.")
        self.grid = list(grid)
        for what, size in zip(("height of the grid", "width of the grid"), grid, strict=True):
            self.check_divides(what, size)

    @property
    def adapter_class(self) -> type[Adapter]:
        """The class of the form."""
        return FORMS[self.form]

    @property
    def scale(self) -> float:
        """What the update is multiplied with."""
        return (self.r if self.alpha is None else self.alpha) / self.r

    def check_rank(self, sizes: tuple[int, int], most: int) -> None:
        """Refuse an r above `most` for a layer of sizes (out, in).

        Raises ValueError.
        """
        if self.r > most:
            bands = f"with levels={self.levels} " if self.form == "weight" else ""
            raise ValueError(
                f"r of wara in its {self.form} form must be at most {most} {bands}for a layer of {sizes[1]} -> "
                f"{sizes[0]} features, got {self.r}."
            )

    def check_divides(self, what: str, size: int) -> None:
        """Where `strict` is set, refuse a size that the transform would have to fill up.

        Raises ValueError.
        """
        if self.strict and size % 2**self.levels:
            raise ValueError(
                f"wara with strict=True needs sizes that 2^levels = {2**self.levels} divides, but {what} is {size}; "
                "leave strict out to fill up with zeros, or exclude the layer."
            )
