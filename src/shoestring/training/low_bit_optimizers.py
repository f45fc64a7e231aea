"""Optimizers of other packages with states in few bits or in pages: whether they run here, before anything is loaded.

Source   Dettmers et al., 8-bit optimizers via block-wise quantization, arXiv:2110.02861; pages: QLoRA, arXiv:2305.14314
Code     bitsandbytes and torchao, through transformers' `optim`
Devices  bitsandbytes' 8-bit ones run on CPUs too. Its paged ones do as well, and page nothing there. torchao's compile
         themselves for each shape that trains, on a CPU with the machine's C++ compiler.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from ..errors import SettingError
from .quantised import need

if TYPE_CHECKING:
    from transformers import TrainingArguments

SMALLEST_QUANTISED = 4096  # numbers; tensors of fewer have float32 states in both packages


def package_of(optim: Any) -> str | None:
    """The package that brings an optimizer of TrainingArguments with small or paged states; None for all others."""
    name = str(getattr(optim, "value", optim))
    if name in ("adamw_torch_4bit", "adamw_torch_8bit"):
        return "torchao"
    ours = re.search(r"bnb|8bit|32bit|paged", name) or name == "ademamix"
    return "bitsandbytes" if ours and not name.startswith("galore") else None


def check_optimizer(arguments: TrainingArguments) -> None:
    """Try the optimizer with one step on one small weight, where the run will train.

    Raises SettingError, naming what is missing, if it does not run; one of torch's own is not tried.
    """
    if (package := package_of(arguments.optim)) is None:
        return
    name = arguments.optim.value
    need(package, f"train.optim: {name}")
    import torch
    from transformers import Trainer

    device = arguments.device
    weight = torch.nn.Parameter(torch.zeros(64, SMALLEST_QUANTISED // 64, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
            optimizer([weight], **options).step()
    except Exception as error:  # of another package's kernels, or of a compiler
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingError(
            f"train.optim: {name} does not run on this machine's {device.type}, says {package}: {reason} Take "
            f"adamw_torch{', or train on a GPU' if device.type == 'cpu' else ''}."
        ) from error


def note_on(arguments: TrainingArguments) -> str | None:
    """What a user should know of an optimizer that runs; None if there is nothing."""
    name = arguments.optim.value
    if package_of(arguments.optim) is not None and "paged" in name and arguments.device.type == "cpu":
        return f"train.optim: {name} pages nothing on a CPU; it is {name.removeprefix('paged_')}."
    return None
