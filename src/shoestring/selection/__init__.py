"""Selection: which of the existing weights learn, and when. One file a method."""

from .base import Selection
from .bitfit import BitFit
from .id3 import ID3
from .ist import IST
from .norm_tuning import NormTuning
from .sparse import SparseSelection
from .sparse_grad import SparseGrad
from .speft import Speft
from .spt import SPT
from .unfreeze import Unfreeze

__all__ = [
    "ID3",
    "IST",
    "SPT",
    "BitFit",
    "NormTuning",
    "Selection",
    "SparseGrad",
    "SparseSelection",
    "Speft",
    "Unfreeze",
]
