"""What training on a share of the tokens costs in quality: held-out quality against steps, tokens, seconds and bytes.

    python benchmarks/token_selection.py --json token_selection.json --figure token_selection.svg

classification: LoRA on the packaged encoder and reviews, beside LoRA with token_tune at 0.3, as many steps and twice as
many. decoder: LoRA on the packaged decoder and word problems, beside recompute and token_tune at several shares, drawn
at random and by TokenSeek's score. Every run is written to the JSON file when it ends, and not run again when it is
there. Seconds are those of the processor, on one thread: other work on the machine does not count.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any

import torch

from result import Row, print_table, read_runs, write
from runs import Outcome, finish, run, word_problems
from shoestring import assets

LORA = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}


def classification(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """LoRA, and LoRA with three tenths of the tokens at as many and at twice as many steps."""
    for name, recipe, steps in (
        ("LoRA", [], 160),
        ("token_tune 0.3", [{"token_tune": {"keep_fraction": 0.3, "seed": seed}}], 160),
        ("token_tune 0.3, twice the steps", [{"token_tune": {"keep_fraction": 0.3, "seed": seed}}], 320),
    ):
        yield (
            name,
            {
                "model": "packaged:minilm",
                "task": "text-classification",
                "data": {"train": "packaged:rotten-tomatoes", "max_length": 40},
                "recipe": [{"lora": {**LORA["lora"], "target_modules": ["query", "key", "value", "dense"]}}, *recipe],
                "train": {
                    "max_steps": steps,
                    "per_device_train_batch_size": 32,
                    "per_device_eval_batch_size": 64,
                    "learning_rate": 1e-3,
                    "eval_strategy": "no",
                    "seed": seed,
                },
            },
        )


def decoder(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """LoRA, with recomputation, and with shares of the tokens."""
    recipes: list[tuple[str, list[Any]]] = [("LoRA", [])]
    recipes += [("LoRA, recompute", ["recompute"])] if seed == 0 else []
    for select in ("random", "seek"):
        for fraction in (0.1, 0.3, 0.5):
            entry = {"token_tune": {"keep_fraction": fraction, "select": select, "seed": seed}}
            recipes.append((f"token_tune {fraction} {select}", [entry]))
    for name, recipe in recipes:
        yield (
            name,
            {
                "model": "packaged:smollm2",
                "task": "causal-lm",
                "data": {**word_problems(), "chat": True, "max_length": 128, "max_eval_rows": 12},
                "recipe": [LORA, *recipe],
                "train": {
                    "max_steps": 40,
                    "per_device_train_batch_size": 2,
                    "per_device_eval_batch_size": 8,
                    "learning_rate": 5e-4,
                    "eval_strategy": "steps",
                    "eval_steps": 20,
                    "eval_on_start": True,
                    "seed": seed,
                },
            },
        )


PARTS = {"classification": classification, "decoder": decoder}


def measured(settings: dict[str, Any]) -> Outcome:
    """A run's outcome, without bytes where tokens are scored: the ledger takes that backward for the step's."""
    outcome = run(settings)
    entries = [entry for entry in settings["recipe"] if isinstance(entry, dict)]
    scored = any(entry.get("token_tune", {}).get("select") == "seek" for entry in entries)
    return {**outcome, "saved_bytes": None} if scored else outcome


def mean(runs: list[dict[str, Any]], part: str) -> float:
    """Mean over seeds of the quality on data that was not trained on: accuracy, or loss."""
    split, measure = {"classification": ("test", "accuracy"), "decoder": ("validation", "loss")}[part]
    return statistics.mean(r["quality"][split][measure] for r in runs)


def compared(runs: dict[str, dict[str, Outcome]]) -> list[Row]:
    rows = []
    for part, found in runs.items():
        by_name: dict[str, list[dict[str, Any]]] = {}
        for key, result in found.items():
            by_name.setdefault(key.partition("|")[0], []).append(result)
        base = by_name.get("LoRA", [])
        for name, results in by_name.items():
            if name == "LoRA" or not base:
                continue
            ours, theirs = mean(results, part), mean(base, part)
            if part == "classification":
                goal = "within 0.01" if "twice" in name else ""
                holds = ours >= theirs - 0.01 if goal else None
                rows.append(Row(f"{part}, {name}: accuracy, {len(results)} seeds", ours, theirs, goal, holds))
            else:
                rows.append(Row(f"{part}, {name}: held-out loss, {len(results)} seeds", ours, theirs))
            for measure in ("saved_bytes", "step_seconds"):
                if results[0][measure] is None:
                    continue
                values = [statistics.median(r[measure] for r in group) for group in (results, base)]
                rows.append(Row(f"{part}, {name}: {measure}", *values))
    return rows


def draw(runs: dict[str, dict[str, Any]], path: str) -> None:
    """Held-out loss of the decoder against steps, seconds and bytes kept, one line a recipe, mean over seeds."""
    import matplotlib.pyplot as plt

    by_name: dict[str, list[dict[str, Any]]] = {}
    for key, result in runs.items():
        by_name.setdefault(key.partition("|")[0], []).append(result)
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, results in by_name.items():
        steps = [step for step, _ in results[0]["curve"]]
        losses = [statistics.mean(r["curve"][i][1] for r in results) for i in range(len(steps))]
        second = statistics.median(r["step_seconds"] for r in results)
        style = "--" if "seek" in name else "-"
        (line,) = axes[0].plot(steps, losses, style, label=name)
        axes[1].plot([step * second for step in steps], losses, style)
        if results[0]["saved_bytes"] is not None:
            axes[2].plot(
                statistics.median(r["saved_bytes"] for r in results) / 2**20, losses[-1], "o", color=line.get_color()
            )
    for axis, label in zip(axes, ("steps", "seconds of training", "MiB kept for backward"), strict=True):
        axis.set_xlabel(label)
        axis.set_ylabel("held-out loss")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="token_selection.json")
    parser.add_argument("--figure", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install(["minilm", "rotten-tomatoes", "smollm2", "gsm8k-test"])
    runs = read_runs(options.json)

    def keep() -> None:
        write(compared(runs), options.json, options.seeds, runs)

    for seed in options.seeds:
        for part in options.only:
            planned = ((f"{name}|{seed}", settings) for name, settings in PARTS[part](seed))
            finish(planned, runs.setdefault(part, {}), measured, keep)
    print_table(compared(runs), "A share of the tokens beside all of them")
    if options.figure:
        draw(runs["decoder"], options.figure)


if __name__ == "__main__":
    main()
