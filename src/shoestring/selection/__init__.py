"""Selection: which of the existing weights learn, and when. One file a method."""

from .base import Selection
from .ist import IST
from .sparse import SparseSelection

__all__ = ["IST", "Selection", "SparseSelection"]
