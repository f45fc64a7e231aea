"""Each test of peft's that a method of ours does not pass or that peft skips, with the reason.

An expected failure is strict and so is a skip: a test that passes after all fails the run, and so does a skip without
a reason here, so that this list stays true. Rules read what a method declares, never its name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from cases import update_of
from torch import nn

from shoestring.adapters.base import AdapterConfig


@dataclass(frozen=True)
class Case:
    """One test of peft's with one config of ours.

    test: its function's name. model, settings: those of the row. values: of all its parameters, by name.
    """

    test: str
    config_cls: type[AdapterConfig]
    model: str
    settings: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reason:
    """Why some tests do not pass.

    tests: patterns of the functions' names.
    outcome: "skips" where peft skips the test itself, "fails" for an expected failure.
    why: the reason, a sentence.
    message: a pattern found in what peft says when it skips, or in the error of the expected failure.
    applies: for which cases.
    """

    tests: tuple[str, ...]
    outcome: str
    why: str
    message: str
    applies: Callable[[Case], bool] = lambda case: True

    def covers(self, case: Case) -> bool:
        """Whether this is the reason for a case."""
        return any(fnmatchcase(case.test, pattern) for pattern in self.tests) and self.applies(case)


REASONS = [
    Reason(
        tests=("test_disable_adapter_with_bias_warns",),
        outcome="skips",
        why="peft runs it for LoRA and BOFT alone, by the name of the class",
        message="Testing bias warnings only for LoraConfig or BOFTConfig",
    ),
    Reason(
        tests=("test_active_adapter",),
        outcome="skips",
        why="modules_to_save are whole copies of a module, of which only one can be active",
        message="Multiple active adapters with modules_to_save",
        applies=lambda case: "modules_to_save" in case.settings,
    ),
    Reason(
        # test_forward_* merge after the forwards they are named for
        tests=("*merge*", "test_disable_adapters_with_merging", "test_forward_*16*"),
        outcome="fails",
        why="the method changes a layer's output, not its weight; it refuses to be merged",
        message="changes a layer's output, not its weight: it cannot be merged",
        applies=lambda case: update_of(case.config_cls, case.settings) == "new_output",
    ),
    Reason(
        tests=("test_disable_adapters", "test_disable_adapters_with_merging"),
        outcome="fails",
        why="the test compares the disabled adapter with a fresh one, and a fresh one of this method is near the "
        "pretrained model but not equal to it; the contract compares with the base model itself",
        message="allclose",
        applies=lambda case: "check_starts_as_the_pretrained_model" in case.config_cls.method.cannot,
    ),
    Reason(
        tests=("test_multiple_active_adapters_*",),
        outcome="fails",
        why="the method takes the whole layer, and refuses a second active adapter on it",
        message="cannot have several active adapters on one",
        applies=lambda case: case.config_cls.method.alone and case.values.get("test_name", "").endswith("Same"),
    ),
    Reason(
        tests=("test_adapter_dtype_autocast",),
        outcome="fails",
        why="the method keeps its parameters in 32 bits on a base in 16, also where they are not asked for",
        message="assert False",
        applies=lambda case: (
            case.config_cls.method._apply is not nn.Module._apply
            and not case.values["autocast_adapter_dtype"]
            and case.values["dtype"].itemsize < 4
        ),
    ),
    Reason(
        tests=("test_default_target_modules_*",),
        outcome="fails",
        why="the method finds its own places in transformer blocks, of which the model of this test has none, or takes "
        "layers that its defaults do not fit; it says so in words of its own",
        message="has no list of equal blocks|lin0: group_size",
        applies=lambda case: case.config_cls.default_targets is not AdapterConfig.default_targets,
    ),
    Reason(
        tests=("test_multiple_adapters_mixed_modules_to_save*", "test_default_target_modules_*str"),
        outcome="fails",
        why="the test takes the method's defaults, which do not fit a layer of 10 -> 20; the method refuses it by name "
        "or says of what share that is less than one",
        message="^lin0: |less than one of the 10 channels",
        applies=lambda case: refuses_by_default(case.config_cls, nn.Linear(10, 20)),
    ),
    Reason(
        tests=(
            "test_set_adapter_non_overlapping_modules*",
            "test_multiple_active_adapters_with_*modules_to_save*",
            "test_set_requires_grad",
            "test_loading_model_*requires_grad_set_correctly",
        ),
        outcome="fails",
        why="the test takes the method's defaults, which start from what the model was loaded from, and its model was "
        "loaded from nowhere",
        message="does not say what it was loaded from",
        applies=lambda case: reads_what_was_loaded(case.config_cls),
    ),
]


def reads_what_was_loaded(config_cls: type[AdapterConfig]) -> bool:
    """Whether the method with its defaults looks for the files of the model."""
    try:
        config_cls(target_modules=["lin0"]).prepare(nn.ModuleDict({"lin0": nn.Linear(16, 16)}))
    except ValueError as error:
        return "what it was loaded from" in str(error)
    return False


def refuses_by_default(config_cls: type[AdapterConfig], layer: nn.Module) -> bool:
    """Whether the method with its defaults refuses a layer of this size; False where it needs more than the layer."""
    config, model = config_cls(target_modules=["lin0"]), nn.ModuleDict({"lin0": layer})
    shared = config.adapter_class.shared(model, config)
    try:
        config.before_injection(model)
        config.adapter_class(layer, config, *([] if shared is None else [shared]), **config.of_layer(model, "lin0"))
    except ValueError:
        return True
    except TypeError:
        return False
    return False


# tests that take a config class and never build it, or build peft's own configs from it
NOT_OURS = {
    "test_add_weighted_adapter_cat_with_rank_pattern": "builds LoraConfig, whatever class it is given",
}


def reason_for(case: Case) -> Reason | None:
    """The reason listed for a case, if any."""
    return next((reason for reason in REASONS if reason.covers(case)), None)
