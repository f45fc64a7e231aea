"""The packaged decoder with linear layers rounded to few bits, and a LoRA that starts at what rounding took."""

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoestring import Technique, assets
from shoestring.quantisation import dequantise, round_to_nearest
from shoestring.technique import Phase, register_technique

MODEL, GROUP_SIZE = "smollm2", 64


def original() -> Any:
    return AutoModelForCausalLM.from_pretrained(assets.model_folder(MODEL), dtype=torch.float32)


def round_layers(model: Any, bits: int) -> dict[str, Tensor]:
    """Round the linear layers of the model's body; what each weight has lost, by the layer's name in the model."""
    lost: dict[str, Tensor] = {}
    for name, layer in model.model.named_modules():
        if isinstance(layer, nn.Linear):
            rounded = dequantise(*round_to_nearest(layer.weight.detach(), bits, GROUP_SIZE, symmetric=False))
            lost[f"model.{name}"] = layer.weight.detach() - rounded
            layer.weight.data = rounded
    return lost


@functools.cache
def folder(bits: int) -> str:
    """A folder of the rounded model, in float32, and its tokenizer."""
    path = tempfile.mkdtemp()
    model = original()
    round_layers(model, bits)
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(assets.model_folder(MODEL)).save_pretrained(path)
    return path


def low_rank(matrix: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in] of equal norms, whose product is the nearest of its rank."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]


@register_technique
@dataclass
class SvdStart(Technique):
    """LoRA on rounded weights starts at the singular vectors of what rounding took, as in LoftQ's first round."""

    name: ClassVar[str] = "svd_start"
    phase: ClassVar[Phase] = Phase.OBJECTIVE

    bits: int = 2

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[nn.Module]:
        lost = round_layers(original(), self.bits)
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                (adapter,) = layer.lora_A
                b, a = low_rank(lost[name.removeprefix("base_model.model.")], layer.r[adapter])
                layer.lora_B[adapter].weight.data = b / layer.scaling[adapter]
                layer.lora_A[adapter].weight.data = a
        yield model
