"""Selection: which of the existing weights learn, and when. One file a method."""

from .base import Selection
from .ist import IST
from .sparse import SparseSelection
from .spt import SPT

__all__ = ["IST", "SPT", "Selection", "SparseSelection"]
