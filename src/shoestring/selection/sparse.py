r"""Sparse selection: single numbers of existing weights train, and nothing of a weight's size is kept for them.

Update   values = W[places]; a step of the optimizer changes values, which are then written into W
         dvalues = (dL/dW)[places], gathered in backward as soon as dL/dW is there, which is then let go
Shapes   W of any shape, places [n] in the flat W, values [n] in float32 or wider
Costs    8 n bytes for places and values in float32, 8 n for AdamW's moments; a weight's input is kept for backward, as
         in any layer that trains; one dense gradient at a time. Forward is that of the plain model
Limits   weights that are read by other modules than those that hold them are not seen (nn.MultiheadAttention); layers
         whose weight an adapter of this package reads without calling them are refused

The weight itself stays frozen, so that trainers, optimizers and checks meet `values` alone. Where a module's forward
reads its weight it gets a view of it whose backward ends in `values`.
"""

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..adapters.base import has_linear_weight
from ..adapters.placement import stacks
from ..errors import SettingError
from ..precision import wide_dtype
from ..resizing import replace_data
from ..targets import Names, targeted
from ..technique import Moment
from ..whole_files import check_names, read_tensors, write_tensors
from .base import Selection, check_trainable, named_parameters, refuse_layers_not_called

FILE = "selected.safetensors"
HOLDER = "selected"  # the module that holds the entries, on the model
SEEN = "_selected_entries"  # in the __dict__ of modules that hold weights: their entries by the weight's key


class Entries(nn.Module):
    """The chosen numbers of one weight.

    name: of the weight, in the model. places: int32, or int64 where the weight is larger. values: what trains.
    moves: places change while it trains, so that `values` train even where there are none; without that, entries with
        none do not train and ask for no gradient.
    """

    moves: ClassVar[bool] = False
    places: Int[Tensor, " n"]
    originals: Float[Tensor, " n"]

    def __init__(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"]):
        super().__init__()
        self.name = name
        self.weight = [weight]  # in a list, so that it is no parameter of this module
        narrow = weight.numel() <= torch.iinfo(torch.int32).max
        self.register_buffer("places", places.to(weight.device, torch.int32 if narrow else torch.int64))
        self.register_buffer("originals", self.taken(), persistent=False)
        values = self.originals.to(wide_dtype(weight.dtype), copy=True)
        self.values = nn.Parameter(values, requires_grad=self._may_train)
        self._written = self.values._version
        self._off = False

    @property
    def _may_train(self) -> bool:
        """Whether an optimizer is to have the values: through all of a run, so that a resumed one has the same."""
        return self.moves or len(self.places) > 0

    @property
    def trains(self) -> bool:
        """Whether a gradient is of use."""
        return self._may_train

    def taken(self, tensor: Tensor | None = None, places: Int[Tensor, " m"] | None = None) -> Float[Tensor, " m"]:
        """A copy of the numbers of `tensor`, which has the weight's shape, at `places`.

        By default of the weight, and at the places of the entries.
        """
        tensor = self.weight[0].detach() if tensor is None else tensor
        return tensor[_indices((self.places if places is None else places).long(), tensor.shape)]

    @torch.no_grad()
    def put(self, values: Tensor, places: Int[Tensor, " m"] | None = None) -> None:
        """Write numbers into the weight, at the places of the entries where no others are given."""
        weight = self.weight[0].data
        where = (self.places if places is None else places).long()
        weight[_indices(where, weight.shape)] = values.to(weight.dtype)

    def write(self, always: bool = False) -> None:
        """Write the values into the weight, where an optimizer has changed them since."""
        if not self._off and (always or self.values._version != self._written):
            self.put(self.values.detach())
            self._written = self.values._version

    def switch(self, on: bool) -> None:
        """Have the values in the weight, or what was there before training."""
        self._off = not on
        self.put(self.values.detach() if on else self.originals)

    def replace(self, places: Int[Tensor, " n"], values: Float[Tensor, " n"]) -> None:
        """Take other places with these values; the numbers at the old ones become what they were before training."""
        self.put(self.originals)
        self.places = places.to(self.places)
        self.originals = self.taken()
        replace_data(self.values, values.to(self.values))
        self.values.requires_grad_(self._may_train)
        self.write(always=True)

    def learned(self) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
        """The places whose numbers are not those of the pretrained weight, in any order, and these numbers."""
        return self.places, self.values.detach()

    def settle(self) -> None:
        """Have the weight keep the values, for good."""
        self.write(always=True)
        self.originals = self.taken()

    def leave(self) -> None:
        """Put what was there before training into the weight, for good."""
        self.put(self.originals)

    def on_gradient(self, dense: Tensor) -> None:
        """Called in backward with dL/dW, before the gradient of the values is taken from it."""


def _indices(places: Int[Tensor, " n"], shape: Sequence[int]) -> tuple[Int[Tensor, " n"], ...]:
    """As torch.unravel_index, which waits for the device."""
    found = []
    for size in reversed(shape):
        found.append(places % size)
        places = places // size
    return tuple(reversed(found))


class _Seen(torch.autograd.Function):
    """The weight, as a tensor whose gradient goes to the values."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, entries: Entries) -> Tensor:
        ctx.entries = entries
        return entries.weight[0].data

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dense: Tensor) -> tuple[Tensor, None]:
        ctx.entries.on_gradient(dense)
        return ctx.entries.taken(dense).to(ctx.entries.values.dtype), None


def _show(module: nn.Module, args: Any) -> None:
    """Before a forward: let the module read its weights so that gradients go to their values.

    A weight that was made to train itself, as for scores of all its numbers, is read as it is.
    """
    for key, entries in module.__dict__[SEEN].items():
        entries.write()
        if torch.is_grad_enabled() and entries.trains and not entries.weight[0].requires_grad:
            module.__dict__[key] = _Seen.apply(entries.values, entries)


def _hide(module: nn.Module, args: Any, output: Any) -> None:
    """After a forward."""
    for key in module.__dict__[SEEN]:
        module.__dict__.pop(key, None)


@dataclass
class SparseSelection(Selection):
    """A technique that trains single numbers of weights. A method writes `places`.

    target_modules: names, or a regular expression for whole names, of modules whose weights may be chosen from; None:
        the linear layers in the model's blocks.
    exclude_modules: names or a regular expression of modules to leave out.
    """

    claims: ClassVar[frozenset[str]] = frozenset({"what the weights of blocks are read as"})

    values_follow = False

    target_modules: Names | None = None
    exclude_modules: Names | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entries: dict[str, Entries] = {}
        self._saved_in: Path | None = None
        self._undo = ExitStack()

    @abstractmethod
    def places(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Int[Tensor, " n"]]:
        """The numbers of each weight that train, as sorted places in the flat weight; weights may go without any.

        weights: those to choose from, by name, frozen.
        """

    def make_entries(self, name: str, weight: nn.Parameter, places: Int[Tensor, " n"]) -> Entries:
        """What holds the chosen numbers; for methods that look at dense gradients."""
        return Entries(name, weight, places)

    def see_data(self, splits: Mapping[str, Any], processor: Any = None) -> None:
        """Empty splits mean that what was chosen is about to be loaded."""
        self.values_follow = self.values_follow or not splits

    def see_saved(self, folder: Path) -> None:
        """Choose what was chosen when it was saved."""
        super().see_saved(folder)
        self._saved_in, self.values_follow = folder, True

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """No whole parameter."""
        return {}

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Freeze all else, choose, and let the chosen numbers train; on exit weights are what they were, bit by bit."""
        with super().attach(model), ExitStack() as undo:
            self._undo = undo
            found = self.candidates(model)
            weights = {name: parameter for name, (_, parameter) in found.items()}
            check_trainable(self.name, weights)
            held = [(name, module) for name, (holders, _) in found.items() for module, _ in holders]
            refuse_layers_not_called(self.name, model, held)
            for parameter in weights.values():
                parameter.requires_grad_(False)
            chosen = self._choose(model, weights)
            self.entries = {name: self.make_entries(name, weights[name], places) for name, places in chosen.items()}
            undo.callback(self.entries.clear)
            self._show_to_modules(undo, {name: holders for name, (holders, _) in found.items()})
            model.add_module(HOLDER, nn.ModuleList(self.entries.values()))
            undo.callback(model._modules.pop, HOLDER)
            yield model

    def _choose(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Int[Tensor, " n"]]:
        """The places in every weight: those that were saved, where they follow, or those that the method chooses."""
        none = {name: torch.empty(0, dtype=torch.int64) for name in weights}
        if self._saved_in is not None:
            return none | {name: places for name, (places, _) in _read(self._saved_in, weights).items()}
        return none | ({} if self.values_follow else self.places(model, weights))

    def candidates(self, model: nn.Module) -> dict[str, tuple[list[tuple[nn.Module, str]], nn.Parameter]]:
        """The weights to choose from, by name, each with all modules that hold it; none that trains whole anyway.

        Raises SettingError if there are none, or a name fits no module.
        """
        modules = {name: module for name, module in model.named_modules() if name}
        wanted = targeted(modules, self.target_modules, self.exclude_modules, self.name)
        if self.target_modules is None:
            blocks = tuple(f"{name}." for name, _ in stacks(model))
            wanted = {name: module for name, module in wanted.items() if name.startswith(blocks)}
        meant = {id(module) for module in wanted.values()}
        holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append((module, key))
        found = {
            name: (holders[id(parameter)], parameter)
            for name, module, key, parameter in named_parameters(model)
            if id(module) in meant and not parameter.requires_grad and self.may_choose(module, key, parameter)
        }
        if not found:
            raise SettingError(
                f"{self.name} finds no weights to choose from in {type(model).__name__}: name modules that have some "
                "in target_modules."
            )
        return found

    def may_choose(self, module: nn.Module, key: str, parameter: nn.Parameter) -> bool:
        """Whether numbers of a parameter may train: of a matrix; where no module is named, of linear layers."""
        return parameter.dim() >= 2 and (self.target_modules is not None or has_linear_weight(module))

    def _show_to_modules(self, undo: ExitStack, holders: Mapping[str, list[tuple[nn.Module, str]]]) -> None:
        for name, entries in self.entries.items():
            undo.callback(entries.leave)
            for module, key in holders[name]:
                if SEEN not in module.__dict__:
                    module.__dict__[SEEN] = {}
                    undo.callback(module.__dict__.pop, SEEN)
                    undo.callback(module.register_forward_pre_hook(_show).remove)
                    undo.callback(module.register_forward_hook(_hide, always_call=True).remove)
                module.__dict__[SEEN][key] = entries

    def on_attached(self, model: nn.Module) -> None:
        """Refuse numbers of weights that another technique trains whole, whose gradients would go to these alone.

        Raises SettingError.
        """
        for name, entries in self.entries.items():
            if entries.trains and entries.weight[0].requires_grad:
                raise SettingError(
                    f"{self.name} would train single numbers of {name}, which trains whole by another technique of the "
                    "recipe: leave its layer out of one of them."
                )

    def on_step_end(self, moment: Moment) -> None:
        """Write what the optimizer has made of the values, also where it hides that it changed them."""
        for entries in self.entries.values():
            entries.write(always=True)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Run the model with the weights it had before training; a new head, and other techniques, stay as they are."""
        for entries in self.entries.values():
            entries.switch(on=False)
        try:
            yield
        finally:
            for entries in self.entries.values():
                entries.switch(on=True)

    def fold(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """Nothing to add: values are in the weights, and stay there."""
        for entries in self.entries.values():
            entries.settle()
        self._undo.close()
        yield from ()

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write places and values, one weight after the other, and how many are of which, with its shape."""
        learned = {name: [part.cpu() for part in entries.learned()] for name, entries in self.entries.items()}
        orders = {name: places.argsort() for name, (places, _) in learned.items()}
        none = (torch.empty(0, dtype=torch.int32), torch.empty(0))  # a method may have chosen whole parts alone
        places, values = (
            torch.cat([none[part], *(found[part][orders[name]] for name, found in learned.items())]) for part in (0, 1)
        )
        about = {name: [len(orders[name]), *entries.weight[0].shape] for name, entries in self.entries.items()}
        write_tensors(folder / FILE, {"places": places, "values": values}, weights=json.dumps(about))

    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over places and values.

        Raises SettingError if the file is missing or damaged, or was made of another model.
        """
        found = _read(folder, {name: entries.weight[0] for name, entries in self.entries.items()})
        for name, entries in self.entries.items():
            entries.replace(*found[name])


def _read(folder: Path, weights: Mapping[str, nn.Parameter]) -> dict[str, tuple[Tensor, Tensor]]:
    """The places and values of each weight that were saved.

    Raises SettingError if the file is missing or damaged, or was made of another model.
    """
    file = folder / FILE
    tensors, texts = read_tensors(file)
    check_names(file, {*tensors, *texts}, ("places", "values", "weights", "format"))
    about: dict[str, list[int]] = json.loads(texts["weights"])
    if odd := sorted(about.keys() ^ weights.keys()):
        raise SettingError(f"{file} was made of another model or other targets: {odd[0]} is in one only.")
    counts = [count for count, *_ in about.values()]
    if not len(tensors["places"]) == len(tensors["values"]) == sum(counts):
        raise SettingError(
            f"{file} is damaged: it has {len(tensors['places'])} places and {len(tensors['values'])} values, and "
            f"counts of {sum(counts)}."
        )
    parts = zip(tensors["places"].split(counts), tensors["values"].split(counts), strict=True)
    found = dict(zip(about, parts, strict=True))
    for name, weight in weights.items():
        places, saved, shape = found[name][0], tuple(about[name][1:]), tuple(weight.shape)
        if saved != shape:
            raise SettingError(
                f"{file} was made of another model: {name} had the shape {saved} there, and has {shape} here."
            )
        if len(places) and not 0 <= int(places.min()) <= int(places.max()) < weight.numel():
            raise SettingError(
                f"{file} has places beyond the {weight.numel()} numbers of {name}: it was made of another model."
            )
    return found


def top_places(scores: Mapping[str, Tensor], count: int) -> dict[str, Int[Tensor, " n"]]:
    """The places of the `count` largest scores over all weights, sorted; of equal ones those that come first.

    Raises ValueError if there are fewer scores, or one is NaN.
    """
    total = sum(score.numel() for score in scores.values())
    if not 1 <= count <= total:
        raise ValueError(f"{count} numbers were to be chosen of {total}.")
    best = torch.empty(0)
    for name, score in scores.items():
        if score.isnan().any():
            raise ValueError(f"The scores of {name} hold NaN.")
        own = score.detach().flatten().topk(min(count, score.numel())).values
        best = torch.cat([best, own.float().cpu()])
        best = best.topk(min(count, len(best))).values
    least, room = best[-1], count - int((best > best[-1]).sum())
    places = {}
    for name, score in scores.items():
        flat = score.detach().flatten().float().cpu()
        equal = (flat == least).nonzero()[:room, 0]
        room -= len(equal)
        places[name] = torch.cat([(flat > least).nonzero()[:, 0], equal]).sort().values
    return places
