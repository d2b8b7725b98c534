"""Start learning rates from the validation loss along the first optimizer steps."""

from .scheduler import CalibratedScheduler
from .search import Calibration, Calibrator, calibrate

__all__ = [
    "CalibratedScheduler",
    "Calibration",
    "Calibrator",
    "calibrate",
]
