"""Files that are there whole or not at all, and tensors read with errors that name the file."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import SettingError


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it, so that a reader never sees half a file.

    The folder is made if needed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    try:
        write(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], **about: str) -> None:
    """Write tensors as safetensors, and texts about them."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda beside: save_file(contiguous, beside, metadata={"format": "pt", **about}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and the texts about them.

    Raises SettingError if it is missing or damaged.
    """
    if not path.exists():
        raise SettingError(f"{path.parent} holds no {path.name}: it was not saved with this recipe.")
    try:
        with safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SettingError(f"{path} cannot be read: {error}") from error


def check_names(where: str | Path, saved: Iterable[str], wanted: Iterable[str], owner: str = "") -> None:
    """Raise SettingError unless what was saved has just the names that are wanted, for `owner` where it is named."""
    saved, wanted = set(saved), set(wanted)
    for names, what in ((wanted - saved, "lacks"), (saved - wanted, "holds the foreign")):
        if names:
            of = f" for {owner}" if owner else ""
            raise SettingError(f"{where} {what} {sorted(names)[0]} ({len(names)} in all){of}.")
