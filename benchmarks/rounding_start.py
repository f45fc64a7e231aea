"""How much of the error of rounded weights a start makes up for: `qwha` beside low-rank starts of equal size.

    python benchmarks/rounding_start.py --json docs/results/rounding_start.json
    python benchmarks/rounding_start.py --bits 2 --blocks 29 --json rounding_start.json

The packaged decoder, its linear layers rounded to the nearest of 2^bits levels in groups of 64 weights. It was itself
distributed in 4 bits, as a GGUF file, and dequantised: its "16-bit" weights lie on a grid of 16 levels in groups of 32,
so that what rounding to 4 bits takes here is not what it takes of other models. The error is
that of a layer's output, ||(W_0 - W_Q - start) X^T|| over ||(W_0 - W_Q) X^T||, on the inputs that it gets in the
rounded model; the mean over the layers of some blocks. Starts are found on some rows of the packaged word problems, and
are measured on others. The low-rank starts have as many numbers: the SVD of W_0 - W_Q (as in LoftQ's first round), and
the same weighted by the inputs (as in CLoQ), which no matrix of that rank can beat on the rows that it is found on.
"""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from result import at_most, print_table, read_rows, rows_beside, write
from rounded import GROUP_SIZE, MODEL, low_rank, original, round_layers
from shoestring import assets
from shoestring.adapters import QWHAConfig
from shoestring.adapters.hadamard import transform
from shoestring.adapters.qwha import DAMPING
from shoestring.quantisation.calibration import Moments, moments_in_parts
from shoestring.training.data import load_splits
from shoestring.training.settings import DataSettings

DATA = "gsm8k-test"


def rows_of_tokens(count: int) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder(MODEL))
    rows = load_splits(DataSettings(train=f"packaged:{DATA}", max_train_rows=count), 0)["train"]
    return [{"input_ids": tokenizer(f"{row['question']} {row['answer']}")["input_ids"]} for row in rows]


def starts(delta: Tensor, moments: Moments, r: int) -> dict[str, Tensor]:
    """What each method adds to the rounded weight, in double precision."""
    config = QWHAConfig(r=r)
    found = config.start_of(delta, moments)
    rows = torch.zeros(delta.numel(), dtype=delta.dtype).index_copy(0, found.places, found.values)
    total = moments.total + DAMPING * moments.total.diagonal().mean() * torch.eye(len(moments.total))
    root = torch.linalg.cholesky(total)
    b, a = low_rank(delta, r)
    weighted_b, weighted_a = low_rank(delta @ root, r)
    return {
        "qwha": transform(rows.view(delta.shape), transposed=True),
        "svd": b @ a,
        "weighted svd": torch.linalg.solve_triangular(root, weighted_b @ weighted_a, upper=False, left=False),
    }


def error(delta: Tensor, moments: Moments) -> float:
    return float(((delta @ moments.total) * delta).sum().clamp(min=0).sqrt())


def errors_at(bits: int, r: int, blocks: list[int], num_rows: int) -> dict[str, float]:
    """The mean relative error of each start."""
    model = original()
    lost = round_layers(model, bits)
    deltas = {name: delta.double() for name, delta in lost.items() if int(name.split(".")[2]) in blocks}
    rows = rows_of_tokens(2 * num_rows)
    layers = {name: model.get_submodule(name) for name in deltas}
    seen, held_out = (moments_in_parts(model, layers, part, num_rows) for part in (rows[:num_rows], rows[num_rows:]))
    relative: dict[str, list[float]] = {}
    for (name, moments), (_, others) in zip(seen, held_out, strict=True):
        delta = deltas[name]
        for start, added in starts(delta, moments, r).items():
            relative.setdefault(start, []).append(error(delta - added, others) / error(delta, others))
    return {start: sum(values) / len(values) for start, values in relative.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--r", type=int, default=16, help="of the low-rank starts; qwha has as many numbers")
    parser.add_argument("--blocks", type=int, nargs="+", default=[0, 15, 29])
    parser.add_argument("--rows", type=int, default=32, help="to calibrate on, and as many to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", default="rounding_start.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    assets.install([MODEL, DATA])
    settings = {"model": MODEL, "data": DATA, "group_size": GROUP_SIZE}
    settings |= {"r": options.r, "blocks": options.blocks, "calibration_rows": options.rows}
    for bits in options.bits:
        found = errors_at(bits, options.r, options.blocks, options.rows)
        rows = [
            at_most(f"{MODEL}, {bits} bits: output error, qwha beside {other}", found["qwha"], found[other], 1)
            for other in ("svd", "weighted svd")
        ]
        print_table(rows)
        write([*rows_beside(rows, options.json), *rows], options.json, **settings)
    print_table(read_rows(options.json), "Rounding that a start makes up for")


if __name__ == "__main__":
    main()
