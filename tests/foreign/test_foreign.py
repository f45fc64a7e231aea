"""peft's own tests on our weight adapters: a short run here, the whole one when slow tests are asked for."""

import re
import subprocess
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from run import NoTests, folder_of_tests, given_archive, run

from shoestring.adapters import AdapterConfig

METHODS = {
    cls.method.name
    for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values()
    if issubclass(cls, AdapterConfig) and cls.__module__.startswith("shoestring.")
}
NEW_METHODS = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from torch import nn
from shoestring.adapters.base import Adapter, AdapterConfig, linear_sizes, register

class Added(Adapter):
    name, beside = "added", 0
    def __init__(self, base, config):
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(linear_sizes(base)))
        if not config.init_weights:
            nn.init.normal_(self.delta)
    def delta_weight(self):
        return self.delta + self.beside

@register
@dataclass(kw_only=True)
class AddedConfig(AdapterConfig):
    method: ClassVar = Added

class Wrong(Added):
    name, beside = "wrong", 1

@register
@dataclass(kw_only=True)
class WrongConfig(AdapterConfig):
    method: ClassVar = Wrong
"""


def output(arguments: list[str]) -> tuple[int, str]:
    """The exit status and what pytest printed; skips, with the way to get them, where peft's tests cannot be had."""
    try:
        folder_of_tests()
    except NoTests as error:
        pytest.skip(f"peft's own tests were not run. {error}")
    done = run([*arguments, "-q"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


def passed(printed: str) -> dict[str, int]:
    """How many of peft's tests passed, by method."""
    return {name: int(number) for name, number in re.findall(r"^(\w+): (\d+) passed", printed, re.MULTILINE)}


@pytest.mark.slow
def test_our_methods_pass_the_tests_of_peft_in_one_setting_each():
    status, printed = output(["--quick"])
    assert status == 0, printed
    assert set(passed(printed)) == METHODS
    assert min(passed(printed).values()) >= 50, passed(printed)


@pytest.mark.slow
def test_our_methods_pass_the_tests_of_peft():
    status, printed = output([])
    assert status == 0, printed
    assert set(passed(printed)) == METHODS
    assert min(passed(printed).values()) >= 280, passed(printed)


def test_a_new_method_is_run_without_a_row_and_caught_when_it_is_wrong(tmp_path: Path, monkeypatch):
    (tmp_path / "new_methods.py").write_text(NEW_METHODS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, printed = output(["--quick", "-p", "new_methods", "-k", "(added or wrong) and (disable or merge)"])
    assert status == 1, printed
    added, wrong = (re.search(rf"^{name}: (.*)$", printed, re.MULTILINE)[1] for name in ("added", "wrong"))
    assert re.fullmatch(r"\d\d passed, 1 skipped", added)
    assert "failed" in wrong


@pytest.mark.slow
def test_what_does_not_pass_needs_its_own_reason(tmp_path: Path, monkeypatch):
    listed = "Reason(tests=('test_safe_merge',), outcome='fails', why='it is said to', message='never said')"
    (tmp_path / "wrong.py").write_text(f"import reasons\nfrom reasons import Reason\nreasons.REASONS[:] = [{listed}]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cases = "(hut and bias_warns) or ((hut or bottleneck) and test_safe_merge)"
    status, printed = output(["--quick", "-p", "wrong", "-k", cases])
    assert status == 1, printed
    assert "3 failed" in printed
    assert "skipped, with no such reason in reasons.py: Testing bias warnings" in printed
    assert "[XPASS(strict)] it is said to" in printed
    assert "failed as expected, but otherwise, with no such reason in reasons.py: bottleneck changes" in printed


def test_an_archive_of_another_version_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PEFT_SDIST", str(tmp_path / "peft-0.1.0.tar.gz"))
    with pytest.raises(NoTests, match=r"PEFT_SDIST must name the file peft-9\.9\.tar\.gz, got .*peft-0\.1\.0"):
        given_archive("9.9")
