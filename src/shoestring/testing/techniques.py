"""The contract of techniques that are no adapters: what holds for every one, whatever it does.

    CASES = [TechniqueCase(name="mine", settings={"rank": 3}), TechniqueCase(name="mine", model=CLASSIFIER)]

    @pytest.mark.parametrize("check", TECHNIQUE_CHECKS)
    @pytest.mark.parametrize("case", CASES)
    def test_my_technique(check, case):
        run_technique_check(check, case)

A case says what the technique is held to beside what its class declares. A check raises AssertionError where the
promise is broken, and skips visibly what says nothing of a case. What a technique cannot do stands in `cannot` of its
case, by the name of the check and with the reason; the check must then fail. Models are tiny, have odd sizes and are
built from fixed seeds.
"""

import copy
import gc
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import _get_current_function_mode
from transformers import TrainingArguments

from ..errors import SettingError
from ..fakes import without_values
from ..memory.kept import REMOVABLE
from ..recipe import Recipe, attached_to
from ..technique import TECHNIQUES, Moment, Phase, Technique
from ..training import RecipeTrainer
from .declared import must_fail
from .tiny_models import (
    DECODER,
    IMAGES,
    Step,
    TinyModel,
    all_training,
    assert_derivative_of_the_loss,
    result_of,
    seeded,
    step,
    tensors_left_behind,
)

FLOAT32, FLOAT64 = 2e-6, 1e-12
HALF = 0.05  # of bfloat16, whose unit is 0.4 %
LABELS = ("Source", "Code", "Update", "Shapes", "Start", "Trains", "Costs", "Differs")
NEEDED_LABELS = {"Source", "Update", "Costs"}


@dataclass(frozen=True, kw_only=True)
class TechniqueCase:
    """One technique with settings on one model, and what it is held to.

    bound: of a technique that is not exact, the largest error of its gradients, as a share of their length; below 1,
        which is the error of no gradient at all.
    own_loss: its loss is none that the model has without it, so there are no gradients to compare its own with; they
        must be the derivative of that loss.
    float64: the largest error of an exact one in float64; more than rounding where stock parts of the model or of the
        loss compute in float32.
    reference: settings of the same technique that give the right gradients; None: the model without it.
    draws_alike: with dropout and the same seed it draws as the reference does.
    draws_at_each_step: it goes on in random numbers of its own, so the same step a second time is another one.
    trained_alone: it trains weights of its own choice or needs adapters, so it has no full fine-tuning to compare with.
        Each gradient is that of a model in which all weights train, unless it is exact.
    own_weights: regular expressions for whole names of weights that train and are no part of that model; the gradients
        of all together must then be the derivative of the loss, too.
    changes_evaluation: outputs in evaluation are not those of the model without it.
    cannot: checks that it cannot pass, with the reason.
    cannot_by: the exceptions that these checks must fail by.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: TinyModel = DECODER
    bound: float | None = None
    own_loss: bool = False
    float64: float = FLOAT64
    reference: Mapping[str, Any] | None = None
    draws_alike: bool = True
    draws_at_each_step: bool = False
    trained_alone: bool = False
    own_weights: tuple[str, ...] = ()
    changes_evaluation: bool = False
    cannot: Mapping[str, str] = field(default_factory=dict)
    cannot_by: tuple[type[Exception], ...] = (AssertionError, SettingError)

    @property
    def technique_class(self) -> type[Technique]:
        """The class registered under `name`."""
        return TECHNIQUES[self.name]

    @property
    def exact(self) -> bool:
        """Whether its gradients must be those of the reference, to rounding."""
        return self.technique_class.exact or self.reference is not None

    @property
    def names_alike(self) -> bool:
        """Whether the weights that train are those that train in what it is compared with."""
        return self.exact or self.own_loss or not self.trained_alone

    def technique(self) -> Technique:
        """A new one."""
        return self.technique_class(**copy.deepcopy(dict(self.settings)))

    def referred(self) -> list[Technique]:
        """What gives the gradients to compare with: nothing, or the technique with other settings."""
        return [] if self.reference is None else [self.technique_class(**self.reference)]

    def applied(self, *techniques: Any, lora: bool = True, seed: int = 7, **model: Any) -> nn.Module:
        """A new model with a recipe of the techniques, beside LoRA where asked; in training mode.

        model: dropout, dtype.
        """
        dtype = model.pop("dtype", torch.float32)
        beside = [self.model.lora()] if lora else []
        with seeded(seed):
            base = self.model.make(**model).to(dtype)
            return Recipe(*beside, *techniques).apply(base, data=self.model.data()).train()

    @property
    def lora_choices(self) -> list[bool]:
        """Whether to try it beside LoRA, and in full fine-tuning."""
        return [True] if self.trained_alone else [True, False]


Check = Callable[[TechniqueCase], None]


def check_declares_what_it_is(case: TechniqueCase) -> None:
    """A registered dataclass with a phase; what it needs, claims and removes is in the words there are for it."""
    cls = case.technique_class
    assert is_dataclass(cls), f"{cls.__name__} must be a dataclass"
    assert cls.name == case.name
    assert isinstance(cls.phase, Phase)
    assert all(isinstance(phase, Phase) for phase in cls.needs)
    assert all(isinstance(claim, str) and claim == claim.strip() for claim in cls.claims)
    assert not (unknown := cls.removes - REMOVABLE), f"removes names {sorted(unknown)}, which are not in REMOVABLE"
    held_to = (cls.exact, case.reference is not None, case.bound is not None, case.own_loss)
    assert any(held_to), "a case of a lossy technique needs a bound, or own_loss if its loss is its own"
    assert not case.own_loss or held_to.count(True) == 1, "a case with own_loss has neither reference nor bound"
    assert case.bound is None or case.bound < 1, (
        f"a bound of {case.bound:g} lets a gradient of zero pass; it must be < 1"
    )


def check_docstring_has_the_labels(case: TechniqueCase) -> None:
    """The module opens with a title, then labels in their order; the class says what it does."""
    doc = sys.modules[case.technique_class.__module__].__doc__ or ""
    title, *rest = doc.strip().splitlines()
    assert re.match(r"\S.*: .*\.$", title), f"the first line must read 'Name: what it does.', it is {title!r}"
    found = [match[1] for line in rest if (match := re.match(r"([A-Z][a-z]+) {2,}\S|(?=$)^", line)) and match[1]]
    ordered = [label for label in found if label in LABELS]
    assert ordered == [label for label in LABELS if label in ordered], f"the labels are out of order: {found}"
    assert set(found) >= NEEDED_LABELS, f"the labels {sorted(NEEDED_LABELS - set(found))} are missing"
    assert (case.technique_class.__doc__ or "").strip()


def check_settings_go_to_yaml_and_back(case: TechniqueCase) -> None:
    """A recipe with it is the same after YAML, and what was set is in there."""
    recipe = Recipe(case.model.lora(), case.technique())
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    held = case.technique().settings()
    assert case.technique_class(**held) == case.technique(), "settings() and the constructor do not agree"


def check_can_be_copied(case: TechniqueCase) -> None:
    """Copies are equal and have state of their own."""
    twin = copy.deepcopy(case.technique())
    assert twin == case.technique()
    assert twin.settings() == case.technique().settings()
    model = case.applied(case.technique())
    step(model, case.model.batch())
    original = attached_to(model).recipe
    assert original == Recipe(case.model.lora(), case.technique()), "attaching changed the recipe"


def check_leaves_the_model_as_it_was(case: TechniqueCase) -> None:
    """After a step, after an error in a forward and after an error in the body, nothing of it is left."""
    for use in (_use, _use_with_an_error_in_the_forward, _use_and_raise):
        with seeded(7):
            model = case.model.make()
            if Phase.ADAPTER in case.technique_class.needs:
                model = Recipe(case.model.lora()).apply(model)
        frozen = list(model.parameters())[:3]
        for parameter in frozen:  # of all kinds, to be found as they were
            parameter.requires_grad_(False)
        trained = [p.requires_grad for p in model.parameters()]
        technique, before = case.technique(), Footprint(model)
        technique.see_data(case.model.data())
        with suppress(_Planned), technique.attach(model) as inner:
            technique.on_attached(inner)
            use(inner, case.model.batch())
        before.compare(use.__name__)
        assert [p.requires_grad for p in model.parameters()] == trained, f"after {use.__name__}, other weights train"


def check_a_recipe_undoes_it(case: TechniqueCase) -> None:
    """Beside LoRA in a recipe, too."""
    for use in (_use, _use_with_an_error_in_the_forward, _use_and_raise):
        with seeded(7):
            model = case.model.make()
        before = Footprint(model)
        recipe = Recipe(case.model.lora(), case.technique())
        with suppress(_Planned), recipe(model, data=case.model.data()) as inner:
            use(inner, case.model.batch())
        before.compare(use.__name__)


def check_gradients_in_float32(case: TechniqueCase) -> None:
    """Loss and gradients are those of the reference, within rounding or the bound."""
    if case.own_loss:
        pytest.skip(f"the loss of {case.name} is its own: check_gradients_in_float64 compares it with its derivative")
    _compare_gradients(case, torch.float32)


def check_gradients_in_float64(case: TechniqueCase) -> None:
    """Loss and gradients are those of the reference, within rounding or the bound; or they fit its own loss."""
    if case.own_loss:
        _check_derivative(case)
    else:
        _compare_gradients(case, torch.float64)
        if case.own_weights:
            _check_derivative(case)


def check_gradients_with_dropout(case: TechniqueCase) -> None:
    """From the same seed, gradients are the reference's; or, if draws differ, those of the loss it computed."""
    if case.own_loss or (case.exact and not case.draws_alike):
        _check_derivative(case, dropout=0.2)
    elif case.draws_alike:
        _compare_gradients(case, torch.float32, dropout=0.2)
    else:
        pytest.skip(f"{case.name} is lossy and draws otherwise: its own tests must compare it with a plain reference")


def check_gradients_after_an_error(case: TechniqueCase) -> None:
    """A forward that raised leaves nothing behind: the next step is what it is without it."""
    if case.draws_at_each_step:
        pytest.skip(f"{case.name} draws at each step, so the step after an error is another one")
    model, fresh = case.applied(case.technique()), case.applied(case.technique())
    with suppress(_Planned):
        _use_with_an_error_in_the_forward(model, case.model.batch())
    ours, wanted = step(model, case.model.batch()), step(fresh, case.model.batch())
    ours.assert_same_names(wanted, "after an error in the forward before")
    error = ours.error(wanted)
    assert error == 0, f"gradients after an error in the forward before are off by {error:.1e}"


def check_gradients_accumulate(case: TechniqueCase) -> None:
    """Two backwards without a step in between give the sum of both."""
    first, second = case.model.batch(1), case.model.batch(2, samples=2)
    model = case.applied(case.technique())
    one, two = step(model, first, seed=3), step(model, second, seed=4)
    model = case.applied(case.technique())
    model.zero_grad()
    for batch, seed in ((first, 3), (second, 4)):
        with seeded(seed):
            model(**batch).loss.backward()
    summed = Step(one.loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    expected = Step(one.loss, {n: one.gradients[n] + two.gradients[n] for n in one.gradients})
    assert summed.gradients.keys() == expected.gradients.keys()
    assert (error := summed.error(expected)) < FLOAT32, f"accumulated gradients are off by {error:.1e}"


def check_bfloat16(case: TechniqueCase) -> None:
    """A model in bfloat16, and one in float32 under autocast, train beside float32 adapters.

    Gradients are near the reference's; those of a loss of its own near what they are in float32, all roundings of the
    model between them.
    """
    in_float32 = _first_step(case, case.technique())
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        ours = _first_step(case, case.technique(), dtype=dtype, autocast=autocast)
        wanted = in_float32 if case.own_loss else _reference(case, dtype=dtype, autocast=autocast)
        where = "under autocast" if autocast else "in bfloat16"
        for name, gradient in ours.gradients.items():
            assert torch.isfinite(gradient).all(), f"the gradient of {name} is not finite {where}"
        if case.names_alike:
            ours.assert_same_names(wanted, where)
        bound = 2 * HALF if case.own_loss else HALF + (0 if case.exact else case.bound or 0)
        assert (error := ours.error(wanted, case.own_weights)) < bound, f"gradients are off by {error:.1e} {where}"


def check_evaluation_is_untouched(case: TechniqueCase) -> None:
    """In evaluation and without gradients, outputs are those of the model without it; generation too, or it refuses."""
    if case.changes_evaluation:
        pytest.skip(f"{case.name} changes outputs in evaluation")
    batch = case.model.batch()
    plain, model = case.applied(), case.applied(case.technique())
    step(model, batch)
    for one in (plain, model):
        one.eval()
    assert torch.equal(result_of(model(**batch)), result_of(plain(**batch))), "outputs in evaluation differ"
    if "labels" in batch:
        with torch.no_grad():
            loss, expected = model.train()(**batch).loss, plain.train()(**batch).loss
        assert torch.allclose(loss, expected, rtol=FLOAT32), "the loss in training mode without gradients differs"
    if case.model.task != DECODER.task:
        return
    prompt: dict[str, Any] = {
        "input_ids": batch["input_ids"][:1, :5],
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with suppress(SettingError):
        ours, expected = (one.eval().generate(**prompt) for one in (model, plain))  # type: ignore[operator]
        assert torch.equal(ours, expected), "it generates otherwise"


def check_only_what_trains_changes(case: TechniqueCase) -> None:
    """A step moves what LoRA trains, weights of its own or of its choice; every weight that trains has a gradient."""
    plain, model = case.applied(), case.applied(case.technique())
    learned = {name for name, p in plain.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    known = {name for name, _ in plain.named_parameters()}
    chooses = case.technique_class.phase == Phase.SELECTION
    assert chooses or trained.keys() & known <= learned, (
        f"{sorted(trained.keys() & known - learned)[0]} trains, and should not"
    )
    step(model, case.model.batch())
    idle = attached_to(model).idle_parameters()
    without = [n for n, p in trained.items() if n not in idle and (p.grad is None or not p.grad.abs().max() > 0)]
    assert not without, f"{without[0]} trains, but gets no gradient"
    torch.optim.SGD(trained.values(), lr=0.1).step()
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert (name in trained) or torch.equal(value, before[name]), f"{name} does not train, but has changed"


def check_trains_in_the_trainer(case: TechniqueCase) -> None:
    """Beside LoRA in RecipeTrainer with gradient accumulation; exact ones end at the weights of LoRA alone."""
    ours = _trained(case, case.technique())
    for name, change in ours.items():
        assert torch.isfinite(change).all(), f"{name} is not finite after a step"
        assert change.abs().max() > 0, f"{name} trains, but a step has not moved it"
    if case.exact:
        wanted = _trained(case, *case.referred()) if case.reference else _trained_with_lora_alone(case.model)
        changes, expected = Step(torch.zeros(()), ours), Step(torch.zeros(()), wanted)
        changes.assert_same_names(expected, "after a step in the trainer")
        error = changes.error(expected)
        assert error < 1e-4, f"a step in the trainer is off by {error:.1e}"  # weights round where gradients do not


def check_resumes_bit_equal(case: TechniqueCase) -> None:
    """Saved after two steps and restored into a new model, the third step is the one of a run that went on."""

    def go_on(model: nn.Module, steps: range) -> list[float]:
        attached, losses = attached_to(model), []
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for index in steps:
            attached.event("on_step_begin", Moment(model, optimizer, index))
            losses.append(float(step(model, case.model.batch(index), seed=index).loss))
            attached.event("on_gradients", Moment(model, optimizer, index))
            optimizer.step()
            attached.event("on_step_end", Moment(model, optimizer, index + 1))
        return losses

    whole, stopped = (case.applied(case.technique(), dropout=0.2) for _ in range(2))
    losses = go_on(whole, range(3))
    again = case.applied(case.technique(), dropout=0.2, seed=8)
    go_on(stopped, range(2))
    with TemporaryDirectory() as folder:
        attached_to(stopped).save(folder)
        attached_to(again).restore(Path(folder))
    assert go_on(again, range(2, 3)) == losses[2:], "the loss after resuming differs"
    parameters = dict(again.named_parameters())
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, parameters[name]), f"{name} differs after resuming"


def check_two_models_at_once(case: TechniqueCase) -> None:
    """Forwards and backwards of two models in turns give what each gives alone."""
    batches = [case.model.batch(1), case.model.batch(2)]
    expected = [step(case.applied(case.technique()), batch) for batch in batches]
    models = [case.applied(case.technique()) for _ in batches]
    losses = []
    for model, batch in zip(models, batches, strict=True):
        with seeded(5):
            losses.append(model(**batch).loss)
    for loss in losses:
        loss.backward()
    for model, loss, wanted in zip(models, losses, expected, strict=True):
        found = Step(loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        found.assert_same_names(wanted, "beside another model")
        for name, gradient in found.gradients.items():
            assert torch.equal(gradient, wanted.gradients[name]), f"{name} differs beside another model"
    Recipe.remove(models[0])
    if not case.draws_at_each_step:
        error = step(models[1], batches[1]).error(expected[1])
        assert error == 0, "detaching one model disturbed the other"


def check_moves_with_its_model(case: TechniqueCase) -> None:
    """A model that is moved to another device after a recipe was attached takes all tensors of its modules along."""
    left = tensors_left_behind(case.applied(case.technique()))
    assert not left, f"{left[0]} stays behind when the model is moved: make it a buffer"


def check_goes_with_its_model(case: TechniqueCase) -> None:
    """A model that nobody holds any more is freed with the recipe on it, and no error is told on the way."""
    model = case.applied(case.technique())
    _use(model, case.model.batch())
    parts = [weakref.ref(part) for part in (model, attached_to(model), attached_to(model).base_model)]
    errors: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda told: errors.append(repr(told.exc_value))
    try:
        del model
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not errors, f"freeing the model ends with {errors[0]}"
    left = [type(found).__name__ for part in parts if (found := part()) is not None]
    assert not left, f"{', '.join(left)} stay in memory when nobody holds the model"


def check_runs_without_values(case: TechniqueCase) -> None:
    """A step with fake tensors, as a planner makes it, runs; all that trains has a gradient of the right shape."""
    needs_lora = Phase.ADAPTER in case.technique_class.needs
    base, technique = case.model.make(), case.technique()
    model = Recipe(case.model.lora()).apply(base) if needs_lora else base
    technique.see_data(case.model.data())
    mode = FakeTensorMode()
    without_values(model, mode)
    batch = {name: mode.from_tensor(value) for name, value in case.model.batch().items()}
    batch.pop("attention_mask", None)  # whose values transformers looks at
    with mode, technique.attach(model.train()) as inner:
        technique.on_attached(inner)
        inner(**batch).loss.backward()
        for name, parameter in inner.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} has no gradient with fake tensors"
                assert parameter.grad.shape == parameter.shape


TECHNIQUE_CHECKS: list[Check] = [
    value for name, value in list(globals().items()) if name.startswith("check_") and callable(value)
]


def run_technique_check(check: Check, case: TechniqueCase) -> None:
    """Run one check on one case; a check the case says it cannot pass must fail, and is marked so.

    What it draws at random is the same at every call.

    Raises AssertionError if the check fails, or passes although `cannot` of the case says that it does not.
    """
    reason = case.cannot.get(check.__name__)
    with seeded(4):
        if reason is None:
            check(case)
            return
        must_fail(lambda: check(case), check.__name__, case.name, reason, case.cannot_by)


def _compare_gradients(case: TechniqueCase, dtype: torch.dtype, dropout: float = 0.0) -> None:
    bound = (FLOAT32 if dtype is torch.float32 else case.float64) if case.exact else case.bound
    assert bound is not None
    for lora in case.lora_choices:
        ours = _first_step(case, case.technique(), lora=lora, dtype=dtype, dropout=dropout)
        wanted = _reference(case, lora=lora, dtype=dtype, dropout=dropout)
        where = f"{'beside LoRA' if lora else 'in full fine-tuning'}, {dtype}, dropout {dropout}"
        if case.names_alike:
            ours.assert_same_names(wanted, where)
        error = ours.error(wanted, case.own_weights)
        assert error <= bound, f"gradients are off by {error:.2e} of their length ({where}); the bound is {bound:g}"
        if case.exact:
            assert abs(float(ours.loss - wanted.loss)) <= bound * abs(float(wanted.loss)), f"the loss differs ({where})"


def _reference(case: TechniqueCase, **model: Any) -> Step:
    """What the first step is compared with."""
    found = _first_step(case, *case.referred(), **model)
    return found if case.names_alike else found.beside(_first_step(case, *case.referred(), all_train=True, **model))


def _first_step(
    case: TechniqueCase, *techniques: Any, autocast: bool = False, all_train: bool = False, **model: Any
) -> Step:
    """The first step of a new model with a recipe. all_train: of all weights, whatever the recipe says."""
    applied = case.applied(*techniques, **model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return step(all_training(applied) if all_train else applied, case.model.batch(), at=None if all_train else 0)


def _check_derivative(case: TechniqueCase, dropout: float = 0.0) -> None:
    for lora in case.lora_choices:
        model = case.applied(case.technique(), lora=lora, dtype=torch.float64, dropout=dropout)
        assert_derivative_of_the_loss(model, case.model.batch())


def _trained(case: TechniqueCase, *techniques: Any) -> dict[str, Tensor]:
    """What a step of RecipeTrainer over two batches changes of all that trains and may not be idle."""
    model = case.applied(*techniques)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of trainers, about what a test does not set
        arguments = TrainingArguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.02,
            max_grad_norm=0.0,
            optim="adamw_torch" if attached_to(model).brings_optimizer else "sgd",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        RecipeTrainer(model=model, args=arguments, train_dataset=case.model.rows()).train()
    idle = attached_to(model).idle_parameters()
    now = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad and name not in idle}
    # what has grown was not there before
    return {name: p - start[name] if p.shape == start[name].shape else p for name, p in now.items()}


@cache
def _trained_with_lora_alone(model: TinyModel) -> dict[str, Tensor]:
    return _trained(TechniqueCase(name="", model=model))


class _Planned(Exception):
    """Raised on purpose."""


def _use(model: nn.Module, batch: dict[str, Tensor]) -> None:
    step(model, batch)
    model.eval()(**batch)


def _use_and_raise(model: nn.Module, batch: dict[str, Tensor]) -> None:
    model.train()(**batch)  # and no backward
    raise _Planned


def _use_with_an_error_in_the_forward(model: nn.Module, batch: dict[str, Tensor]) -> None:
    def fail(*_: Any) -> None:
        raise _Planned

    leaves = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for leaf in (leaves[len(leaves) // 2], leaves[-1]):  # inside a block, and the head
        hook = leaf.register_forward_pre_hook(fail)
        try:
            with pytest.raises(_Planned):
                step(model, batch)
        finally:
            hook.remove()


class Footprint:
    """Everything of a model that a technique must put back, taken when made."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.taken = self._now()
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.outputs = self._outputs()

    def compare(self, after: str) -> None:
        """Raise AssertionError, saying what `after` left behind."""
        now = self._now()
        for what, before in self.taken.items():
            assert now[what] == before, f"after {after}, {what} of the model are not what they were"
        values = self.model.state_dict()
        assert values.keys() == self.values.keys()
        for name, value in self.values.items():
            assert torch.equal(values[name], value), f"after {after}, {name} has changed"
        assert torch.equal(self._outputs(), self.outputs), f"after {after}, the output of the model has changed"
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None, (
            f"a saved-tensor hook outlived {after}"
        )
        assert _get_current_function_mode() is None, f"a function mode outlived {after}"

    def _outputs(self) -> Tensor:
        modes = {module: module.training for module in self.model.modules()}
        with torch.no_grad():
            outputs = self.model.eval()(**self._inputs())
        for module, training in modes.items():
            module.training = training
        return result_of(outputs)

    def _inputs(self) -> dict[str, Tensor]:
        if self.model.main_input_name == "pixel_values":
            return IMAGES.batch()
        return {"input_ids": torch.arange(3, 16)[None]}

    def _now(self) -> dict[str, Any]:
        modules = dict(self.model.named_modules(remove_duplicate=False))
        tables = [name for name in vars(nn.Module()) if name.endswith("_hooks")]
        found: list[Any] = [getattr(module, "config", None) for module in modules.values()]
        configs = {id(config): config for config in found if hasattr(config, "to_dict")}
        return {
            "modules": {name: id(module) for name, module in modules.items()},
            "attributes": {name: set(vars(module)) for name, module in modules.items()},
            "hooks": {name: [list(vars(module)[table]) for table in tables] for name, module in modules.items()},
            "forwards": {name: vars(module).get("forward") for name, module in modules.items()},
            "parameters": {name: (id(p), p.shape, p.dtype) for name, p in self.model.named_parameters()},
            "buffers": {name: id(b) for name, b in self.model.named_buffers()},
            "configs": {key: (config.to_dict(), config._attn_implementation) for key, config in configs.items()},
        }
