"""Fashion-MNIST: 28 x 28 grey pictures of ten kinds of clothing.

Source   Debian's dataset-fashion-mnist; Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747
Differs  test is the published one; a tenth of train, chosen by the hash of the picture, is the validation part
"""

import gzip
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .extras import need_packages
from .splits import split_of

if TYPE_CHECKING:
    from datasets import DatasetDict

LABELS = (
    "t-shirt or top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def read(files: Path) -> "DatasetDict":
    """Columns image (mode "L") and label."""
    need_packages(("PIL",), "Showing the pictures of fashion-mnist")
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features(image=Image(), label=ClassLabel(names=list(LABELS)))
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    for row in read_pairs(files, "train"):
        splits[split_of(row["image"]["bytes"].hex(), {"train": 0.9, "validation": 0.1})].append(row)
    splits["test"] = read_pairs(files, "t10k")
    return DatasetDict({split: Dataset.from_list(rows, features=features) for split, rows in splits.items()})


def read_pairs(files: Path, part: str) -> list[dict[str, Any]]:
    """The pictures of one part, as PGM files in memory (a short header and the pixels), with their labels.

    The files are in IDX form: four bytes that name the type and rank, the sizes as big-endian u32, the bytes.
    """
    images = gzip.decompress((files / f"{part}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((files / f"{part}-labels-idx1-ubyte.gz").read_bytes())
    _, count, height, width = struct.unpack(">4I", images[:16])
    pixels, kinds = images[16:], labels[8:]
    header, area = f"P5 {width} {height} 255\n".encode(), width * height
    return [
        {"image": {"bytes": header + pixels[i * area : (i + 1) * area], "path": None}, "label": kinds[i]}
        for i in range(count)
    ]
