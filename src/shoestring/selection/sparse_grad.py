r"""SparseGrad: of the MLPs' weights, those few numbers train that have large gradients in a basis made for that.

Source   Chekalina, Rudenko, Mezentsev et al. 2024, arXiv:2410.07383
Code     github.com/sayankotor/sparse_grads (no licence file), read for its form, nothing copied
Update   U, V: eigenvectors of sum_k G_k^T G_k and of sum_k G_k G_k^T, with G_k [out, in] the gradient of row k of some
         data at one of the layers of a type: the factors of the tensor of all G_k. dL/dWr = V^T G U is large in few
         places, which are chosen once; S holds the numbers there, and zeros
         y = x W^T + ((x U) S^T) V^T + b, the layer with V (V^T W U + S) U^T for a weight
Shapes   U [in, in], V [out, out] for all layers of a type; S [out, in] with n numbers, of which only the rows and
         columns that have some are formed; x [tokens, in]
Start    S = 0, so step 0 is the pretrained model, to the bit
Trains   density out in numbers a layer
Costs    16 bytes a number with AdamW; U and V once a type, those columns of them that some layer uses. The layer's
         input is all that is kept for backward. As many products more as a LoRA of the rank of S's used rows and
         columns has. Before training: two passes of gradients, and float32 scores of the MLPs' weights on the host
Differs  U and V come from gradients of rows at the pretrained weights, where the paper collects those of 30 steps of
         training
         the numbers that train are chosen once, by the sum of their squared gradients over the data, where the paper
         chooses anew at each step and has an optimizer with a dense state for that
         W stays as it is and S is added in forward, where the paper turns W; so nothing is rounded, and bfloat16
         weights lose no small change. Only S is in the turned basis, and weight decay acts on it
         biases do not train, and gates of gated MLPs do; `exclude_modules` leaves them out, as in the paper
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.pytorch_utils import Conv1D

from ..adapters.base import has_linear_weight, keeping_only_input, linear_sizes
from ..adapters.placement import find_blocks
from ..errors import SettingError
from ..fakes import has_values
from ..precision import wide_dtype
from ..quantisation.calibration import Calibrated
from ..quantisation.gradients import each_gradient
from ..resizing import replace_data
from ..targets import Names, targeted
from ..technique import register_technique
from ..whole_files import read_tensors, write_tensors
from .base import Selection, pretrained_modules, refuse_layers_not_called, settings_error

FILE = "rotated.safetensors"
HOLDER = "rotated"  # the module that holds bases and numbers, on the model
ADDED = "_rotated_numbers"  # in the __dict__ of layers
Sides = Literal["both", "narrow"]


class Basis(nn.Module):
    """The turned axes that the layers of one type share: columns of U and V; None: the axis stays as it is."""

    u: Float[Tensor, "in p"] | None
    v: Float[Tensor, "out q"] | None

    def __init__(self, u: Tensor | None, v: Tensor | None):
        super().__init__()
        self.register_buffer("u", u)
        self.register_buffer("v", v)


class Numbers(nn.Module):
    """The numbers of one layer that train, in its type's basis.

    rows, columns: of S, those with a number, as columns of V and U. at: places in that part of S, flat.
    """

    rows: Int[Tensor, " r"]
    columns: Int[Tensor, " c"]
    at: Int[Tensor, " n"]

    def __init__(self, name: str, layer: nn.Module, basis: Basis):
        super().__init__()
        self.name = name
        self.basis = [basis]  # in a list, so that it is counted once
        self.layer = [layer]
        self.size_out, self.size_in = linear_sizes(layer)
        weight: Any = layer.weight
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        for part in ("rows", "columns", "at"):
            self.register_buffer(part, none)
        wide = wide_dtype(weight.dtype)
        self.values = nn.Parameter(torch.zeros(0, dtype=wide, device=weight.device), requires_grad=False)
        self.off = False

    def take(self, rows: Tensor, columns: Tensor, at: Tensor, values: Tensor | None = None) -> None:
        """Train the numbers at these places; from 0 where no values are given."""
        for part, tensor in (("rows", rows), ("columns", columns), ("at", at)):
            setattr(self, part, tensor.to(self.rows))
        zeros = self.values.new_zeros(len(at))
        replace_data(self.values, zeros if values is None else values.to(zeros))
        self.values.requires_grad_(True)

    def core(self, dtype: torch.dtype) -> Float[Tensor, "r c"]:
        """The rows and columns of S that have numbers."""
        flat = torch.zeros(len(self.rows) * len(self.columns), dtype=dtype, device=self.values.device)
        return flat.scatter(0, self.at, self.values.to(dtype)).view(len(self.rows), len(self.columns))

    def added(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x U S^T V^T."""
        (basis,) = self.basis
        turned = x[..., self.columns] if basis.u is None else x @ basis.u[:, self.columns].to(x.dtype)
        turned = turned @ self.core(x.dtype).T
        if basis.v is not None:
            return turned @ basis.v[:, self.rows].T.to(x.dtype)
        return turned.new_zeros(*x.shape[:-1], self.size_out).index_copy(-1, self.rows, turned)

    @torch.no_grad()
    def change(self) -> Float[Tensor, "out in"]:
        """What to add to the layer's weight, as [out, in], for the same outputs without this."""
        return self.added(torch.eye(self.size_in, dtype=self.values.dtype, device=self.values.device)).T


def _add(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor | None:
    numbers: Numbers = layer.__dict__[ADDED]
    if numbers.off or not len(numbers.at):
        return None
    return y + keeping_only_input(args[0], numbers.added, [numbers.values]).to(y.dtype)


@register_technique
@dataclass(kw_only=True)
class SparseGrad(Calibrated, Selection):
    """Train a share of the numbers of MLPs, in a basis where their gradients are sparse.

    density: share of each weight's numbers that train, 0 < density <= 1.
    rotate: both: both axes of a weight are turned, as in the paper; narrow: the shorter one, which costs less.
    target_modules, exclude_modules: names or a regular expression of linear layers; None: those of the blocks' MLPs.
    calibration_rows, calibration_max_tokens, calibration_seed: how many rows, cut to how many tokens, which ones.
    train_head: also train what stands outside of the pretrained model, such as a new classifier.

    Raises SettingError for settings out of range.
    """

    name: ClassVar[str] = "sparse_grad"
    claims: ClassVar[frozenset[str]] = frozenset({"what the weights of blocks are read as"})

    density: float = 0.01
    rotate: Sides = "both"
    target_modules: Names | None = None
    exclude_modules: Names | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise settings_error(self.name, "density", "above 0 and at most 1", self.density)
        if self.rotate not in get_args(Sides):
            raise settings_error(self.name, "rotate", "both or narrow", self.rotate)
        self.numbers: dict[str, Numbers] = {}
        self._bases: dict[str, Basis] = {}
        self._saved_in: Path | None = None
        self._undo = ExitStack()

    def see_saved(self, folder: Path) -> None:
        """Take what was found when it was saved."""
        super().see_saved(folder)
        self._saved_in = folder

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """No parameter of the model."""
        return {}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Freeze all else, find the bases and the numbers, and add what they give to the layers' outputs."""
        with super().attach(model), ExitStack() as undo:
            self._undo = undo
            layers = self._layers(model)
            refuse_layers_not_called(self.name, model, [(name, layer) for name, (_, layer) in layers.items()])
            self._bases = {}
            undo.callback(self.numbers.clear)
            for name, (kind, layer) in layers.items():
                basis = self._bases.setdefault(kind, Basis(*self._whole(layer)))
                self.numbers[name] = Numbers(name, layer, basis)
            if not all(has_values(p) for p in model.parameters()):
                self._take_anything()
            elif self._saved_in is not None:
                self.restore(model, self._saved_in)
            elif not self.values_follow:
                self._choose(model, layers)
            for name, (_, layer) in layers.items():
                layer.__dict__[ADDED] = self.numbers[name]
                undo.callback(layer.__dict__.pop, ADDED)
                undo.callback(layer.register_forward_hook(_add).remove)
            parts = [*self._bases.values(), *self.numbers.values()]
            model.add_module(HOLDER, nn.ModuleList(parts))
            undo.callback(model._modules.pop, HOLDER)
            yield model

    def change(self, name: str) -> Float[Tensor, "out in"]:
        """What to add to the weight of a layer, as [out, in], for the trained model without this technique."""
        return self.numbers[name].change()

    def fold(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """The changes of all layers, as their weights lie."""
        for name, numbers in self.numbers.items():
            change = numbers.change()
            layer: Any = numbers.layer[0]
            yield f"{name}.weight", layer.weight, change.T if isinstance(layer, Conv1D) else change
        self._undo.close()

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Run the model with the weights it had before training; a new head, and other techniques, stay as they are."""
        for numbers in self.numbers.values():
            numbers.off = True
        try:
            yield
        finally:
            for numbers in self.numbers.values():
                numbers.off = False

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write bases, places and values."""
        write_tensors(folder / FILE, self._tensors())

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over bases, places and values.

        Raises SettingError if the file is missing or damaged, or was made of another model or other targets.
        """
        saved, _ = read_tensors(folder / FILE)
        if odd := sorted(saved.keys() ^ self._tensors().keys()):
            raise SettingError(f"{folder / FILE} was made of another model or other targets: {odd[0]} is in one only.")
        for kind, basis in self._bases.items():
            for side, axes in dict(basis.named_buffers()).items():
                setattr(basis, side, saved[f"{kind}.{side}"].to(axes))
        for name, numbers in self.numbers.items():
            numbers.take(*(saved[f"{name}.{part}"] for part in ("rows", "columns", "at", "values")))

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for kind, basis in self._bases.items():
            tensors |= {f"{kind}.{side}": axes for side, axes in basis.named_buffers()}
        for name, numbers in self.numbers.items():
            tensors |= {f"{name}.{part}": getattr(numbers, part).int() for part in ("rows", "columns", "at")}
            tensors[f"{name}.values"] = numbers.values
        return tensors

    def _layers(self, model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
        """The layers by name, each with its type: the list of blocks that it is in, and its name in the block.

        Raises SettingError if there are none, or one is no plain linear layer.
        """
        layers = {name: module for name, module in pretrained_modules(model) if name}
        if self.target_modules is None:
            layers = {name: layers[name] for name in feedforward_layers(model)}
        layers = targeted(layers, self.target_modules, self.exclude_modules, self.name)
        if not layers:
            raise SettingError(
                f"sparse_grad finds no linear layers of MLPs in {type(model).__name__}: name layers in target_modules."
            )
        for name, layer in layers.items():
            _check_layer(name, layer)
        return {name: (_kind(name, layer), layer) for name, layer in layers.items()}

    def _whole(self, layer: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """Room for U and V of a layer of this type; None for the side that is not turned."""
        size_out, size_in = linear_sizes(layer)
        weight: Any = layer.weight
        wide = wide_dtype(weight.dtype)
        turn_in = self.rotate == "both" or size_in <= size_out
        turn_out = self.rotate == "both" or size_in > size_out
        u, v = (torch.zeros(size, size, dtype=wide, device=weight.device) for size in (size_in, size_out))
        return u if turn_in else None, v if turn_out else None

    def _count(self, numbers: Numbers) -> int:
        return max(round(self.density * numbers.size_out * numbers.size_in), 1)

    def _take_anything(self) -> None:
        """As many numbers as there will be, with as many rows and columns as there may be; nothing is looked at."""
        for numbers in self.numbers.values():
            count = self._count(numbers)
            numbers.take(torch.arange(numbers.size_out), torch.arange(numbers.size_in), torch.arange(count))

    def _choose(self, model: nn.Module, layers: Mapping[str, tuple[str, nn.Module]]) -> None:
        """Find the bases from the gradients of the rows, then the numbers from the gradients in these bases."""
        rows, number, most = self.rows_drawn(), self.calibration_rows, self.calibration_max_tokens
        modules = {name: layer for name, (_, layer) in layers.items()}
        grams = {kind: Grams(dict(basis.named_buffers())) for kind, basis in self._bases.items()}
        each_gradient(
            model, modules, rows, number, lambda name, x, dy: grams[layers[name][0]].add(x, dy), max_tokens=most
        )
        for kind, basis in self._bases.items():
            for side, axes in basis.named_buffers():
                axes.copy_(eigenvectors(grams[kind], side, kind))
        energies = {name: torch.zeros(n.size_out, n.size_in) for name, n in self.numbers.items()}

        def add(name: str, x: Tensor, dy: Tensor) -> None:
            energies[name] += turned_gradient(x, dy, self.numbers[name].basis[0]).square_().cpu()

        each_gradient(model, modules, rows, number, add, max_tokens=most)
        for name, numbers in self.numbers.items():
            places = energies.pop(name).flatten().topk(self._count(numbers)).indices.sort().values
            row, column = places // numbers.size_in, places % numbers.size_in
            used_rows, used_columns = row.unique(), column.unique()
            at = torch.searchsorted(used_rows, row) * len(used_columns) + torch.searchsorted(used_columns, column)
            numbers.take(used_rows, used_columns, at)
        for basis in self._bases.values():
            own = [numbers for numbers in self.numbers.values() if numbers.basis[0] is basis]
            _let_go_of_unused(basis, own)


class Grams:
    """Sums of G^T G ("u") and G G^T ("v") over the gradients of layers of one type.

    sides: which of the two are wanted.
    """

    def __init__(self, sides: Iterable[str] = ("u", "v")) -> None:
        self.sums: dict[str, Any] = dict.fromkeys(sides, 0)
        self.count = 0

    def add(self, x: Float[Tensor, "tokens in"], dy: Float[Tensor, "tokens out"]) -> None:
        """Of G = dy^T x, which is formed only where there are more tokens than it has rows or columns."""
        self.count += 1
        few = len(x) < min(x.shape[1], dy.shape[1])
        gradient = None if few else dy.T @ x
        if "u" in self.sums:
            self.sums["u"] = self.sums["u"] + (x.T @ (dy @ dy.T @ x) if gradient is None else gradient.T @ gradient)
        if "v" in self.sums:
            self.sums["v"] = self.sums["v"] + (dy.T @ (x @ x.T @ dy) if gradient is None else gradient @ gradient.T)


def eigenvectors(grams: Grams, side: str, kind: str) -> Float[Tensor, "size size"]:
    """As columns, in double precision, that of the largest eigenvalue first.

    Raises SettingError for fewer than two gradients, and for such as are NaN or Inf.
    """
    if grams.count < 2:
        raise SettingError(
            f"sparse_grad needs at least 2 gradients to find a basis for {kind}, and has {grams.count}: raise "
            "calibration_rows."
        )
    if not grams.sums[side].isfinite().all():
        raise SettingError(f"The gradients of {kind} hold NaN or Inf: check the model's weights and the rows.")
    vectors: Tensor = torch.linalg.eigh(grams.sums[side].double()).eigenvectors
    return vectors.flip(1)


def turned_gradient(
    x: Float[Tensor, "tokens in"], dy: Float[Tensor, "tokens out"], basis: Basis
) -> Float[Tensor, "out in"]:
    """V^T dy^T x U."""
    x = x if basis.u is None else x @ basis.u.to(x.dtype)
    dy = dy if basis.v is None else dy @ basis.v.to(dy.dtype)
    return dy.T @ x


def feedforward_layers(model: nn.Module) -> dict[str, str]:
    """The linear layers of blocks' feed-forward parts, by name, each with its type: the same in all blocks of a list.

    Raises SettingError for models with no block of a known layout.
    """
    try:
        blocks = tuple(f"{name}." for name, _, _ in find_blocks(model))
    except ValueError as error:
        raise SettingError(str(error)) from error
    kinds = {}
    for name, module in pretrained_modules(model):
        block = next((block for block in blocks if name.startswith(block)), None)
        if block is not None and "att" not in name.removeprefix(block).lower() and has_linear_weight(module):
            kinds[name] = _kind(name, module)
    return kinds


def _kind(name: str, layer: nn.Module) -> str:
    """A layer's name without the number of its block, and its sizes."""
    parts = name.removesuffix(".base_layer").split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(part for i, part in enumerate(parts) if i != first) + " {} x {}".format(*linear_sizes(layer))


def _check_layer(name: str, layer: nn.Module) -> None:
    weight: Any = getattr(layer, "weight", None)
    quantised = isinstance(weight, Tensor) and (not weight.is_floating_point() or is_traceable_wrapper_subclass(weight))
    if quantised:
        raise SettingError(
            f"{name} is quantised ({type(layer).__name__}), and sparse_grad takes gradients of plain weights: leave it "
            "out, or load the model in 16 or 32 bits."
        )
    if not isinstance(layer, (nn.Linear, Conv1D)):
        raise SettingError(
            f"sparse_grad trains nn.Linear and Conv1D only, but {name} is of type {type(layer).__name__}; list it in "
            "exclude_modules."
        )


def _let_go_of_unused(basis: Basis, layers: list[Numbers]) -> None:
    """Keep those columns of U and V that some layer uses."""
    for side, part in (("u", "columns"), ("v", "rows")):
        axes = getattr(basis, side)
        if axes is None:
            continue
        used = torch.cat([getattr(numbers, part) for numbers in layers]).unique()
        setattr(basis, side, axes[:, used].contiguous())
        for numbers in layers:
            setattr(numbers, part, torch.searchsorted(used, getattr(numbers, part)))
