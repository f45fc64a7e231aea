r"""SketchTune: weights are replaced by tables of 2^n values a row, which train, and by codes of n bits, which do not.

Source   Zhang, Su, Desai, Wu, Xu, Shrivastava 2025, arXiv:2410.06364
Update   W_ij = table_{i, q(j), code_ij}, y = x W^T + b
Shapes   W [out, in], tables [out, groups, 2^bits], codes [out, in] packed, q(j) the group of column j
Start    the sketch of the pretrained weight (`quantisation.sketch`): by k-means, with data weighted and swept by what
         the layer's inputs are. So training starts at the compressed model, not at the pretrained one
Trains   out groups 2^bits numbers a layer, in float32
Costs    in memory and in files out in bits / 8 + 4 out groups 2^bits bytes a layer in place of its weight. Building:
         the calibration rows are run once for every 4 GiB of moments, 8 in^2 bytes a layer
Kind     what of the model is there at all: the weights are given up, which an adapter's must not be, since peft goes
         back to them to disable, switch, merge and unload. When the technique is removed, the layers are linear
         ones again, with the weights that the trained sketch stands for. A model that was stored as sketches
         (`quantisation.save_packed`) is taken as it is, without data and without its original weights
Differs  codes of 3 bits take 3 bits, not 4; gradients are summed by blocks of rows, with nothing of [batch, out, in];
         layers measured in a later run over the data see those before them as sketches; columns are swept in order,
         and count in k-means as in the sweep (exponent 2, the authors 4). Of two codes of 4 bits in a byte the first is
         in the low half, the authors' in the high one
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..adapters.base import has_linear_weight, is_quantised, linear_sizes
from ..adapters.placement import freeze_but_head, stacks
from ..errors import SettingError
from ..fakes import has_values
from ..quantisation.calibration import Calibrated, Moments
from ..quantisation.sketch import Sketch, build_sketch, check_groups_per_row, curvature_of
from ..quantisation.sketched_linear import SketchedLinear
from ..resizing import replace_data
from ..targets import targeted
from ..technique import Phase, Technique, register_technique
from ..whole_files import check_names, read_tensors, write_tensors

BITS = range(2, 5)
CODES_FILE, TABLES_FILE = "sketch_codes.safetensors", "sketch_tables.safetensors"
CODES_MARK = "codes"  # in the metadata of both files
OTHERS_CHOOSE_WHAT_TRAINS = frozenset({Phase.ADAPTER, Phase.PROMPT, Phase.SELECTION})
SECONDS_BEFORE_A_BAR = 5


@register_technique
@dataclass(kw_only=True)
class SketchTune(Calibrated, Technique):
    """Weights as small tables that train and packed codes that do not: one model of 2 to 4 bits, no second path.

    The data is what the recipe is attached with, `recipe.apply(model, data={"train": rows})`; `shoestring train` gives
    its own. All else is frozen, unless an adapter, prompt or selection in the recipe decides what trains beside it.

    bits: of a code, 2 to 4; a table has 2^bits values.
    groups: tables a row, for as many stretches of equal width; more fit better and train more. Usual: 1, 2, 4, 8.
    target_modules: names or a regular expression of the layers; None: all linear layers in the model's blocks.
    exclude_modules: names or a regular expression of layers to leave out.
    calibrate: measure the layers' inputs on data; False: the weights alone decide, and no data is needed.
    calibration_rows, calibration_max_tokens, calibration_seed: how many rows, cut to how many tokens, which ones.
    damping: share of the mean diagonal added to the moments of the inputs.
    exponent: how much more a column counts in k-means that matters more; 0: all alike.
    sweep: codes of later columns make up for what earlier ones miss by; only with calibration.
    train_head: also train what stands outside of the pretrained model, such as a new classifier.
    seed: of k-means.

    Raises SettingError if a setting is out of range.
    """

    name: ClassVar[str] = "sketchtune"
    phase: ClassVar[Phase] = Phase.PRUNING

    bits: int = 4
    groups: int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    calibrate: bool = True
    damping: float = 0.01
    exponent: float = 2.0
    sweep: bool = True
    train_head: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bits, int) or self.bits not in BITS:
            raise SettingError(
                f"bits of sketchtune must be a whole number from {BITS.start} to {BITS.stop - 1}, got {self.bits}."
            )
        if self.groups < 1:
            raise SettingError(f"groups of sketchtune must be at least 1, got {self.groups}.")
        if not 0 <= self.exponent < math.inf:
            raise SettingError(f"exponent of sketchtune must be a number of at least 0, got {self.exponent}.")
        if not self.damping > 0:
            raise SettingError(f"damping of sketchtune must be above 0, got {self.damping}.")
        self._decides_what_trains = True
        self._layers: dict[str, SketchedLinear] = {}
        self._replaced: dict[str, nn.Module] = {}

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Leave to adapters, prompts and selections what else of the model trains."""
        self._decides_what_trains = not any(other.phase in OTHERS_CHOOSE_WHAT_TRAINS for other in others)

    def set_task(self, peft_task_type: str) -> bool:
        """Whether a new head trains because of this technique."""
        return self._decides_what_trains and self.train_head

    @property
    def reads_data(self) -> bool:
        """Whether the sketches are calibrated."""
        return self.calibrate

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Put sketches in place of the layers.

        Raises SettingError, naming the layer, if one cannot be a sketch, and if there is no data to build it from.
        """
        chosen = self._chosen(model)
        trained = [(p, p.requires_grad) for p in model.parameters()]
        self._replaced = {}
        with ExitStack() as undo:
            undo.callback(lambda: [p.requires_grad_(on) for p, on in trained])
            if self._decides_what_trains:
                freeze_but_head(model, self.train_head)
            self._build(undo, model, chosen)
            yield model

    def on_attached(self, model: nn.Module) -> None:
        """Let the tables train, which adapters freeze with all else of the model; let go of the calibration rows."""
        super().on_attached(model)
        for layer in self._layers.values():
            layer.tables.requires_grad_(True)

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write codes and tables; codes are the same for all tasks trained from one sketch."""
        codes = {name: layer.codes for name, layer in self._layers.items()}
        tables = {name: layer.tables for name, layer in self._layers.items()}
        for file, tensors in ((CODES_FILE, codes), (TABLES_FILE, tables)):
            write_tensors(folder / file, tensors, **{CODES_MARK: _mark_of(codes)})

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Read codes and tables, or tables alone, of another task, where the model has their codes already.

        Raises SettingError if a file is missing, or holds other layers, sizes, codes or values that are no numbers.
        """
        codes = {name: layer.codes for name, layer in self._layers.items()}
        filled = all(layer.filled for layer in self._layers.values())
        if (folder / CODES_FILE).exists() or not filled:
            codes, _ = _read(folder / CODES_FILE, codes)
        tables, mark = _read(folder / TABLES_FILE, {name: layer.tables for name, layer in self._layers.items()})
        if mark != _mark_of(codes):
            raise SettingError(
                f"{folder / TABLES_FILE} belongs to other codes than those here: put the {CODES_FILE} beside it that "
                "it was saved with."
            )
        for name, layer in self._layers.items():
            _check_range(f"{folder / TABLES_FILE}: {name}", tables[name], layer.dtype)
        with torch.no_grad():
            for name, layer in self._layers.items():
                layer.codes.copy_(codes[name])
                layer.tables.copy_(tables[name])
                self._fill_in_place_of_weight(name)

    def _chosen(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers to replace, by name, each one fit for it.

        Raises SettingError naming a layer that is not, or a name that no layer has.
        """
        modules = {name: module for name, module in model.named_modules() if name}
        blocks = tuple(f"{name}." for name, _ in stacks(model))
        chosen = targeted(modules, self.target_modules, self.exclude_modules, self.name)
        if self.target_modules is None:
            chosen = {n: m for n, m in chosen.items() if n.startswith(blocks) and has_linear_weight(m)}
        if not chosen:
            raise SettingError(
                f"sketchtune finds no linear layers in the blocks of {type(model).__name__}: name them in "
                "target_modules."
            )
        holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
        for name, layer in chosen.items():
            if isinstance(layer, SketchedLinear):
                self._check_sketch(name, layer)
                continue
            _check_layer(name, layer, model.get_submodule(name.rpartition(".")[0]))
            if holders[id(layer.weight)] > 1:
                raise SettingError(
                    f"The weight of {name} is another module's too, which sketchtune would leave without it: untie "
                    "them first, or list the layer in exclude_modules."
                )
            try:
                check_groups_per_row(linear_sizes(layer)[1], self.groups)
            except ValueError as error:
                raise SettingError(f"{name}: {error}") from error
        return chosen

    def _check_sketch(self, name: str, layer: SketchedLinear) -> None:
        """Take a sketch as it is, of a model that was stored so, where the settings are those it was made with."""
        if (layer.bits, layer.groups) != (self.bits, self.groups):
            raise SettingError(
                f"{name} is a sketch of {layer.bits} bits and {layer.groups} groups already, and sketchtune is to make "
                f"one of {self.bits} and {self.groups}: give the settings that it was made with, or the original model."
            )

    def _build(self, undo: ExitStack, model: nn.Module, chosen: dict[str, nn.Module]) -> None:
        """Replace the layers, one by one."""
        places = defaultdict(list)
        for parent in model.modules():
            for key, child in parent._modules.items():
                places[id(child)].append((parent, key))
        valueless = not all(has_values(p) for p in model.parameters())
        builds = not (valueless or self.values_follow)
        self._layers = {name: layer for name, layer in chosen.items() if isinstance(layer, SketchedLinear)}
        dense = {name: layer for name, layer in chosen.items() if name not in self._layers}
        moments: Iterator[tuple[str, Moments | None]] = ((name, None) for name in dense)
        if builds and self.calibrate and dense:
            moments = self.moments(model, dense)
        for name, seen in tqdm(moments, "Sketches", len(dense), unit="layer", delay=SECONDS_BEFORE_A_BAR, leave=False):
            layer = dense[name]
            sketch = self._empty_sketch(layer)
            self._layers[name], self._replaced[name] = sketch, layer
            undo.callback(_put_weight_back, name, layer, sketch)
            if builds:
                sketch.fill(*self._sketch_of(name, layer, seen))
            if builds or valueless:
                self._fill_in_place_of_weight(name)
            for parent, key in places[id(layer)]:
                parent._modules[key] = sketch
                undo.callback(parent._modules.__setitem__, key, layer)

    def _empty_sketch(self, layer: Any) -> SketchedLinear:
        rows, columns = linear_sizes(layer)
        bias, weight = layer.bias is not None and layer.bias, layer.weight
        sketch = SketchedLinear(columns, rows, self.bits, self.groups, bias, weight.dtype, weight.device)
        return sketch.train(layer.training)

    @torch.no_grad()
    def _sketch_of(self, name: str, layer: nn.Module, seen: Moments | None) -> Sketch:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if not weight.isfinite().all():
            raise SettingError(f"The weight of {name} holds NaN or Inf: a sketch of it would too. Load other weights.")
        try:
            curvature = None if seen is None else curvature_of(seen.total, seen.count, self.damping)
        except ValueError as error:
            raise SettingError(f"{name}: {error}") from error
        return build_sketch(
            weight.T if isinstance(layer, Conv1D) else weight,
            self.bits,
            self.groups,
            curvature=curvature,
            exponent=self.exponent,
            sweep=self.sweep,
            seed=self.seed,
        )

    def _fill_in_place_of_weight(self, name: str) -> None:
        """Mark the sketch as filled, and let go of the weight that it stands for."""
        self._layers[name].filled = True
        weight: Any = getattr(self._replaced.get(name), "weight", None)
        if weight is not None and weight.numel():
            weight.requires_grad_(False)
            replace_data(weight, weight.detach().new_empty(0))


def _put_weight_back(name: str, layer: nn.Module, sketch: SketchedLinear) -> None:
    """Give the linear layer the weight that the sketch stands for, where it has given up its own.

    Raises SettingError if that does not fit into the weight's dtype.
    """
    if not sketch.filled:
        return
    with torch.no_grad():
        dense = sketch.weight.detach()
    replace_data(layer.weight, (dense.T if isinstance(layer, Conv1D) else dense).contiguous())  # type: ignore[arg-type]
    _check_range(name, sketch.tables.detach(), sketch.dtype)


def _check_range(name: str, tables: Tensor, dtype: torch.dtype) -> None:
    """Refuse tables with values that are no numbers in the dtype of the model."""
    if has_values(tables) and not tables.to(dtype).isfinite().all():
        raise SettingError(
            f"{name} holds values that are NaN, Inf or beyond the range of {str(dtype).removeprefix('torch.')} "
            f"(largest {float(tables.abs().max()):.3g}): train in float32 or bfloat16, or with a lower learning rate."
        )


def _check_layer(name: str, layer: nn.Module, parent: nn.Module) -> None:
    """Refuse what is no plain linear layer.

    Raises SettingError.
    """
    if is_quantised(layer) or (
        has_linear_weight(layer) and not layer.weight.is_floating_point()  # type: ignore[operator]
    ):
        raise SettingError(
            f"{name} is quantised already ({type(layer).__name__}), and sketchtune quantises by itself: load the model "
            "in 16 or 32 bits."
        )
    if isinstance(layer, BaseTunerLayer):
        raise SettingError(f"{name} has an adapter already: attach sketchtune first, or leave the layer out.")
    if isinstance(parent, nn.MultiheadAttention):
        raise SettingError(
            f"{name} belongs to nn.MultiheadAttention, which reads its weight without calling it; list it in "
            "exclude_modules."
        )
    if type(layer) not in (nn.Linear, Conv1D):
        raise SettingError(
            f"sketchtune replaces nn.Linear and Conv1D only, but {name} is of type {type(layer).__name__}; list it in "
            "exclude_modules."
        )


def _mark_of(codes: Mapping[str, Tensor]) -> str:
    """The same for the same codes only."""
    digest = hashlib.sha256()
    for name, tensor in sorted(codes.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _read(file: Path, own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file and the mark of the codes they belong to.

    Raises SettingError if it is missing or its tensors are not those wanted.
    """
    saved, about = read_tensors(file)
    check_names(file, saved, own)
    for name, tensor in own.items():
        if saved[name].shape != tensor.shape:
            raise SettingError(
                f"{file}: {name} is of shape {tuple(saved[name].shape)}, but bits and groups here make it "
                f"{tuple(tensor.shape)}."
            )
    return saved, about.get(CODES_MARK, "")
