"""Opening installed assets: a model as an ordinary model folder, data as its splits."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError
from .asset import DataAsset, ModelAsset
from .cache import cache_folder, folder_written_whole, is_whole, locked, need_room
from .catalogue import get
from .installing import files_made_from, installed_files

if TYPE_CHECKING:
    from datasets import DatasetDict

logger = logging.getLogger(__name__)


def model_folder(name: str) -> Path:
    """A folder for `from_pretrained`: configuration, safetensors, and tokenizer or preprocessor.

    A model that its carrier holds in another format is converted at first use, which takes some seconds, and kept.
    Raises SettingError if the asset is unknown, is data, is not installed, or its converter needs a package of the
    `demo` extra that is missing.
    """
    asset = get(name)
    if not isinstance(asset, ModelAsset):
        raise SettingError(f"{name} is packaged data, not a model.")
    files = installed_files(asset)
    if asset.convert is None:
        return files
    folder = cache_folder() / name / "model"
    made_from = {**files_made_from(asset), "converter_version": asset.converter_version}
    if is_whole(folder, made_from):
        return folder
    with locked(asset.package):
        if not is_whole(folder, made_from):  # another process may have made it while we waited
            need_room(asset.converted_bytes, f"Converting {name}")
            logger.info("Converting %s to an ordinary model folder, once: %s", name, folder)
            with folder_written_whole(folder, made_from) as new:
                asset.convert(files, new)
    return folder


def data_files(name: str) -> Path:
    """The folder of a data asset's files, as its carrier has them. Raises SettingError as `load_data` does."""
    return installed_files(get_data(name))


def load_data(name: str) -> "DatasetDict":
    """The data in memory, with the splits "train", "validation" and "test" as far as they exist.

    Raises SettingError if the asset is unknown, is a model, or is not installed.
    """
    asset = get_data(name)
    return asset.read(installed_files(asset))


def get_data(name: str) -> DataAsset:
    asset = get(name)
    if not isinstance(asset, DataAsset):
        raise SettingError(f"{name} is a packaged model, not data.")
    return asset
