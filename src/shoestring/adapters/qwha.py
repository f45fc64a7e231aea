r"""QWHA: sparse coefficients in a Walsh-Hadamard basis, which first make up for the rounding of a quantised base.

Source   Jeon et al., ICLR 2026, arXiv:2509.17428
Code     none taken; the authors' is github.com/vantaa89/qwha
Update   y = (W_Q + s F U) x + b, s = alpha / sqrt(out in), F with p non-zeros c at fixed places, U of `hadamard.py`
         c_e: s (dY^T X U^T)[e]
Shapes   W_Q [out, in], F [out, n], U [n, n]; n = in, or without `strict` the next size that has a transform
Start    calibrated: places and values of `sparse_coefficients.py` for D = W_0 - W_Q and the inputs of rows of data
         weight: the same for inputs of equal strength, which needs no data     zero: c = 0, places at random
Trains   p = r (in + out) numbers a layer, and holds their places, 4 bytes each
Costs    x and c kept at a layer. Few tokens: U x and a sparse product, both again in backward. Many: s F U is formed
         and added to the unpacked weight, again in backward, with one dense gradient. So of one layer there are two
         [out, in] tensors in forward and three in backward, in 32 bits, beside the weight where it has to be unpacked
Differs  s U is the authors' alpha / sqrt(out) H / in, with U orthonormal. Inputs are those of the quantised model,
         without padding. Places at random are one in each of p equal stretches of F, so that none comes twice. While
         all values are zero the output is the base's to the bit for few tokens; of an unpacked weight, but for rounding
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SettingError
from ..fakes import has_values
from ..quantisation.calibration import Calibrated, Moments
from ..quantisation.originals import OriginalWeights, is_same, source_of_model
from . import hadamard
from .base import AdaptedLinear, Adapter, AdapterConfig, keeping_only_input, linear_sizes, register
from .sparse_coefficients import Coefficients, allocate, best_coefficients, output_errors

DAMPING = 1e-4  # of the mean second moment
SPARSE_PRODUCT = {"cpu": 8}  # how many times dearer a product is than in a dense one; measured with torch's CSR
SPARSE_PRODUCT_ELSEWHERE = 32  # a guess

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")


class QWHA(Adapter):
    """The coefficients of one adapter on one layer, and their places."""

    name = "qwha"
    decides_when_packed = True
    places: Tensor
    features: Tensor  # (out, in), saved with the places, which mean nothing to a layer of other sizes

    def __init__(self, base: nn.Module, config: "QWHAConfig", start: Coefficients | None = None):
        super().__init__()
        self.out_features, self.in_features = linear_sizes(base)
        self.size = config.transform_size(self.in_features)
        count = config.count(self.out_features, self.in_features)
        self.scale = config.scale(self.out_features, self.in_features)
        places = start.places if start else spread_at_random(count, self.out_features * self.size)
        kind = torch.int32 if self.out_features * self.size < 2**31 else torch.int64
        self.register_buffer("places", places.to(kind))
        self.register_buffer("features", torch.tensor([self.out_features, self.in_features]))
        self.values = nn.Parameter(torch.zeros(count))
        if start is not None:
            self.values.data = (start.values / self.scale).float()
        elif not config.init_weights:
            nn.init.normal_(self.values, std=0.3 * sqrt(self.out_features / count) / self.scale)

    def change(self) -> Float[Tensor, "out in"]:
        """s F U."""
        return hadamard.transform(self._coefficients(), transposed=True)[:, : self.in_features]

    def _coefficients(self) -> Float[Tensor, "out n"]:
        """s F."""
        rows = self.values.new_zeros(self.out_features * self.size)
        rows = rows.index_copy_(0, self.places.long(), self.scale * self.values)
        return rows.view(self.out_features, self.size)

    def new_weight(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        return weight + self.change()

    def through(self, x: Tensor, layer: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's own output, and s F (U x)."""
        y = layer(x)
        return y + keeping_only_input(x, self._of_tokens, [self.values]).to(y.dtype)

    def prefers_tokens(self, num_tokens: int) -> bool:
        """By the products that either form takes beside those of the layer."""
        passes = 3 if self.training else 1
        of_transform = self.size * hadamard.products_a_number(self.size)
        dearer = SPARSE_PRODUCT.get(self.values.device.type, SPARSE_PRODUCT_ELSEWHERE)
        by_tokens = passes * num_tokens * (of_transform + dearer * len(self.values))
        gradient = num_tokens * self.out_features * self.in_features if self.training else 0
        return by_tokens < passes * self.out_features * of_transform + gradient

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in torch.

        Raises SettingError, naming the layer, if the places are none of this layer's.
        """
        features = state_dict.setdefault(f"{prefix}features", torch.tensor([self.out_features, self.in_features]))
        places = state_dict.get(f"{prefix}places")
        if places is not None and has_values(places):
            self._check_saved(places, features.tolist(), prefix.partition(f".{self.name}_.")[0])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_saved(self, places: Tensor, features: list[int], layer: str) -> None:
        """Refuse places that were saved for another layer, or are damaged."""
        other = "the adapter belongs to another model, or this one has changed; load it on the model it was trained on."
        if features != [self.out_features, self.in_features] or len(places) != len(self.places):
            raise SettingError(
                f"{layer} of {self.in_features} -> {self.out_features} takes {len(self.places)} places of qwha, but "
                f"{len(places)} were saved for {features[1]} -> {features[0]}: {other}"
            )
        first, last, end = int(places.min()), int(places.max()), self.out_features * self.size
        if not 0 <= first <= last < end:
            raise SettingError(
                f"{layer}: the saved places of qwha go from {first} to {last}, but this layer has 0 to {end - 1}: "
                f"{other}"
            )
        if (places.diff() <= 0).any():
            raise SettingError(
                f"{layer}: the saved places of qwha are not in ascending order, each once: damaged file."
            )

    def _of_tokens(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        rows = F.pad(x.to(self.values.dtype), (0, self.size - self.in_features)).reshape(-1, self.size)
        starts = torch.arange(self.out_features + 1, dtype=self.places.dtype, device=self.places.device) * self.size
        begins = torch.searchsorted(self.places, starts, out_int32=self.places.dtype == torch.int32)
        y = _SparseProduct.apply(hadamard.transform(rows), self.scale * self.values, begins, self.places % self.size)
        return y.to(x.dtype).view(*x.shape[:-1], self.out_features)


class _SparseProduct(torch.autograd.Function):
    """y = x F^T for F by rows: row i has `values` in `columns`, from begins[i] to begins[i + 1]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, begins: Tensor, columns: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, begins, columns)
        if not has_values(x):
            return x.new_empty(len(x), len(begins) - 1)
        return (_by_rows(x, values, begins, columns) @ x.T).T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, begins, columns = ctx.saved_tensors
        if not has_values(x):
            return torch.empty_like(x), torch.empty_like(values), None, None
        turned = dy.T.contiguous()
        dx = (_by_rows(x, values, begins, columns).t() @ turned).T if ctx.needs_input_grad[0] else None
        dvalues = None
        if ctx.needs_input_grad[1]:
            zero = _by_rows(x, torch.zeros_like(values), begins, columns)
            dvalues = torch.sparse.sampled_addmm(zero, turned, x.contiguous(), beta=0).values()
        return dx, dvalues, None, None


def _by_rows(x: Tensor, values: Tensor, begins: Tensor, columns: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(begins, columns, values, (len(begins) - 1, x.shape[1]), check_invariants=False)


def spread_at_random(count: int, size: int) -> Int[Tensor, " count"]:
    """One place at random in each of `count` stretches of 0 ... size - 1, as equal as can be, ascending."""
    first = (torch.arange(count + 1) * size).div(count, rounding_mode="floor")
    lengths = first.diff()
    return first[:-1] + (torch.rand(count) * lengths).long().clamp(max=lengths - 1)


@register
@dataclass(kw_only=True)
class QWHAConfig(Calibrated, AdapterConfig):
    """QWHA: sparse coefficients in a Walsh-Hadamard basis, started such that a quantised layer's output is off least.

    r: trains r (in + out) numbers a layer, as LoRA of that rank; the paper takes 64.
    alpha: the change is scaled by alpha / sqrt(out in); acts on the learning rate alone.
    init: "calibrated", from original weights and data; "weight", from original weights alone; "zero", from neither.
    original: where the weights from before quantisation are: a folder, hub id or packaged:NAME with safetensors;
        None: what the model was loaded from.
    score: by which error rows share the coefficients: "output" in what comes out, "weight" in the weight.
    allocation_power: the error is taken to this power; 0: all rows get the same.
    strict: refuse numbers of inputs without a Hadamard transform; False fills up with zeros to the next one.
    calibration_rows, calibration_max_tokens, calibration_seed: see `Calibrated`.

    Raises ValueError for values out of range, and for settings that have no effect with `init`.
    """

    method: ClassVar = QWHA
    r: int = 8
    alpha: float = 4000.0
    init: Literal["calibrated", "weight", "zero"] = "calibrated"
    original: str | None = None
    score: Literal["output", "weight"] = "output"
    allocation_power: float = 1.0
    strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r of qwha must be a whole number of at least 1, got {self.r!r}.")
        if self.init not in ("calibrated", "weight", "zero"):
            raise ValueError(f"init of qwha must be 'calibrated', 'weight' or 'zero', got {self.init!r}.")
        if self.score not in ("output", "weight"):
            raise ValueError(f"score of qwha must be 'output' or 'weight', got {self.score!r}.")
        if self.allocation_power < 0:
            raise ValueError(f"allocation_power of qwha must be 0 or more, got {self.allocation_power}.")
        if self.init == "zero" and (self.original is not None or self.score == "weight"):
            raise ValueError("original and score of qwha have no effect with init='zero'; leave them out.")
        if self.init == "weight" and self.score == "weight":
            raise ValueError("score of qwha has no effect with init='weight', which has no data; leave it out.")
        self._starts: dict[str, Coefficients] = {}

    def transform_size(self, in_features: int) -> int:
        """The size of the transform of so many inputs.

        Raises ValueError if there is none and `strict` is set.
        """
        if not self.strict:
            return hadamard.next_size(in_features)
        if not hadamard.has_transform(in_features):
            raise ValueError(
                f"qwha needs a number of inputs that has a Hadamard transform, but the layer has {in_features}: set "
                f"strict=False to fill up with zeros to {hadamard.next_size(in_features)}, or leave the layer out."
            )
        return in_features

    def count(self, out_features: int, in_features: int) -> int:
        """How many coefficients a layer trains.

        Raises ValueError if they are more than there are places in F, or as `transform_size`.
        """
        count, places = self.r * (in_features + out_features), out_features * self.transform_size(in_features)
        if count > places:
            most = places // (in_features + out_features)
            raise ValueError(
                f"r of qwha must be at most {most} for a layer of {in_features} -> {out_features} features, which has "
                f"{places} places for its r (in + out) coefficients, got {self.r}."
            )
        return count

    def scale(self, out_features: int, in_features: int) -> float:
        """s, by which the change is multiplied."""
        return self.alpha / sqrt(out_features * in_features)

    @property
    def reads_data(self) -> bool:
        """Whether the start needs data."""
        return self.init == "calibrated"

    def prepare(self, model: nn.Module) -> None:
        """Find the start of each layer: its coefficients are kept until the adapter on it is made.

        Raises SettingError for original weights or data that are missing or do not fit, ValueError for sizes.
        """
        if self.init == "zero":
            return
        layers = self.layers_in(model)
        for name, layer in layers.items():
            self._check_sizes(name, *linear_sizes(_base_of(layer)))
        source = self.original or source_of_model(model)
        if source is None:
            raise ValueError(
                "qwha starts from the weights before quantisation, and this model does not say what it was loaded "
                "from: set original to a folder with them, or init='zero'."
            )
        originals = OriginalWeights(source)
        seen: Any = self.moments(model, layers) if self.reads_data else ((name, None) for name in layers)
        unchanged = []
        for name, moments in seen:
            base = _base_of(layers[name])
            weight = _dequantised(base, model)
            original = originals.weight(name, linear_sizes(base), isinstance(base, Conv1D)).to(weight.device)
            if not weight.isfinite().all() or not original.isfinite().all():
                raise ValueError(f"{name}: its weight, or the original in {source}, holds NaN or Inf.")
            if is_same(original, weight):
                unchanged.append(name)
            else:
                start = self._starts[name] = self.start_of(original.double() - weight.double(), moments)
                if start.unrefined:
                    warnings.warn(
                        f"qwha leaves the values of {start.unrefined} of {len(weight)} rows of {name} unrefined: the "
                        "inputs of its calibration rows are too much alike. Give more rows, or other ones."
                    )
        if unchanged:
            warnings.warn(
                f"qwha starts {len(unchanged)} layers ({unchanged[0]} first) at zero and at random places: their "
                f"weights are those of {source}, so there is no rounding to make up for."
            )

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """The start that `prepare` found."""
        return {"start": self._starts.pop(key)} if key in self._starts else {}

    def start_of(self, delta: Float[Tensor, "out in"], moments: Moments | None) -> Coefficients:
        """The coefficients of D = `delta` for inputs of those moments, in double precision, without s."""
        (out_features, in_features), size = delta.shape, self.transform_size(delta.shape[1])
        wanted = hadamard.transform(F.pad(delta, (0, size - in_features)))
        gram = None
        if moments is not None:
            total = moments.total.to(delta)
            total = total + DAMPING * total.diagonal().mean() * torch.eye(in_features).to(total)
            total = F.pad(total, (0, size - in_features, 0, size - in_features))
            gram = hadamard.transform(hadamard.transform(total).T.contiguous())
        errors = output_errors(wanted, gram if self.score == "output" else None)
        counts = allocate(errors, self.count(out_features, in_features), size, float(self.allocation_power))
        return best_coefficients(wanted, gram, counts)

    def _check_sizes(self, name: str, out_features: int, in_features: int) -> None:
        try:
            self.count(out_features, in_features)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _base_of(layer: Any) -> nn.Module:
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _dequantised(base: nn.Module, model: nn.Module) -> Float[Tensor, "out in"]:
    with torch.no_grad():
        return AdaptedLinear(base, "qwha_", **get_quantization_kwargs(model)).weight_out_in().detach()
