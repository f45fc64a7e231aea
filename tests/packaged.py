"""Packaged data that several tests read, parsed once; MiniLM with reviews to learn from; what learning moves."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from shoestring import assets
from shoestring.testing.assets import need
from shoestring.testing.tiny_models import seeded


@cache
def data(name: str) -> Any:
    """The splits of packaged data, the same ones at every call."""
    need(name)
    return assets.load_data(name)


def reviews(count: int) -> Any:
    """Rows of rotten-tomatoes, in an order that mixes films."""
    return data("rotten-tomatoes")["train"].shuffle(seed=0).select(range(count))


def minilm_and_reviews(count: int) -> tuple[Any, dict[str, Tensor]]:
    """MiniLM with a head for two classes, in evaluation mode, and a batch of reviews; both the same at every call."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    need("minilm")
    folder = assets.model_folder("minilm")
    rows = reviews(count)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(rows["text"]), max_length=24, truncation=True, padding=True, return_tensors="pt")
    with seeded(0):
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.float32)
    return model, {**batch, "labels": torch.tensor(rows["label"][:])}


def losses_of(model: nn.Module, batch: Mapping[str, Tensor], own: str, steps: int = 4, lr: float = 3e-3) -> list[float]:
    """The losses of steps of Adam.

    own: in the names of what a method adds, a head left out.

    Raises AssertionError if a tensor of its own ends as it started.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p.detach().clone() for name, p in trained.items() if own in name}
    assert start, f"no {own} trains"
    optimizer = torch.optim.Adam(trained.values(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    still = [name for name, before in start.items() if torch.equal(trained[name], before)]
    assert not still, f"{still[0]} (and {len(still) - 1} more) have not moved"
    return losses
