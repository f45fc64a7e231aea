"""Comparisons with made-up figures, in the shape that real ones have."""

import math
import random

from shoestring.compare.comparison import Compared, Comparison, Difference, Failure, Spread
from shoestring.compare.measures import COSTS, Measure, front

ACCURACY = Measure("accuracy", "accuracy", "share", "higher")
LOSS = Measure("eval_loss", "held-out loss", "", "lower")
METHODS = (
    "full", "lora", "dora", "ia3", "ln_tuning", "vera", "prompt", "prefix", "miss", "shira", "hut", "snell", "bitfit",
    "lora + recompute", "dora + recompute", "sparse_grad", "lean_mlp + lora", "in_place", "galore", "lisa", "side",
    "lora + token_tune + chunked_loss", "quantised 4 bits + lora + recompute", "bottleneck", "random_layers",
)  # fmt: skip
PARTS = ("weights", "adapters", "gradients", "optimizer_state", "saved_for_backward", "logits_and_loss", "temporary")
HOSTILE = (
    '</script><script>alert("name")</script>',
    "<b>bold</b> & 'quoted' \"twice\"",
    "<!-- <script> é 名前 🧵 \u2028 \u202e",
    "=HYPERLINK(\"x\")|*_`[a](b)`_*|",
    "<img src=x onerror=alert(1)>",
)  # fmt: skip
MEASURES = (ACCURACY, LOSS, *(each for each in COSTS if each.name not in ("gpu_peak_bytes", "seconds_to_target")))


def make(recipes=25, seeds=3, *, steps=160, failures=2, missing=4, names=(), seed=0, **changed):
    """A comparison of so many recipes: costs over orders of magnitude, quality that saturates, noise between seeds."""
    chance = random.Random(seed)
    names = [*names, *(_name(place) for place in range(recipes))][:recipes]
    made = [_recipe(name, place, seeds, steps, chance) for place, name in enumerate(names)]
    made = [_with(recipe, front=found) for recipe, found in zip(made, _fronts(made), strict=True)]
    made.sort(key=lambda recipe: -recipe.values["accuracy"].mean)
    baseline = names[0] if names else None
    made = [_with(recipe, difference=_difference(recipe, made, baseline)) for recipe in made]
    given = {
        "name": "encoder classification",
        "task": "text-classification",
        "model": "packaged:minilm",
        "quality": "accuracy",
        "baseline": baseline,
        "measures": MEASURES if made else (),
        "recipes": tuple(made),
        "failures": tuple(Failure(f"reversible-{k}", k, _REASONS[k % len(_REASONS)]) for k in range(failures)),
        "missing": missing,
        "machine": {"cpu": "2 cores, x86_64", "memory": "16 GiB", "accelerator": "none"},
        "versions": {"shoestring": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        "command": "shoestring compare benchmarks/suites/encoder.yaml",
        "made_at": "2026-11-20T18:03:11+00:00",
        "on_the_way": ACCURACY,
    }
    return Comparison(**(given | changed))


_REASONS = (
    "SettingError: reversible needs blocks whose two halves have one size, but encoder.layer.0 has 384 and 1536; "
    "take recompute instead.",
    "out of memory: the process was ended by the system after 41 steps",
)


def _with(recipe, **changed):
    return Compared(**({name: getattr(recipe, name) for name in Compared.__dataclass_fields__} | changed))


def _name(place):
    method = METHODS[place % len(METHODS)]
    return method if place < len(METHODS) else f"{method} r{2 ** (place // len(METHODS))}"


def _spread(mean, noise, seeds, chance, highest=math.inf):
    values = tuple(min(mean * (1 + chance.gauss(0, noise)), highest) for _ in range(seeds))
    mean = math.fsum(values) / seeds
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (seeds - 1)) if seeds > 1 else None
    return Spread(mean, std, values)


def _recipe(name, place, seeds, steps, chance):
    total, full = 22_700_000, place == 0
    trained = total if full else round(10 ** chance.uniform(3, 6.2))
    parts = {part: round(chance.uniform(0.4, 6) * 2**20) for part in PARTS}
    parts |= {"weights": 87 * 2**20, "adapters": 0 if full else 4 * trained}
    parts |= {"gradients": 4 * trained, "optimizer_state": 8 * trained}
    parts["saved_for_backward"] = round(chance.choice((1, 0.8, 0.5, 0.3)) * 180 * 2**20)
    memory = sum(parts.values())
    accuracy = 0.55 if name == "prompt" else 0.88 - 0.07 * (1 - math.log10(trained) / 7.4) - abs(chance.gauss(0, 0.012))
    step = 0.18 * (1.35 if "recompute" in name else 1) * chance.uniform(0.75, 1.2)
    exact = {
        "trained_parameters": trained, "trained_share": trained / total, "checkpoint_bytes": 4 * trained + 1024,
        "peak_bytes": memory, "last_step_bytes": memory, "trained_in_backbone": max(trained - 770, 0),
        "kept_bytes": parts["saved_for_backward"], "weights_bytes": parts["weights"],
        "gradients_bytes": parts["gradients"], "optimizer_bytes": parts["optimizer_state"],
    }  # fmt: skip
    noisy = {
        "eval_loss": 1.2 - accuracy, "process_peak_bytes": memory + 500 * 2**20, "step_seconds": step,
        "step_seconds_p90": 1.2 * step, "all_steps_seconds": step * steps, "train_seconds": 1.1 * step * steps,
        "tokens_a_second": 1280 / step,
        "latency_seconds": 0.04, "forgetting": chance.uniform(0.001, 0.2),
    }  # fmt: skip
    values = {key: Spread(value, 0.0 if seeds > 1 else None, (value,) * seeds) for key, value in exact.items()}
    values |= {key: _spread(value, 0.02, seeds, chance) for key, value in noisy.items()}
    values["accuracy"] = _spread(accuracy, 0.004, seeds, chance, 1.0)
    values["ppt"] = _spread(accuracy * 0.98, 0.003, seeds, chance)
    values["ppe"] = _spread(accuracy * 0.97, 0.003, seeds, chance)
    values["pme"] = _spread(accuracy * math.exp(-math.log10(memory / 600e6 + 1)), 0.003, seeds, chance)
    yaml = f"recipe:\n  - {name!r}: {{target_modules: [query, value], alpha: 16}}\n"
    run = f"model: packaged:minilm\ntask: text-classification\ndata: {{train: packaged:rotten-tomatoes}}\n{yaml}"
    return Compared(
        name,
        yaml,
        run + f"train:\n  max_steps: {steps}\n  learning_rate: 1.0e-3\n  seed: 0\noutput_dir: runs/{place}\n",
        tuple(range(seeds)),
        values,
        parts,
        {s: [(step, 0.7 * math.exp(-3 * step / steps) + 1.2 - accuracy + abs(chance.gauss(0, 0.05)))
             for step in range(1, steps + 1)] for s in range(seeds)},
        {s: [(step * k * steps / 5, accuracy * (1 - 0.4 * math.exp(-k)) + chance.gauss(0, 0.003)) for k in range(1, 6)]
         for s in range(seeds)},
        notes=("the head is trained too",) if place % 7 == 2 else (),
    )  # fmt: skip


def _fronts(made):
    found = [[] for _ in made]
    for cost in MEASURES[1:]:
        points = [{name: spread.mean for name, spread in recipe.values.items()} for recipe in made]
        if any(cost.name in point for point in points):
            for place, on in enumerate(front(points, {"accuracy": "higher", cost.name: cost.better})):
                found[place] += [cost.name] * on
    return [tuple(each) for each in found]


def _difference(recipe, made, baseline):
    if recipe.name == baseline:
        return None
    against = next(other for other in made if other.name == baseline).values["accuracy"].mean
    mean, half = recipe.values["accuracy"].mean - against, 0.018
    clear = abs(mean) > half
    return Difference(mean, mean - half, mean + half, 0.01 if clear else 0.3, clear)
