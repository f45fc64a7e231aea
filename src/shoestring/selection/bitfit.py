r"""BitFit: only biases train, those that are there and, on request, zero biases added to layers that have none.

Source   Ben Zaken, Ravfogel, Goldberg 2022, arXiv:2106.10199
Update   y = x W^T + b: b trains, db = sum over tokens of dy
Shapes   b [out]
Start    the pretrained values, or zeros where biases are added: the model as it was, bit by bit
Trains   out numbers a linear layer and hidden a norm, 0.1 % of a BERT; and a new head
Costs    optimizer state for those alone; no linear layer keeps its input
Differs  biases are found by the types of modules and by what a layer reads in its block, not by parts of names;
         a subset is that subset alone (the authors' code adds the pooler); added biases are no part of the paper.
         The base's own biases train in place: taken off, the recipe leaves what they learned in them. A file names
         each bias, so that any reader of safetensors finds it, which adds 3 % to BERT-base's
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..adapters.base import linear_sizes
from ..adapters.placement import ATTENTION_INPUT, FEEDFORWARD_INPUT, stacks
from ..errors import SettingError, did_you_mean
from ..norms import is_norm
from ..targets import Names, targeted
from ..technique import register_technique
from ..whole_files import read_tensors, write_tensors
from .base import Selection, pretrained_modules, settings_error

FILE = "added_biases.safetensors"
ALL = "all"
# parts of a block by what their layers are called, relative to the block
QKV = {
    "query": re.compile(r"(.*\.)?(q|query|q_(proj|lin)|query_proj)"),
    "key": re.compile(r"(.*\.)?(k|key|k_(proj|lin)|key_proj)"),
    "value": re.compile(r"(.*\.)?(v|value|v_(proj|lin)|value_proj)"),
}
ATTENTION = re.compile(r"(.*\.)?([a-z_]*att(n|ention)?|EncDecAttention|SelfAttention)\..*", re.IGNORECASE)
PARTS = (*QKV, "attention_output", "intermediate", "output", "norm", "rest")


@register_technique
@dataclass
class BitFit(Selection):
    """Only biases train.

    biases: "all", or a list of parts: query, key, value, attention_output, intermediate, output (the layers of a
        block), norm (everywhere), rest (all other). The paper's small version is [query, intermediate].
    added: names, or a regular expression for whole names, of linear layers that have no bias to give a zero bias,
        which then trains. They are saved with the recipe and gone when it is removed.

    Raises SettingError for an unknown part, and if there is no such bias.
    """

    name: ClassVar[str] = "bitfit"

    biases: list[str] | str = ALL
    added: Names | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._added: dict[str, nn.Parameter] = {}
        self._keys: set[str] = set()
        if self.biases == ALL:
            return
        if isinstance(self.biases, str) or not self.biases:
            raise settings_error(self.name, "biases", f"{ALL!r} or a list of {', '.join(PARTS)}", self.biases)
        for part in self.biases:
            if part not in PARTS:
                raise SettingError(f"biases of bitfit: there is no part {part!r}. {did_you_mean(part, PARTS)}")

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        """Add the biases that are to be added, and train; on exit they are gone."""
        with ExitStack() as undo:
            self._added = {}
            for name, layer in self._layers_without_bias(model).items():
                weight: torch.Tensor = layer.weight  # type: ignore[assignment]
                dtype = weight.dtype if weight.is_floating_point() else torch.float32
                zeros = torch.zeros(linear_sizes(layer)[0], dtype=dtype, device=weight.device)
                layer.bias = self._added[f"{name}.bias"] = nn.Parameter(zeros)
                undo.callback(setattr, layer, "bias", None)
            undo.enter_context(super().attach(model))
            yield model

    def chosen(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The biases of linear layers, convolutions and norms that are meant, and those added."""
        found: dict[str, nn.Parameter] = {}
        self._keys = set()
        modules = dict(pretrained_modules(model))
        blocks = tuple(f"{name}.{index}." for name, stack in stacks(model) for index in range(len(stack)))
        for name, module in modules.items():
            bias = module._parameters.get("bias")
            if bias is None or not (isinstance(module, (nn.Linear, Conv1D, _ConvNd)) or is_norm(module)):
                continue
            block = next((b for b in blocks if name.startswith(b)), None)
            within = name.removeprefix(block or "").removesuffix(".base_layer")
            parts = parts_of(within, module, in_block=block is not None)
            if f"{name}.bias" in self._added or self._wants(name, parts):
                found[f"{name}.bias"] = bias
                if parts == {"key"}:
                    self._keys.add(f"{name}.bias")
        if not found:
            what = "no bias" if self.biases == ALL else f"no bias of {', '.join(self.biases)}"
            raise SettingError(
                f"bitfit finds {what} in {type(model).__name__}. To train zero biases added to its linear layers, name "
                "those in added, such as added: [q_proj, up_proj]."
            )
        return found

    def idle_parameters(self, model: nn.Module) -> set[str]:
        """Biases of keys alone: without rotary embeddings softmax takes no notice of them."""
        return self._keys

    def _wants(self, name: str, parts: frozenset[str]) -> bool:
        """Whether all that one bias is for is to train.

        Raises SettingError if only a part of it is.
        """
        if self.biases == ALL or parts <= set(self.biases):
            return True
        if parts & set(self.biases):
            raise SettingError(
                f"{name} holds the biases of {', '.join(sorted(parts))} in one tensor: give all of them in biases of "
                "bitfit, or none."
            )
        return False

    def _layers_without_bias(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The linear layers to give a bias.

        Raises SettingError if a name fits none, or one of them has a bias already.
        """
        if self.added is None:
            return {}
        linear = {name: m for name, m in pretrained_modules(model) if isinstance(m, (nn.Linear, Conv1D))}
        meant = targeted(linear, self.added, None, self.name, setting="added")
        for name, layer in meant.items():
            if layer.bias is not None:
                raise SettingError(
                    f"added of bitfit names {name}, which has a bias already: leave it out there; biases says whether "
                    "it trains."
                )
        return meant

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write the added biases; those that the base model has are saved with the recipe."""
        if self._added:
            write_tensors(folder / FILE, self._added)

    @torch.no_grad()
    def restore(self, model: nn.Module, folder: Path) -> None:
        """Take over the added biases.

        Raises SettingError if the file is missing or damaged, or was made of another model.
        """
        if not self._added:
            return
        saved, _ = read_tensors(folder / FILE)
        ours = {name: bias.shape for name, bias in self._added.items()}
        if odd := sorted(ours.items() ^ {name: bias.shape for name, bias in saved.items()}.items()):
            raise SettingError(f"{folder / FILE} was made of another model: {odd[0][0]} is not the same in both.")
        for name, bias in self._added.items():
            bias.copy_(saved[name])


def parts_of(name: str, module: nn.Module, in_block: bool) -> frozenset[str]:
    """What a bias is for, by the name of its module in the block: several parts where one layer does their work."""
    if is_norm(module):
        return frozenset({"norm"})
    if not in_block:
        return frozenset({"rest"})
    for part, pattern in QKV.items():
        if pattern.fullmatch(name):
            return frozenset({part})
    if ATTENTION_INPUT.fullmatch(name):
        return frozenset(QKV)
    if ATTENTION.fullmatch(name):
        return frozenset({"attention_output"})
    return frozenset({"intermediate" if FEEDFORWARD_INPUT.fullmatch(name) else "output"})
