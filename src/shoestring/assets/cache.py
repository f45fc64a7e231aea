"""The user's cache folder: where it is, and how a folder in it is written whole or not at all."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from ..errors import SettingError

STAMP = "shoestring.json"
MOVE_THE_CACHE = "Set SHOESTRING_CACHE to a folder where there is room and you may write, then try again."


def cache_folder() -> Path:
    """Where assets are kept: $SHOESTRING_CACHE, else `shoestring` in $XDG_CACHE_HOME or ~/.cache. May not exist yet."""
    chosen = os.environ.get("SHOESTRING_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "shoestring"


@contextmanager
def disk_errors_named() -> Iterator[None]:
    """Turns a full disk or a missing permission inside the block into a SettingError that names the file."""
    try:
        yield
    except SafetensorError as error:  # it reports input and output errors as text
        if f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise SettingError(f"The disk of {cache_folder()} is full. {MOVE_THE_CACHE}") from error
    except OSError as error:
        where = error.filename or cache_folder()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SettingError(f"The disk is full: {where} could not be written. {MOVE_THE_CACHE}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise SettingError(f"{where} may not be written ({error.strerror}). {MOVE_THE_CACHE}") from error
        raise


def need_room(size_bytes: int, purpose: str) -> None:
    """Raises SettingError if the cache's disk has less than `size_bytes` free."""
    folder = cache_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes:
        raise SettingError(
            f"{purpose} needs {size_bytes / 1e6:.0f} MB in {cache_folder()}, "
            f"but only {free / 1e6:.0f} MB are free on its disk. {MOVE_THE_CACHE}"
        )


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time is inside the block for this name; others wait."""
    locks = cache_folder() / "locks"
    with disk_errors_named():
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{name}.lock")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def passing_folder(name: str) -> Iterator[Path]:
    """An empty folder in the cache that is gone after the block.

    Not the system's temporary folder: that may be small, or memory. Hold the lock of `name`: what a killed attempt left
    there is removed first.
    """
    folder = cache_folder() / f".{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folder_written_whole(target: Path, made_from: dict[str, Any]) -> Iterator[Path]:
    """A new folder to write in; it takes the place of `target` when the block ends, and vanishes if the block fails.

    made_from: what the content depends on; `is_whole` compares it later.
    Hold the lock of `target` around it: what an earlier, killed attempt left beside `target` is removed here.
    """
    with disk_errors_named():
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}-*"):
            shutil.rmtree(leftover)
        new = Path(tempfile.mkdtemp(prefix=f".{target.name}-new-", dir=target.parent))
        try:
            yield new
            sizes = {str(path.relative_to(new)): path.stat().st_size for path in new.rglob("*") if path.is_file()}
            (new / STAMP).write_text(json.dumps({"made_from": made_from, "sizes": sizes}, indent=1))
            new.chmod(0o755)  # mkdtemp keeps others out; a shared cache is meant to be read
            if target.exists():
                os.replace(target, new.with_name(f".{target.name}-old"))
            os.replace(new, target)
        finally:
            for leftover in target.parent.glob(f".{target.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)


def is_whole(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether `folder` was finished from just this source and its files still have the sizes they had then."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
        return bool(stamp["made_from"] == made_from) and all(
            (folder / name).stat().st_size == size for name, size in stamp["sizes"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or not a stamp
        return False
