"""What an encoder of images gains by learning on without labels in a new domain, as ExPLoRA does it.

    python benchmarks/new_domain.py --json docs/results/new_domain.json
    python benchmarks/new_domain.py --seeds 0 --json new_domain.json

A tiny ViT learns by masked autoencoding from drawings, boxes and ellipses of random grey, then goes on with packaged
pictures of clothing in three ways at equal steps: LoRA and the last block (ExPLoRA), LoRA alone, the last block alone.
ExPLoRA on as many more drawings shows what is due to longer training and not to the new domain. Before and after, a
linear probe on the mean of its patches (2,000 labels, ridge regression) and LoRA on 500 labels show what its features
are worth on 2,000 other pictures. Every run is written to the JSON file when it ends, and not run again when it is
there.
"""

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from quality import SEEDS
from result import Row, print_table, read_runs, write
from runs import Outcome, finish
from shoestring import Recipe, assets
from shoestring.objectives import MaskedAutoencoder
from shoestring.selection import Unfreeze

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
CONFIG = ViTConfig(**SIZES, image_size=28, patch_size=7, num_channels=1, num_labels=10)
BEFORE, ON, TUNED = 300, 600, 150  # steps
MASKED = MaskedAutoencoder(mask_ratio=0.5, decoder_width=48, decoder_blocks=1, decoder_heads=4)
LORA = LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
ON_DRAWINGS = "explora on drawings"
WAYS = {
    "explora": lambda: Recipe(LORA, Unfreeze(blocks=[-1], norms=True), MASKED),
    ON_DRAWINGS: lambda: Recipe(LORA, Unfreeze(blocks=[-1], norms=True), MASKED),
    "LoRA alone": lambda: Recipe(LORA, MASKED),
    "last block alone": lambda: Recipe(Unfreeze(blocks=[-1]), MASKED),
}
MEASURES = {"probe": "accuracy of a linear probe", "tuned": "accuracy of LoRA on 500 labels"}

Labelled = tuple[Tensor, Tensor]


def drawings(count: int, generator: torch.Generator) -> Tensor:
    """Boxes and ellipses of random grey on a gradient: the first domain."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
    slope = torch.rand(count, 2, 1, 1, generator=generator) * 2 - 1
    drawn = 0.5 + 0.25 * (slope[:, 0] * rows + slope[:, 1] * columns)
    for form in range(4):
        y, x, high, wide, grey = torch.rand(count, 5, 1, 1, generator=generator).unbind(1)
        dy, dx = (rows - (y * 2 - 1)) / (0.1 + 0.5 * high), (columns - (x * 2 - 1)) / (0.1 + 0.5 * wide)
        inside = (dy**2 + dx**2 < 1) if form % 2 else (dy.abs().maximum(dx.abs()) < 1)
        drawn = torch.where(inside, grey, drawn)
    return (drawn * 2 - 1)[:, None]


def clothing(split: str, count: int) -> Labelled:
    """Packaged pictures and what they show: the second domain."""
    rows = assets.load_data("fashion-mnist")[split].shuffle(seed=0).select(range(count))
    pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in rows["image"]])
    return pixels[:, None].float() / 127.5 - 1, torch.tensor(rows["label"])


def learn(model: nn.Module, batch_of: Callable[[], dict[str, Tensor]], steps: int, rate: float) -> None:
    """Steps of AdamW, the rate falling to zero."""
    trained = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 20, 1 - step / steps)
        loss = model(**batch_of()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def some(data: Labelled, count: int) -> Labelled:
    rows = torch.randint(0, len(data[0]), (count,))
    return data[0][rows], data[1][rows]


def probed(encoder: nn.Module, train: Labelled, test: Labelled) -> float:
    """Accuracy of a linear probe; ridge regression, so that nothing is drawn."""
    with torch.no_grad():
        x, z = (
            encoder.eval()(pixel_values=part[0]).last_hidden_state[:, 1:].mean(1).double() for part in (train, test)
        )
    mean, deviation = x.mean(0), x.std(0)
    x, z = (nn.functional.pad((part - mean) / deviation, (0, 1), value=1.0) for part in (x, z))
    wanted = nn.functional.one_hot(train[1], CONFIG.num_labels).double()
    weights = torch.linalg.solve(x.T @ x + 10 * torch.eye(x.shape[1]).double(), x.T @ wanted)
    return float(((z @ weights).argmax(1) == test[1]).double().mean())


def tuned(encoder: nn.Module, train: Labelled, test: Labelled) -> float:
    """Accuracy of a classifier on the encoder, tuned on the labels by LoRA."""
    base = ViTForImageClassification(CONFIG)
    base.vit.load_state_dict(encoder.state_dict())
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    with Recipe(lora)(base) as model:
        learn(model, lambda: dict(zip(("pixel_values", "labels"), some(train, 32), strict=True)), TUNED, 5e-3)
        with torch.no_grad():
            return float((model.eval()(pixel_values=test[0]).logits.argmax(1) == test[1]).double().mean())


def pretrained(seed: int) -> nn.Module:
    """The encoder of drawings."""
    torch.manual_seed(seed)
    source = ViTModel(CONFIG, add_pooling_layer=False)
    generator = torch.Generator().manual_seed(seed)
    with Recipe(MASKED)(source) as model:
        learn(model, lambda: {"pixel_values": drawings(64, generator)}, BEFORE, 2e-3)
    return source


def gone_on(source: nn.Module, way: str, pictures: Tensor, seed: int) -> nn.Module:
    """An ordinary encoder that has seen the new domain, or more of the first one."""
    torch.manual_seed(seed)
    model = WAYS[way]().apply(copy.deepcopy(source))
    generator = torch.Generator().manual_seed(len(SEEDS) + seed)  # other drawings than those of `pretrained`

    def batch() -> dict[str, Tensor]:
        drawn = way == ON_DRAWINGS
        return {"pixel_values": drawings(64, generator) if drawn else some((pictures, pictures), 64)[0]}

    learn(model, batch, ON, 3e-3)
    encoder = model.model
    return encoder.merge_and_unload() if hasattr(encoder, "merge_and_unload") else encoder


def planned(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for way in ("before", *WAYS):
        yield f"{way}|{seed}", {"way": way, "seed": seed}


class Measured:
    """What each encoder is worth; that of drawings is trained once a seed."""

    def __init__(self) -> None:
        self.pictures, self.kinds = clothing("train", 6000)
        self.test = clothing("test", 2000)
        self.sources: dict[int, nn.Module] = {}

    def __call__(self, settings: dict[str, Any]) -> Outcome:
        way, seed = settings["way"], settings["seed"]
        if seed not in self.sources:
            self.sources[seed] = pretrained(seed)
        encoder = self.sources[seed]
        if way != "before":
            encoder = gone_on(encoder, way, self.pictures, seed)
        labelled = [(self.pictures[:count], self.kinds[:count]) for count in (2000, 500)]
        torch.manual_seed(seed)
        return {"probe": probed(encoder, labelled[0], self.test), "tuned": tuned(encoder, labelled[1], self.test)}


def rows(done: dict[str, Outcome]) -> list[Row]:
    """Each way beside the encoder before, and ExPLoRA beside it on drawings; means over the seeds that are there."""
    found = []
    for way, base in (*((way, "before") for way in WAYS), ("explora", ON_DRAWINGS)):
        seeds = [seed for seed in SEEDS if all(f"{one}|{seed}" in done for one in (way, base))]
        for measure, what in MEASURES.items() if seeds else ():
            ours, beside = (statistics.mean(done[f"{one}|{seed}"][measure] for seed in seeds) for one in (way, base))
            goal = f"above {base}" if way == "explora" else ""
            name = f"{way} beside {base}, {len(seeds)} of {len(SEEDS)} seeds: {what}"
            found.append(Row(name, ours, beside, goal, ours > beside if goal else None))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="the runs to do now")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="new_domain.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install(["fashion-mnist"])
    runs = read_runs(options.json)
    done = runs.setdefault("accuracy", {})
    settings = {"steps": {"before": BEFORE, "on": ON, "tuned": TUNED}, "threads": options.threads}

    measured = Measured()
    for seed in options.seeds:
        finish(planned(seed), done, measured, lambda: write(rows(done), options.json, SEEDS, runs, **settings))
    print_table(rows(done), "An encoder in a new domain")


if __name__ == "__main__":
    main()
