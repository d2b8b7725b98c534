"""Start learning rates from the validation loss along the first optimizer steps."""

from .scheduler import CalibratedScheduler
from .search import LOOKS, Calibration, Calibrator, calibrate

__all__ = [
    "LOOKS",
    "CalibratedScheduler",
    "Calibration",
    "Calibrator",
    "calibrate",
]
