"""Contracts that every method of a kind keeps, usable by methods outside this package; needs pytest."""

from .adapters import ADAPTER_CHECKS, run_adapter_check
from .techniques import TECHNIQUE_CHECKS, TechniqueCase, run_technique_check

__all__ = ["ADAPTER_CHECKS", "TECHNIQUE_CHECKS", "TechniqueCase", "run_adapter_check", "run_technique_check"]
