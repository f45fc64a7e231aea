r"""S2FT: structured sparse fine-tuning, of whole attention heads and feed-forward channels.

Source   Yang et al., NeurIPS 2024, arXiv:2412.06289
Update   o, down: W'[:, c] = W[:, c] + D,  dD = dY^T X[:, c]     c: the input columns of the selected heads or channels
         v, up:   W'[c, :] = W[c, :] + D,  dD = dY[:, c]^T X     c: the output rows of the selected KV heads or channels
         dX = dY W'
Shapes   W [out, in], D [out, s] for s columns, [s, in] for s rows
Start    D = 0: exactly the pretrained model
Trains   s out numbers in o and down, s in in v and up; s differs from layer to layer: the ratios are of all heads, or
         channels, of the model together. Layers with none are left alone
Costs    o, down: X[:, c] is kept, X is not. v, up: X is kept. The products of the frozen layer and a thin one; to
         gather columns takes a thousandth of that, so their order is left as it is. `permute` makes slices of them
Differs  the paper permutes always; here the same weights train with the base untouched, and grouped heads can be
         selected one by one. Scores are divided by their mean over the layer before layers are compared, as raw norms
         would give one depth all; the paper leaves this open
"""

import copy
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..errors import SettingError, did_you_mean
from ..fakes import has_values
from ..quantisation.calibration import Calibrated
from ..quantisation.gradients import column_gradients
from .base import AdaptedLinear, Adapter, AdapterConfig, has_linear_weight, holders, linear_sizes, register
from .coupled import Order, Part, Role, Structure, check_movable, find_structures, layer_at, order_of
from .partial_linear import partial_linear
from .placement import place_in_stack

SELECTIONS = ("random", "weight", "activation", "product", "gradient")
TRAINED: tuple[Role, ...] = ("o", "down", "v", "up")
MARK = "s2ft_permuted"  # in the config of a model whose units are moved, which is saved with its weights
PRECISION = 1e-9  # of ratio times count, so that a product that is whole but for rounding is taken as it is


class S2FT(Adapter):
    """The change D of some columns or rows of one layer.

    indices: which, in the layer as the model was loaded; saved with D. now: the same where the base is permuted.
    """

    name = "s2ft"
    indices: Tensor
    now: Tensor

    def __init__(
        self, base: nn.Module, config: "S2FTConfig", part: Part, units: Sequence[int], moved: dict[int, int] | None
    ):
        super().__init__()
        self.layer, self.dim, self.sizes, self.moved = part.layer, part.dim, linear_sizes(base), moved
        places = part.places(units)
        if moved is not None:
            places = sorted(places, key=moved.__getitem__)
        self.register_buffer("indices", torch.tensor(places))
        self.delta = nn.Parameter(torch.zeros(self._shape(len(places))))
        self._look_at(places)
        if not config.init_weights:
            nn.init.normal_(self.delta, std=0.1)

    def _shape(self, num_places: int) -> tuple[int, int]:
        out_features, in_features = self.sizes
        return (out_features, num_places) if self.dim else (num_places, in_features)

    def _look_at(self, places: list[int]) -> None:
        """Note where `places` are under a permutation."""
        if self.moved is not None:
            now = [self.moved[place] for place in places]
            self.adjacent = now == list(range(now[0], now[0] + len(now)))
            self.register_buffer("now", torch.tensor(now, device=self.indices.device), persistent=False)
            self.first = now[0]

    @property
    def part(self) -> Tensor | slice:
        """Which columns or rows of the weight as it stands, as a slice if they are adjacent."""
        if self.moved is None:
            return self.indices
        return slice(self.first, self.first + len(self.indices)) if self.adjacent else self.now

    @property
    def part_indices(self) -> Tensor:
        """`part` as numbers."""
        return self.indices if self.moved is None else self.now

    def linear(
        self, x: Float[Tensor, "*batch in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
    ) -> Float[Tensor, "*batch out"]:
        """x W'^T + b."""
        return partial_linear(x, weight, bias, self.delta, **{"columns" if self.dim else "rows": self.part})  # type: ignore[arg-type]

    def delta_output(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """x (W' - W)^T, keeping x[..., columns], or x for rows."""
        if self.dim:
            return F.linear(x[..., self.part], self.delta.to(x.dtype))
        some = F.linear(x, self.delta.to(x.dtype))
        return some.new_zeros(*x.shape[:-1], self.sizes[0]).index_copy(-1, self.part_indices, some)

    def delta_weight(self) -> Float[Tensor, "out in"]:
        """W' - W, dense."""
        return self.delta.new_zeros(self.sizes).index_copy(self.dim, self.part_indices, self.delta)

    def set_sum(self, terms: Sequence[tuple[float, "S2FT"]]) -> None:
        """Take the weighted sum of other adapters on the layer, whose indices must be among its own."""
        at = {place: number for number, place in enumerate(self.indices.tolist())}
        with torch.no_grad():
            self.delta.zero_()
            for weight, other in terms:
                index = torch.tensor([at[place] for place in other.indices.tolist()], device=self.delta.device)
                self.delta.index_add_(self.dim, index, other.delta.to(self.delta), alpha=weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the indices that were saved, to which the saved change belongs, whatever was selected here.

        Raises SettingError if they do not fit the layer.
        """
        indices, delta = state_dict.get(f"{prefix}indices"), state_dict.get(f"{prefix}delta")
        if indices is not None and delta is not None and has_values(indices):
            places, size = indices.tolist(), self.sizes[self.dim]
            if len(set(places)) != len(places) or not all(0 <= place < size for place in places):
                what = "columns" if self.dim else "rows"
                raise SettingError(
                    f"{self.layer} has {size} {what}, but the adapter was saved for {len(places)} from {min(places)} "
                    f"to {max(places)}, {len(set(places))} of them different: it belongs to another model."
                )
            if tuple(delta.shape) != self._shape(len(places)):
                raise SettingError(
                    f"{self.layer} of {self.sizes[1]} -> {self.sizes[0]} takes a change of "
                    f"{list(self._shape(len(places)))} for {len(places)} indices, got {list(delta.shape)}: the adapter "
                    "belongs to another model."
                )
            if len(places) != len(self.indices):
                self.indices = self.indices.new_empty(len(places))
                self.delta = nn.Parameter(self.delta.new_empty(delta.shape), self.delta.requires_grad)
            self._look_at(places)
        super()._load_from_state_dict(state_dict, prefix, *args)


@register
@dataclass(kw_only=True)
class S2FTConfig(Calibrated, AdapterConfig):
    """S2FT: trains some attention heads and feed-forward channels of the frozen weights themselves.

    target_modules: None: the o, down, v and up layers of all blocks whose ratio is above 0. Layers named here that
        belong to no known attention or feed-forward part count among down, each column by itself.
    o_ratio, v_ratio: share of the query heads, and of the KV heads, that train: columns of o, rows of v.
    down_ratio, up_ratio: share of the feed-forward channels that train: columns of down, rows of up.
        0 <= ratio <= 1, and above 0 at least one of all heads or channels.
    selection: "random"; or by score: "weight", the norm of what would train; "activation", the root mean square of
        what o or down reads from a unit, over calibration rows; "product" of both; "gradient", the norm of the
        gradients of a unit's columns of o or down, row by row.
    end: "large" or "small" scores.
    seed: of the random selection, apart from torch's.
    permute: move the selected units together in the base for the time of training, and back after. The outputs are the
        same but for rounding. It is seldom faster.
    selected: heads or channels by layer, in place of ratios and selection; filled in when the adapter is made.
    calibration_rows, calibration_max_tokens, calibration_seed: of the selections that look at data: how many rows, cut
        to how many tokens, which ones.

    Raises ValueError for values out of range and unknown words.
    """

    method: ClassVar = S2FT
    o_ratio: float = 0.052
    down_ratio: float = 0.02
    v_ratio: float = 0.0
    up_ratio: float = 0.0
    selection: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    end: Literal["large", "small"] = "large"
    seed: int = 0
    permute: bool = False
    selected: dict[str, list[int]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ratios = {f"{role}_ratio": self.ratio(role) for role in TRAINED}
        for name, ratio in ratios.items():
            if not 0 <= ratio <= 1:
                raise ValueError(f"{name} of s2ft must be in (0, 1], or 0 to train none, got {ratio}.")
        if not any(ratios.values()) and self.selected is None:
            raise ValueError(f"s2ft has nothing to train: {', '.join(ratios)} are all 0; set one of them.")
        if self.selection not in SELECTIONS:
            raise ValueError(f"selection of s2ft must be one of {', '.join(SELECTIONS)}, got {self.selection!r}.")
        if self.end not in ("large", "small"):
            raise ValueError(f"end of s2ft must be 'large' or 'small', got {self.end!r}.")
        if self.permute and self.bias != "none":
            raise ValueError(f"bias of s2ft must be 'none' with permute, which moves biases too, got {self.bias!r}.")
        self._parts: dict[str, Part] = {}
        self._orders: list[Order] = []

    def ratio(self, role: Role) -> float:
        """The share of units of one role that train."""
        return float(getattr(self, f"{role}_ratio"))

    def see_saved(self, folder: Path) -> None:
        """Select what was selected when the adapter was saved."""
        saved = type(self).from_pretrained(str(folder))
        self.selected, self.target_modules = saved.selected, saved.target_modules

    @property
    def reads_data(self) -> bool:
        """Whether the selection looks at data."""
        return self.selection in ("activation", "product", "gradient")

    def default_targets(self, model: nn.Module) -> set[str]:
        """Those of `selected`, or the layers of known structures whose ratio is above 0, in the blocks asked for.

        Raises SettingError if the model has none, or none of one role whose ratio is above 0.
        """
        if self.selected is not None:
            return set(self.selected)
        roles = [role for role in TRAINED if self.ratio(role)]
        parts = [part for structure in find_structures(model) for part in structure.parts]
        missing = [role for role in roles if all(part.role != role for part in parts)]
        if parts and missing:
            raise SettingError(
                f"{missing[0]}_ratio of s2ft is {self.ratio(missing[0]):g}, but {type(model).__name__} has no layer "
                f"known to be {missing[0]}: set it to 0, or target_modules to the layers whose input columns are to "
                "train."
            )
        found = {part.layer for part in parts if part.role in roles}
        if (blocks := self.layers_to_transform) is not None:
            wanted = {blocks} if isinstance(blocks, int) else set(blocks)
            found = {name for name in found if (place := place_in_stack(model, name)) and place[1] in wanted}
        if not found:
            raise SettingError(
                f"{type(model).__name__} has no list of equal blocks with attention or feed-forward layers of names "
                "known to s2ft, in the blocks asked for; set target_modules to the layers whose input columns are to "
                "train."
            )
        return found

    def before_injection(self, model: nn.Module) -> None:
        """Select, where nothing is selected yet; leave layers without a unit alone; move units together if asked."""
        super().before_injection(model)
        others = [m for m in model.modules() if isinstance(m, S2FT)]
        if others and (self.permute or any(m.moved is not None for m in others)):
            raise SettingError(
                "permute of s2ft moves the base for one adapter, and there is another on this model; delete it, or "
                "set permute to False for both."
            )
        if not others and getattr(_config_of(model), MARK, False):
            raise SettingError(
                f"The weights of this {type(model).__name__} were saved while permute of s2ft had moved its heads and "
                "channels, so that selected ones are not where they were: load the original model, or unload the "
                "adapter before saving."
            )
        structures = find_structures(model)
        if self.selected is None:
            _maybe_include_all_linear_layers(self, model)
            layers = {name: layer_at(model, name) for name in self.layers_in(model)}
            self._parts = self._parts_of(model, structures, layers)
            if not self._parts:
                return  # what targets there are, peft or the base refuses
            self.selected = self._select(model, structures)
            self.target_modules = {*self.selected, *(name for name in layers if name not in self._parts)}
            self._parts = {name: self._parts[name] for name in self.selected}
        else:
            self._parts = self._parts_of(model, structures, {name: layer_at(model, name) for name in self.selected})
        if self.permute:
            self._move(model, structures)

    def _parts_of(
        self, model: nn.Module, structures: Sequence[Structure], layers: Mapping[str, nn.Module]
    ) -> dict[str, Part]:
        """What can train in each of `layers`.

        Raises SettingError for layers that train nothing by themselves or by the ratios, and for tied ones.
        """
        known = {part.layer: part for s in structures for part in s.parts if part.role not in TRAINED}
        known |= {part.layer: part for s in structures for part in s.parts if part.role in TRAINED}
        parts = {}
        for name, layer in layers.items():
            if not has_linear_weight(layer):
                continue  # refused by the base
            part = known.get(name, Part(name, "down", linear_sizes(layer)[1]))
            if part.role not in TRAINED:
                raise SettingError(
                    f"{name} holds {part.role}, and s2ft trains parts of o, down, v and up only; leave the layer out "
                    "of target_modules."
                )
            if self.selected is None and not self.ratio(part.role):
                raise SettingError(
                    f"{part.role}_ratio of s2ft is 0, so that nothing of {name} would train: raise it, or leave the "
                    "layer out of target_modules."
                )
            if not part.num_units:
                why = next(s.fixed for s in structures if part in s.parts)
                raise SettingError(
                    f"{name} has no heads or channels that can be paired: {why}. Set {part.role}_ratio of s2ft to 0, "
                    "or list the layer in exclude_modules."
                )
            if len(held := holders(model, layer)) > 1:
                raise SettingError(
                    f"s2ft changes {name} in place, and its weight is held by {' and '.join(held)} together: untie "
                    "them first, or list the layer in exclude_modules."
                )
            parts[name] = part
        return parts

    def _select(self, model: nn.Module, structures: Sequence[Structure]) -> dict[str, list[int]]:
        """Units by layer, of all layers of a role together; layers without one are not in it.

        Raises SettingError if a ratio is too small for one unit.
        """
        chosen: dict[str, list[int]] = {}
        for role in TRAINED:
            if not (parts := [part for part in self._parts.values() if part.role == role]):
                continue
            units = [(part.layer, unit) for part in parts for unit in range(part.num_units)]
            count = int(self.ratio(role) * len(units) + PRECISION)
            if not count:
                what = "heads" if parts[0].width > 1 else "channels"
                raise SettingError(
                    f"{role}_ratio of s2ft is {self.ratio(role)}, which is less than one of the {len(units)} {what} of "
                    f"{len(parts)} layers: set it to 1/{len(units)} or more, or to 0 to train none."
                )
            if self.selection == "random" or not has_all_values(model) or (self.reads_data and self.values_follow):
                picked = random.Random(f"{self.seed} {role}").sample(units, count)
            else:
                scores = self._scores(model, structures, parts)
                order = sorted(range(len(units)), key=scores.__getitem__, reverse=self.end == "large")
                picked = [units[index] for index in order[:count]]
            for layer, unit in sorted(picked):
                chosen.setdefault(layer, []).append(unit)
        return chosen

    def _scores(self, model: nn.Module, structures: Sequence[Structure], parts: Sequence[Part]) -> list[float]:
        """Of every unit of every part, in order, over the mean of its layer."""
        readers = {p.layer: _reader(structures, p) for p in parts}
        squares = self._squares(model, [reader.layer for reader in readers.values()])
        scores: list[float] = []
        for part in parts:
            score = torch.ones(part.num_units, dtype=torch.float64)
            if self.selection in ("weight", "product"):
                score = score * _norms(model, part)
            if self.reads_data:
                read = squares[readers[part.layer].layer].double().cpu()
                score = score * read.view(part.num_units, -1).mean(1).sqrt()
            scores += (score / score.mean().clamp_min(torch.finfo(score.dtype).tiny)).tolist()
        return scores

    def _squares(self, model: nn.Module, readers: Sequence[str]) -> dict[str, Float[Tensor, " in"]]:
        """Of each input of o or down, over the calibration rows: its mean square, or that of its column's gradient."""
        layers = {name: model.get_submodule(name) for name in readers}
        if self.selection == "gradient":
            rows = self.rows_drawn()
            return column_gradients(model, layers, rows, len(rows), max_tokens=self.calibration_max_tokens)
        if self.reads_data:
            return {name: each.total.diagonal() / each.count for name, each in self.moments(model, layers)}
        return {}

    def _move(self, model: nn.Module, structures: Sequence[Structure]) -> None:
        """Move the selected units of each structure together.

        Raises SettingError, with nothing moved, where layers belong to no structure or one that cannot be moved.
        """
        assert self.selected is not None
        inside = {part.layer for structure in structures for part in structure.parts}
        for name in self._parts:
            if name not in inside:
                raise SettingError(
                    f"{name} belongs to no attention or feed-forward part that s2ft knows, so that its channels cannot "
                    "be paired; set permute to False, which trains the same weights."
                )
        orders = []
        for structure in structures:
            trained = [part for part in structure.parts if self._parts.get(part.layer) == part]
            rows, columns = ([u for p in trained if p.dim == dim for u in self.selected[p.layer]] for dim in (0, 1))
            if trained:
                check_movable(model, structure)
                orders.append(order_of(structure, rows, columns))
        for order in orders:
            order.move(model)
            self._orders.append(order)
        if (config := _config_of(model)) is not None:
            setattr(config, MARK, True)

    def of_layer(self, model: nn.Module, key: str) -> dict[str, Any]:
        """Which units of this layer train, and where they are.

        Raises ValueError if nothing of it is selected.
        """
        if (part := self._parts.get(key)) is None:
            raise ValueError("it is among target_modules of s2ft, but not in selected; add it there, or leave it out.")
        order = next((order for order in self._orders if part in order.structure.parts), None)
        units = (self.selected or {})[key]
        return {"part": part, "units": units, "moved": None if order is None else order.places_now(part)}

    def after_removal(self, model: nn.Module) -> None:
        """Move the units back."""
        if self._orders and hasattr(config := _config_of(model), MARK):
            delattr(config, MARK)
        while self._orders:
            self._orders.pop().move(model, back=True)


def _config_of(model: nn.Module) -> PretrainedConfig | None:
    """The config that is saved with the model's weights, where it is one of transformers."""
    config = getattr(model, "config", None)
    return config if isinstance(config, PretrainedConfig) else None


def _reader(structures: Sequence[Structure], part: Part) -> Part:
    """The part of o or down that reads what `part` gives, or that is `part` itself."""
    roles: tuple[Role, ...] = ("o", "down")
    if part.role in roles:
        return part
    structure = next(s for s in structures if part in s.parts)
    return next(p for p in structure.parts if p.role in roles)


def _norms(model: nn.Module, part: Part) -> Float[Tensor, " units"]:
    """The norm of each unit's rows or columns, in double precision."""
    with torch.no_grad():
        layer = layer_at(model, part.layer)
        weight = AdaptedLinear(layer, "s2ft_", **get_quantization_kwargs(model)).weight_out_in().detach()
        squares = weight.double().square().sum(1 - part.dim)
        own = squares[part.start : part.start + part.num_units * part.width]
        return own.view(part.num_units, part.width).sum(1).sqrt().cpu()


def has_all_values(model: nn.Module) -> bool:
    """Whether the model's weights are numbers, not sizes alone."""
    return all(map(has_values, model.parameters()))


def fuse(model: PeftModel, weights: Mapping[str, float], adapter_name: str) -> None:
    """Add an adapter that is the weighted sum of others on the same model; one half each of two is their mean.

    weights: by the name of the adapter. Where they selected the same heads or channels, their changes add up.

    Raises ValueError for names that are no s2ft adapters here, for adapters with modules_to_save, and under `permute`.
    """
    configs = model.peft_config
    for name in weights:
        if not isinstance(configs.get(name), S2FTConfig):
            known = [n for n, c in configs.items() if isinstance(c, S2FTConfig)]
            raise ValueError(f"There is no s2ft adapter {name!r} to fuse. {did_you_mean(name, known)}")
    if not weights or adapter_name in configs:
        raise ValueError(f"fuse takes at least one adapter and a new name, got {dict(weights)} and {adapter_name!r}.")
    if saved := {name: sorted(configs[name].modules_to_save) for name in weights if configs[name].modules_to_save}:
        raise ValueError(
            "fuse adds up changes of s2ft alone, but "
            + " and ".join(f"{name} has modules_to_save {', '.join(modules)}" for name, modules in saved.items())
            + ", of which there is no sum: fuse adapters without them."
        )
    config = copy.deepcopy(configs[next(iter(weights))])
    chosen: dict[str, set[int]] = {}
    for name in weights:
        for layer, units in configs[name].selected.items():
            chosen.setdefault(layer, set()).update(units)
    config.selected = {layer: sorted(units) for layer, units in chosen.items()}
    config.target_modules, config.exclude_modules, config.init_weights = set(chosen), None, True
    model.add_adapter(adapter_name, config)
    for layer in model.modules():
        adapters = getattr(layer, "adapters", {}) if isinstance(layer, AdaptedLinear) else {}
        if adapter_name in adapters and isinstance(adapters[adapter_name], S2FT):
            adapters[adapter_name].set_sum([(w, adapters[name]) for name, w in weights.items() if name in adapters])
