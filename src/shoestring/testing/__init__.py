"""Contracts that every method of a kind keeps, usable by methods outside this package; needs pytest."""

from .adapters import ADAPTER_CHECKS, run_adapter_check

__all__ = ["ADAPTER_CHECKS", "run_adapter_check"]
