r"""Scores of single weights: what a loss has to do with each number of a weight.

Update   gradient: sum over rows of dL/dW, or of its squares row by row (the diagonal of the empirical Fisher matrix)
         curvature: H g ~ (g(W + t g) - g(W - t g)) / 2t with g the mean gradient over the rows; t |g| = 1e-3 |W|
         flow: dR/d|W| of a model with the sizes of all its weights for weights and identities for activation
         functions, R the sum of its first output for one token of ones
Costs    a step of full training without its optimizer once a row (curvature: three times), or once in all (flow); one
         dense gradient at a time on the device, and one to three float32 tensors of each weight's size on the host
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import SettingError
from ..feed_forward import is_elementwise
from ..modes import in_eval_mode
from ..quantisation.calibration import SECONDS_BEFORE_A_BAR
from ..quantisation.gradients import all_frozen, loss_of
from ..wrappers import innermost

STEP_SHARE = 1e-3  # of the length of the weights: how far apart gradients are taken whose difference is a curvature


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


def curvature_scores(
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    rows: Sequence[Mapping[str, Any]],
    num_rows: int,
    *,
    max_tokens: int | None = None,
) -> dict[str, Tensor]:
    """For each number of `weights`: the product of the loss's second derivative and the mean gradient over the rows.

    A difference of gradients, so that no graph of a graph is kept, and attention may be fused.

    Raises SettingError as `gradient_scores`, and for weights in 16 bits, which are not fine enough for a difference.
    """
    for name, weight in weights.items():
        if weight.element_size() < 4:
            raise SettingError(
                f"The curvature at {name} cannot be found: steps of {str(weight.dtype).removeprefix('torch.')} are too "
                "wide for differences of gradients. Load the model in float32, or choose another score."
            )
    gradients = gradient_scores(model, weights, rows, num_rows, max_tokens=max_tokens)
    originals = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    step = STEP_SHARE * _length(originals) / max(_length(gradients), torch.finfo(torch.float32).tiny)
    curvature: dict[str, Tensor] = {}
    try:
        for sign in (1, -1):
            for name, weight in weights.items():
                weight.data.copy_(originals[name] + sign * step * gradients[name])
            for name, gradient in gradient_scores(model, weights, rows, num_rows, max_tokens=max_tokens).items():
                curvature[name] = gradient - curvature[name] if name in curvature else gradient
    finally:
        for name, weight in weights.items():
            weight.data.copy_(originals[name])
    return {name: difference / (-2 * step * num_rows**2) for name, difference in curvature.items()}


def flow_scores(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """For each number of `weights`: how its size moves the model's output when every weight is taken by its size.

    Needs no data. Attention to a single token gives that token's value, so that queries and keys move nothing.

    Raises SettingError for models that take no embeddings, and for scores that are NaN or Inf.
    """
    scores = {name: torch.zeros(weight.shape) for name, weight in weights.items()}
    with ExitStack() as undo:
        undo.enter_context(torch.enable_grad())
        undo.enter_context(in_eval_mode(model))
        undo.enter_context(all_frozen(model))
        undo.enter_context(_sizes_for_weights(model))
        for module in model.modules():
            if is_elementwise(module):
                undo.callback(module.register_forward_hook(lambda module, args, output: args[0]).remove)
        for name, weight in weights.items():
            undo.enter_context(_gradients_to(weight, partial(_copy, scores[name])))
        model(**_one_token_of_ones(model))[0].float().sum().backward()
    for name, score in scores.items():
        if not score.isfinite().all():
            raise SettingError(f"The flow through {name} is beyond the range of numbers: choose another score.")
    return scores


def _length(tensors: Mapping[str, Tensor]) -> float:
    return sum(float(tensor.float().square().sum()) for tensor in tensors.values()) ** 0.5


def _one_token_of_ones(model: nn.Module) -> dict[str, Tensor]:
    inner = innermost(model)
    accepted = inspect.signature(inner.forward).parameters
    if "inputs_embeds" not in accepted:
        raise SettingError(
            f"The flow is that of embeddings, and {type(inner).__name__} takes none: choose another score."
        )
    ones = torch.ones_like(inner.get_input_embeddings().weight[:1][None])
    sides = ("inputs_embeds", "decoder_inputs_embeds") if inner.config.is_encoder_decoder else ("inputs_embeds",)
    return dict.fromkeys(sides, ones.detach())


@contextmanager
def _sizes_for_weights(model: nn.Module) -> Iterator[None]:
    """All weights without their signs, which come back, to the bit."""
    floating = [p.data for p in model.parameters() if p.is_floating_point()]
    negative = [weight.signbit().cpu() for weight in floating]
    try:
        for weight in floating:
            weight.abs_()
        yield
    finally:
        for weight, sign in zip(floating, negative, strict=True):
            weight.copysign_(torch.where(sign.to(weight.device), -1.0, 1.0).to(weight.dtype))


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


def _copy(to: Tensor, gradient: Tensor) -> None:
    to.copy_(gradient)
