"""Weights trained in place, and quantised bases: what a step costs, and how well it trains, beside LoRA.

    python benchmarks/in_place.py --json docs/results/in_place.json
    python benchmarks/in_place.py --only cost --methods paca --rounds 2 --json in_place.json

cost: one step, forward and backward, of the packaged decoder: in float32; with weights in bfloat16 under autocast, what
trains in float32; and so with `chunked_loss`, without which logits of its many words are half of all bytes. Each method
stands beside a LoRA without dropout on the same layers, whose r is the whole number that comes nearest to the method's
trained parameters; both are rows of their own. `paca` stands beside a LoRA of equal r too, and `qwha` of r 64 beside
one of 64, in batches of 2,048 tokens, where its paper takes 8,192 and more: steps of these would take minutes here, and
what it makes beside its products counts for less there. `first norm alone` trains next to nothing, but backward goes
through all blocks: what it has of LoRA's bytes and seconds, no method for these layers can spare. In bfloat16, peft
casts the input of each layer to the float32 of LoRA's weights and autocast casts it back, so that q, k and v keep a
copy each of an input that is one; there each method stands, with the same limits, beside a LoRA whose own weights are
in bfloat16 too, as with peft's `autocast_adapter_dtype=False`, and whose layers share it. Bytes are the ledger's.
Seconds are those of the processor on one thread, the least of several steps, the method's and LoRA's in turn. No
optimizer is in it. Some stand beside full tuning too, with AdamW's update in both, and bytes of all there is, weights
and states included; full tuning has its weights in float32.

stored: the decoder as `save_packed` writes it, beside its weights in 16 bit: the whole file with what stays as it was,
embeddings above all, and the packed layers in it alone.

classification, decoder, rounded: trainings at equal numbers of steps, with learning rates looked for as `quality.py`
says, beside LoRA of equal trained parameters. rounded: the decoder's linear layers hold the nearest of 4 levels in
groups of 64 weights; `qwha` stands beside LoRA and beside a LoRA that starts at the singular vectors of what rounding
took, of which a row without a goal tells how it does beside LoRA. Every run is written to the JSON file when it ends,
and not run again when it is there.

The packaged decoder was itself distributed in 4 bits, as a GGUF file, and dequantised: the "16-bit" weights of its
linear layers lie on a grid of 16 levels in groups of 32. What methods that round lose here says little of other models.
"""

import argparse
import functools
import gc
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quality import REVIEWS, WORD_PROBLEMS, Contestant, Trainings, command, do
from result import Row, at_most, print_table
from rounded import folder
from shoestring import Recipe, assets
from shoestring.adapters.base import AdaptedLinear
from shoestring.quantisation import save_packed
from shoestring.quantisation.packed_model import TENSORS_FILE, packed_layers
from steps import above_weights, memory, seconds, stepped, with_adamw

KEPT, PEAK, SECONDS, WHOLE = "bytes kept", "peak above the weights", "seconds", "peak, weights and states included"
PEAK_AND_ONE = "peak above the weights, a dense change more for LoRA"
MODEL, BATCH = "smollm2", (4, 512)
VARIANTS: dict[str, tuple[str, list[Any]]] = {
    "in float32": ("float32", []),
    "in bfloat16": ("bfloat16", []),
    "in bfloat16 with chunked_loss": ("bfloat16", ["chunked_loss"]),
}
"""What all weights are in, and techniques that stand beside each method and LoRA."""
NF4, BITS_OF_ROUNDED = {"name": f"packaged:{MODEL}", "quantization": "nf4"}, 2
EVERYWHERE = {"minilm": ["query", "key", "value", "dense"], MODEL: "all-linear"}


@dataclass(frozen=True)
class Method:
    """A recipe, and what of a step may be at most so many times LoRA's.

    targets: the layers of LoRA, and of the method where it does not say its own. r: LoRA's, where none has about as
    many trained parameters. full: limits beside full tuning; None for no such rows. same_r: an r that the method and a
    LoRA both take, and limits beside that one; None for no such rows.
    without_data: settings that let its first technique attach without data, for costs; None leaves one out. parts: the
    trainings. nf4: LoRA stands on the base in nf4. stored: how many times the bytes of 16 bit its file may be, and the
    packed layers in it. apart: by part, how much worse than LoRA's its quality may be, where not as much as the part
    says.
    """

    recipe: list[Any]
    limits: dict[str, float] = field(default_factory=dict)
    targets: dict[str, Any] = field(default_factory=lambda: EVERYWHERE)
    r: int | None = None
    full: dict[str, float] | None = None
    same_r: tuple[int, dict[str, float]] | None = None
    without_data: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("classification", "decoder")
    nf4: bool = False
    stored: float | None = None
    apart: dict[str, float] = field(default_factory=dict)


QWHA = {"r": 16, "original": f"packaged:{MODEL}"}
METHODS: dict[str, Method] = {
    "paca": Method([{"paca": {"r": 16}}], {KEPT: 0.84, SECONDS: 0.85}, same_r=(16, {PEAK: 0.90, SECONDS: 0.90})),
    "s2ft": Method(
        [{"s2ft": {"o_ratio": 0.052, "down_ratio": 0.02, "target_modules": None}}],
        {KEPT: 0.80, PEAK: 0.95, SECONDS: 0.90},
        targets={"minilm": ["output.dense"], MODEL: ["o_proj", "down_proj"]},
        full={WHOLE: 1 / 2.5, SECONDS: 1 / 1.5},
    ),
    "qwha": Method(
        [{"qwha": QWHA}],
        same_r=(64, {PEAK_AND_ONE: 1.0, SECONDS: 1.2}),
        without_data={"init": "zero", "original": None},
        parts=("rounded",),
        apart={"rounded": 0.0},
    ),
    "l4q": Method([{"l4q": {"group_size": 64}}], {PEAK: 1.05}, apart={"classification": 0.01}),
    "sketchtune": Method(
        [{"sketchtune": {"groups": 1, "target_modules": None}}],
        without_data={"calibrate": False},
        parts=("decoder",),
        nf4=True,
        stored=0.40,
        apart={"decoder": 0.0},
    ),
    "SHiRA": Method([{"shira": {"r": 8}}]),
    "LoRA-FA": Method([{"lora": {"r": 16, "lora_alpha": 32}}, "lora_fa"]),
    "first norm alone": Method(
        [{"norm_tuning": {"target_modules": r".*layers\.0\.input_layernorm"}}], r=8, full={}, parts=()
    ),
}
QUALITY = {"classification": REVIEWS, "decoder": WORD_PROBLEMS, "rounded": WORD_PROBLEMS}


def lora(r: int, **more: Any) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, "lora_dropout": 0.0, **more}}


def entries(recipe: list[Any], targets: Any, **more: Any) -> list[Any]:
    """The recipe with its first technique, which has settings, on the layers that the comparison is about."""
    ((name, settings),) = recipe[0].items()
    settings = {"target_modules": targets, **settings, **more}
    return [{name: {key: value for key, value in settings.items() if value is not None}}, *recipe[1:]]


class Stepped:
    """A packaged model with a recipe, and one step of it.

    half: what trains is in bfloat16, which peft would leave so with `autocast_adapter_dtype=False`.
    """

    def __init__(self, model: str, recipe: list[Any], dtype: str = "float32", update: bool = False, half: bool = False):
        auto = AutoModelForCausalLM if model == MODEL else AutoModelForSequenceClassification
        frozen = any(isinstance(entry, dict) for entry in recipe)
        held = dtype if frozen else "float32"  # weights that train are not rounded
        loaded = auto.from_pretrained(assets.model_folder(model), dtype=held)
        ids = torch.randint(0, loaded.config.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
        self.model, self.step = stepped(loaded, ids, recipe, autocast=dtype == "bfloat16")
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained if half else ():
            parameter.data = parameter.data.bfloat16()
        self.optimizer: torch.optim.Optimizer | None = None
        if update:
            self.step, self.optimizer = with_adamw(self.model, self.step)
        self.trained = sum(p.numel() for p in trained)

    @functools.cached_property
    def bytes_of_step(self) -> dict[str, int]:
        report = memory(self.model, self.step, self.optimizer)
        return {KEPT: report.saved_bytes, PEAK: above_weights(report), WHOLE: report.peak_bytes}


@functools.cache
def equal_lora(name: str, model: str) -> tuple[int, list[Any]]:
    """The r and the recipe of the LoRA that comes nearest to a method's trained parameters, on its layers."""
    method = METHODS[name]
    ours = Stepped(model, without_data(method, model)).trained
    a_rank = Stepped(model, [lora(1, target_modules=method.targets[model])]).trained
    r = method.r or max(1, round(ours / a_rank))
    return r, [lora(r, target_modules=method.targets[model])]


def without_data(method: Method, model: str, **more: Any) -> list[Any]:
    return entries(method.recipe, method.targets[model], **method.without_data, **more)


def cost_of(name: str, variant: str, rounds: int) -> list[Row]:
    """The rows of one method."""
    method = METHODS[name]
    r, recipe = equal_lora(name, MODEL)
    label = f"{MODEL} {variant}, {name} beside"
    rows = rows_beside_lora(f"{label} LoRA r={r}", name, recipe, method.limits, variant, rounds)
    if method.full is not None:
        rows += rows_of(f"{label} full tuning, with AdamW", name, [], method.full, variant, rounds, update=True)
    if method.same_r:
        r, limits = method.same_r
        recipe = [lora(r, target_modules=method.targets[MODEL])]
        rows += rows_beside_lora(f"{label} LoRA of the same r, {r}", name, recipe, limits, variant, rounds, r=r)
    return rows


def rows_beside_lora(
    label: str, name: str, recipe: list[Any], limits: dict[str, float], variant: str, rounds: int, **more: Any
) -> list[Row]:
    """The rows beside one LoRA, and in bfloat16 beside it with weights in bfloat16 too."""
    halves = (False, True) if VARIANTS[variant][0] == "bfloat16" else (False,)
    return [
        row
        for half in halves
        for row in rows_of(
            f"{label} with weights in bfloat16" if half else label,
            name,
            recipe,
            limits,
            variant,
            rounds,
            half=half,
            **more,
        )
    ]


def rows_of(
    label: str,
    name: str,
    baseline: list[Any],
    limits: dict[str, float],
    variant: str,
    rounds: int,
    update: bool = False,
    half: bool = False,
    **more: Any,
) -> list[Row]:
    """The rows beside one baseline. half: what trains in it is in bfloat16. more: settings of the method for them."""
    gc.collect()
    dtype, others = VARIANTS[variant]
    ours = Stepped(MODEL, [*without_data(METHODS[name], MODEL, **more), *others], dtype, update)
    base = Stepped(MODEL, [*baseline, *others], dtype, update, half)
    rows = [Row(f"{label}: trained parameters", ours.trained, base.trained)]
    rows += [
        Row(f"{label}: {measure}", ours.bytes_of_step[measure], base.bytes_of_step[measure])
        for measure in ([WHOLE] if update else [KEPT, PEAK])
    ]
    if PEAK_AND_ONE in limits:
        dense = max(4 * m.in_features * m.out_features for m in ours.model.modules() if isinstance(m, AdaptedLinear))
        peaks = ours.bytes_of_step[PEAK], base.bytes_of_step[PEAK] + dense
        rows.append(Row(f"{label}: {PEAK_AND_ONE}", *peaks))
    rows.append(Row(f"{label}: {SECONDS}", *seconds(ours.step, base.step, rounds)))
    measures = [row.name.rpartition(": ")[2] for row in rows]
    return [
        at_most(row.name, row.ours, row.baseline, limits[measure]) if measure in limits else row
        for row, measure in zip(rows, measures, strict=True)
    ]


def stored(name: str) -> list[Row]:
    """What the file of a model takes whose layers the method holds packed, and these layers alone, beside 16 bit."""
    method = METHODS[name]
    if method.stored is None:
        return []
    model = AutoModelForCausalLM.from_pretrained(assets.model_folder(MODEL), dtype=torch.bfloat16)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    model = Recipe.from_list(without_data(method, MODEL)).apply(model)
    layers: dict[str, Any] = dict(packed_layers(model))
    of_layers = sum(2 * layer.in_features * layer.out_features for layer in layers.values())
    with tempfile.TemporaryDirectory() as written:
        save_packed(model, written)
        file = Path(written) / TENSORS_FILE
        packed = file.stat().st_size
        in_layers = sum(t.nbytes for key, t in load_file(file).items() if key.rpartition(".")[0] in layers)
    label = f"{MODEL}, {name} stored"
    return [
        at_most(f"{label}, beside 16 bit: bytes", packed, whole, method.stored),
        at_most(f"{label}, its layers alone, beside 16 bit: bytes", in_layers, of_layers, method.stored),
    ]


def contestants(part: str, names: Collection[str] | None) -> dict[str, Contestant]:
    """The methods of a part, all or with these names, each after the LoRA of equal trained parameters."""
    model = QUALITY[part].model
    made: dict[str, Contestant] = {}
    for name, method in METHODS.items():
        if part not in method.parts or (names is not None and name not in names):
            continue
        r, recipe = equal_lora(name, model)
        where = "" if method.targets is EVERYWHERE else f" on {' and '.join(method.targets[model])}"
        ours, apart = entries(method.recipe, method.targets[model]), method.apart.get(part)
        base = f"LoRA r={r}{where}{' in nf4' if method.nf4 else ''}"
        if part == "rounded":
            made[base] = Contestant(recipe, model=rounded)
            made["svd_start"] = Contestant([*recipe, "svd_start"], base, model=rounded, goal=False)
            made[name] = Contestant(ours, (base, "svd_start"), model=rounded, apart=apart)
        else:
            made[base] = Contestant(recipe, model=(lambda: NF4) if method.nf4 else None)
            made[name] = Contestant(ours, base, apart=apart)
    return made


def rounded() -> str:
    return folder(BITS_OF_ROUNDED)


def main() -> None:
    parser = command(__doc__ or "", ["cost", "stored", *QUALITY], METHODS, "in_place.json")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="of the part cost")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed")
    do(parser, ["minilm", "rotten-tomatoes", "smollm2", "gsm8k-test"], trainings_of, costs)


def trainings_of(options: argparse.Namespace) -> Trainings:
    settings = {"batch": BATCH, "rounds": options.rounds, "threads": options.threads}
    recipes = {name: method.recipe for name, method in METHODS.items()}
    return Trainings(QUALITY, contestants, options.json, {**settings, "methods": recipes})


def costs(options: argparse.Namespace, trainings: Trainings) -> None:
    """Those asked for; the file is written after each method."""
    for name in options.methods:
        if "stored" in options.only:
            trainings.keep(stored(name))
        for variant in options.variants if "cost" in options.only else ():
            trainings.keep(found := cost_of(name, variant, options.rounds))
            print_table(found)


if __name__ == "__main__":
    main()
