"""What is measured of answers, one module a kind of answer: classes and masks, labels, numbers, volumes."""

from .classes import (
    CLASS_SCORES,
    METRICS,
    build_compute_metrics,
    build_dice_metrics,
    load_metric,
    predicted_classes,
    score_classes,
)
from .direction import lower_is_better
from .labels import LABEL_METRICS, build_label_metrics, score_label_sets
from .numbers import NUMBER_METRICS, build_number_metrics, score_numbers
from .refined_loss import refined_losses
from .volumes import build_volume_metrics, measure_volumes

__all__ = [
    "CLASS_SCORES",
    "LABEL_METRICS",
    "METRICS",
    "NUMBER_METRICS",
    "build_compute_metrics",
    "build_dice_metrics",
    "build_label_metrics",
    "build_number_metrics",
    "build_volume_metrics",
    "load_metric",
    "lower_is_better",
    "measure_volumes",
    "predicted_classes",
    "refined_losses",
    "score_classes",
    "score_label_sets",
    "score_numbers",
]
