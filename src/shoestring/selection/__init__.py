"""Selection: which of the existing weights learn, and when. One file a method."""

from .base import Selection
from .sparse import SparseSelection

__all__ = ["Selection", "SparseSelection"]
