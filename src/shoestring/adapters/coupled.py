r"""Coupled structures: layers of one block that share an inner index, whose units can change places without a trace.

Feed-forward   inner channel c is row c of up and gate, and column c of down
Attention      head h is a block of head-size rows of q, k and v, and the same block of columns of o. With grouped heads
               g query heads read one KV head: KV heads move with their g query heads, and these among themselves
Units          channels (width 1), query heads (q, o) and KV heads (k, v); numbers of units are those of the layers as
               the model was loaded, wherever their weights stand

Names of layers are data, one row of `ATTENTIONS` or `FEEDFORWARDS`. A layer that holds several parts one after the
other (qkv, gate and up) is split by slices; of one that holds them head by head, only o is known.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Shaped
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import SettingError
from .base import has_linear_weight, holders, is_quantised, linear_sizes
from .placement import has_module, stacks

Role = Literal["o", "v", "q", "k", "down", "up", "gate"]
COLUMNS: tuple[Role, ...] = ("o", "down")  # roles whose units are columns of the weight; rows in all others
HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


@dataclass(frozen=True)
class AttentionNames:
    """Of the layers of one sort of attention, relative to the module around them.

    qkv: one layer with all rows of q, then of k, then of v, in place of three.
    mixed: a layer that holds q, k and v head by head, in place of them; v has then no place of its own.
    unless: attributes of the module with values with which `qkv` holds its rows otherwise, such as head by head.
    heads_differ: heads have a bias by position each, so that they cannot change places.
    counts_in_config: its forward takes the number of heads from the config, which is one for all blocks.
    """

    o: str
    q: str = ""
    k: str = ""
    v: str = ""
    qkv: str = ""
    mixed: str = ""
    unless: tuple[tuple[str, Any], ...] = ()
    heads_differ: bool = False
    counts_in_config: bool = False


@dataclass(frozen=True)
class FeedForwardNames:
    """Of the layers of one sort of feed-forward part; gate_up: one layer with all rows of gate, then of up."""

    down: str
    up: str = ""
    gate: str = ""
    gate_up: str = ""


ATTENTIONS = (
    AttentionNames("o_proj", "q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM, ViT, DINOv2
    AttentionNames("out_proj", "q_proj", "k_proj", "v_proj"),  # OPT, CLIP, BART, Whisper
    AttentionNames("dense", "q_proj", "k_proj", "v_proj"),  # Phi
    AttentionNames("output.dense", "self.query", "self.key", "self.value"),  # BERT and its kin
    AttentionNames("output.dense", "attention.query", "attention.key", "attention.value"),  # older ViT
    AttentionNames("dense", "query", "key", "value"),  # ALBERT
    AttentionNames("out_lin", "q_lin", "k_lin", "v_lin"),  # DistilBERT
    AttentionNames("o", "q", "k", "v", heads_differ=True),  # T5, MPNet
    AttentionNames(  # GPT-2, GPTBigCode
        "c_proj", qkv="c_attn", unless=(("multi_query", False), ("is_cross_attention", True))
    ),
    AttentionNames("o_proj", qkv="qkv_proj", counts_in_config=True),  # Phi-3
    AttentionNames("Wo", qkv="Wqkv"),  # ModernBERT
    AttentionNames("out_proj", qkv="Wqkv", heads_differ=True),  # MPT
    AttentionNames("dense", mixed="query_key_value"),  # GPT-NeoX
)
BIASES_BY_POSITION = ("has_relative_attention_bias", "has_spatial_attention_bias")  # of each head; LayoutLM
FEEDFORWARDS = (
    FeedForwardNames("down_proj", "up_proj", "gate_proj"),
    FeedForwardNames("down_proj", gate_up="gate_up_proj"),
    FeedForwardNames("down_proj", "up_proj"),
    FeedForwardNames("fc2", "fc1"),
    FeedForwardNames("output.dense", "intermediate.dense"),
    FeedForwardNames("lin2", "lin1"),
    FeedForwardNames("c_proj", "c_fc"),
    FeedForwardNames("wo", "wi_1", "wi_0"),
    FeedForwardNames("wo", "wi"),
    FeedForwardNames("Wo", gate_up="Wi"),
    FeedForwardNames("dense_4h_to_h", "dense_h_to_4h"),
    FeedForwardNames("ffn_output", "ffn"),
)


@dataclass(frozen=True)
class Part:
    """Where the units of one role are in one layer: `num_units` blocks of `width` rows or columns, from `start` on."""

    layer: str
    role: Role
    num_units: int
    width: int = 1
    start: int = 0

    @property
    def dim(self) -> int:
        """Of the weight [out, in]: 1 for columns, 0 for rows."""
        return int(self.role in COLUMNS)

    def places(self, units: Sequence[int]) -> list[int]:
        """The rows or columns of `units`, in their order.

        Raises SettingError for a unit that the layer does not have.
        """
        outside = [unit for unit in units if not 0 <= unit < self.num_units]
        if outside:
            what = "heads" if self.width > 1 else "channels"
            raise SettingError(
                f"{self.layer} has the {what} 0 to {self.num_units - 1}, but {outside[0]} was selected: the selection "
                "was made for another model."
            )
        return [self.start + unit * self.width + i for unit in units for i in range(self.width)]


@dataclass(frozen=True)
class Structure:
    """The parts of one attention or feed-forward part, by role.

    fixed: why its units cannot change places, or why a part of it has no units.
    whole: why none of its units can be left out, though they can change places.
    """

    name: str
    parts: tuple[Part, ...]
    fixed: str = ""
    whole: str = ""

    def __getitem__(self, role: Role) -> Part | None:
        return next((part for part in self.parts if part.role == role), None)


def find_structures(model: nn.Module) -> list[Structure]:
    """The structures in the model's blocks, in order."""
    found: dict[str, Structure] = {}
    for stack, blocks in stacks(model):
        for name, module in blocks.named_modules(prefix=stack):
            if isinstance(module, BaseTunerLayer):
                continue
            for kind, structure in (("attention", _attention(name, module)), ("ffn", _feedforward(name, module))):
                if structure is not None:
                    found[f"{name} {kind}"] = structure
    return list(found.values())


def layer_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, without the adapters on it."""
    layer = model.get_submodule(name)
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def _sizes(parent: nn.Module, name: str) -> tuple[int, int]:
    return linear_sizes(layer_at(parent, name))


def _has_layers(parent: nn.Module, names: Iterator[str] | Sequence[str]) -> bool:
    return all(has_module(parent, name) and has_linear_weight(layer_at(parent, name)) for name in names)


def _attention(name: str, module: nn.Module) -> Structure | None:
    for names in ATTENTIONS:
        if _has_layers(module, [n for n in (names.o, names.q, names.k, names.v, names.qkv, names.mixed) if n]):
            return _attention_of(name, module, names)
    return None


def _attention_of(name: str, module: nn.Module, names: AttentionNames) -> Structure:
    sizes = [getattr(m, a) for m in module.modules() for a in HEAD_SIZES if isinstance(getattr(m, a, None), int)]
    o, width, inner = f"{name}.{names.o}", sizes[0] if sizes else 0, _sizes(module, names.o)[1]
    if not width or inner % width:
        heads_of = f"heads of {width}" if width else f"heads: {type(module).__name__} does not say how large they are"
        return Structure(name, (Part(o, "o", 0),), f"the {inner} channels that it reads do not make up {heads_of}")
    heads = inner // width
    columns = Part(o, "o", heads, width)
    if names.mixed or any(getattr(module, key, None) == value for key, value in names.unless):
        mixed = f"{name}.{names.mixed or names.qkv}"
        return Structure(name, (columns, Part(mixed, "v", 0)), f"{mixed} does not hold q, k and v one after the other")
    if names.qkv:
        of_kv, odd = divmod(_sizes(module, names.qkv)[0] - inner, 2)
        starts = {"q": (names.qkv, 0), "k": (names.qkv, inner), "v": (names.qkv, inner + of_kv)}
        fits = not odd
    else:
        starts = {"q": (names.q, 0), "k": (names.k, 0), "v": (names.v, 0)}
        of_q, of_k, of_kv = (_sizes(module, starts[role][0])[0] for role in "qkv")
        fits = of_q == inner and of_k == of_kv
    kv_heads = of_kv // width
    if not fits or of_kv % width or not kv_heads or heads % kv_heads:
        layer = f"{name}.{starts['v'][0]}"
        return Structure(
            name, (columns, Part(layer, "v", 0)), f"rows of q, k and v do not fit {heads} heads of {width}"
        )
    parts = [columns]
    for role, (layer, start) in starts.items():
        units = heads if role == "q" else kv_heads
        parts.append(Part(f"{name}.{layer}", role, units, width, start))  # type: ignore[arg-type]
    differ = names.heads_differ or any(getattr(m, key, False) for m in module.modules() for key in BIASES_BY_POSITION)
    return Structure(
        name,
        tuple(parts),
        fixed="its heads have a bias by position each" if differ else "",
        whole="its forward takes the number of heads from the model's config" if names.counts_in_config else "",
    )


def _feedforward(name: str, module: nn.Module) -> Structure | None:
    for names in FEEDFORWARDS:
        if _has_layers(module, [n for n in (names.down, names.up, names.gate, names.gate_up) if n]):
            return _feedforward_of(name, module, names)
    return None


def _feedforward_of(name: str, module: nn.Module, names: FeedForwardNames) -> Structure:
    channels = _sizes(module, names.down)[1]
    down = Part(f"{name}.{names.down}", "down", channels)
    if names.gate_up:
        rows_of: dict[Role, tuple[str, int]] = {"gate": (names.gate_up, 0), "up": (names.gate_up, channels)}
    else:
        rows_of = {"up": (names.up, 0)}
        if names.gate:
            rows_of["gate"] = (names.gate, 0)
    wanted = 2 * channels if names.gate_up else channels
    for layer, _ in rows_of.values():
        if (rows := _sizes(module, layer)[0]) != wanted:
            up = Part(f"{name}.{layer}", "up", 0)
            return Structure(
                name, (down, up), f"{up.layer} has {rows} rows, and {down.layer} reads {channels} channels"
            )
    rows_parts = (Part(f"{name}.{layer}", role, channels, 1, start) for role, (layer, start) in rows_of.items())
    return Structure(name, (down, *rows_parts))


@dataclass(frozen=True)
class Order:
    """A new order of the units of one structure: what stands at place i was unit `of[role][i]`."""

    structure: Structure
    of: dict[Role, list[int]]

    def move(self, model: nn.Module, back: bool = False) -> None:
        """Put rows and columns of all parts, with their biases, in this order, or back to where they were, in place.

        Only numbers change places: the outputs stay the same but for rounding, and going back restores every bit. Ask
        `check_movable` first.
        """
        layers = {part.layer: layer_at(model, part.layer) for part in self.structure.parts}
        with torch.no_grad():
            for part in self.structure.parts:
                layer, order = layers[part.layer], torch.tensor(self.channels(part))
                order = order.argsort() if back else order
                rows_first = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
                _reorder(rows_first.T if part.dim else rows_first, order, part.start)  # type: ignore[arg-type]
                if part.dim == 0 and layer.bias is not None:
                    _reorder(layer.bias, order, part.start)  # type: ignore[arg-type]

    def channels(self, part: Part) -> list[int]:
        """For each place of a part, counted from its start, the row or column that stands there."""
        return [place - part.start for place in part.places(self.of[part.role])]

    def places_now(self, part: Part) -> dict[int, int]:
        """Where each row or column of the part, by its old number, is now."""
        return {part.start + old: part.start + new for new, old in enumerate(self.channels(part))}


def _reorder(rows: Shaped[Tensor, "n ..."], order: Tensor, start: int) -> None:
    some = rows[start : start + len(order)]
    some.copy_(some[order.to(rows.device)])


def check_movable(model: nn.Module, structure: Structure) -> None:
    """Refuse to move units of what is fixed, quantised, tied or has more weights by head than are known.

    Raises SettingError naming the layer.
    """
    check_separable(model, structure, "permuted", "; set permute to False, which trains the same weights")


def check_separable(model: nn.Module, structure: Structure, done: str, hint: str) -> None:
    """Refuse to move units, or to leave some out, where that is not known to be safe; see `check_movable`.

    done: what is to be done to them, as a participle. hint: what to do instead.

    Raises SettingError naming the layer.
    """
    if structure.fixed:
        raise SettingError(f"{structure.name} cannot be {done}: {structure.fixed}{hint}.")
    layers = {part.layer: layer_at(model, part.layer) for part in structure.parts}
    for name, layer in layers.items():
        if is_quantised(layer) or not isinstance(layer, (nn.Linear, Conv1D)) or not layer.weight.is_floating_point():
            raise SettingError(f"{name} is quantised and cannot be {done}: {type(layer).__name__}{hint}.")
        if len(held := holders(model, layer)) > 1:
            raise SettingError(f"{name} cannot be {done}: {' and '.join(held)} hold the same weight{hint}.")
    around = model.get_submodule(structure.name)
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    adapted = tuple(f"{name}." for name, module in around.named_modules() if isinstance(module, BaseTunerLayer))
    for name, module in around.named_modules():
        if name.endswith("LayerNorm") or isinstance(module, BaseTunerLayer) or name.startswith(adapted):
            continue  # BERT's norm is that of the sum after o
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in own and _may_belong(around, name, parameter, structure):
                raise SettingError(
                    f"{structure.name} cannot be {done}: {name or 'it'} has a weight of its own of "
                    f"{parameter.numel()} numbers that may belong to "
                    f"{'channels' if structure['down'] else 'heads'}{hint}."
                )


def _may_belong(around: nn.Module, name: str, parameter: Tensor, structure: Structure) -> bool:
    """Whether a parameter of the module `name`, which no part holds, may be of single heads or channels.

    A norm of one head's size that stands there once is shared by all heads. A feed-forward part may have the whole
    block around it, of which what belongs to channels is known by its size.
    """
    module, first = around.get_submodule(name), structure.parts[0]
    if first.role == "down":
        return first.num_units in parameter.shape and not has_linear_weight(module)
    one_of_many = isinstance(around.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
    return one_of_many or "norm" not in type(module).__name__.lower() or parameter.numel() != first.width


def channel_order(num_channels: int, rows: Sequence[int], columns: Sequence[int]) -> list[int]:
    """[rows only, both, columns only, the rest]: what trains in rows and in columns is then one slice each."""
    in_rows, in_columns = set(rows), set(columns)

    def rank(channel: int) -> int:
        return {(True, False): 0, (True, True): 1, (False, True): 2}.get((channel in in_rows, channel in in_columns), 3)

    return sorted(range(num_channels), key=rank)


def head_order(
    num_heads: int, num_kv_heads: int, kv_rows: Sequence[int], columns: Sequence[int]
) -> tuple[list[int], list[int]]:
    """An order of query heads and one of KV heads, each KV head with its queries.

    kv_rows: KV heads selected in v. columns: query heads selected in o. With one query head a KV head both are slices;
    otherwise the KV heads are, and the query heads as far as their groups allow: groups that are selected whole stand
    between one that ends and one that begins with what is selected.
    """
    group = num_heads // num_kv_heads
    chosen, in_rows = set(columns), set(kv_rows)
    groups = {kv: range(kv * group, (kv + 1) * group) for kv in range(num_kv_heads)}
    touched = [kv for kv, heads in groups.items() if chosen.intersection(heads)]
    whole = {kv for kv in touched if chosen.issuperset(groups[kv])}
    both = sorted((kv for kv in touched if kv in in_rows), key=lambda kv: kv in whole)
    columns_only = sorted((kv for kv in touched if kv not in in_rows), key=lambda kv: kv not in whole)
    if group > 1 and not both:
        columns_only = columns_only[-1:] + columns_only[:-1]
    middle = both + columns_only
    others = [kv for kv in groups if kv not in set(middle)]
    kv_order = [*(kv for kv in others if kv in in_rows), *middle, *(kv for kv in others if kv not in in_rows)]
    order: list[int] = []
    for kv in kv_order:
        chosen_last = kv == middle[0] if middle else False
        order += sorted(groups[kv], key=lambda head: (head in chosen) == chosen_last)
    return order, kv_order


def order_of(structure: Structure, rows: Sequence[int], columns: Sequence[int]) -> Order:
    """The order that brings the selected units together. rows: units of v or up; columns: units of o or down."""
    o, v, down = structure["o"], structure["v"], structure["down"]
    if down is not None:
        channels = channel_order(down.num_units, rows, columns)
        return Order(structure, dict.fromkeys(("down", "up", "gate"), channels))
    assert o is not None
    if v is None:
        return Order(structure, {})  # refused when it is moved
    heads, kv_heads = head_order(o.num_units, v.num_units, rows, columns)
    return Order(structure, {"o": heads, "q": heads, "k": kv_heads, "v": kv_heads})
