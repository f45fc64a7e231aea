"""Run peft's own tests on our weight adapters.

    python tests/foreign/run.py [--quick] [pytest arguments]

Takes tests/test_custom_models.py from the source distribution of the peft that is installed. That archive is fetched
once from the package index into the cache folder; $PEFT_SDIST names one that is there already. Nothing of it is kept
in this project.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from shoestring.assets.cache import cache_folder

HERE = Path(__file__).parent
FILES = ("test_custom_models.py", "testing_common.py", "testing_utils.py")
INI = """[pytest]
filterwarnings =
    ignore
markers =
    single_gpu_tests: needs one GPU
    multi_gpu_tests: needs several GPUs
    regression: peft's regression suite
    bitsandbytes: needs bitsandbytes
"""


class NoTests(RuntimeError):
    """peft's tests could not be had; the message says why and what to do."""


def folder_of_tests() -> Path:
    """A folder with peft's tests as the package `tests`, fetched if it is not there.

    Raises NoTests if the archive cannot be fetched or lacks the tests.
    """
    version = importlib.metadata.version("peft")
    folder = cache_folder() / "foreign" / f"peft-{version}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        archive = given_archive(version) or downloaded_archive(version, Path(temporary))
        unpacked = Path(temporary) / "unpacked"
        unpack(archive, f"peft-{version}", unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another run was faster
            if not folder.exists():
                raise
    return folder


def given_archive(version: str) -> Path | None:
    """The archive that $PEFT_SDIST names, if it is set."""
    if not (given := os.environ.get("PEFT_SDIST")):
        return None
    archive = Path(given)
    if archive.name != f"peft-{version}.tar.gz" or not archive.is_file():
        raise NoTests(f"PEFT_SDIST must name the file peft-{version}.tar.gz, got {given}.")
    return archive


def downloaded_archive(version: str, folder: Path) -> Path:
    """The source distribution of peft, from the package index pip is set up for."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command = [*pip, "--no-deps", "--no-binary", "peft", f"peft=={version}", "--dest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or not archives:
        raise NoTests(
            f"The source distribution of peft {version} could not be fetched: "
            f"{(done.stderr.strip().splitlines() or ['pip gave no archive'])[-1]} Where there is a network, run "
            f"`pip download --no-deps --no-binary peft peft=={version}`, and set PEFT_SDIST to the file."
        )
    return archives[0]


def unpack(archive: Path, top: str, folder: Path) -> None:
    """Write the three files of tests into `folder`/tests, and settings that keep any other pytest settings out."""
    (folder / "tests").mkdir(parents=True)
    with tarfile.open(archive) as opened:
        for name in FILES:
            try:
                member = opened.extractfile(f"{top}/tests/{name}")
            except KeyError:
                member = None
            if member is None:
                raise NoTests(f"{archive.name} has no tests/{name}: this version of peft keeps its tests elsewhere.")
            with member, open(folder / "tests" / name, "wb") as file:
                shutil.copyfileobj(member, file)
    (folder / "tests" / "__init__.py").touch()
    (folder / "pytest.ini").write_text(INI)


def run(arguments: list[str], **options: object) -> subprocess.CompletedProcess:
    """pytest on peft's tests with our methods in them."""
    folder = folder_of_tests()
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    # --tb=native: pytest's own tracebacks parse the 8,000 lines anew for each expected failure, a minute in all
    settings = ["-c", str(folder / "pytest.ini"), "--rootdir", str(folder), "-p", "no:cacheprovider", "--tb=native"]
    command = [sys.executable, "-m", "pytest", "-p", "shoestring_peft_plugin", *settings, *arguments]
    command.append(str(folder / "tests" / FILES[0]))
    return subprocess.run(command, env=environment, **options)  # type: ignore[call-overload]


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1:]).returncode)
    except NoTests as error:
        sys.exit(str(error))
