"""What a model is to learn: which rows, which network and loss, which inputs, which metrics; one file a task."""

from .base import Task
from .classification import Classification
from .metrics import build_compute_metrics
from .multi_label import MultiLabel
from .registry import TASKS, get_task, register_task
from .regression import Regression
from .segmentation import Segmentation, segmentation_trainer_arguments
from .segmentation_3d import VolumeSegmentation

__all__ = [
    "TASKS",
    "Classification",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "VolumeSegmentation",
    "build_compute_metrics",
    "get_task",
    "register_task",
    "segmentation_trainer_arguments",
]
