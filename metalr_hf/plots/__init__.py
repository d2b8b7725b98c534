"""Pictures."""

from .drawing import ShownFigure
from .learning_rates import plot_learning_rates

__all__ = ["ShownFigure", "plot_learning_rates"]
