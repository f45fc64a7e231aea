"""The contract of weight adapters, run on every registered method."""

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from shoestring.adapters import AdapterConfig
from shoestring.testing import ADAPTER_CHECKS, run_adapter_check

# one row a method and form: the name it is registered under, then settings
CASES = {
    "hut": ("hut", {"r": 3, "alpha": 5}),
    "hut-literal": ("hut", {"r": 3, "form": "literal"}),
    "qwha": ("qwha", {"r": 3, "init": "zero", "alpha": 30}),
    "s2_lora": ("s2_lora", {"r": 3, "alpha": 5}),
    "s2_lora-adalora": ("s2_lora", {"r": 3, "init": "adalora"}),
    "l4q": ("l4q", {"r": 3, "group_size": 8}),
    "l4q-3-bit": ("l4q", {"r": 2, "bits": 3, "group_size": 4, "alpha": 3.0, "learn_offset": False}),
    "s2ft": ("s2ft", {"down_ratio": 0.2, "v_ratio": 0.5}),
    "s2ft-weight": ("s2ft", {"down_ratio": 0.15, "v_ratio": 0.5, "selection": "weight", "end": "small"}),
    "snell": ("snell", {"r": 4, "sparsity": 0.5}),
    "snell-hard": ("snell", {"r": 6, "gate": "hard"}),
    "snella": ("snella", {"r": 4, "start_sparsity": 0.3}),
    "bottleneck-houlsby": ("bottleneck", {"form": "houlsby", "r": 3, "init": "lora"}),
    "bottleneck-pfeiffer": ("bottleneck", {"form": "pfeiffer", "reduction_factor": 4, "init": "lora", "norm": True}),
    "bottleneck-parallel": ("bottleneck", {"activation": "gelu", "scale": "learned"}),
    "mola": ("mola", {"r": 3, "experts": 3}),
    "mola-all-of-two": ("mola", {"r": 2, "experts": 2, "alpha": 3, "use_rslora": True}),
    "paca": ("paca", {"r": 5, "alpha": 3}),
    "paca-weight": ("paca", {"r": 5, "selection": "weight"}),
    "nera": ("nera", {"r": 3, "alpha": 1.0}),
    "nera-knots": ("nera", {"r": 3, "num_knots": 6, "alpha": 2.0}),  # none has a kink at 0, as 4 knots have
    "wara": ("wara", {"r": 3, "alpha": 5}),
    "wara-bands": ("wara", {"r": 3, "levels": 2, "per_band": True}),
    "wara-grid": ("wara", {"form": "grid", "r": 3, "grid": [6, 10], "num_prefix_tokens": 3}),
    "wara-tiny": ("wara", {"form": "tiny", "r": 3, "alpha": 5}),
    "wara-tiny-diagonal": ("wara", {"form": "tiny", "r": 3, "core": "diagonal"}),
    "bottleneck-adaptformer": ("bottleneck", {"form": "adaptformer", "r": 5, "dropout": 0.0}),
    "tlora-ring": ("tlora", {"transform_rank": 2, "r": 3}),
    "tlora-lora": ("tlora", {"residual": "lora", "r": 3, "num_factors": 3, "transform_rank": 3}),
    "tlora-paper": ("tlora", {"init": "paper", "r": 2}),
    "alore": ("alore", {"r": 4, "num_experts": 2}),
    "alore-per-expert": ("alore", {"r": 4, "has_bias": True, "aggregate": "per_expert", "scale": 0.5}),
}
METHODS = {
    str(name).lower(): cls for name, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(cls, AdapterConfig)
}


@pytest.mark.parametrize("check", ADAPTER_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("case", CASES)
def test_every_adapter(check: Callable, case: str):
    name, settings = CASES[case]
    run_adapter_check(check, METHODS[name], lambda: dict(settings))


@pytest.mark.parametrize("name", METHODS)
def test_settings_that_are_no_numbers_and_factors_that_train_nothing_are_refused(name: str):
    for each in fields(METHODS[name]):
        if isinstance(each.default, float):
            with pytest.raises(ValueError, match=f"{each.name} of {name} must be a number, got nan"):
                METHODS[name](**{each.name: math.nan})
        for value in (0.0, -1.0, math.inf) if each.name == "alpha" else ():
            with pytest.raises(ValueError, match=f"alpha of {name} must be above 0, got {value}"):
                METHODS[name](alpha=value)


def test_every_registered_method_has_a_row():
    rows: set[Any] = {name for name, _ in CASES.values()}
    missing = {name for name, cls in METHODS.items() if cls.__module__.startswith("shoestring.")} - rows
    assert not missing, f"add a row to CASES for {', '.join(sorted(missing))}"
