"""A GGUF file as an ordinary model folder.

Source   transformers' own reader (`gguf_file`), which undoes the quantisation
Differs  weights are stored as float32: a Q4_1 value is a half-precision scale times 0..15 plus a half-precision
         offset, which bfloat16 would round.
"""

from pathlib import Path
from typing import Any

from .extras import need_packages


def convert_smollm2(files: Path, folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct, 134.5 M weights."""
    convert(files / "SmolLM2-135M-Instruct.Q4_1.gguf", folder)


def convert(file: Path, folder: Path) -> None:
    """Writes a folder that opens as the causal language model in the file, with tokenizer and chat template.

    Needs about eight bytes of memory and four of disk a weight. Raises SettingError if the gguf package is missing.
    """
    need_packages(("gguf",), f"Converting {file.name}")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases without it always dequantise
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)

    # A model that came from GGUF calls itself quantised for good, and cannot be trained or saved: make a plain one.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(read.state_dict(), strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
