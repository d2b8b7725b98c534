"""Runs that stop by themselves when they have converged."""

from .arguments import REFINED_LOSS, SETS_ITSELF, prepare_stopping
from .finishing import FinishingTrainer

__all__ = ["REFINED_LOSS", "SETS_ITSELF", "FinishingTrainer", "prepare_stopping"]
