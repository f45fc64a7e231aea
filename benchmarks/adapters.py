"""Every weight adapter beside LoRA of as many trained parameters: what a step costs, and how well it trains.

    python benchmarks/adapters.py --only cost --json docs/results/adapters.json
    python benchmarks/adapters.py --only classification --seeds 0 --json docs/results/adapters.json

cost: one step, forward and backward, of the packaged encoder and decoder. LoRA's r is the whole number that comes
nearest to the method's trained parameters; both are rows of their own. Bytes are the ledger's. Seconds are those of the
processor on one thread, the least of several steps, the method's and LoRA's in turn. Limits are rows beside the LoRA
that they name. What a trainer does between steps, such as SNELLA's budget, is not in it, nor is the optimizer.

classification, decoder: LoRA and each method are trained at equal numbers of steps, with learning rates looked for as
`quality.py` says, and then three times as long. Every run is written to the JSON file when it ends, and not run again
when it is there. Rows say how many seeds are finished.
"""

import argparse
import dataclasses
import functools
import gc
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from quality import REVIEWS, WORD_PROBLEMS, Contestant, Trainings, command, do
from result import Row, at_most, print_table, read_rows
from shoestring import assets
from steps import Step, above_weights, memory, seconds, stepped

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Model:
    """A packaged model, what of it adapters without places of their own adapt, and the batch of one step."""

    auto: Any
    targets: Any
    batch: tuple[int, int]
    widest: tuple[int, int]  # sizes of the largest adapted layer
    queries_and_values: tuple[str, ...]
    rounds: int  # steps of each that are timed
    logits: int  # numbers of them in a step
    num_labels: int | None = None

    @property
    def largest_weight_bytes(self) -> int:
        return self.widest[0] * self.widest[1] * FLOAT_BYTES


MODELS = {
    "minilm": Model(
        AutoModelForSequenceClassification,
        ["query", "key", "value", "dense"],
        (4, 256),
        (1536, 384),
        ("query", "value"),
        3,
        4 * 2,
        num_labels=2,
    ),
    "smollm2": Model(AutoModelForCausalLM, "all-linear", (1, 256), (1536, 576), ("q_proj", "v_proj"), 2, 256 * 49152),
}


def lora(r: int, **more: Any) -> dict[str, Any]:
    return {"lora": {"r": r, "lora_alpha": 2 * r, **more}}


PISSA = {"lora": {"r": 8, "lora_alpha": 8, "init_lora_weights": "pissa"}}
OWN_PLACES = ("alore", "bottleneck")

METHODS: dict[str, list[Any]] = {
    "hut": [{"hut": {"r": 8}}],
    "hut literal": [{"hut": {"r": 8, "form": "literal"}}],
    "s2_lora": [{"s2_lora": {"r": {"minilm": 18, "smollm2": 96}}}],
    "wara": [{"wara": {"r": 16}}],
    "wara per_band": [{"wara": {"r": 8, "per_band": True}}],
    "wara tiny": [{"wara": {"r": {"minilm": 48, "smollm2": 54}, "form": "tiny"}}],
    "nera": [{"nera": {"r": 4}}],
    "nera not centred": [{"nera": {"r": 4, "centred": False}}],
    "tlora": [{"tlora": {"r": 7}}],
    "tlora starred": [{"tlora": {"r": 4, "residual": "lora"}}],
    "snell": [{"snell": {"r": 8}}],
    "snella": [{"snella": {"r": 8}}],
    "alore": [{"alore": {"r": 36}}],
    # an allocation over blocks has no number for a layer in none
    "mola": [{"mola": {"r": 8, "exclude_modules": {"minilm": ["bert.pooler.dense"], "smollm2": None}}}],
    "miss": [{"miss": {"r": 16}}],
    "bat": [{"miss": {"r": 16, "init_weights": "bat"}}],
    "bottleneck houlsby": [{"bottleneck": {"form": "houlsby", "r": 36}}],
    "bottleneck pfeiffer": [{"bottleneck": {"form": "pfeiffer", "r": 72}}],
    "bottleneck parallel": [{"bottleneck": {"form": "parallel", "r": 72}}],
    "bottleneck adaptformer": [{"bottleneck": {"form": "adaptformer", "r": 72}}],
    "ba_lora": [PISSA, "ba_lora"],
}
"""WaRA's grid form is for tokens of images; these models have none."""

WITHOUT = {"ba_lora": ("PiSSA r=8", PISSA)}  # the adapter without what the method adds, as a further baseline


def entries(recipe: list[Any], model: str) -> list[Any]:
    """The recipe for one model: its values where settings have one for each, and its places."""
    made: list[Any] = []
    for entry in recipe:
        if isinstance(entry, str):
            made.append(entry)
            continue
        ((name, settings),) = entry.items()
        settings = {key: value[model] if isinstance(value, dict) else value for key, value in settings.items()}
        if name not in OWN_PLACES:
            settings.setdefault("target_modules", MODELS[model].targets)
        made.append({name: settings})
    return made


@dataclass(frozen=True)
class Limit:
    """At most `ratio` times LoRA's, plus bytes that depend on the model.

    beside: the LoRA that is meant; None for that of equal parameters.
    """

    measure: str
    ratio: float
    beside: Callable[[Model], dict[str, Any]] | None = None
    more_bytes: Callable[[Model], int] | None = None


def rank(r: int) -> Callable[[Model], dict[str, Any]]:
    return lambda model: lora(r)


KEPT, PEAK, SECONDS = "bytes kept", "peak above the weights", "seconds"
LIMITS: dict[str, list[Limit]] = {
    "hut": [Limit(PEAK, 1, more_bytes=lambda model: model.largest_weight_bytes)],
    "hut literal": [Limit(PEAK, 1, more_bytes=lambda model: model.largest_weight_bytes)],
    "wara": [Limit(PEAK, 1.05, rank(16)), Limit(SECONDS, 1.3, rank(16))],
    "wara per_band": [Limit(PEAK, 1.05, rank(8)), Limit(SECONDS, 1.3, rank(8))],
    "nera": [Limit(PEAK, 1.5, rank(4))],
    "nera not centred": [Limit(PEAK, 1.5, rank(4))],
    "tlora": [
        Limit(PEAK, 1, rank(49), lambda model: 2 * max(model.widest) ** 2 * FLOAT_BYTES),
        Limit(SECONDS, 2, rank(49)),
    ],
    "tlora starred": [
        Limit(PEAK, 1, rank(4), lambda model: 2 * max(model.widest) ** 2 * FLOAT_BYTES),
        Limit(SECONDS, 2, rank(4)),
    ],
    "snell": [Limit(PEAK, 1.08, rank(8)), Limit(SECONDS, 1.3, rank(8))],
    "snella": [Limit(PEAK, 1.08, rank(8)), Limit(SECONDS, 1.3, rank(8))],
    "alore": [Limit(PEAK, 1, lambda model: lora(36, target_modules=list(model.queries_and_values)))],
    "mola": [Limit(PEAK, 1.3, rank(64)), Limit(SECONDS, 2, rank(64))],
    "miss": [Limit(PEAK, 1), Limit(SECONDS, 1)],
    "bat": [Limit(SECONDS, 1.6)],
    "ba_lora": [Limit(PEAK, 1, lambda model: PISSA, lambda model: model.logits * FLOAT_BYTES)],
}


class Stepped:
    """A packaged model with a recipe, and what a step of it costs."""

    def __init__(self, name: str, recipe: list[Any]):
        self.model, self.step = self._prepared(name, recipe)
        self.trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @staticmethod
    def _prepared(name: str, recipe: list[Any]) -> tuple[Any, Step]:
        about = MODELS[name]
        torch.manual_seed(0)  # of a new head
        labels = {} if about.num_labels is None else {"num_labels": about.num_labels}
        model = about.auto.from_pretrained(assets.model_folder(name), dtype=torch.float32, **labels)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, model.config.vocab_size, about.batch, generator=generator)
        classes = None if about.num_labels is None else torch.arange(about.batch[0]) % about.num_labels
        return stepped(model, ids, entries(recipe, name), classes)

    @functools.cached_property
    def bytes_of_step(self) -> dict[str, int]:
        report = memory(self.model, self.step)
        return {KEPT: report.saved_bytes, PEAK: above_weights(report)}


@functools.cache
def parameters_a_rank(model: str) -> int:
    return Stepped(model, [lora(1)]).trained


def equal_rank(model: str, trained: int) -> int:
    """LoRA's r that comes nearest to so many trained parameters."""
    return max(1, round(trained / parameters_a_rank(model)))


def cost_of(name: str, model: str) -> list[Row]:
    """The rows of one method on one model."""
    gc.collect()
    ours = Stepped(model, METHODS[name])
    r = equal_rank(model, ours.trained)
    limits = LIMITS.get(name, [])
    equal = [limit for limit in limits if limit.beside is None]
    rows = rows_of(f"{model}, {name} beside LoRA r={r}", ours, Stepped(model, [lora(r)]), equal, model)
    others: dict[str, tuple[dict[str, Any], list[Limit]]] = {}
    for limit in limits:
        if limit.beside is not None:
            others.setdefault(str(limit.beside(MODELS[model])), (limit.beside(MODELS[model]), []))[1].append(limit)
    for entry, some in others.values():
        settings = entry["lora"]
        label = f"{model}, {name}, limit beside {'PiSSA' if entry is PISSA else 'LoRA'} r={settings['r']}"
        label += " of queries and values" if "target_modules" in settings else ""
        if entry == lora(r):  # the same LoRA: only what the limits say is new
            rows = limited(rows, some, MODELS[model])
        else:
            rows += rows_of(label, ours, Stepped(model, [entry]), some, model, only_limits=True)
    return rows


def rows_of(
    label: str, ours: Stepped, base: Stepped, limits: list[Limit], model: str, only_limits: bool = False
) -> list[Row]:
    rows = [Row(f"{label}: trained parameters", ours.trained, base.trained)]
    rows += [
        Row(f"{label}: {measure}", ours.bytes_of_step[measure], base.bytes_of_step[measure]) for measure in (KEPT, PEAK)
    ]
    wanted = {limit.measure for limit in limits}
    if not only_limits or SECONDS in wanted:
        rows.append(Row(f"{label}: {SECONDS}", *seconds(ours.step, base.step, MODELS[model].rounds)))
    if only_limits:
        rows = [row for row in rows if row.name.rpartition(": ")[2] in wanted]
    return limited(rows, limits, MODELS[model])


def limited(rows: list[Row], limits: list[Limit], about: Model) -> list[Row]:
    """The rows, with goals where there are limits on what they measure."""
    made = []
    for row in rows:
        for limit in limits:
            if row.name.rpartition(": ")[2] == limit.measure:
                if limit.more_bytes is None:
                    row = at_most(row.name, row.ours, row.baseline, limit.ratio)
                else:
                    most = limit.ratio * row.baseline + limit.more_bytes(about)
                    row = Row(row.name, row.ours, row.baseline, f"<= {most:,.0f}", row.ours <= most)
        made.append(row)
    return made


QUALITY = {
    "classification": dataclasses.replace(REVIEWS, longer={"max_steps": 300}),
    "decoder": dataclasses.replace(WORD_PROBLEMS, longer={"max_steps": 120}),
}


def contestants(file: str, part: str, names: Collection[str] | None) -> dict[str, Contestant]:
    """The methods, all or with these names, each after the LoRA of equal trained parameters.

    file: where costs tell which LoRA is meant; those that were not measured are counted now.
    """
    model = QUALITY[part].model
    beside = re.compile(rf"{model}, (.*) beside LoRA r=(\d+): trained parameters")
    ranks = {match[1]: int(match[2]) for row in read_rows(file) if (match := beside.fullmatch(row.name))}
    made: dict[str, Contestant] = {}
    for name in METHODS if names is None else names:
        r = ranks.get(name) or equal_rank(model, Stepped(model, METHODS[name]).trained)
        baselines = {f"LoRA r={r}": lora(r)} | ({WITHOUT[name][0]: WITHOUT[name][1]} if name in WITHOUT else {})
        for base, entry in baselines.items():
            made.setdefault(base, Contestant(entries([entry], model)))
        made[name] = Contestant(entries(METHODS[name], model), tuple(baselines))
    return made


def main() -> None:
    parser = command(__doc__ or "", ["cost", *QUALITY], METHODS, "adapters.json")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="of the part cost")
    parser.add_argument("--again", action="store_true", help="measure costs that are in the file already, too")
    parser.add_argument(
        "--twice",
        nargs="+",
        default=[],
        metavar="NAME",
        help="methods, and LoRAs as 'LoRA r=8', whose longer training is made at twice the rate found as well as half",
    )
    do(parser, ["minilm", "rotten-tomatoes", "smollm2", "gsm8k-test"], trainings_of, costs)


def trainings_of(options: argparse.Namespace) -> Trainings:
    settings = {"rounds": {name: model.rounds for name, model in MODELS.items()}, "threads": options.threads}
    of_file = functools.partial(contestants, options.json)
    return Trainings(QUALITY, of_file, options.json, {**settings, "methods": METHODS})


def costs(options: argparse.Namespace, trainings: Trainings) -> None:
    """Those asked for; the file is written after each method."""
    for model in options.models if "cost" in options.only else ():
        for name in options.methods:
            there = any(row.name.startswith(f"{model}, {name} beside") for row in read_rows(options.json))
            if options.again or not there:
                trainings.keep(found := cost_of(name, model))
                print_table(found)


if __name__ == "__main__":
    main()
