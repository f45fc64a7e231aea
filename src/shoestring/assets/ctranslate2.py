"""Reading a CTranslate2 model file.

Source   the format CTranslate2's converters write, binary version 6; all numbers are little-endian:
         version u32, kind of model (string), its revision u32,
         count u32, then for each tensor: name (string), rank u8, sizes u32 each, type u8, bytes u32, the values,
         count u32, then for each alias: its name (string), the name of the tensor it stands for (string).
         A string is its length u16, with the closing zero counted, and its bytes.
"""

import struct
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingError

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 6
NUMPY_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}


def read_tensors(file: Path) -> dict[str, "Tensor"]:
    """All tensors by name, in float32. Raises SettingError for a file of another version."""
    import numpy as np
    import torch

    stream = BytesIO(file.read_bytes())

    def number(code: str) -> int:
        (value,) = struct.unpack(f"<{code}", stream.read(struct.calcsize(code)))
        return int(value)

    def string() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    version = number("I")
    if version != VERSION:
        raise SettingError(f"{file.name} is a CTranslate2 file of version {version}; version {VERSION} can be read.")
    string(), number("I")  # kind of model and its revision
    tensors = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype = NUMPY_TYPES[number("B")]
        values = np.frombuffer(stream.read(number("I")), dtype=dtype).reshape(shape)
        tensors[name] = torch.from_numpy(values.astype(np.float32))
    for _ in range(number("I")):
        alias = string()
        tensors[alias] = tensors[string()]
    return tensors
