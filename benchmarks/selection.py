"""Which weights learn: quality of selections, objectives, pruning and updates without gradients beside their baselines.

    python benchmarks/selection.py --json docs/results/selection.json
    python benchmarks/selection.py --only quality --methods id3 --seeds 0 --json selection.json

cost: short runs on the packaged encoder, of which one step is counted by the ledger once the method is at work (after
pruning, for example). Bytes are the same on every run; seconds are the processor's, least of the steps after that one,
and for ist, whose steps differ, their mean.
quality: the packaged encoder on reviews, equal numbers of steps, learning rates looked for as `quality.py` says. Each
method stands beside the baseline that it claims to beat or to equal, with as many trained numbers where both choose
numbers; some beside a second one. Where the rate above the best one makes a method diverge, one in between is tried as
well, and for full tuning a lower one: at the first ones it learns nothing.
density_loss and its baseline train an encoder with ReLU in place of GELU, which has few exact zeros; the share of
activations that are not zero is a row of its own.
forwards: the loss that bilevel_zofo comes to with at most half of the forwards of zeroth_order, where a backward counts
as two. Both train LoRA on queries and values; the one moves all other weights, too. What that is worth is seen beside
LoRA alone with as many forwards, three a step, and beside bilevel_zofo with a backbone that stays as it is; and what
zeroth_order learns, beside the model as it was.
Every run is written to the JSON file when it ends, and not run again when it is there.
"""

import argparse
import functools
import gc
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, TrainerCallback

from quality import REVIEWS, SEEDS, Contestant, Trainings, command, compared, do, outcomes_of, result
from result import Row, at_most
from shoestring import Ledger, Recipe, assets
from shoestring.memory import MemoryReport
from shoestring.recipe import attached_to
from shoestring.training import RunSettings, train

TARGETS = ["query", "key", "value", "dense"]
COUNT = 337_920  # what LoRA r=8 trains on these layers
FEW = 42_240  # and r=1
SCORED = 1024  # rows that scores are made from, as the paper has it
BIASES, NORMS = 26_112, 9_984  # of the encoder
BLOCKS = 6
MLPS = [f"layer.{index}.{part}.dense" for index in range(BLOCKS) for part in ("intermediate", "output")]


def lora(r: int, targets: list[str] = TARGETS) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "target_modules": targets}}


def speft(score: str, count: int, rows: int = 64) -> dict[str, Any]:
    return {"speft": {"score": score, "count": count, "calibration_rows": rows, "calibration_max_tokens": 40}}


def light_peft(estimation_steps: int) -> dict[str, Any]:
    """Of heads and channels as many are taken as its paper says of the base, over 40 %."""
    removed = {"removed_heads_fraction": 0.42, "removed_channels_fraction": 0.42}
    return {"light_peft": {"estimation_steps": estimation_steps, **removed}}


def density_loss(weight: float) -> dict[str, Any]:
    return {"density_loss": {"weight": weight, "epsilon": 0.01} if weight else {"weight": 0.0}}


RELU = "LoRA r=8 with ReLU"
DENSITY_WEIGHTS = {
    "density_loss": 0.05,
    "density_loss, 1.4 times the weight": 0.07,
    "density_loss, twice the weight": 0.1,
}
HALF, ONE = {"ist": {"active_layers": 0.5}}, {"ist": {"active_layers": 1}}
RANDOM = {"ist": {"active_layers": 0.5, "importance": False}}

CONTESTANTS = {
    "LoRA r=8": Contestant([lora(8)]),
    "LoRA r=1": Contestant([lora(1)]),
    "full tuning": Contestant([], also=(2.5e-4,)),
    "fixed Fisher mask": Contestant([speft("fisher", FEW, SCORED)], "LoRA r=1"),
    "random mask": Contestant([speft("random", FEW)], "LoRA r=1"),
    "random mask, 26k": Contestant([speft("random", BIASES)]),
    "random mask, 10k": Contestant([speft("random", NORMS)]),
    "random mask, 338k": Contestant([speft("random", COUNT)]),
    "linear probe": Contestant([{"unfreeze": {"blocks": []}}]),
    "bitfit": Contestant(["bitfit"], "random mask, 26k", apart=0.0, also=(8e-3,)),
    "norm_tuning": Contestant(["norm_tuning"], "random mask, 10k", apart=0.0, also=(8e-3,)),
    "id3": Contestant([{"id3": {"count": FEW}}], "fixed Fisher mask", apart=0.0),
    "speft": Contestant([speft("gradient", COUNT, SCORED)], "LoRA r=8", apart=0.0),
    "sparse_grad": Contestant([{"sparse_grad": {}}], "full tuning"),
    "spt": Contestant([{"spt": {"budget": COUNT, "calibration_rows": 64}}], "LoRA r=8", apart=0.0),
    "random layers": Contestant([lora(8), RANDOM], "LoRA r=8"),
    "ist": Contestant([lora(8), HALF], "LoRA r=8", apart=0.0, also=(2e-3,)),
    RELU: Contestant([lora(8), density_loss(0.0)], model=lambda: with_relu()),
    **{
        name: Contestant([lora(8), density_loss(weight)], RELU, model=lambda: with_relu(), apart=0.01)
        for name, weight in DENSITY_WEIGHTS.items()
    },
    "light_peft": Contestant([lora(8), light_peft(30)], "LoRA r=8"),
    "LoRA r=8, 300 steps": Contestant([lora(8)], train={"max_steps": 300}),
    "light_peft, 300 steps": Contestant([lora(8), light_peft(60)], "LoRA r=8, 300 steps", train={"max_steps": 300}),
}
ALSO_BESIDE = {
    "bitfit": "linear probe",
    "norm_tuning": "linear probe",
    "speft": "random mask, 338k",
    "ist": "random layers",
}
OF_LOSS = frozenset({"speft", "ist"})  # these beside their second baseline

STEPS, INNER_STEPS = 400, 3
FORWARDS, FORWARDS_OF_ROUND = 2 * STEPS, 3 * INNER_STEPS + 2 * 3 + 6
ROUNDS = FORWARDS // 2 // FORWARDS_OF_ROUND
BILEVEL_STEPS, BILEVEL_FORWARDS = ROUNDS * (INNER_STEPS + 1), ROUNDS * FORWARDS_OF_ROUND
LORA_STEPS = BILEVEL_FORWARDS // 3  # a forward, and a backward that counts as two
OF_VALUES = {"lora": {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]}}
WITH_FORWARDS = {
    "the model as it was": Contestant([OF_VALUES], train={"max_steps": 1, "learning_rate": 1e-9}),
    "zeroth_order": Contestant([OF_VALUES, {"zeroth_order": {"eps": 1e-2}}], "the model as it was", apart=0.0),
    "LoRA of as many forwards": Contestant([OF_VALUES], train={"max_steps": LORA_STEPS}),
    "bilevel_zofo, same backbone": Contestant(
        [OF_VALUES, {"bilevel_zofo": {"inner_steps": INNER_STEPS, "backbone_lr": 0.0}}],
        train={"max_steps": BILEVEL_STEPS},
    ),
    "bilevel_zofo": Contestant(
        [OF_VALUES, {"bilevel_zofo": {"inner_steps": INNER_STEPS}}],
        "zeroth_order",
        apart=0.0,
        train={"max_steps": BILEVEL_STEPS},
    ),
}
WITHOUT_GOAL = {"bilevel_zofo": ("LoRA of as many forwards", "bilevel_zofo, same backbone")}
TRAININGS = {
    "quality": (REVIEWS, CONTESTANTS),
    "forwards": (replace(REVIEWS, train={**REVIEWS.train, "max_steps": STEPS}, measure="loss"), WITH_FORWARDS),
}

PRUNED = [lora(8), light_peft(2)]


class LaterSteps(TrainerCallback):
    """The ledger over steps that come late, and the processor's seconds of those after them."""

    def __init__(self, counted: Collection[int]):
        self.counted = counted
        self.seconds: list[float] = []
        self.begun: list[float] = []
        self.of_learning: list[float] = []
        self.reports: dict[int, MemoryReport] = {}
        self.lowest: dict[int, int] = {}
        self.model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for technique in attached_to(kwargs["model"]).techniques:
            if callable(learn := getattr(technique, "learn", None)):
                technique.learn = self.timed(learn)  # type: ignore[attr-defined]

    def timed(self, learn: Callable[..., None]) -> Callable[..., None]:
        """What updates a method's scores, with a note of the seconds that it took."""

        def timed(*given: Any) -> None:
            began = time.process_time()
            learn(*given)
            self.of_learning.append(time.process_time() - began)

        return timed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model = kwargs["model"]
        if state.global_step + 1 in self.counted:
            self.ledger = Ledger(self.model, getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]))
            self.ledger.start()
        self.began = time.process_time()
        if state.global_step >= max(self.counted):
            self.begun.append(self.began)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (step := state.global_step + 1) in self.counted:
            trained = (
                re.search(r"\.layer\.(\d+)\.", name) for name, p in self.model.named_parameters() if p.requires_grad
            )
            self.lowest[step] = min((int(block[1]) for block in trained if block), default=-1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.counted:
            self.ledger.stop()
            self.reports[state.global_step] = self.ledger.report()
        elif state.global_step > max(self.counted):
            self.seconds.append(time.process_time() - self.began)


@dataclass(frozen=True)
class Short:
    """What a short run came to.

    peak, kept, state, weights: bytes of the first counted step. kept_of: bytes kept in each. lowest: the lowest block
    that trains in each; -1 for none. seconds: the least of a step. mean_seconds: of a step. all_seconds: from the last
    counted step to the last one, with what is between steps. learning_seconds: the mean of an update of scores, in
    `all_seconds`; 0 without. measured: what techniques say of the last evaluation. frozen_in_blocks: numbers of the
    base that the blocks have in the end.
    """

    peak: int
    kept: int
    state: int
    weights: int
    kept_of: dict[int, int]
    lowest: dict[int, int]
    seconds: float
    mean_seconds: float
    all_seconds: float
    learning_seconds: float
    measured: dict[str, float]
    trained: int
    frozen_in_blocks: int


@functools.cache
def _short(recipe: str, steps: int, counted: tuple[int, ...], model: str, train_fields: str) -> Short:
    later = LaterSteps(counted)
    data = {"train": "packaged:rotten-tomatoes", "max_length": 40, "max_train_rows": 640, "max_eval_rows": 64}
    fields = {
        "max_steps": steps,
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-4,
        "bf16": True,
        "eval_strategy": "no",
        "save_strategy": "no",
        "seed": 0,
        **json.loads(train_fields),
    }
    with tempfile.TemporaryDirectory() as folder:
        made = {"model": model, "task": "text-classification", "data": data, "recipe": json.loads(recipe)}
        report = train(RunSettings.from_dict({**made, "train": fields, "output_dir": folder}), callbacks=[later])
    gc.collect()
    first = later.reports[counted[0]]
    return Short(
        first.peak_bytes,
        first.saved_bytes,
        first.largest["optimizer_state"],
        first.largest["weights"],
        {step: report.saved_bytes for step, report in later.reports.items()},
        later.lowest,
        min(later.seconds),
        statistics.mean(later.seconds),
        later.begun[-1] - later.begun[0],
        statistics.mean(later.of_learning) if later.of_learning else 0.0,
        report.quality["test"],
        report.trained_parameters,
        sum(p.numel() for name, p in later.model.named_parameters() if ".layer." in name and not p.requires_grad),
    )


def short(
    recipe: list[Any], steps: int = 12, counted: Collection[int] = (6,), model: str = "packaged:minilm", **fields: Any
) -> Short:
    return _short(json.dumps(recipe), steps, tuple(counted), model, json.dumps(fields))


def cost() -> list[Row]:
    """The rows of all methods whose claim is about bytes, updates or seconds."""
    one, eight, full = short([lora(1)]), short([lora(8)]), short([])
    fixed, growing = (short([{"id3": {"count": FEW, "strategy": name}}]) for name in ("static", "increment"))
    grown = short([{"id3": {"count": FEW, "steps": 6}}], counted=[9])
    mlps = short([{"unfreeze": {"blocks": [], "modules": MLPS}}])
    sparse, pruned, forward = short(["sparse_grad"]), short(PRUNED), inference_peak()
    updates = [run.measured["id3_updates"] for run in (growing, fixed)]
    return [
        at_most("id3: bytes of optimizer state beside 8 a trained number", grown.state, 8 * grown.trained, 1.01),
        at_most("id3: updates beside those of all numbers from the first step on", *updates, 0.6),
        Row("id3 beside LoRA r=1: bytes kept for backward", growing.kept, one.kept),
        at_most("id3 beside full tuning: peak bytes", growing.peak, full.peak, 1.0),
        at_most("id3 beside full tuning: peak bytes once all its numbers train", grown.peak, full.peak, 0.999),
        at_most("sparse_grad beside full tuning: peak bytes", sparse.peak, full.peak, 0.80),
        at_most("sparse_grad beside training of the MLPs: peak bytes", sparse.peak, mlps.peak, 0.76),
        Row("sparse_grad beside full tuning: seconds", sparse.seconds, full.seconds),
        Row("sparse_grad beside LoRA r=8: seconds", sparse.seconds, eight.seconds),
        *beside_lora(one, eight, full, sparse),
        *of_blocks(eight),
        at_most("light_peft: frozen numbers in the blocks", pruned.frozen_in_blocks, eight.frozen_in_blocks, 0.6),
        at_most("light_peft beside LoRA r=8: peak bytes after pruning", pruned.peak, eight.peak, 0.65),
        at_most("light_peft beside LoRA r=8: seconds after pruning", pruned.seconds, eight.seconds, 0.7),
        Row("light_peft beside LoRA r=8: bytes of weights after pruning", pruned.weights, eight.weights),
        at_most("zeroth_order beside a forward: peak bytes", short([lora(8), "zeroth_order"]).peak, forward, 1.05),
    ]


def beside_lora(one: Short, eight: Short, full: Short, sparse: Short) -> list[Row]:
    """Bytes of methods beside LoRA of as many numbers, or the same recipe without them."""
    rows = []
    for name in ("bitfit", "norm_tuning"):
        kept = short([name]).kept
        rows += [
            at_most(f"{name} beside {base}: bytes kept for backward", kept, other.kept, 0.75)
            for base, other in (("full tuning", full), ("LoRA r=8", eight))
        ]
    masked, routed = short([speft("gradient", FEW)]), short([CONTESTANTS["spt"].recipe[0]])
    in_mlps = short([lora(3, MLPS)])
    numbers = f"{in_mlps.trained:,} numbers beside {sparse.trained:,}"
    relu, plain = (short(recipe, model=with_relu()) for recipe in (CONTESTANTS["density_loss"].recipe, [lora(8)]))
    outer = [lora(8), {"bilevel_zofo": {"inner_steps": 5}}]  # the sixth step is an outer one
    bilevel, of_sgd = (short(recipe, optim="sgd") for recipe in (outer, [lora(8)]))
    return [
        *rows,
        at_most("speft beside LoRA r=1, as many numbers: peak bytes", masked.peak, one.peak, 1.10),
        at_most("spt beside LoRA r=8, at most as many numbers: peak bytes", routed.peak, eight.peak, 1.15),
        at_most(f"sparse_grad beside LoRA r=3 of the MLPs, {numbers}: peak bytes", sparse.peak, in_mlps.peak, 1.10),
        at_most("density_loss beside LoRA r=8, both with ReLU: peak bytes", relu.peak, plain.peak, 1.05),
        at_most("bilevel_zofo, an outer step, beside LoRA r=8, with SGD: peak bytes", bilevel.peak, of_sgd.peak, 1.10),
    ]


def of_blocks(eight: Short) -> list[Row]:
    """Bytes and seconds of steps in which some of the blocks train."""
    halves, block = short([lora(8), HALF]), short([lora(8), ONE])
    six = short([lora(8), HALF], counted=range(4, 10)).kept_of.values()
    single = short([lora(8), ONE], steps=20, counted=range(3, 19))
    kept_by_lowest = {single.lowest[step]: kept for step, kept in single.kept_of.items()}
    passes, without = (short([lora(8), one], steps=17) for one in (HALF, RANDOM))
    ten_steps = [passes.all_seconds, without.all_seconds]
    learned = passes.learning_seconds, without.all_seconds
    return [
        at_most("ist, half of the blocks, beside LoRA r=8: bytes kept for backward", halves.kept, eight.kept, 0.999),
        at_most(
            "ist, half of the blocks, beside LoRA r=8: mean bytes kept over six steps",
            statistics.mean(six),
            eight.kept,
            0.999,
        ),
        Row("ist, half of the blocks, beside LoRA r=8: most bytes kept over six steps", max(six), eight.kept),
        at_most("ist, one block, beside half of them: bytes kept for backward", block.kept, halves.kept, 0.999),
        *(
            # backward stops at the lowest block that trains; a tenth is for what is outside of the blocks
            at_most(
                f"ist, block {lowest + 1} of {BLOCKS} alone, beside LoRA r=8: bytes kept for backward",
                kept,
                eight.kept,
                min(round((BLOCKS - lowest) / BLOCKS + 0.1, 2), 0.999),
            )
            for lowest, kept in sorted(kept_by_lowest.items())
        ),
        Row("ist, half of the blocks, beside LoRA r=8: seconds", halves.mean_seconds, eight.mean_seconds),
        at_most("ist beside random blocks: seconds of ten steps and what is between them", *ten_steps, 1.15),
        at_most("ist: seconds of an update of its scores, beside ten steps with random blocks", *learned, 0.15),
    ]


def inference_peak() -> int:
    """Of a forward of the encoder with LoRA r=8, of as many rows as a step has."""
    model = Recipe.from_list([lora(8)]).apply(
        AutoModelForSequenceClassification.from_pretrained(assets.model_folder("minilm"), num_labels=2)
    )
    ids = torch.randint(0, 1000, (32, 40), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.zeros(32, dtype=torch.long)}
    with Ledger(model) as ledger, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model.eval()(**inputs)
    return ledger.report().peak_bytes


@functools.cache
def with_relu() -> str:
    """A folder of the encoder, with ReLU in place of GELU."""
    folder = tempfile.mkdtemp()
    shutil.copytree(assets.model_folder("minilm"), folder, dirs_exist_ok=True)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "relu"}))
    return folder


def contestants(part: str, names: Collection[str] | None) -> dict[str, Contestant]:
    """Those of these names, or all, and the baselines they need, before them."""
    there = TRAININGS[part][1]
    named = [name for name in names or there if name in there]
    wanted = {one for name in named for one in (name, there[name].beside, ALSO_BESIDE.get(name, ""))}
    wanted |= {one for name in named for one in WITHOUT_GOAL.get(name, ())}
    return {name: contestant for name, contestant in there.items() if name in wanted}


class Selections(Trainings):
    """With rows of what two methods claim beside quality."""

    def rows(self) -> list[Row]:
        rows, done = super().rows(), self.runs.get("quality", {})
        for name, base in ALSO_BESIDE.items():
            part = replace(REVIEWS, measure="loss") if name in OF_LOSS else REVIEWS
            rows += compared("quality", part, {name: replace(CONTESTANTS[name], beside=base)}, done)
        return [*rows, *densities(done), *with_forwards(self.runs.get("forwards", {}))]


def densities(done: dict[str, Any]) -> list[Row]:
    """The share of activations that are not zero; with a goal where all seeds are finished."""
    density, rows = replace(REVIEWS, measure="density"), []
    for loss in DENSITY_WEIGHTS:
        of_seed = [outcomes_of(done, one)[1] for one in (loss, RELU)]
        if common := of_seed[0].keys() & of_seed[1].keys():
            means = [statistics.mean(result(density, some[seed]) for seed in common) for some in of_seed]
            name = f"quality, {loss} beside {RELU}, {len(common)} of {len(SEEDS)} seeds: density"
            rows.append(at_most(name, *means, 0.6) if len(common) == len(SEEDS) else Row(name, *means))
    return rows


def with_forwards(done: dict[str, Any]) -> list[Row]:
    """What bilevel_zofo comes to beside others with as many forwards, and how many those are, once all is finished."""
    part, rows = TRAININGS["forwards"][0], []
    for name, bases in WITHOUT_GOAL.items():
        for base in bases:
            beside = compared("forwards", part, {name: replace(WITH_FORWARDS[name], beside=base)}, done)
            rows += [replace(row, goal="", holds=None) for row in beside]
    finished = [len(outcomes_of(done, name)[1]) == len(SEEDS) for name in ("bilevel_zofo", "zeroth_order")]
    if all(finished):
        name = "forwards, bilevel_zofo beside zeroth_order: forwards"
        rows.append(at_most(name, BILEVEL_FORWARDS, FORWARDS, 0.5))
        rows.append(
            Row("forwards, LoRA of as many forwards beside bilevel_zofo: forwards", 3 * LORA_STEPS, BILEVEL_FORWARDS)
        )
    return rows


def main() -> None:
    names = [name for _, some in TRAININGS.values() for name in some]
    do(
        command(__doc__ or "", ["cost", *TRAININGS], names, "selection.json"),
        ["minilm", "rotten-tomatoes"],
        trainings_of,
        lambda options, trainings: trainings.keep(cost()) if "cost" in options.only else None,
    )


def trainings_of(options: argparse.Namespace) -> Trainings:
    recipes = {name: one.recipe for _, some in TRAININGS.values() for name, one in some.items()}
    parts = {name: part for name, (part, _) in TRAININGS.items()}
    return Selections(parts, contestants, options.json, {"threads": options.threads, "methods": recipes})


if __name__ == "__main__":
    main()
