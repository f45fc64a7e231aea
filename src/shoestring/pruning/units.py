"""Attention heads and feed-forward channels of a model, some of which can be left out of its weights and put back."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..adapters.coupled import Structure, check_separable, find_structures, layer_at
from ..errors import SettingError
from ..precision import wide_dtype
from ..resizing import head_counts, replace_data, resize, rows_first, set_weight
from .rows import kept_at_home

SAMPLES = 16  # numbers of a weight by which it is known again


@dataclass
class _Original:
    """What a layer was: all of its weight, or the rows that were left out, and those of its bias."""

    weight: Tensor
    bias: Tensor | None
    kept_rows: Tensor | None  # of a layer with fewer rows; None: the weight is whole
    num_rows: int


class Units:
    """The heads of one attention, or the channels of one feed-forward part.

    name: of the layer that reads them, o or down. layers: all layers that have them, by name. count: as loaded.
    group: query heads to a KV head, which stay or go together; 1 for channels.
    """

    def __init__(self, model: nn.Module, structure: Structure):
        self.structure = structure
        self.reader = structure.parts[0]
        self.name, self.count, self.width = self.reader.layer, self.reader.num_units, self.reader.width
        self.are_heads = self.reader.role == "o"
        self.group = self.count // v.num_units if (v := structure["v"]) is not None else 1
        self.layers = {part.layer: layer_at(model, part.layer) for part in structure.parts}
        self._around = model.get_submodule(structure.name) if self.are_heads else None
        self._originals: dict[str, _Original] = {}
        self._counts: list[tuple[nn.Module, str, int]] = []

    @property
    def reading_layer(self) -> nn.Module:
        """o or down."""
        return self.layers[self.name]

    @property
    def are_cut(self) -> bool:
        """Whether some were left out, or their factors folded in."""
        return bool(self._originals)

    def sample(self) -> Float[Tensor, " samples"]:
        """Some numbers of the reading layer's weight as it was loaded, by which a base is told from another."""
        whole = self._originals[self.name].weight if self.are_cut else self.reading_layer.weight.detach()  # type: ignore[operator]
        flat = whole.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
        return flat[places.to(flat.device)].cpu()

    def spread(self, of_units: Float[Tensor, " units"]) -> Float[Tensor, " inputs"]:
        """One number a unit, for each input of the reading layer."""
        return of_units.repeat_interleave(self.width) if self.width > 1 else of_units

    def places(self, kept: Int[Tensor, " kept"]) -> tuple[dict[str, Tensor], Tensor]:
        """What is kept with these units: rows, by layer, and the columns of the reading layer."""
        units = kept.tolist()
        kv_heads = sorted({unit // self.group for unit in units})
        rows: dict[str, list[int]] = defaultdict(list)
        for part in sorted(self.structure.parts, key=lambda part: part.start):
            if part.role not in ("o", "down"):
                rows[part.layer] += part.places(kv_heads if part.role in "kv" else units)
        columns = torch.tensor(self.reader.places(units))
        return {layer: torch.tensor(of_layer) for layer, of_layer in rows.items()}, columns

    @torch.no_grad()
    def cut(self, kept: Tensor, factors: Float[Tensor, " kept"], folder: str | None) -> None:
        """Leave out all other units, and multiply what reads these by `factors`; originals wait at home.

        folder: for files of the originals; None: they wait in host memory.
        """
        rows, columns = self.places(kept)
        for name, of_layer in rows.items():
            self._cut_rows(name, self.layers[name], of_layer, folder)
        reader = self.reading_layer
        weight = rows_first(reader)
        self._originals[self.name] = _Original(
            kept_at_home(reader.weight.detach(), folder),  # type: ignore[operator]
            None,
            None,
            weight.shape[0],
        )
        wide = wide_dtype(weight.dtype)
        smaller = weight.index_select(1, columns.to(weight.device)).to(wide)
        set_weight(reader, (smaller * self.spread(factors).to(smaller)).to(weight.dtype))
        self._set_counts(len(kept))

    def uncut(self) -> None:
        """Have all units again, with the weights they were loaded with, bit for bit."""
        for name, original in self._originals.items():
            layer = self.layers[name]
            now = rows_first(layer)
            if original.kept_rows is None:
                in_file = original.weight.untyped_storage().filename is not None
                whole = original.weight.to(now.device, now.dtype, copy=in_file)
                replace_data(layer.weight, whole)  # type: ignore[arg-type]
                resize(layer)
                continue
            set_weight(layer, _with_rows(now, original.weight, original))
            if original.bias is not None:
                bias: nn.Parameter = layer.bias  # type: ignore[assignment]
                replace_data(bias, _with_rows(bias.detach(), original.bias, original))
        self._originals.clear()
        for module, attribute, value in self._counts:
            setattr(module, attribute, value)
        self._counts.clear()

    def _cut_rows(self, name: str, layer: nn.Module, kept: Tensor, folder: str | None) -> None:
        weight, bias = rows_first(layer), layer.bias
        gone = torch.ones(weight.shape[0], dtype=torch.bool)
        gone[kept] = False
        left_out = gone.nonzero()[:, 0].to(weight.device)
        here = kept.to(weight.device)
        self._originals[name] = _Original(
            kept_at_home(weight[left_out], folder),
            None if bias is None else bias.detach()[left_out].cpu(),  # type: ignore[operator]
            kept,
            weight.shape[0],
        )
        if len(left_out):
            set_weight(layer, weight[here])
            if bias is not None:
                replace_data(bias, bias.detach()[here])  # type: ignore[arg-type, operator]

    def _set_counts(self, kept: int) -> None:
        if self._around is None:
            return
        old = {"heads": self.count, "kv_heads": self.count // self.group, "inner": self.count * self.width}
        new = {"heads": kept, "kv_heads": kept // self.group, "inner": kept * self.width}
        for module_name, attributes in head_counts(self._around, old, new).items():
            module = self._around.get_submodule(module_name)
            for name, value in attributes.items():
                self._counts.append((module, name, getattr(module, name)))
                setattr(module, name, value)

    def counts(self) -> dict[str, dict[str, int]]:
        """The head counts that were changed, by the module's name below the attention, then attribute."""
        if self._around is None:
            return {}
        names = {id(module): name for name, module in self._around.named_modules()}
        found: dict[str, dict[str, int]] = {}
        for module, attribute, _ in self._counts:
            full = f"{self.structure.name}.{names[id(module)]}".removesuffix(".")
            found.setdefault(full, {})[attribute] = getattr(module, attribute)
        return found


def _with_rows(now: Tensor, others: Tensor, original: _Original) -> Tensor:
    """Kept and left-out rows together, in the order they had."""
    whole = now.new_empty(original.num_rows, *now.shape[1:])
    gone = torch.ones(original.num_rows, dtype=torch.bool)
    assert original.kept_rows is not None
    gone[original.kept_rows] = False
    whole[original.kept_rows.to(now.device)] = now
    whole[gone.to(now.device)] = others.to(now)
    return whole


def find_units(model: nn.Module, heads: bool, channels: bool, of: str) -> list[Units]:
    """What can be pruned of the model, in order.

    heads, channels: what is wanted. of: the technique, for messages.

    Raises SettingError if the model has none of a kind that is wanted, or one that cannot be left out.
    """
    hint = {True: "; set removed_heads_fraction to 0", False: "; set removed_channels_fraction to 0"}
    found = []
    for structure in find_structures(model):
        is_attention = structure.parts[0].role == "o"
        if not (heads if is_attention else channels):
            continue
        check_separable(model, structure, "pruned", hint[is_attention])
        if structure.whole:
            raise SettingError(f"{structure.name} cannot be pruned: {structure.whole}{hint[is_attention]}.")
        found.append(Units(model, structure))
    for wanted, are_heads, what in ((heads, True, "attention"), (channels, False, "feed-forward parts")):
        if wanted and not any(units.are_heads == are_heads for units in found):
            raise SettingError(
                f"{of} finds no {what} it knows in the blocks of {type(model).__name__}, an architecture that is not "
                f"supported{hint[are_heads]}."
            )
    return found
