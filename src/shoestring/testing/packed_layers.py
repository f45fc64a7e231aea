"""Linear layers of a model put into few bits, as the packages do that pack them."""

from typing import Any

import pytest
import torch
from torch import nn

KINDS = ("nf4", "nf4 stored in bfloat16", "torchao-int8")


def pack_layer(model: Any, name: str, kind: str) -> None:
    """Pack the weight of the `nn.Linear` of that name in place; skips the test where the package is missing."""
    layer: Any = model.get_submodule(name)
    if kind == "torchao-int8":
        pytest.importorskip("torchao", reason="torchao is missing: pip install 'shoestring[torchao]'")
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layer, Int8WeightOnlyConfig(set_inductor_config=False))
        return
    bitsandbytes = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is missing: pip install 'shoestring[quant]'", exc_type=ImportError
    )
    storage = torch.bfloat16 if kind.endswith("bfloat16") else torch.uint8
    bias = layer.bias is not None
    packed: nn.Module = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias, quant_type="nf4", quant_storage=storage
    )
    packed.load_state_dict(layer.state_dict())
    model.set_submodule(name, packed.to("cpu"))
