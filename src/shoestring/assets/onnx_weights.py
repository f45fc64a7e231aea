"""Reading weights out of an ONNX graph, for converters that turn an exported model back into a transformers model."""

from pathlib import Path
from typing import TYPE_CHECKING

from .extras import need_packages

if TYPE_CHECKING:
    from onnx import GraphProto
    from torch import Tensor


def read_graph(file: Path) -> tuple["GraphProto", dict[str, "Tensor"]]:
    """The graph of an ONNX file and its stored tensors by name. Raises SettingError if the onnx package is missing."""
    need_packages(("onnx",), f"Converting {file.name}")
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    # numpy_helper may return read-only memory, which torch warns of; hence the copy.
    tensors = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    return graph, tensors


def dequantized(tensors: dict[str, "Tensor"], name: str) -> "Tensor":
    """The float32 weight that onnxruntime's dynamic quantisation stored as `name`_quantized, _scale and _zero_point.

    One scale a tensor, or one for each entry of its last dimension: w = scale (q - zero_point).
    """
    return tensors[f"{name}_scale"] * (tensors[f"{name}_quantized"].float() - tensors[f"{name}_zero_point"].float())
