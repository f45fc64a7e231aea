"""The rows that peft's own tests get in place of theirs: every registered method, in a few settings, on peft's models.

A new method needs nothing here: it is found in the registry and run with its defaults and a small `r`. VARIANTS is for
methods whose defaults do not fit layers of 10 -> 20 and 20 -> 2, or that have forms worth a run of their own.
"""

from dataclasses import fields
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import shoestring.adapters  # noqa: F401  (registers the methods)
from shoestring.adapters.base import Adapter, AdapterConfig

Settings = dict[str, Any]

# the name of a method -> the name of a variant -> its settings
VARIANTS: dict[str, dict[str, Settings]] = {
    "hut": {"residual": {"r": 2}, "literal": {"r": 2, "form": "literal"}},
    "s2_lora": {"kaiming": {"r": 2}, "adalora": {"r": 2, "init": "adalora"}},
    "wara": {  # lin1 has 2 outputs, Conv1D has one
        "weight": {"r": 1},
        "per_band": {"r": 1, "levels": 2, "per_band": True},
        "tiny": {"form": "tiny", "r": 1},
    },
    "nera": {"small gain": {"r": 2, "gain": 0.1}},  # the inputs of peft's tests go up to 89
    # 5 divides the 10, 20 and 5 inputs
    "l4q": {
        "8 bits": {"r": 2, "bits": 8, "group_size": 5, "learn_offset": False},
        "3 bits": {"r": 2, "bits": 3, "group_size": 5, "learn_offset": False},
    },
    # neither 10 nor 5 inputs have a Hadamard transform; with the default alpha the large steps of peft's tests diverge
    "qwha": {"filled up": {"r": 1, "init": "zero", "strict": False, "alpha": 3.0}},
    # layers of peft's tests have sizes of one prime factor, and its large steps take a transform with noise to infinity
    "tlora": {
        "ring": {"r": 1, "strict": False, "init": "paper"},
        "lora": {"r": 2, "residual": "lora", "strict": False},
    },
    "alore": {  # 5 divides 10, 20 and the 5 inputs of Conv1D
        "sum": {"r": 5, "num_experts": 5},
        "per expert": {"r": 5, "num_experts": 5, "aggregate": "per_expert", "has_bias": True},
    },
    "paca": {"random": {"r": 2}, "weight": {"r": 4, "selection": "weight"}},
    "mola": {"two of three": {"r": 2, "experts": 3}, "all of two": {"r": 2, "experts": 2}},
    # Conv1D has 5 inputs, of which some must be chosen
    "s2ft": {"random": {"down_ratio": 0.5}, "by weight": {"down_ratio": 0.4, "selection": "weight"}},
    # of the 5 weights of Conv1D some must be left
    "snell": {"soft": {"r": 2, "sparsity": 0.3}, "hard": {"r": 4, "sparsity": 0.3, "gate": "hard"}},
    "bottleneck": {
        "houlsby": {"form": "houlsby", "r": 2, "init": "lora"},
        "pfeiffer": {"form": "pfeiffer", "r": 2, "init": "lora"},
        "parallel": {"r": 2, "scale": "learned"},
        "adaptformer": {"form": "adaptformer", "r": 2, "dropout": 0.0},
    },
}

# of a learning rate of 100, with which others learn in three steps, these do not come back
SMALL_STEPS = {"l4q"}

# what is adapted, and in which of the models in peft's tests: MLP has the linear layers lin0 (10 -> 20) and
# lin1 (20 -> 2); EmbConv1D an embedding, transformers' Conv1D and lin0
PLACES: dict[str, tuple[str, Settings]] = {
    "lin0 and lin1": ("MLP", {"target_modules": ["lin0", "lin1"]}),
    "lin0 by a word": ("MLP", {"target_modules": "lin0"}),
    "lin0": ("MLP", {"target_modules": ["lin0"]}),
    "lin1": ("MLP", {"target_modules": ["lin1"]}),
    "lin0, lin1 saved": ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    "all but lin1": ("MLP", {"target_modules": "all-linear", "exclude_modules": ["lin1"]}),
    "conv1d": ("EmbConv1D", {"target_modules": ["conv1d"]}),
}
# the places that variants after the first are run in
PLACES_OF_FURTHER_VARIANTS = ("lin0 and lin1", "conv1d")


def methods() -> dict[str, type[AdapterConfig]]:
    """The config class of every registered method of ours, by name."""
    return {
        cls.method.name: cls
        for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values()
        if isinstance(cls, type) and issubclass(cls, AdapterConfig)
    }


def variants(config_cls: type[AdapterConfig]) -> dict[str, Settings]:
    """The settings a method is run with, by the name of the variant; for a method without a row its defaults."""
    small = {"r": 2} if any(field.name == "r" for field in fields(config_cls)) else {}
    return VARIANTS.get(config_cls.method.name, {"defaults": small})


def test_cases() -> list[tuple[str, str, type[AdapterConfig], Settings]]:
    """For TEST_CASES: (name of the row, name of the model, config class, settings)."""
    rows = []
    for method, config_cls in methods().items():
        for number, (variant, settings) in enumerate(variants(config_cls).items()):
            for place in PLACES if number == 0 else PLACES_OF_FURTHER_VARIANTS:
                model, where = PLACES[place]
                rows.append((f"{method} {variant}: {place}", model, config_cls, {**where, **settings}))
    return rows


def config_classes() -> list[type[AdapterConfig]]:
    """For ALL_PEFT_CONFIG_CLASSES and the other lists of classes."""
    return list(methods().values())


def configs() -> list[AdapterConfig]:
    """For lists of configs: one a variant, which does not start as the pretrained model."""
    return [
        config_cls(target_modules=["lin0"], init_weights=False, **settings)
        for config_cls in methods().values()
        for settings in variants(config_cls).values()
    ]


def two_adapters() -> list[tuple[str, str, type[AdapterConfig], Settings, Settings]]:
    """For MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES: (name, method, class, settings of the first, of the second adapter)."""
    rows = []
    for method, config_cls in methods().items():
        for variant, settings in variants(config_cls).items():
            first = {"target_modules": ["lin0"], "init_weights": False, **settings}
            for relation, second in (("Same", "lin0"), ("Different", "lin1")):
                other = {**first, "target_modules": [second]}
                rows.append((f"{method} {variant} {relation}", method, config_cls, first, other))
    return rows


def update_of(config_cls: type[AdapterConfig], settings: Settings) -> str:
    """Which of the three updates the method, or its form, overrides."""
    method = config_cls(**settings).adapter_class
    for update in ("new_output", "new_weight", "delta_weight"):
        if getattr(method, update) is not getattr(Adapter, update):
            return update
    raise TypeError(f"{method.__name__} overrides no update.")
