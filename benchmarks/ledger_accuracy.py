"""The ledger's peak beside the CUDA allocator's own maximum, for training steps of a decoder with random weights.

    python benchmarks/ledger_accuracy.py --json docs/results/ledger_accuracy.json

Needs a GPU. Goal: within 5 % for each. The allocator rounds each tensor up to 512 bytes and counts kernels' workspaces, which
the ledger does not see; both count from the same state of the device.
"""

import argparse
import gc
import sys
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from result import Row, print_table, write
from shoestring import Ledger, Recipe
from shoestring.adapters import HUTConfig

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
CASES: dict[str, tuple[Recipe, bool, int]] = {
    "full": (Recipe(), False, 1024),
    "full, checkpointing": (Recipe(), True, 1024),
    "lora": (Recipe(LoraConfig(r=16, target_modules="all-linear")), False, 1024),
    "lora, checkpointing": (Recipe(LoraConfig(r=16, target_modules="all-linear")), True, 4096),
    "hut": (Recipe(HUTConfig(r=16, target_modules="all-linear")), False, 1024),
}


def measure(name: str) -> Row:
    """The second step of one case."""
    recipe, checkpointing, tokens = CASES[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    base, model = model, recipe.apply(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, tokens), device="cuda")

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    with Ledger(model, optimizer) as ledger:
        step()
    counted = ledger.report().peak_bytes
    step_alone = torch.cuda.max_memory_allocated()
    Recipe.remove(model)
    del base, model, optimizer
    gc.collect()
    torch.cuda.empty_cache()
    held = abs(counted - step_alone) <= 0.05 * step_alone
    return Row(f"{name}, {tokens} tokens: peak bytes", counted, step_alone, "within 5 %", held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("ledger_accuracy needs a GPU: it compares with the CUDA allocator.")
    rows = [measure(name) for name in CASES]
    print_table(rows, f"The ledger beside max_memory_allocated on {torch.cuda.get_device_name()}")
    if options.json:
        write(rows, options.json, seeds=[0], device=torch.cuda.get_device_name())


if __name__ == "__main__":
    main()
