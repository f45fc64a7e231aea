"""One training step of a model with a recipe: its bytes by the ledger, and its seconds beside another's."""

import time
from collections.abc import Callable
from typing import Any

import torch

from shoestring import Ledger, Recipe
from shoestring.memory import MemoryReport

Step = Callable[[], None]


def stepped(
    model: Any, ids: torch.Tensor, entries: list[Any], labels: torch.Tensor | None = None, autocast: bool = False
) -> tuple[Any, Step]:
    """The model with a recipe, and one step of it: forward and backward.

    labels: None for those of a language model. autocast: to bfloat16.
    """
    torch.manual_seed(2)  # of adapters
    model = Recipe.from_list(entries).apply(model).train()

    def step() -> None:
        torch.manual_seed(1)
        model.zero_grad()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids.clone() if labels is None else labels).loss
        loss.backward()

    return model, step


def with_adamw(model: Any, step: Step) -> tuple[Step, torch.optim.Optimizer]:
    """The step with AdamW's update after it, and the optimizer, whose states are there."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-6)

    def updated() -> None:
        step()
        optimizer.step()

    updated()
    return updated, optimizer


def memory(model: Any, step: Step, optimizer: torch.optim.Optimizer | None = None) -> MemoryReport:
    model.zero_grad()
    with Ledger(model, optimizer) as ledger:
        step()
    return ledger.report()


def above_weights(report: MemoryReport) -> int:
    return report.peak_bytes - report.at_peak["weights"]


def seconds(ours: Step, baseline: Step, rounds: int) -> tuple[float, float]:
    """The processor's least seconds of each, run in turn."""
    times: dict[Step, list[float]] = {ours: [], baseline: []}
    for _ in range(rounds + 1):
        for step in (baseline, ours):
            began = time.process_time()
            step()
            times[step].append(time.process_time() - began)
    return min(times[ours][1:]), min(times[baseline][1:])
