"""Checkpoints that are whole or not there: a manifest with hashes, checked before a run is resumed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import SettingError

MANIFEST = "checkpoint.json"
BESIDE = ".checkpoint-in-progress"


def finish(written: Path, place: Path, identity: dict[str, Any]) -> None:
    """Add the manifest to the files in `written` and move the folder to `place`.

    identity: what a run must agree on to go on from here.
    """
    files = {
        str(path.relative_to(written)): {"bytes": path.stat().st_size, "sha256": _hash(path)}
        for path in sorted(written.rglob("*"))
        if path.is_file()
    }
    manifest = {"version": 1, "identity": identity, "files": files}
    manifest["sha256"] = _hash_of_manifest(manifest)
    (written / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*(written / name for name in files), written / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # a power cut must not leave a renamed folder of empty files
    if place.exists():
        shutil.rmtree(place)
    written.rename(place)
    written.parent.rmdir()


def find(folder: Path, identity: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of this run in `folder`, None if there is none; and what is wrong with newer ones.

    Raises SettingError if the newest whole checkpoint belongs to another run, naming where they differ, or if there are
    checkpoints and none is whole.
    """
    found = checkpoints_in(folder)
    problems = []
    if (folder / BESIDE).exists():
        problems.append(f"{folder / BESIDE} was being written when the run ended; it is left out.")
    for path in sorted(found, key=_step, reverse=True):
        if (problem := damage(path)) is not None:
            problems.append(f"{path} is damaged: {problem}; it is left out.")
            continue
        theirs = json.loads((path / MANIFEST).read_text())["identity"]
        for key in identity.keys() | theirs.keys():
            if identity.get(key) != theirs.get(key):
                raise SettingError(
                    f"{path} belongs to another run: its {key} is {theirs.get(key)!r}, here {identity.get(key)!r}. "
                    "Change it back, choose another output_dir, or start over with --overwrite."
                )
        return path, problems
    if found:
        raise SettingError(f"{' '.join(problems)} No whole checkpoint is left; start over with --overwrite.")
    return None, problems


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders named checkpoint-STEP; one renamed to be kept is not among them."""
    return [path for path in sorted(folder.glob("checkpoint-*")) if path.name.removeprefix("checkpoint-").isdigit()]


def rotate(folder: Path, limit: int | None, spare: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `limit` (None or 0: none), never one of `spare`, nor one renamed."""
    if not limit:
        return
    found = sorted(checkpoints_in(folder), key=_step)
    too_many = max(len(found) - max(limit, len(spare)), 0)
    for path in [path for path in found if path not in spare][:too_many]:
        shutil.rmtree(path, ignore_errors=True)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, _, sha256 = manifest["files"], manifest["identity"], manifest.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable, so it was not written to the end or not by Shoestring"
    if sha256 != _hash_of_manifest(manifest):
        return f"{MANIFEST} does not hold what was written"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != expected["bytes"]:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {expected['bytes']}"
        if _hash(path / name) != expected["sha256"]:
            return f"{name} does not hold what was written"
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_manifest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
