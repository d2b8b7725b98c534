"""Fine-tuning strategies side by side."""

# Modules that register further strategies.
from . import baselines, range_test, rate_free  # noqa: F401
from .report import write_report
from .runs import Cell, Comparison, compare
from .strategies import Strategy, register_strategy

__all__ = ["Cell", "Comparison", "Strategy", "compare", "register_strategy", "write_report"]
