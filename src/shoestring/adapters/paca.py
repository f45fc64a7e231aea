r"""PaCA: partial connection adaptation.

Source   Woo, Namkung, Lee, Jeong, Kim, Jeon, ICLR 2025, arXiv:2503.01905
Update   W' = W but for W'[:, I] = W[:, I] + s D, with I some r inputs of the layer, s = alpha / r
Shapes   W [out, in], D [out, r], I [r]
Start    D = 0; I drawn at random for each layer, or by the size of the weight's columns or of their gradients
Trains   r out numbers a layer
Costs    x[..., I] is all a layer keeps; one product, with D written into W for its time
Differs  D is a change and the weight itself stays, where the authors' code writes into the weight: so adapters can be
         switched, and evaluation never sees weights of one step ago. Of a base in few bits the columns I are not kept
         in 16 bits beside it; there D acts by a second, small product, as it does on layers that another adapter
         changes too. Convolutions, of which it takes input channels for columns, are left out
"""

from dataclasses import dataclass, fields
from random import Random
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..errors import SettingError
from ..fakes import has_values
from ..precision import at_least_float32
from ..quantisation.calibration import Calibrated
from ..quantisation.gradients import column_gradients
from .base import Adapter, AdapterConfig, holders, linear_sizes, register
from .partial_linear import Part, partial_linear

SELECTIONS = ("random", "weight", "gradient")
ONLY_BY = {"random": ("seed",), "gradient": ("calibration_rows", "calibration_max_tokens", "calibration_seed")}


class PaCA(Adapter):
    """D of one adapter on one layer, and the columns that it changes."""

    name = "paca"
    columns: Tensor

    def __init__(self, base: nn.Module, config: "PaCAConfig", columns: list[int]):
        super().__init__()
        self.size = linear_sizes(base)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.by_weight = config.selection == "weight"
        self.delta = nn.Parameter(torch.zeros(self.size[0], config.r))
        self.register_buffer("columns", torch.tensor(columns))
        if not config.init_weights:
            nn.init.normal_(self.delta, std=0.1)

    def start(self, weight: Float[Tensor, "out in"]) -> None:
        """Choose the columns by the weight, where that is asked for."""
        if self.by_weight:
            self.columns.copy_(largest(at_least_float32(weight).norm(dim=0), len(self.columns)))

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """s D in the columns, 0 elsewhere."""
        return Part(1, self.columns).scattered(self.delta * self.scale, self.size)

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same by a small product, beside layers in few bits and other adapters."""
        chosen = x.index_select(-1, self.columns)
        return F.linear(chosen if self.scale == 1 else chosen * self.scale, self.delta)

    def linear(
        self, x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """In one product, with what the merged layer gives bit by bit."""
        return partial_linear(x, weight, bias, self.delta, columns=self.columns, scale=self.scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in torch.

        Raises SettingError, naming the layer, if the columns are none of this layer's.
        """
        columns = state_dict.get(f"{prefix}columns")
        if columns is not None and has_values(columns):
            check_columns(columns, self.size, prefix.partition(f".{self.name}_.")[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def largest(scores: Float[Tensor, " in"], count: int) -> Int[Tensor, " count"]:
    """The places of the largest scores, in ascending order."""
    return scores.topk(count).indices.sort().values


def check_columns(columns: Tensor, size: tuple[int, int], layer: str) -> None:
    """Refuse columns that were saved for another layer.

    Raises SettingError with the layer's name.
    """
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < size[1]:
        raise SettingError(
            f"{layer}: the saved columns of paca go from {int(columns.min())} to {int(columns.max())}, but the layer "
            f"has {size[1]} inputs ({size[1]} -> {size[0]}). The adapter belongs to another model, or this one has "
            "changed; load it on the model it was trained on."
        )
    if (columns.diff() <= 0).any():
        raise SettingError(f"{layer}: the saved columns of paca are not in ascending order, each once: damaged file.")


def check_unshared(model: nn.Module, layer: nn.Module) -> None:
    """Refuse a layer whose weight other modules hold too.

    Raises ValueError with their names.
    """
    if len(names := holders(model, layer)) > 1:
        raise ValueError(
            f"paca changes a weight in place, and this one is held by {' and '.join(names)} together: untie them "
            "first, or leave the layer out of target_modules."
        )


@register
@dataclass(kw_only=True)
class PaCAConfig(Calibrated, AdapterConfig):
    """PaCA: some columns of each pretrained weight are trained, and only their inputs kept for it.

    r: columns of each layer, 1 <= r <= inputs of the layer. LoRA of half that r has about as many parameters.
    alpha: D is scaled by alpha / r; None: alpha = r.
    selection: which columns: "random", as in the paper; "weight", those of the largest norm; "gradient", those whose
        gradients have the largest sum of squares over rows of the training data.
    seed: of the random selection, which also depends on the layer's name.
    calibration_rows, calibration_max_tokens, calibration_seed: of the selection by gradients: how many rows, cut to
        how many tokens, which ones.

    Raises ValueError for values out of range, unknown words, and settings without effect in the chosen selection.
    """

    method: ClassVar = PaCA
    r: int = 16
    alpha: float | None = None
    selection: Literal["random", "weight", "gradient"] = "random"
    seed: int = 0
    calibration_rows: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self._scores: dict[str, Tensor] = {}
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r of paca must be a whole number of at least 1, got {self.r!r}.")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection of paca must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        defaults = {field.name: field.default for field in fields(self)}
        for selection, names in ONLY_BY.items():
            for name in names:
                if self.selection != selection and getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name} of paca has no effect with selection={self.selection!r}, only with {selection!r}; "
                        "leave it out."
                    )

    @property
    def reads_data(self) -> bool:
        """Whether the selection does."""
        return self.selection == "gradient"

    def prepare(self, model: nn.Module) -> None:
        """Score the columns of all layers by their gradients, where that is asked for."""
        if self.reads_data:
            rows, length = self.rows_drawn(), self.calibration_max_tokens
            self._scores = column_gradients(model, self.layers_in(model), rows, len(rows), max_tokens=length)

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """The columns of the layer `key`.

        Raises ValueError if it has fewer than `r`, or shares its weight with another module.
        """
        layer = model.get_submodule(key)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        out_features, in_features = linear_sizes(base)
        if self.r > in_features:
            raise ValueError(
                f"r of paca is {self.r}, but this layer of {in_features} -> {out_features} has {in_features} columns; "
                "lower r or leave the layer out of target_modules."
            )
        check_unshared(model, base)
        if key in self._scores:
            return {"columns": largest(self._scores.pop(key), self.r).tolist()}
        return {"columns": sorted(Random(f"{self.seed} {key}").sample(range(in_features), self.r))}
