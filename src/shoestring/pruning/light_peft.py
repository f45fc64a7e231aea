r"""Light-PEFT: heads, channels, adapters and ranks that a few first steps find redundant are taken out of the model.

Source   Gu, Fu, Liu, Shen, Lin, Wang 2024, arXiv:2406.03792
Update   estimation  o(m_h * context) and down(m_f * inner), loss + c (sum |m_h| + sum |m_f|); masks and adapters train
         pruning     heads and channels of the lowest m, adapters of the lowest mean ||d|| / ||h||, ranks of the lowest
                     |mean_i A_ji gA_ji| + |mean_o B_oj gB_oj|, averaged over the second half of the estimation
         after       the adapters that are left train on; m of what is left is part of o and down, and of their adapters
Shapes   m_h [heads], m_f [channels] a layer; d what an adapter adds, h what its layer gives; A [r, in], B [out, r]
Start    masks of 1: the model with its adapters, exactly
Trains   the adapters, and for the estimation one number a head and a channel
Costs    estimation: the input of o and down is kept, and its product with the mask. After: the shares that are left.
         The originals of what was cut are kept: all of o and down, and of the other layers what is gone; in host
         memory, on a CPU the same, or in a file of offload_folder
Kind     what of the model is there at all; it shrinks in the middle of a run, between two steps of the optimizer
Differs  masks multiply the context vector, not the attention's probabilities, which is the same and lets any attention
         run; counts in place of quantiles, so that ties do not take more than their share; channels go in blocks of
         `channel_multiple`; KV heads go with their queries, by the mean of their masks; mask values are folded in
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..adapters.coupled import layer_at
from ..adapters.slicing import READ, BranchRatio, SlicedAdapter, TokensSeen, sliceable_adapters
from ..errors import RunFailed, SettingError
from ..fakes import has_values
from ..precision import wide_dtype
from ..quantisation.originals import is_same
from ..technique import NUMBERS_HELD, Moment, Phase, Technique, refuse_several_processes, register_technique, sum_of
from ..whole_files import read_tensors, write_tensors
from .units import Units, find_units

FILE = "light_peft.safetensors"
MASK = "light_peft_mask"  # the parameter's name on the layer that reads what it multiplies
ESTIMATION, PRUNED = "estimation", "pruned"
FRACTIONS = (
    "removed_heads_fraction",
    "removed_channels_fraction",
    "removed_modules_fraction",
    "removed_ranks_fraction",
)
SHORT_RUN = 2  # steps of a run that only measures


class Plan(NamedTuple):
    """What is left: of each part of the model units and their factors, of each adapter ranks; none: it goes."""

    units: dict[str, tuple[Tensor, Tensor]]
    ranks: dict[str, Tensor]


@register_technique
@dataclass(kw_only=True)
class LightPEFT(Technique):
    """Prunes the base model and the adapters on it early in training, by what the first steps show.

    Goes with LoRA and with adapters that declare how they are sliced. Under RecipeTrainer, which gives the masks a
    learning rate of their own.

    estimation_steps: optimizer steps before pruning, at least 2.
    removed_heads_fraction: share of heads taken out in every attention; whole KV groups, at least one stays.
    removed_channels_fraction: share of feed-forward channels taken out.
    channels_scope: "model": the lowest of all layers go; "layer": the same share of each.
    channel_multiple: channels are kept in multiples of it, at least once; 1 prunes single ones.
    removed_modules_fraction: share of adapters taken off their layers.
    removed_ranks_fraction: share of the ranks of the other adapters taken out.
    ranks_scope: "model" or "layer", as for channels; an adapter that loses all ranks is taken off.
    sparsity_weight: c, of the sum of absolute mask values in the loss.
    mask_lr_factor: the masks' learning rate, as a multiple of the run's.
    offload_folder: keep the originals of what is cut in files here, gone when the process ends; None: in host memory.

    Raises SettingError for values out of range.
    """

    name: ClassVar[str] = "light_peft"
    phase: ClassVar[Phase] = Phase.PRUNING
    needs: ClassVar[frozenset[Phase]] = frozenset({Phase.ADAPTER})
    varies: ClassVar[frozenset[str]] = frozenset({NUMBERS_HELD})

    estimation_steps: int = 200
    removed_heads_fraction: float = 1 / 3
    removed_channels_fraction: float = 1 / 3
    channels_scope: Literal["model", "layer"] = "model"
    channel_multiple: int = 8
    removed_modules_fraction: float = 0.75
    removed_ranks_fraction: float = 0.5
    ranks_scope: Literal["model", "layer"] = "model"
    sparsity_weight: float = 1e-4
    mask_lr_factor: float = 10.0
    offload_folder: str | None = None

    def __post_init__(self) -> None:
        for name in FRACTIONS:
            if not 0 <= (value := getattr(self, name)) < 1:
                all_of_it = " 1 would prune everything of a layer;" if value == 1 else ""
                raise SettingError(f"{name} of light_peft must be at least 0 and below 1, got {value}.{all_of_it}")
        for name, least in (("estimation_steps", 2), ("channel_multiple", 1)):
            if getattr(self, name) < least:
                raise SettingError(f"{name} of light_peft must be at least {least}, got {getattr(self, name)}.")
        for name in ("channels_scope", "ranks_scope"):
            if getattr(self, name) not in ("model", "layer"):
                raise SettingError(f"{name} of light_peft must be 'model' or 'layer', got {getattr(self, name)!r}.")
        if not 0 <= self.sparsity_weight < math.inf:
            raise SettingError(
                f"sparsity_weight of light_peft must be a number of at least 0, got {self.sparsity_weight}."
            )
        if not self.mask_lr_factor > 0:
            raise SettingError(f"mask_lr_factor of light_peft must be above 0, got {self.mask_lr_factor}.")
        self._reset()

    def _reset(self) -> None:
        self._units: list[Units] = []
        self._samples: dict[str, Tensor] = {}
        self._attributes: dict[str, set[str]] = {}
        self._adapters: list[SlicedAdapter] = []
        self._ratios: list[BranchRatio] = []
        self._hooks: list[RemovableHandle] = []
        self._tokens = TokensSeen()
        self._plan: Plan | None = None
        self._sums: dict[str, dict[str, Tensor]] = {"ratios": {}, "ranks": {}}
        self._num_recorded = 0
        self._is_recorded = False  # the step that is going on
        self._trains_pruned = False

    @property
    def is_pruned(self) -> bool:
        """Whether the estimation is over."""
        return self._plan is not None

    @property
    def units(self) -> tuple[Units, ...]:
        """The heads and channels of the model that it is attached to."""
        return tuple(self._units)

    def check_recipe(self, others: Sequence[Technique]) -> None:
        """Refuse optimizers of their own, whose state would be that of shapes that are gone."""
        for other in others:
            if type(other).make_optimizer is not Technique.make_optimizer:
                raise SettingError(
                    f"light_peft and {other.name} cannot be combined: layers and adapters get smaller in the middle of "
                    f"the run, and the optimizer that {other.name} brings would go on with what they were. Take out "
                    "one of the two."
                )

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Find what can be pruned; layers are whole again after.

        Raises SettingError, naming the layer, for architectures, quantised layers and shared weights that cannot be.
        """
        if self.offload_folder is not None and not Path(self.offload_folder).is_dir():
            raise SettingError(f"offload_folder of light_peft must be a folder, and {self.offload_folder} is none.")
        self._reset()
        self._model = model
        self._units = find_units(model, self.removed_heads_fraction > 0, self.removed_channels_fraction > 0, self.name)
        for units in self._units:
            if not units.are_heads and units.count < self.channel_multiple:
                raise SettingError(
                    f"channel_multiple of light_peft is {self.channel_multiple}, but {units.name} reads only "
                    f"{units.count} channels: give a number that is not above it."
                )
            if has_values(units.reading_layer.weight):  # type: ignore[arg-type]
                self._samples[units.name] = units.sample()
            self._attributes |= {name: _marks(layer) for name, layer in units.layers.items()}
        try:
            yield model
        finally:
            self._end_estimation()
            for units in self._units:
                units.uncut()
            self._reset()
            del self._model

    def on_attached(self, model: nn.Module) -> None:
        """Put masks in front of the layers that read heads and channels, and watch the adapters.

        Raises SettingError, naming the layer, if its weights train or its adapter cannot be sliced.
        """
        self._adapters = sliceable_adapters(self._model, self.name)
        readers = {id(units.reading_layer) for units in self._units}
        cut = {id(layer): name for units in self._units for name, layer in units.layers.items()}
        for units in self._units:
            for name, layer in units.layers.items():
                self._check_cuttable(name, layer)
        for adapter in self._adapters:
            if not any(p.requires_grad for p in adapter.parameters.values()):
                raise SettingError(
                    f"light_peft needs gradients of the adapters, but that on {adapter.key} is frozen: take out what "
                    "freezes it."
                )
            if any(READ in axes for axes in adapter.axes.values()) and id(adapter.layer) in cut.keys() - readers:
                raise SettingError(
                    f"The adapter on {adapter.key} reads all outputs of its layer, some of which light_peft takes "
                    "away: put it on another layer, or take a form that reads the layer's input."
                )
        self._outer = model
        self._begin_estimation()

    def _check_cuttable(self, name: str, layer: nn.Module) -> None:
        """Refuse a layer that trains, or that another technique counts on as it is.

        Raises SettingError.
        """
        if layer_at(self._model, name) is not layer or _marks(layer) != self._attributes[name]:
            raise SettingError(
                f"light_peft cuts {name} in the middle of the run, but another technique of the recipe replaces it or "
                "chooses numbers of it by their place: take out one of the two."
            )
        if any(p.requires_grad for p in layer.parameters()):
            raise SettingError(
                f"light_peft cuts frozen layers, but {name} trains: leave it to an adapter, or take out what trains it."
            )

    def _begin_estimation(self) -> None:
        for units in self._units:
            reader: Any = units.reading_layer
            dtype = wide_dtype(reader.weight.dtype)
            mask = nn.Parameter(torch.ones(units.count, dtype=dtype, device=reader.weight.device))
            reader.register_parameter(MASK, mask)
            outermost = self._model.get_submodule(units.name)  # so that adapters read what is masked, too
            self._hooks.append(outermost.register_forward_pre_hook(_Masking(reader, units)))
        self._ratios = [BranchRatio(adapter, self._tokens) for adapter in self._adapters]
        self._hooks += [hook for ratio in self._ratios for hook in ratio.hooks()]
        self._hooks.append(self._outer.register_forward_pre_hook(self._tokens.look, with_kwargs=True))

    def _end_estimation(self) -> list[nn.Parameter]:
        """Take masks and hooks away; the masks."""
        for hook in self._hooks:
            hook.remove()
        masks = self._masks()
        for units in self._units:
            units.reading_layer._parameters.pop(MASK, None)
        self._hooks, self._ratios = [], []
        self._tokens.recording = False
        self._tokens.forget()
        return list(masks.values())

    def _masks(self) -> dict[str, nn.Parameter]:
        """By the name of the layer that reads what they multiply."""
        held = {units.name: units.reading_layer._parameters.get(MASK) for units in self._units}
        return {name: mask for name, mask in held.items() if mask is not None}

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The masks; once they are gone an empty group, so that the groups of a resumed run are those that it had."""
        if not self._units:
            return []
        return [{"params": list(self._masks().values()), "lr_factor": self.mask_lr_factor, "weight_decay": 0.0}]

    def added_loss(self, model: nn.Module, batch: dict[str, Any], outputs: Any) -> Tensor | None:
        """c times the sum of absolute mask values."""
        masks = self._masks()
        if not masks or not self.sparsity_weight:
            return None
        return self.sparsity_weight * sum_of([mask.abs().sum() for mask in masks.values()])

    def on_step_begin(self, moment: Moment) -> None:
        """Watch the adapters in the second half of the estimation."""
        refuse_several_processes(self.name, "prunes by the gradients of one process, in the middle of the run")
        if self.is_pruned:
            self._trains_pruned = True
            return
        self._tokens.recording = moment.step >= self.estimation_steps // 2
        self._is_recorded = False
        if moment.step == 0 and SHORT_RUN < moment.num_steps <= self.estimation_steps:
            warnings.warn(
                f"light_peft prunes nothing in this run: estimation_steps is {self.estimation_steps}, and the run has "
                f"{moment.num_steps} steps. Set it to a small part of them."
            )

    def before_clipping(self, moment: Moment) -> None:
        """Add up the importance of adapters and of their ranks, once a step; of no step that overflowed."""
        if self.is_pruned or not self._tokens.recording or self._is_recorded:
            return
        self._is_recorded = True
        found = {
            (kind, ratio.adapter.key): value
            for ratio in self._ratios
            for kind, value in (("ratios", ratio.take()), ("ranks", ratio.adapter.rank_scores()))
            if value is not None
        }
        if not all(bool(value.isfinite().all()) for value in found.values() if has_values(value)):
            return
        self._num_recorded += 1
        for (kind, key), value in found.items():
            sums = self._sums[kind]
            sums[key] = sums[key] + value if key in sums else value

    def on_gradients(self, moment: Moment) -> None:
        """The same where nothing is clipped."""
        self.before_clipping(moment)

    def on_step_end(self, moment: Moment) -> None:
        """Prune, once the estimation is over."""
        self._tokens.forget()
        if self.is_pruned or moment.step < self.estimation_steps or not self._has_values:
            return
        self.prune(moment.optimizer)
        self._trains_pruned = True

    @property
    def _has_values(self) -> bool:
        return all(has_values(p) for p in self._model.parameters())

    def prune(self, optimizer: Optimizer | None = None) -> None:
        """Take out what the estimation so far ranks lowest; `optimizer` forgets what it knew of what changed shape."""
        changed, gone = self._carry_out(self._chosen())
        if optimizer is not None:
            forget(optimizer, changed, gone)

    def _chosen(self) -> Plan:
        masks = {name: mask.detach().cpu() for name, mask in self._masks().items()}
        heads = [units for units in self._units if units.are_heads]
        channels = [units for units in self._units if not units.are_heads]
        kept = {units.name: kept_heads(masks[units.name], units.group, self.removed_heads_fraction) for units in heads}
        share = (self.removed_channels_fraction, self.channel_multiple)
        if self.channels_scope == "model":
            of_all = kept_channels([masks[units.name] for units in channels], *share)
            kept |= dict(zip([units.name for units in channels], of_all, strict=True))
        else:
            kept |= {units.name: kept_channels([masks[units.name]], *share)[0] for units in channels}
        return Plan({name: (places, masks[name][places]) for name, places in kept.items()}, self._chosen_ranks())

    def _chosen_ranks(self) -> dict[str, Tensor]:
        if not any(float(score.abs().max()) > 0 for score in self._sums["ranks"].values()):
            raise RunFailed(
                "light_peft cannot say which adapters and ranks matter: no gradient reached them in the second half of "
                "its estimation. Train with gradients, through a trainer that tells the recipe of its steps."
            )
        keys = [adapter.key for adapter in self._adapters]
        ratios = torch.stack([self._score("ratios", key, torch.zeros(())) for key in keys])
        staying = [keys[place] for place in highest(ratios, self.removed_modules_fraction)]
        sizes = {adapter.key: adapter.num_ranks for adapter in self._adapters}
        scores = {key: self._score("ranks", key, torch.zeros(sizes[key])) for key in staying}
        ranks = dict.fromkeys(keys, torch.zeros(0, dtype=torch.int64))
        if self.ranks_scope == "layer":
            return ranks | {key: highest(each, self.removed_ranks_fraction) for key, each in scores.items()}
        left = torch.zeros(sum(sizes[key] for key in staying), dtype=torch.bool)
        left[highest(torch.cat([scores[key] for key in staying]), self.removed_ranks_fraction)] = True
        of_each = left.split([sizes[key] for key in staying])
        return ranks | {key: part.nonzero()[:, 0] for key, part in zip(staying, of_each, strict=True)}

    def _score(self, kind: str, key: str, none: Tensor) -> Tensor:
        """The mean of what was recorded, on the CPU."""
        return self._sums[kind].get(key, none).float().cpu() / max(1, self._num_recorded)

    def _carry_out(self, plan: Plan) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Make layers and adapters what the plan says: the parameters of other shape, and those that are gone."""
        gone, changed = self._end_estimation(), []
        cut: dict[int, dict[str, Tensor]] = {}
        for units in self._units:
            kept, factors = plan.units[units.name]
            rows, columns = units.places(kept)
            cut |= {id(units.layers[name]): {"outputs": places} for name, places in rows.items()}
            of_reader = {"inputs": columns, "input_factors": units.spread(factors)}
            cut[id(units.reading_layer)] = of_reader
        for adapter in self._adapters:
            ranks = plan.ranks[adapter.key]
            if not len(ranks):
                gone += adapter.take_off()
        for units in self._units:
            units.cut(*plan.units[units.name], self.offload_folder)
        for adapter in self._adapters:
            if not adapter.taken_off:
                changed += adapter.slice(plan.ranks[adapter.key], **cut.get(id(adapter.layer), {}))
        self._plan = plan
        self._sums, self._num_recorded = {"ratios": {}, "ranks": {}}, 0
        return changed, gone

    def _go_back(self) -> None:
        """Be in the estimation again, with adapters whose values are to be loaded."""
        for units in self._units:
            units.uncut()
        for adapter in reversed(self._adapters):
            adapter.put_back()
        self._plan = None
        self._begin_estimation()

    def state_dict(self) -> dict[str, Any]:
        """What the estimation has added up so far; nothing once it is over."""
        if self.is_pruned or not self._num_recorded:
            return {}
        return {"num_recorded": self._num_recorded, **{kind: dict(sums) for kind, sums in self._sums.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on adding up."""
        self._num_recorded = state.get("num_recorded", 0)
        device = {adapter.key: next(iter(adapter.parameters.values())).device for adapter in self._adapters}
        self._sums = {
            kind: {key: value.to(device[key]) for key, value in state.get(kind, {}).items()} for kind in self._sums
        }

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the masks, or what is left and its mask values; and some numbers by which the base is known again."""
        tensors = {f"{name}/sample": sample for name, sample in self._samples.items()}
        if self._plan is None:
            tensors |= {f"{name}/mask": mask.detach().cpu() for name, mask in self._masks().items()}
        else:
            for name, (kept, factors) in self._plan.units.items():
                tensors |= {f"{name}/kept": kept.to(torch.int32), f"{name}/mask": factors}
            tensors |= {f"{key}/ranks": ranks.to(torch.int32) for key, ranks in self._plan.ranks.items()}
        stage = PRUNED if self.is_pruned else ESTIMATION
        write_tensors(folder / FILE, tensors, stage=stage)

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Bring model and adapters to the sizes that were saved; values of adapters are theirs to load.

        Raises SettingError if there is no such file, or one of another base or of other adapters.
        """
        file = folder / FILE
        tensors, about = read_tensors(file)
        self._check_base(file, tensors)
        if self.is_pruned:
            self._go_back()
        if about.get("stage") == ESTIMATION:
            if self._trains_pruned:
                warnings.warn(
                    f"{folder} was saved in the estimation of light_peft, and the run has pruned the model since: "
                    "now it is whole again. Where this is the best checkpoint of the run, set "
                    "train.load_best_model_at_end: false; or evaluate by steps and set train.eval_delay to "
                    f"estimation_steps, {self.estimation_steps}, so that only pruned models are compared."
                )
            self._trains_pruned = False
            with torch.no_grad():
                for name, mask in self._masks().items():
                    mask.copy_(tensors[f"{name}/mask"])
            return
        ranks = {key.removesuffix("/ranks"): t.long() for key, t in tensors.items() if key.endswith("/ranks")}
        if ranks.keys() != {adapter.key for adapter in self._adapters}:
            other = sorted(ranks.keys() ^ {adapter.key for adapter in self._adapters})[0]
            raise SettingError(f"{file} was saved with other adapters than those here; {other} is only on one side.")
        kept = {u.name: (tensors[f"{u.name}/kept"].long(), tensors[f"{u.name}/mask"]) for u in self._units}
        for name, (places, _) in kept.items():
            if not len(places):
                raise SettingError(f"{file} leaves nothing of {name}: everything of a layer cannot be pruned.")
        self._carry_out(Plan(kept, ranks))

    def _check_base(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        saved = {key.removesuffix("/sample") for key in tensors if key.endswith("/sample")}
        if self._samples and saved != self._samples.keys():
            other = sorted(saved ^ self._samples.keys())[0]
            raise SettingError(f"{file} belongs to another base model: only one of the two has the layer {other}.")
        for name, sample in self._samples.items():
            if not is_same(sample, tensors[f"{name}/sample"]):
                raise SettingError(
                    f"{file} belongs to another base model: the weight of {name} was another when it was saved. Load "
                    "the model that was trained on."
                )


class _Masking:
    """Forward pre-hook on the outermost module of a layer: its input times the mask on the layer."""

    def __init__(self, layer: nn.Module, units: Units):
        self.layer, self.units = layer, units

    def __call__(self, module: nn.Module, args: Sequence[Any]) -> tuple[Any, ...]:
        mask: Tensor = getattr(self.layer, MASK)
        return (args[0] * self.units.spread(mask).to(args[0].dtype), *args[1:])


def _marks(layer: nn.Module) -> set[str]:
    """What is set on a layer, by name: others leave marks there. A forward that is wrapped meets any weight."""
    return set(vars(layer)) - {"forward"}


def highest(scores: Float[Tensor, " n"], removed_fraction: float) -> Int[Tensor, " kept"]:
    """Places of all but the lowest share of the scores, ascending; of equal ones the later go, and one stays always."""
    kept = len(scores) - int(removed_fraction * len(scores) + 1e-9)
    return scores.sort(descending=True, stable=True).indices[: max(1, kept)].sort().values


def kept_heads(mask: Float[Tensor, " heads"], group: int, removed_fraction: float) -> Int[Tensor, " kept"]:
    """The query heads that stay: those of the KV heads with the highest means, ascending."""
    kv_heads = highest(mask.view(-1, group).mean(1), removed_fraction)
    return (kv_heads[:, None] * group + torch.arange(group)).flatten()


def kept_channels(masks: Sequence[Tensor], removed_fraction: float, multiple: int) -> list[Tensor]:
    """The channels that stay of each layer, ascending: those of the highest values over all layers, by blocks.

    Each layer's channels are sorted by value and make blocks of `multiple`; blocks stay by their mean, the first of
    each layer always, as many as come nearest to the wanted number of channels.
    """
    orders = [mask.sort(descending=True, stable=True).indices for mask in masks]
    blocks = [order.split(multiple) for order in orders]
    total = sum(len(mask) for mask in masks)
    wanted = total - int(removed_fraction * total + 1e-9)
    others = [
        (float(masks[layer][block].mean()), len(block), layer)
        for layer, of_layer in enumerate(blocks)
        for block in of_layer[1:]
    ]
    others.sort(key=lambda each: -each[0])  # stable; within a layer values fall, so that a prefix of its blocks stays
    counts, kept = [1] * len(masks), sum(len(of_layer[0]) for of_layer in blocks)
    for _, size, layer in others:
        if abs(kept + size - wanted) > abs(kept - wanted):
            break
        counts[layer] += 1
        kept += size
    return [torch.cat(of_layer[:count]).sort().values for of_layer, count in zip(blocks, counts, strict=True)]


def forget(optimizer: Optimizer, changed: Sequence[nn.Parameter], gone: Sequence[nn.Parameter]) -> None:
    """Have an optimizer start anew with parameters of another shape, and step no more with those that are gone.

    Groups stay, empty ones too: a schedule has one learning rate for each.
    """
    removed = {id(parameter) for parameter in gone}
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in removed]
    for parameter in (*changed, *gone):
        optimizer.state.pop(parameter, None)
