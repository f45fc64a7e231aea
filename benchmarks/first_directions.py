"""How much of what LoRA learns lies between the first singular directions of the weights, where tiny `wara` works.

    python benchmarks/first_directions.py --json docs/results/first_directions.json    # ten minutes on one thread

LoRA of as few parameters as the tiny form is trained on the packaged word problems as in the longer trainings of
adapters.py. Of each layer's change D the part U U^T D V V^T is kept, with the r first singular vectors U and V of the
weight, as the tiny form keeps them; the share is of squared norms, over all layers. Beside it stands the share of a
random matrix of the same shapes.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters import METHODS, QUALITY, contestants
from quality import settings_of
from result import Row, print_table, write
from shoestring import assets, load
from shoestring.training import RunSettings, train

TINY = METHODS["wara tiny"][0]["wara"]["r"]["smollm2"]
RATE = 2e-3  # that of LoRA r=2 in the longer trainings


def share(model: Any, change_of: Callable[[LoraLayer, Tensor], Tensor]) -> float:
    """Of the squared norm of all changes, what lies between the first singular vectors of the weights."""
    inside = whole = 0.0
    for layer in (module for module in model.modules() if isinstance(module, LoraLayer)):
        weight = layer.get_base_layer().weight.detach().double()
        change = change_of(layer, weight).double()
        left, _, right = torch.linalg.svd(weight, full_matrices=False)
        inside += float((left[:, :TINY].T @ change @ right[:TINY].T).square().sum())
        whole += float(change.square().sum())
    return inside / whole


def rows(seed: int) -> list[Row]:
    lora = contestants("", "decoder", ["wara tiny"])
    name = next(name for name in lora if name != "wara tiny")
    settings: dict[str, Any] = settings_of(QUALITY["decoder"], lora[name], RATE, seed, longer=True)
    with tempfile.TemporaryDirectory() as folder:
        settings["train"] |= {"save_strategy": "no", "report_to": "none"}
        train(RunSettings.from_dict({**settings, "output_dir": f"{folder}/run"}))
        base = AutoModelForCausalLM.from_pretrained(assets.model_folder("smollm2"), dtype=torch.float32)
        model = load(base, Path(folder, "run", "final"))
        generator = torch.Generator().manual_seed(0)
        learned = share(model, lambda layer, weight: layer.get_delta_weight("default").detach())
        random = share(model, lambda layer, weight: torch.randn(weight.shape, generator=generator))
    what = (
        f"share of the change of {name} between the first {TINY} singular vectors of each weight, beside a random one's"
    )
    return [Row(f"{what}, seed {seed}", learned, random)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="first_directions.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install(["smollm2", "gsm8k-test"])
    write(made := rows(options.seed), options.json, [options.seed], learning_rate=RATE, r=TINY)
    print_table(made, "What LoRA learns, and the first singular directions")


if __name__ == "__main__":
    main()
