"""Methods that train parts of the weights in place beside LoRA of as many trained parameters: what a step costs.

    python benchmarks/in_place.py --json docs/results/in_place.json
    python benchmarks/in_place.py --methods paca --rounds 2 --json in_place.json

One step, forward and backward, of the packaged decoder. Each method stands beside a LoRA without dropout on the same
layers, whose r is the whole number that comes nearest to the method's trained parameters; both are rows of their own.
Bytes are the ledger's. Seconds are those of the processor on one thread, the least of several steps, the method's and
LoRA's in turn. The optimizer is not in it.
"""

import argparse
import functools
import gc
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from result import Row, at_most, print_table, read_rows, rows_beside, write
from shoestring import assets
from steps import above_weights, memory, seconds, stepped

KEPT, PEAK, SECONDS = "bytes kept", "peak above the weights", "seconds"
MODEL, TARGETS = "smollm2", "all-linear"
BATCH = (2, 512)


@dataclass(frozen=True)
class Method:
    """A recipe, and what of a step may be at most so many times LoRA's. targets: what it and LoRA adapt."""

    recipe: list[Any]
    limits: dict[str, float]
    targets: Any = TARGETS


METHODS: dict[str, Method] = {
    "paca": Method([{"paca": {"r": 16}}], {KEPT: 0.84, SECONDS: 0.85}),
    "paca r=64": Method([{"paca": {"r": 64}}], {KEPT: 0.84, SECONDS: 0.85}),
    "l4q": Method([{"l4q": {"group_size": 64}}], {PEAK: 1.05}),
    "sketchtune": Method([{"sketchtune": {"groups": 1, "calibrate": False}}], {}, r".*_proj"),
    "peft's SHiRA": Method([{"shira": {"r": 8}}], {}),
    "LoRA-FA": Method([{"lora": {"r": 16, "lora_alpha": 32}}, "lora_fa"], {}),
}


def lora(r: int) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0}}


class Stepped:
    """The packaged decoder with a recipe, and one step of it."""

    def __init__(self, recipe: list[Any], targets: Any):
        model = AutoModelForCausalLM.from_pretrained(assets.model_folder(MODEL), dtype=torch.float32)
        ids = torch.randint(0, model.config.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
        self.model, self.step = stepped(model, ids, placed(recipe, targets))
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @functools.cached_property
    def bytes_of_step(self) -> dict[str, int]:
        """Kept for backward, and the peak above the weights."""
        report = memory(self.model, self.step)
        return {KEPT: report.saved_bytes, PEAK: above_weights(report)}


def placed(recipe: list[Any], targets: Any) -> list[Any]:
    """The recipe with its adapters on the layers that the comparison is about."""
    made: list[Any] = []
    for entry in recipe:
        if isinstance(entry, dict):
            ((name, settings),) = entry.items()
            entry = {name: {"target_modules": targets, **settings}}
        made.append(entry)
    return made


@functools.cache
def parameters_a_rank(targets: Any) -> int:
    return Stepped([lora(1)], targets).trained


def cost_of(name: str, rounds: int) -> list[Row]:
    """The rows of one method."""
    gc.collect()
    method = METHODS[name]
    ours = Stepped(method.recipe, method.targets)
    r = max(1, round(ours.trained / parameters_a_rank(method.targets)))
    base = Stepped([lora(r)], method.targets)
    measured = {measure: (ours.bytes_of_step[measure], base.bytes_of_step[measure]) for measure in (KEPT, PEAK)}
    rows = {
        "trained parameters": (ours.trained, base.trained),
        **measured,
        SECONDS: seconds(ours.step, base.step, rounds),
    }
    label = f"{MODEL}, {name} beside LoRA r={r}"
    return [
        at_most(f"{label}: {measure}", *values, method.limits[measure])
        if measure in method.limits
        else Row(f"{label}: {measure}", *values)
        for measure, values in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="in_place.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install([MODEL])
    settings = {"model": MODEL, "batch": BATCH, "rounds": options.rounds, "threads": options.threads}
    recipes = {name: method.recipe for name, method in METHODS.items()}
    for name in options.methods:
        print_table(found := cost_of(name, options.rounds))
        write([*rows_beside(found, options.json), *found], options.json, **settings, methods=recipes)
    print_table(read_rows(options.json), "Trained in place, beside LoRA")


if __name__ == "__main__":
    main()
