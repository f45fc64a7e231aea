"""The output folder of a run: one run at a time, and nothing in it overwritten unless asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import SettingError

REPORT, SETTINGS, FINAL, LOCK = "report.json", "run.yaml", "final", ".lock"


@contextmanager
def output_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the folder and hold it for one run.

    Raises SettingError if another run holds it, if it has a run already that neither resume nor overwrite speaks of, if
    it holds other files, or if it cannot be written.
    """
    if resume and overwrite:
        raise SettingError("--resume goes on with a run and --overwrite throws it away; give one of them.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingError(f"output_dir {folder} is a file, or lies inside one; name a folder.") from None
    except PermissionError:
        raise SettingError(f"No permission to make output_dir {folder}; choose another.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingError(f"No permission to write in output_dir {folder}; choose another.")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingError(f"output_dir {folder} is in use by another run; wait for it, or choose another.") from None
    try:
        ours = [p for p in folder.iterdir() if p.name in (REPORT, SETTINGS, FINAL) or "checkpoint-" in p.name]
        if overwrite:
            for path in ours:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif ours and not resume:
            raise SettingError(
                f"output_dir {folder} holds a run already ({', '.join(sorted(p.name for p in ours)[:3])}). Go on with "
                "it by --resume, start over by --overwrite, or choose another output_dir."
            )
        elif resume and (folder / REPORT).exists():
            raise SettingError(f"The run in {folder} has finished; its report is {folder / REPORT}.")
        yield
    finally:
        lock.release()
