"""What becomes of every two techniques in one recipe with LoRA, on a tiny encoder and a tiny decoder.

    python -m shoestring.testing.composition > docs/composition.md

Method   Each pair is attached with peft's LoRA on all linear layers, in float64, and makes the first training step,
         with the events of a run. Two exact techniques are compared with LoRA alone; otherwise the pair is compared
         with LoRA and one of the two, and the nearer one counts, so that the error is what the other one adds. The
         error is the length of the difference of all gradients over the length of those compared with. What trains in
         the pair and not in the reference is compared with what it gets where all weights of the reference train; what
         is no weight there, with what it gets where only its own technique stands beside LoRA.
Later    A technique that changes the model after some steps is tried after them, too: an exact partner must then give
         the gradients that it has alone; any other must run.
Dropout  Then a step with dropout. The gradients of two exact techniques must be the derivative of the loss they
         computed; a pair that is exact beside a lossy technique must be so here, if the exact one draws as LoRA does.
Refused  Only by a SettingError while the recipe is built or attached. All other errors are raised here, and so is a
         lossy technique that has no effect in a pair.
"""

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import torch

from ..errors import SettingError
from ..recipe import Recipe
from ..technique import TECHNIQUES, Technique
from .tiny_models import (
    CLASSIFIER,
    DECODER,
    Step,
    TinyModel,
    all_training,
    assert_derivative_of_the_loss,
    seeded,
    step,
)

EXACT = 2e-6  # parts of stock models and losses compute in float32
CLASSES = ((EXACT, "exact"), (0.05, "< 5 %"), (0.2, "< 20 %"))  # far from all results, so stable across machines
MORE = "more"
DROPOUT = 0.2
MODELS = (CLASSIFIER, DECODER)
ONLY_THE_BASE = {"removed_modules_fraction": 0.0, "removed_ranks_fraction": 0.0}  # not what gradients decide

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "embedding_pruning": {"keep_ids": [50]},
    "id3": {"count": 90, "steps": 3},
    "light_peft": {"estimation_steps": 2, "channel_multiple": 4, **ONLY_THE_BASE},
    "ist": {"active_layers": 1, "suppressed_layers": 1, "num_draws": 2},
    "low_bit_activations": {"min_bytes": 0},
    "offload": {"to": "disk", "min_bytes": 0},
    "parameter_groups": {"groups": [{"names": ".*", "lr_factor": 1.0}]},
    "sketchtune": {"groups": 2, "calibration_rows": 8},
    "sparse_grad": {"calibration_rows": 8},
    "speft": {"density": 0.05, "calibration_rows": 8},
    "spt": {"budget": 300, "calibration_rows": 8},
    "token_tune": {"keep_fraction": 0.5},
    "token_windows": {"window_tokens": 4},
}
"""Where defaults do nothing on tiny models, or something has to be said. All others are tried as they come."""

OWN: Mapping[str, str] = {
    "light_peft": r".*\.light_peft_mask",
    "reversible": r"reversible\..*",  # small adapters between its streams
    "sketchtune": r".*\.tables",
    "sparse_grad": r"(.*\.)?rotated\..*\.values",
}
"""What a technique trains that is no weight of the model without it: its gradients have nothing to be compared with."""

LATER: Mapping[str, int] = {"light_peft": 2}
"""Steps after which a technique changes the model."""


@dataclass(frozen=True)
class Outcome:
    """What one step gave: its error, or the reason why the recipe was refused."""

    error: float = 0.0
    refused: str = ""

    def __str__(self) -> str:
        """The class of the error, which is the same on all machines."""
        return next((name for limit, name in CLASSES if self.error <= limit), MORE)


def tried() -> list[type[Technique]]:
    """The techniques of this package that train by gradients on plain batches of text, in the order they attach in."""
    ours = [cls for cls in TECHNIQUES.values() if cls.__module__.split(".")[0] == Recipe.__module__.split(".")[0]]
    by_gradients = [cls for cls in ours if cls.training_step is Technique.training_step]
    fit = [cls for cls in by_gradients if not cls.reads_of_batch and not cls.brings_loss]
    return sorted(fit, key=lambda cls: (cls.phase, cls.name))


def alone(model: TinyModel, name: str) -> Outcome:
    """One technique beside LoRA, compared with LoRA.

    Raises AssertionError where an exact one loses a gradient.
    """
    try:
        found = _step(model, name)
    except _Refused as refusal:
        return Outcome(refused=str(refusal))
    if TECHNIQUES[name].exact:
        found.assert_same_names(_step(model), f"{name} on the {model.name}")
    return Outcome(found.error(_reference(model), [OWN[name]] if name in OWN else []))


def together(model: TinyModel, first: str, second: str) -> Outcome:
    """Two techniques beside LoRA.

    Raises whatever a pair raises that was not refused in time, AssertionError where gradients of two exact ones
    are lost, or are wrong under dropout, or where one of the pair has none to be compared with.
    """
    try:
        pair = _step(model, first, second)
    except _Refused as refusal:
        return Outcome(refused=str(refusal))
    lossy = [name for name in (first, second) if not TECHNIQUES[name].exact]
    if not lossy:
        pair.assert_same_names(_step(model), f"{first} and {second} on the {model.name}")
        _check_derivative(model, first, second)
        return Outcome(pair.error(_step(model)))
    errors = {name: pair.error(_reference(model, name, beside=_other(name, first, second))) for name in (first, second)}
    for name in lossy:
        other = _other(name, first, second)
        if alone(model, name).error > EXACT and errors[other] <= EXACT:
            raise AssertionError(f"{name} has no effect beside {other} on the {model.name}.")
    if len(lossy) == 1 and min(errors.values()) <= EXACT:
        _check_with_dropout(model, lossy[0], _other(lossy[0], first, second))
    for name in {first, second} & LATER.keys():
        _check_later(model, name, _other(name, first, second))
    return Outcome(min(errors.values()))


def page() -> str:
    """The outcomes of all techniques and pairs, as Markdown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("shoestring").setLevel(logging.ERROR)
        names = [cls.name for cls in tried()]
        reasons: dict[str, int] = {}

        def cell(outcomes: list[Outcome]) -> str:
            words = [f"no ({_number(o.refused, reasons)})" if o.refused else str(o) for o in outcomes]
            return words[0] if len(set(words)) == 1 else ", ".join(words)

        single = {name: cell([alone(model, name) for model in MODELS]) for name in names}
        pairs = {(a, b): cell([together(model, a, b) for model in MODELS]) for a, b in combinations(names, 2)}
    lines = [HEAD, _row(["", "alone", *(str(i + 1) for i in range(len(names) - 1))]), _row(["---"] * (len(names) + 1))]
    for i, name in enumerate(names):
        lines.append(_row([f"{i + 1} `{name}`", single[name], *(pairs[other, name] for other in names[:i])]))
    lines += ["", "## Why not", "", *(f"{number}. {reason}" for reason, number in reasons.items()), ""]
    return "\n".join(lines)


HEAD = f"""# Which techniques go together

Made by `python -m shoestring.testing.composition > docs/composition.md`; `tests/test_composition.py` checks that it is
what the code gives. How adapters combine is another matter: a recipe may hold several, see
[techniques.md](techniques.md#adapters).

Every two techniques that train by gradients on plain batches of text are attached together with peft's LoRA on all
linear layers of a tiny BERT classifier and of a tiny Llama (two queries to a key, tied head), and make the first
training step in float64. The number is the difference of all gradients, as a share of their length:

- two exact techniques are compared with LoRA alone;
- otherwise the pair is compared with LoRA and one of the two, the nearer one, so that it is what the other one adds;
- weights that train in the pair and not in what it is compared with, such as the biases of `bitfit` and the numbers
  that `id3` chooses, are compared with what they get there when all weights train;
- weights that a technique brings, such as those of `sparse_grad`, are compared with what they get with it and LoRA
  alone;
- *alone* is one technique with LoRA, compared with LoRA alone; weights that it brings are left to its own tests.
  `reversible` makes the model another function, so its number is no error.

Left out: `zeroth_order` and `bilevel_zofo` make the step themselves, `answer_choices` reads answers to choose from, and
`masked_autoencoder` brings a loss of images.

**exact** is below {EXACT:g}; **{MORE}** is 20 % or more, on models whose weights are random. Where the models differ,
the encoder's result comes first. Pairs of exact techniques are also tried with dropout: their gradients must be the
derivative of the loss they computed. **no (n)**: the recipe is refused before the first step, for reason n below.
"""


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    print(page(), end="")


class _Refused(Exception):
    """A recipe that was refused while it was built or attached."""


def _other(name: str, first: str, second: str) -> str:
    return second if name == first else first


def _reference(model: TinyModel, *names: str, beside: str = "") -> Step:
    """The step of these techniques, with what all weights of the model would get, and what `beside` alone trains."""
    found = _step(model, *names).beside(_step(model, *names, all_train=True))
    return found.beside(_step(model, beside)) if beside else found


@cache
def _step(model: TinyModel, *names: str, dropout: float = 0.0, all_train: bool = False, at: int = 0) -> Step:
    """The step after `at` others, in which no weight changes; with all_train of all weights, told of no event."""
    applied = _applied(model, *names, dropout=dropout)
    if all_train:
        return step(all_training(applied), model.batch())
    return [step(applied, model.batch(), at=index) for index in range(at + 1)][-1]


def _applied(model: TinyModel, *names: str, dropout: float) -> Any:
    """A new model with LoRA and the techniques.

    Raises _Refused.
    """
    base = model.make(dropout).double()
    try:
        techniques = [TECHNIQUES[name](**SETTINGS.get(name, {})) for name in names]
        with seeded(7):
            return Recipe(model.lora(), *techniques).apply(base, data=model.data())
    except SettingError as error:
        raise _Refused(" ".join(str(error).split())) from error


def _check_derivative(model: TinyModel, first: str, second: str) -> None:
    assert_derivative_of_the_loss(_applied(model, first, second, dropout=DROPOUT), model.batch())


def _check_with_dropout(model: TinyModel, lossy: str, exact: str) -> None:
    if _step(model, exact, dropout=DROPOUT).error(_step(model, dropout=DROPOUT)) > EXACT:
        return  # it draws otherwise
    error = _step(model, *sorted((lossy, exact)), dropout=DROPOUT).error(_step(model, lossy, dropout=DROPOUT))
    if error > EXACT:
        raise AssertionError(f"With dropout, {exact} beside {lossy} is off by {error:.1e} on the {model.name}.")


def _check_later(model: TinyModel, name: str, other: str) -> None:
    pair, wanted = _step(model, *sorted((name, other)), at=LATER[name]), _step(model, name, at=LATER[name])
    where = f"{name} and {other} on the {model.name} after {LATER[name]} steps"
    if TECHNIQUES[other].exact:
        pair.assert_same_names(wanted, where)
        if (error := pair.error(wanted)) > EXACT:
            raise AssertionError(f"Gradients of {where} are off by {error:.1e}.")


def _number(reason: str, reasons: dict[str, int]) -> int:
    return reasons.setdefault(reason, len(reasons) + 1)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
