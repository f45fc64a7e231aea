"""The contract of techniques, run on every registered one that is no adapter."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from shoestring.selection.id3 import Growing
from shoestring.selection.sparse import Entries
from shoestring.technique import TECHNIQUES
from shoestring.testing.techniques import (
    TECHNIQUE_CHECKS,
    Check,
    TechniqueCase,
    check_a_recipe_undoes_it,
    check_declares_what_it_is,
    check_gradients_accumulate,
    check_gradients_in_float64,
    check_trains_in_the_trainer,
    check_two_models_at_once,
    run_technique_check,
)
from shoestring.testing.tiny_models import CLASSIFIER, DECODER, IMAGES, decoder

NO_FAKES: dict[str, Any] = {
    "cannot": {"check_runs_without_values": "it counts the rows of an embedding that has values"},
    "cannot_by": (NotImplementedError,),
}
ROUNDS_IN_FLOAT32 = {"float64": 2e-6}  # Llama's norms and the losses of language models compute in float32
UNTIED = replace(DECODER, make=partial(decoder, tie_word_embeddings=False))
WITH_RELU = replace(DECODER, make=partial(decoder, hidden_act="relu"))
ON_THE_SPHERE: dict[str, Any] = {"model": CLASSIFIER, "own_loss": True, "changes_evaluation": True}
ROUNDED_AT_RANDOM: dict[str, Any] = {"settings": {"min_bytes": 0}, "draws_at_each_step": True}
SKETCHED: dict[str, Any] = {
    "settings": {"groups": 2, "calibration_rows": 8},
    "bound": 0.3,
    "trained_alone": True,
    "own_weights": (r".*\.tables",),
    "changes_evaluation": True,
    "cannot": dict.fromkeys(
        ("check_leaves_the_model_as_it_was", "check_a_recipe_undoes_it"),
        "it gives weights up to save their memory, and leaves those that its sketch stands for",
    ),
}

NAMED_GRADIENTS = (
    "check_gradients_in_float32",
    "check_gradients_in_float64",
    "check_gradients_with_dropout",
    "check_bfloat16",
)
ROUTED: dict[str, Any] = {
    "bound": 2e-6,
    "trained_alone": True,
    "cannot": {"check_resumes_bit_equal": "the check attaches it beside LoRA of other values: to other routes"},
}
BLOCKS_REST: dict[str, Any] = {
    "settings": {"active_layers": 1, "suppressed_layers": 1, "num_draws": 2, "period": 2, "reward_rows": 4},
    "bound": 2e-6,  # between steps, where no event has come, all blocks train
    "trained_alone": True,
}

CHOSEN: dict[str, Any] = {"bound": 2e-6, "trained_alone": True}
MASKED: dict[str, Any] = {**CHOSEN, "own_weights": (r".*\.light_peft_mask",)}
TURNED: dict[str, Any] = {**CHOSEN, "own_weights": (r"(.*\.)?rotated\..*\.values",)}

# one row a technique, form and model: its name, then what it is held to
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "answer_choices": ("answer_choices", {"bound": 0.0}),  # without choices in the batch, it has nothing to add
    "ba_lora": ("ba_lora", {"bound": 0.03, "trained_alone": True}),
    "ba_lora-encoder": ("ba_lora", {"model": CLASSIFIER, "bound": 0.1, "trained_alone": True}),
    "bilevel_zofo": (
        "bilevel_zofo",
        {
            "bound": 2e-6,
            "trained_alone": True,
            "cannot": {"check_trains_in_the_trainer": "it wants held-out rows, of which this trainer has none"},
        },
    ),
    "bitfit": ("bitfit", {"model": CLASSIFIER, "bound": 2e-6, "trained_alone": True}),
    "bitfit-added": (
        "bitfit",
        {"settings": {"added": list(DECODER.targets)}, **CHOSEN, "own_weights": (r".*_proj\.base_layer\.bias",)},
    ),
    "chunked_loss": ("chunked_loss", {"settings": {"chunk_rows": 5}, **ROUNDS_IN_FLOAT32}),
    "density_loss": ("density_loss", {"settings": {"epsilon": 0.1}, "model": WITH_RELU, "own_loss": True}),
    "density_loss-encoder": ("density_loss", {"settings": {"epsilon": 0.1}, "model": CLASSIFIER, "own_loss": True}),
    "embedding_pruning": ("embedding_pruning", {"settings": {"keep_ids": [50]}, "model": UNTIED, **NO_FAKES}),
    "embedding_pruning-tied": ("embedding_pruning", {"trained_alone": True, **NO_FAKES}),
    "id3": ("id3", {"settings": {"count": 90, "steps": 3}, "bound": 2e-6, "trained_alone": True}),
    "id3-adapters": (
        "id3",
        {
            "settings": {"of": "adapters", "density": 1.0, "strategy": "static"},
            "model": CLASSIFIER,
            "bound": 2e-6,
            "trained_alone": True,
            "cannot": {"check_runs_without_values": "tensors of adapters hand their gradients on to what is chosen"},
        },
    ),
    "ist": ("ist", {**BLOCKS_REST, "cannot": {"check_trains_in_the_trainer": "one of the two blocks rests in a step"}}),
    "ist-encoder": ("ist", {**BLOCKS_REST, "model": CLASSIFIER}),
    "lean_mlp": ("lean_mlp", {}),
    "lean_mlp-encoder": ("lean_mlp", {"model": CLASSIFIER}),
    "lora_fa": ("lora_fa", {"bound": 2e-6, "trained_alone": True}),  # the gradients of B are LoRA's
    "light_peft": ("light_peft", {"settings": {"estimation_steps": 2, "channel_multiple": 4}, **MASKED}),
    "light_peft-encoder": (
        "light_peft",
        {"settings": {"estimation_steps": 3, "channel_multiple": 4}, "model": CLASSIFIER, **MASKED},
    ),
    "low_bit_activations": ("low_bit_activations", {**ROUNDED_AT_RANDOM, "bound": 0.04}),
    "low_bit_activations-encoder": ("low_bit_activations", {**ROUNDED_AT_RANDOM, "model": CLASSIFIER, "bound": 0.03}),
    "metric_learning": ("metric_learning", {**ON_THE_SPHERE, "settings": {"learn_scale": True, "slerp": True}}),
    "metric_learning-fixed": ("metric_learning", {**ON_THE_SPHERE, "settings": {"scale": 3.0}}),
    "masked_autoencoder": (
        "masked_autoencoder",
        {
            "settings": {"mask_ratio": 0.6, "decoder_width": 16, "decoder_blocks": 1, "decoder_heads": 2},
            "model": IMAGES,
            "own_loss": True,
        },
    ),
    "norm_tuning": ("norm_tuning", {"bound": 2e-6, "trained_alone": True}),
    "norm_tuning-encoder": ("norm_tuning", {"model": CLASSIFIER, "bound": 2e-6, "trained_alone": True}),
    "offload": ("offload", {"settings": {"to": "disk", "min_bytes": 0}}),
    "parameter_groups": ("parameter_groups", {"settings": {"groups": [{"names": ".*", "lr_factor": 1.0}]}}),
    "recompute": ("recompute", {}),
    "recompute-segments": ("recompute", {"settings": {"segments": 2}, "model": CLASSIFIER}),
    "shared_norm": ("shared_norm", ROUNDS_IN_FLOAT32),
    "shared_norm-encoder": ("shared_norm", {"model": CLASSIFIER}),
    "sketchtune": ("sketchtune", SKETCHED),
    "sketchtune-encoder": ("sketchtune", {**SKETCHED, "model": CLASSIFIER}),
    "sparse_grad": ("sparse_grad", {"settings": {"calibration_rows": 8}, **TURNED}),
    "sparse_grad-encoder": (
        "sparse_grad",
        {"settings": {"calibration_rows": 8, "rotate": "narrow"}, "model": CLASSIFIER, **TURNED},
    ),
    "speft": ("speft", {"settings": {"count": 99, "calibration_rows": 8}, **CHOSEN}),
    "speft-encoder": (
        "speft",
        {"settings": {"density": 0.05, "score": "magnitude", "scope": "local"}, "model": CLASSIFIER, **CHOSEN},
    ),
    "speft-dynamic": (
        "speft",
        {
            "settings": {"density": 0.05, "dynamic_steps": 2, "scope": "local", "calibration_rows": 8},
            "model": CLASSIFIER,
            **CHOSEN,
        },
    ),
    "spt": ("spt", {**ROUTED, "settings": {"budget": 300, "calibration_rows": 8, "structured_fraction": 1.0}}),
    "spt-encoder": (
        "spt",
        {
            **ROUTED,
            "settings": {"budget": 900, "calibration_rows": 8},
            "model": CLASSIFIER,
            "cannot": {
                **ROUTED["cannot"],
                "check_only_what_trains_changes": "A of its LoRA has no gradient while B is 0",
                **dict.fromkeys(NAMED_GRADIENTS, "its LoRA is one more wrapper around the model, so names are others"),
            },
        },
    ),
    "step_activation": ("step_activation", {"bound": 0.6}),
    "token_windows": ("token_windows", {"settings": {"window_tokens": 4}, "draws_alike": False}),
    "token_windows-window_major": (
        "token_windows",
        {"settings": {"window_tokens": 4, "schedule": "window_major"}, "draws_alike": False},
    ),
    "token_windows-encoder": (
        "token_windows",
        {"settings": {"window_tokens": 4}, "model": CLASSIFIER, "draws_alike": False},
    ),
    "unfreeze": ("unfreeze", {"settings": {"blocks": [0], "norms": True}, "bound": 2e-6, "trained_alone": True}),
    "unfreeze-encoder": ("unfreeze", {"model": CLASSIFIER, "bound": 2e-6, "trained_alone": True}),
    "zeroth_order": ("zeroth_order", {"bound": 2e-6}),
}
for form in ({}, {"mode": "float"}):
    of_reversible: dict[str, Any] = {
        "settings": form,
        "reference": {**form, "reversible_layers": 0},
        "trained_alone": True,
        "changes_evaluation": True,
        "float64": 1e-9,
    }
    if not form:
        CASES["reversible"] = ("reversible", of_reversible)
    CASES[f"reversible-{form.get('mode', 'exact')}-encoder"] = ("reversible", {**of_reversible, "model": CLASSIFIER})
for form in ({}, {"form": "rows"}):
    of_tune: dict[str, Any] = {
        "settings": {"keep_fraction": 0.8, **form},
        "draws_alike": False,
        "draws_at_each_step": True,
    }
    of_tune_on_encoder = {**of_tune, "model": CLASSIFIER, "bound": 0.25}
    CASES[f"token_tune-{form.get('form', 'streams')}"] = ("token_tune", {**of_tune, "bound": 0.8})
    CASES[f"token_tune-{form.get('form', 'streams')}-encoder"] = ("token_tune", of_tune_on_encoder)


FIRST_ROWS = {name: case for case, (name, _) in reversed(CASES.items())}.values()
ONCE = {check_trains_in_the_trainer, check_a_recipe_undoes_it, check_two_models_at_once, check_gradients_accumulate}
TRIED = [(case, check) for case in CASES for check in TECHNIQUE_CHECKS if case in FIRST_ROWS or check not in ONCE]


@pytest.mark.parametrize(("case", "check"), TRIED, ids=lambda part: getattr(part, "__name__", part))
def test_every_technique(case: str, check: Check):
    name, settings = CASES[case]
    run_technique_check(check, TechniqueCase(name=name, **settings))


def test_every_registered_technique_has_a_row():
    ours = {name for name, cls in TECHNIQUES.items() if cls.__module__.startswith("shoestring.")}
    missing = ours - {name for name, _ in CASES.values()}
    assert not missing, f"add a row to CASES for {', '.join(sorted(missing))}"


def test_a_bound_that_a_gradient_of_zero_keeps_is_refused():
    with pytest.raises(AssertionError, match="a bound of 1 lets a gradient of zero pass"):
        check_declares_what_it_is(TechniqueCase(name="step_activation", bound=1.0))


def test_a_gradient_that_is_no_derivative_of_its_loss_is_found():
    with pytest.raises(AssertionError, match=r"the loss changes by .* along its gradient"):
        check_gradients_in_float64(TechniqueCase(name="step_activation", own_loss=True))


@pytest.mark.parametrize(
    ("name", "settings", "entries"), [("speft", {"score": "magnitude"}, Entries), ("id3", {"steps": 1}, Growing)]
)
def test_wrong_gradients_of_chosen_numbers_are_found(name, settings, entries, monkeypatch):
    case = TechniqueCase(name=name, settings={"count": 90, **settings}, **CHOSEN)
    check_gradients_in_float64(case)
    right = entries.on_gradient
    monkeypatch.setattr(entries, "on_gradient", lambda self, dense: right(self, dense.mul_(1.01)))
    with pytest.raises(AssertionError, match="gradients are off by"):
        check_gradients_in_float64(case)


def test_weights_without_a_gradient_to_compare_with_must_be_declared():
    case = TechniqueCase(name="bitfit", settings={"added": ["o_proj"]}, **CHOSEN)
    with pytest.raises(AssertionError, match=r"o_proj\.base_layer\.bias trains, and there is no gradient to compare"):
        check_gradients_in_float64(case)
    check_gradients_in_float64(replace(case, own_weights=(r".*\.o_proj\.base_layer\.bias",)))


@pytest.mark.parametrize(("by", "outcome"), [((KeyError,), pytest.xfail.Exception), ((AssertionError,), KeyError)])
def test_an_error_proves_what_cannot_be_only_where_the_case_names_it(by, outcome):
    def check_something(case: TechniqueCase) -> None:
        raise KeyError

    case = TechniqueCase(name="recompute", cannot={"check_something": "for a reason"}, cannot_by=by)
    with pytest.raises(outcome):
        run_technique_check(check_something, case)
