"""A carrier made for the tests: a small wheel that pip accepts, and catalogue entries for files in it."""

import hashlib
import zipfile
from pathlib import Path

from shoestring import assets
from shoestring.assets import CarrierFile, DataAsset
from shoestring.assets.catalogue import CATALOGUE

CONTENT = {
    "tiny_carrier/__init__.py": b"raise RuntimeError('the code of a carrier must never run')",
    "tiny_carrier/data/words.txt": b"one two three",
    "tiny_carrier/data/more.txt": b"four five",
}


def write_wheel(folder: Path) -> Path:
    """A wheel that pip accepts, with the same bytes every time."""
    info = "tiny_carrier-1.0.dist-info"
    records = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-carrier\nVersion: 1.0\nRequires-Dist: absent\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / "tiny_carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, data in {**CONTENT, **records}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return wheel


def carrier_file(path: str, sha256: str | None = None) -> CarrierFile:
    return CarrierFile(path, len(CONTENT[path]), sha256 or hashlib.sha256(CONTENT[path]).hexdigest())


def add_asset(monkeypatch, name: str, wheel: Path, *paths: str, **changes) -> assets.Asset:
    """Puts an asset of the tiny carrier into the catalogue; `changes` replace its fields."""
    fields = {
        "name": name,
        "package": "tiny-carrier",
        "version": "1.0",
        "carrier_bytes": wheel.stat().st_size,
        "carrier_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "files": tuple(carrier_file(path) for path in paths),
        "licence": "none",
        "task": "text-classification",
        "description": "for tests",
        "read": lambda files: {"train": (files / "words.txt").read_text().split()},
    }
    asset = DataAsset(**{**fields, **changes})
    monkeypatch.setitem(CATALOGUE, name, asset)
    return asset
