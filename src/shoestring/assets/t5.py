"""flan-t5-small, fine-tuned to write titles, from int8 ONNX files.

Source   traceforge-title-model; T5 is Raffel et al. 2020, arXiv:1910.10683, FLAN Chung et al. 2022, arXiv:2210.11416
Differs  weights are int8 values times their scales, so up to half a step from those that were trained.
         The carrier's runtime also rounds activations; ours does not, so its outputs are noisier.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .model_files import write_model
from .onnx_weights import dequantized, read_graph

if TYPE_CHECKING:
    from torch import Tensor


def convert(files: Path, folder: Path) -> None:
    """Writes a folder that opens as T5ForConditionalGeneration, with its tokenizer."""
    from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration, T5Tokenizer

    weights = {**stack_weights(files / "encoder.onnx"), **stack_weights(files / "decoder.onnx")}
    del weights["encoder.embed_tokens.weight"]  # the same table as shared.weight
    ids: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    shape: dict[str, Any] = {
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 6,
        "vocab_size": 32128,
        "tie_word_embeddings": False,  # the output layer has its own table, and its inputs are not scaled
    }
    config = T5Config(**shape, **ids, feed_forward_proj="gated-gelu")
    write_model(folder, T5ForConditionalGeneration, config, weights)
    GenerationConfig(**ids).save_pretrained(folder)
    T5Tokenizer.from_pretrained(files, model_max_length=512).save_pretrained(folder)


def stack_weights(file: Path) -> dict[str, "Tensor"]:
    """The tensors of the encoder's or the decoder's file, by transformers' names, in float32.

    Norms and embeddings kept their names. The matrix of a linear layer, stored as [in, out], is anonymous: the
    node that multiplies by it is called after the layer.
    """
    graph, tensors = read_graph(file)
    weights = {}
    for name in tensors:
        if name.endswith("layer_norm.weight"):
            weights[layer_name(name)] = tensors[name]
        elif name.endswith("weight_quantized"):
            weights[layer_name(name.removesuffix("_quantized"))] = dequantized(tensors, name.removesuffix("_quantized"))
    for node in graph.node:
        if node.op_type == "MatMulInteger":
            layer = node.name.strip("/").replace("/", ".").removesuffix(".MatMul_quant")
            matrix = dequantized(tensors, node.input[1].removesuffix("_quantized"))
            weights[layer_name(layer) + ".weight"] = matrix.T.contiguous()
    return weights


def layer_name(exported: str) -> str:
    """transformers' name: the exporter wrapped the encoder as `enc` and the whole model as `m`."""
    if exported.startswith("enc."):
        return "encoder." + exported.removeprefix("enc.")
    return exported.removeprefix("m.")
