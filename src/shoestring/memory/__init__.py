"""Memory: measured by the ledger."""

from .ledger import Ledger
from .report import PARTS, MemoryReport

__all__ = ["PARTS", "Ledger", "MemoryReport"]
