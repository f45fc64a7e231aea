"""The output folder of a run: one run at a time, and nothing in it overwritten unless asked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import SettingError
from .checkpoints import BESIDE, checkpoints_in

REPORT, SETTINGS, FINAL, LOCK = "report.json", "run.yaml", "final", ".lock"
BEFORE = "before.json"  # the quality before training, for a run that goes on
ASIDE = ".replaced"  # a run whose place a new one takes


@contextmanager
def output_folder(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """Make the folder and hold it for one run; a folder made here goes again if nothing was written in it.

    Raises SettingError if another run holds it, if it has a run already that neither resume nor overwrite speaks of, if
    there is no run to resume, or if it cannot be written.
    """
    if resume and overwrite:
        raise SettingError("--resume goes on with a run and --overwrite throws it away; give one of them.")
    made = not folder.exists()
    with held(folder, "run"):
        try:
            _put_back(folder)
            ours = _of_a_run(folder)
            if ours and not (resume or overwrite):
                raise SettingError(
                    f"output_dir {folder} holds a run already ({', '.join(sorted(p.name for p in ours)[:3])}). Go on "
                    "with it by --resume, start over by --overwrite, or choose another output_dir."
                )
            elif resume and (folder / REPORT).exists():
                raise SettingError(f"The run in {folder} has finished; its report is {folder / REPORT}.")
            elif resume and not ours:
                raise SettingError(f"There is no run in {folder} to go on with; start one without --resume.")
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] in ([], [LOCK]):
                shutil.rmtree(folder, ignore_errors=True)  # refused before anything was written


@contextmanager
def held(folder: Path, user: str) -> Iterator[None]:
    """Make an output folder and lock it.

    user: what else may hold it, as errors name it.

    Raises SettingError if it cannot be made or written, or is held already.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise SettingError(f"output_dir {folder} is a file, or lies inside one; name a folder.") from None
    except PermissionError:
        raise SettingError(f"No permission to make output_dir {folder}; choose another.") from None
    except OSError as error:  # a file system that is read-only, a name too long
        raise SettingError(f"output_dir {folder} cannot be made ({error.strerror}); choose another.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingError(f"No permission to write in output_dir {folder}; choose another.")
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingError(
            f"output_dir {folder} is in use by another {user}; wait for it, or choose another."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_run(folder: Path) -> Iterator[Callable[[], None]]:
    """Make room for a new run; yields what throws the old one away, to be called once a first step was made.

    What the old run left is put aside; where the new one comes to nothing before that step, it is put back, at the next
    run in the folder if the process was killed. Other files stay.
    """
    aside, gone = folder / ASIDE, folder / f"{ASIDE}-gone"
    shutil.rmtree(gone, ignore_errors=True)
    old = _of_a_run(folder)
    begun = False

    def begin() -> None:
        nonlocal begun
        begun = True
        if aside.exists():
            aside.rename(gone)  # at once, so that half of a run is never put back
            shutil.rmtree(gone, ignore_errors=True)

    try:
        for path in old:
            aside.mkdir(exist_ok=True)
            path.rename(aside / path.name)
        yield begin
    except BaseException:
        if not begun:
            for path in {folder / SETTINGS, folder / BEFORE} - set(old):
                path.unlink(missing_ok=True)
            _put_back(folder)
        raise
    begin()


def _put_back(folder: Path) -> None:
    """Have the run again that was put aside, in place of what another one has written before its first step."""
    aside = folder / ASIDE
    put_aside = list(aside.iterdir()) if aside.exists() else []
    if put_aside:
        (folder / BEFORE).unlink(missing_ok=True)  # the old run's was the first to be put aside, if it had one
    for path in put_aside:
        (folder / path.name).unlink(missing_ok=True)
        path.rename(folder / path.name)
    if aside.exists():
        aside.rmdir()


def _of_a_run(folder: Path) -> list[Path]:
    names = (BEFORE, REPORT, SETTINGS, FINAL, f".{FINAL}-in-progress", BESIDE)
    return [path for path in map(folder.joinpath, names) if path.exists()] + checkpoints_in(folder)
