"""Which weights learn: quality of selections, objectives, pruning and updates without gradients beside their baselines.

    python benchmarks/selection.py --json docs/results/selection.json
    python benchmarks/selection.py --only quality --methods id3 --seeds 0 --json selection.json

quality: the packaged encoder on reviews, equal numbers of steps, learning rates looked for as `quality.py` says. Each
method stands beside the baseline that it claims to beat or to equal, with as many trained numbers where both choose
numbers. Every run is written to the JSON file when it ends, and not run again when it is there.
"""

import argparse
from typing import Any

import torch

from quality import FIRST_RATES, REVIEWS, SEEDS, Contestant, Runs, compared, train_all
from result import Row, print_table, read_rows, read_runs, rows_beside, write
from shoestring import assets

TARGETS = ["query", "key", "value", "dense"]
COUNT = 337_920  # what LoRA r=8 trains on these layers
FEW = 42_240  # and r=1


def lora(r: int) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "target_modules": TARGETS}}


def speft(score: str, count: int) -> dict[str, Any]:
    return {"speft": {"score": score, "count": count, "calibration_rows": 64, "calibration_max_tokens": 40}}


CONTESTANTS = {
    "LoRA r=8": Contestant([lora(8)]),
    "LoRA r=1": Contestant([lora(1)]),
    "full tuning": Contestant([]),
    "fixed Fisher mask": Contestant([speft("fisher", FEW)], "LoRA r=1"),
    "random mask": Contestant([speft("random", FEW)], "LoRA r=1"),
    "bitfit": Contestant(["bitfit"], "random mask", apart=0.0),
    "norm_tuning": Contestant(["norm_tuning"], "random mask", apart=0.0),
    "id3": Contestant([{"id3": {"count": FEW}}], "fixed Fisher mask", apart=0.0),
    "speft": Contestant([speft("gradient", COUNT)], "LoRA r=8", apart=0.0),
    "sparse_grad": Contestant([{"sparse_grad": {}}], "full tuning"),
    "spt": Contestant([{"spt": {"budget": COUNT, "calibration_rows": 64}}], "LoRA r=8", apart=0.0),
    "random layers": Contestant([lora(8), {"ist": {"active_layers": 0.5, "importance": False}}], "LoRA r=8"),
    "ist": Contestant([lora(8), {"ist": {"active_layers": 0.5}}], "LoRA r=8", apart=0.0),
    "density_loss": Contestant([lora(8), "density_loss"], "LoRA r=8", apart=0.01),
    "light_peft": Contestant([lora(8), {"light_peft": {"estimation_steps": 30}}], "LoRA r=8"),
}


def chosen(names: list[str]) -> dict[str, Contestant]:
    """The contestants of these names, and the baselines they need, before them."""
    wanted = {base for name in names for base in (name, CONTESTANTS[name].beside)}
    return {name: contestant for name, contestant in CONTESTANTS.items() if name in wanted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["quality"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--methods", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the runs to do now")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="selection.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install(["minilm", "rotten-tomatoes"])
    work(options)
    print_table(read_rows(options.json), "Which weights learn")


def work(options: argparse.Namespace) -> None:
    """All parts asked for; the file is written after each run."""
    runs: Runs = read_runs(options.json)

    def keep(rows: list[Row]) -> None:
        kept = [row for row in rows_beside(rows, options.json) if not row.name.startswith("quality")]
        quality = compared("quality", REVIEWS, CONTESTANTS, runs.get("quality", {}))
        recipes = {name: contestant.recipe for name, contestant in CONTESTANTS.items()}
        settings = {"threads": options.threads, "first_learning_rates": FIRST_RATES, "methods": recipes}
        write([*kept, *rows, *quality], options.json, SEEDS, runs, **settings)

    for seed in options.seeds if "quality" in options.only else ():
        train_all(REVIEWS, chosen(options.methods), runs.setdefault("quality", {}), seed, lambda: keep([]))


if __name__ == "__main__":
    main()
