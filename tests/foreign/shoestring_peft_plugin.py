"""A pytest plugin: peft's tests/test_custom_models.py with our methods in place of peft's.

The lists that its `parametrize` marks hold are changed in place before the first test is made from them. Only tests
that receive one of our configs are kept; what they must do is in `reasons.py`.
"""

import importlib.util
import re
import sys
from collections.abc import Generator
from types import ModuleType
from typing import Any

import cases
import pytest
import torch
from peft import PeftConfig
from reasons import NOT_OURS, REASONS, Case, Reason, reason_for

from shoestring.adapters.base import AdapterConfig

SWAPPED: set[int] = set()
USED: set[int] = set()
CASE, REASON = pytest.StashKey[Case](), pytest.StashKey[Reason | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """--quick: the first variant of each method in the first place only."""
    parser.addoption("--quick", action="store_true", help="one row a method")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Stand in for diffusers where it is not installed: peft's module imports it for a function that we do not use."""
    if importlib.util.find_spec("diffusers") is not None:
        return (yield)
    sys.modules["diffusers"] = stand_in = ModuleType("diffusers")
    stand_in.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    try:
        return (yield)
    finally:
        del sys.modules["diffusers"]


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Change the lists that this test's marks hold, once each."""
    named = {
        "TEST_CASES": cases.test_cases,
        "ALL_PEFT_CONFIG_CLASSES": cases.config_classes,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.two_adapters,
    }
    if id(metafunc.module) not in SWAPPED:
        SWAPPED.add(id(metafunc.module))
        for name, rows in named.items():
            if not isinstance(getattr(metafunc.module, name, None), list):
                raise pytest.UsageError(
                    f"{metafunc.module.__name__} has no list {name}: this peft keeps its cases elsewhere."
                )
            replace(getattr(metafunc.module, name), rows(), metafunc.config)
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1] if len(mark.args) > 1 else None
        if not isinstance(values, list) or id(values) in SWAPPED:
            continue
        if values and all(isinstance(value, type) and issubclass(value, PeftConfig) for value in values):
            replace(values, cases.config_classes(), metafunc.config)
        elif values and mark.args[0] == "config0" and all(isinstance(value, PeftConfig) for value in values):
            replace(values, cases.configs(), metafunc.config)


def replace(values: list, ours: list, config: pytest.Config) -> None:
    """Put our rows into a list of peft's, keeping the list."""
    values[:] = one_a_method(ours) if config.getoption("quick") else ours
    SWAPPED.add(id(values))


def one_a_method(rows: list) -> list:
    """The first row of each method."""
    return list({config_class(row): row for row in reversed(rows)}.values())[::-1]


def config_class(row: Any) -> type[AdapterConfig] | None:
    """The class of ours in a row, a value or a list of values."""
    for value in row if isinstance(row, (tuple, list)) else [row]:
        if isinstance(value, AdapterConfig):
            return type(value)
        if isinstance(value, type) and issubclass(value, AdapterConfig):
            return value
    return None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of our configs, and mark those that are expected to fail."""
    kept, other = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        cls, name = config_class(list(params.values())), getattr(item, "originalname", item.name)
        if cls is None or name in NOT_OURS:
            other.append(item)
            continue
        kept.append(item)
        settings = next((value for value in params.values() if isinstance(value, dict)), {})
        item.stash[CASE] = case = Case(name, cls, params.get("model_id", ""), settings, dict(params))
        item.stash[REASON] = reason = reason_for(case)
        if reason is not None:
            USED.add(id(reason))
            if reason.outcome == "fails":
                item.add_marker(pytest.mark.xfail(reason=reason.why, strict=True))
    config.hook.pytest_deselected(items=other)
    items[:] = kept


@pytest.fixture(autouse=True)
def large_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train with lr = 100 where peft does so for those of its methods whose weights would move by under 1e-4."""
    case = request.node.stash[CASE]
    large = case.config_cls.method.name not in cases.SMALL_STEPS
    if large and case.test == "test_only_params_are_updated" and case.model == "EmbConv1D":
        plain = torch.optim.SGD
        monkeypatch.setattr(torch.optim, "SGD", lambda parameters, lr: plain(parameters, lr=100))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, Any, Any]:
    """Fail a skip or an expected failure whose cause is not the one listed, and a pass where a skip was expected."""
    report = yield
    reason = item.stash.get(REASON, None)
    if call.excinfo is not None and report.skipped:
        said = str(call.excinfo.value)
        if reason is None or not re.search(reason.message, said):
            outcome = "failed as expected, but otherwise" if hasattr(report, "wasxfail") else "skipped"
            report.outcome, report.longrepr = "failed", f"{outcome}, with no such reason in reasons.py: {said}"
            vars(report).pop("wasxfail", None)
        elif isinstance(report.longrepr, tuple):
            report.longrepr = (*report.longrepr[:2], f"Skipped: {reason.why}")
    elif reason is not None and reason.outcome == "skips" and report.when == "call" and report.passed:
        report.outcome, report.longrepr = "failed", f"no longer skipped; take it out of reasons.py: {reason.why}"
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how many tests passed for each method, and which reasons met no test."""
    counts: dict[str, dict[str, int]] = {}
    for outcome in ("passed", "skipped", "xfailed", "xpassed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            if method := dict(getattr(report, "user_properties", ())).get("method"):
                counts.setdefault(method, {}).setdefault(outcome, 0)
                counts[method][outcome] += 1
    terminalreporter.section("peft's tests on our methods")
    for method, by_outcome in counts.items():
        terminalreporter.line(
            f"{method}: " + ", ".join(f"{number} {outcome}" for outcome, number in by_outcome.items())
        )
    for reason in REASONS:
        if id(reason) not in USED:
            terminalreporter.line(f"reasons.py: no test of this run matches {', '.join(reason.tests)}: {reason.why}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note which method a test is about, for the summary."""
    item.user_properties.append(("method", item.stash[CASE].config_cls.method.name))
