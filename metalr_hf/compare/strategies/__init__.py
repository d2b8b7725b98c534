"""Fine-tuning strategies: what one is, the registry of all, and those that come with the package."""

# Modules that register further strategies.
from . import baselines, grid_search, range_test, rate_free  # noqa: F401
from .registry import STRATEGIES, HeldOut, Job, Strategy, get_strategy, register_strategy, strategies_table

__all__ = [
    "STRATEGIES",
    "HeldOut",
    "Job",
    "Strategy",
    "get_strategy",
    "register_strategy",
    "strategies_table",
]
