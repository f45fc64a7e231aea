"""The catalogue itself, and what listing it costs."""

import re
import subprocess
import sys

import pytest

from shoestring import assets
from shoestring.errors import SettingError


def test_it_starts_with_five_models_and_six_data_sets():
    names = {
        kind: [name for name, asset in assets.CATALOGUE.items() if asset.kind == kind] for kind in ("model", "data")
    }
    assert names == {
        "model": ["minilm", "smollm2", "dinov2-small", "flan-t5-small", "whisper-tiny-en"],
        "data": ["rotten-tomatoes", "reuters-r8", "boolq", "gsm8k-test", "xsum", "fashion-mnist"],
    }


@pytest.mark.parametrize("asset", assets.CATALOGUE.values(), ids=lambda asset: asset.name)
def test_every_asset_is_pinned_and_described(asset):
    hashes = [file.sha256 for file in asset.files]
    if asset.registry == "pypi":
        hashes.append(asset.carrier_sha256)
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashes)
    assert len(set(hashes)) == len(hashes)
    assert asset.version
    assert asset.licence
    assert asset.description
    assert asset.task


@pytest.mark.parametrize("asset", assets.CATALOGUE.values(), ids=lambda asset: asset.name)
def test_files_of_an_asset_do_not_overwrite_each_other(asset):
    assert len({file.name for file in asset.files}) == len(asset.files)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(SettingError, match=r"no packaged asset 'minilmm'. Did you mean 'minilm'\?"):
        assets.get("minilmm")


def test_gsm8k_warns_that_its_score_is_none_of_gsm8k():
    assert "never a GSM8K score" in assets.get("gsm8k-test").description


def test_importing_installs_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "cache"))
    subprocess.run([sys.executable, "-c", "import shoestring, shoestring.assets"], check=True)
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "own"))
    assert assets.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("SHOESTRING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_folder() == tmp_path / "xdg" / "shoestring"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / ".cache" / "shoestring"
