r"""Scores of single weights from data: what the loss of rows has to do with each number of a weight.

Update   sum over rows of dL/dW, or of its squares row by row (the diagonal of the empirical Fisher matrix)
Costs    a step of full training without its optimizer once a row; one dense gradient at a time on the device, and
         one float32 tensor of each weight's size on the host
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingError
from ..quantisation.calibration import SECONDS_BEFORE_A_BAR, in_eval_mode
from ..quantisation.gradients import all_frozen, loss_of


def gradient_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    *,
    max_tokens: int | None = None,
    squared: bool = False,
) -> dict[str, Tensor]:
    """For each number of `weights`, by the weight's name: the sum of its gradients over the first `num_rows` rows.

    rows: model inputs of one row each, with their labels; for a causal language model those are its own inputs where
        there are no others. Rows run one by one in eval mode.
    squared: the sum of the gradients' squares, each of one row.

    The scores are float32 on the host, of each weight's shape.

    Raises SettingError for too few rows, for a row without a loss, and naming a weight that no gradient reached or
    whose is NaN or Inf.
    """
    if not 1 <= num_rows <= len(rows):
        raise SettingError(
            f"Scores of weights were to be found on {num_rows} rows, but there are {len(rows)}: give as many as that, "
            "and at least one."
        )
    scores: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        own = gradient.float()
        own = (own.square() if squared else own).cpu()
        scores[name] = scores[name].add_(own) if name in scores else own.clone()

    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(in_eval_mode(model))
        undo.enter_context(all_frozen(model))
        for name, weight in weights.items():
            undo.enter_context(_gradients_to(weight, partial(add, name)))
        for index in tqdm(range(num_rows), desc="Gradients", unit="row", delay=SECONDS_BEFORE_A_BAR, leave=False):
            loss_of(model, rows[index], index, max_tokens).backward()
    for name in weights:
        if name not in scores:
            raise SettingError(
                f"No gradient of the {num_rows} rows reached {name}: leave it out of target_modules, or give rows that "
                "use it."
            )
        if not scores[name].isfinite().all():
            raise SettingError(f"The gradient of {name} holds NaN or Inf: check the model's weights and the rows.")
    return scores


@contextmanager
def _gradients_to(weight: nn.Parameter, take: Callable[[Tensor], None]) -> Iterator[None]:
    """Let the weight train, and have `take` called with each of its gradients, which is let go then."""
    trained, before = weight.requires_grad, weight.grad

    def hand_over(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            take(gradient)

    weight.requires_grad_(True)
    weight.grad = None
    handle = weight.register_post_accumulate_grad_hook(hand_over)
    try:
        yield
    finally:
        handle.remove()
        weight.grad = before
        weight.requires_grad_(trained)
