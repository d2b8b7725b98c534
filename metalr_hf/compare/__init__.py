"""Fine-tuning strategies side by side."""

from .report import write_report
from .runs import Cell, Comparison, compare
from .strategies import Strategy, register_strategy

__all__ = ["Cell", "Comparison", "Strategy", "compare", "register_strategy", "write_report"]
