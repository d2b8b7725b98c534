"""Figures: learning rates as curves and heat maps, and what all figures of the package share."""

from .drawing import ShownFigure
from .learning_rates import plot_learning_rates

__all__ = ["ShownFigure", "plot_learning_rates"]
