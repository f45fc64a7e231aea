"""Memory: measured by the ledger, and explained tensor by tensor."""

from .kept import Kept, KeptReport, KeptRow
from .ledger import Ledger
from .report import PARTS, MemoryReport

__all__ = ["PARTS", "Kept", "KeptReport", "KeptRow", "Ledger", "MemoryReport"]
