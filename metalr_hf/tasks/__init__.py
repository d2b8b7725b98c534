"""What a model is to learn: which head, which loss, which inputs, which metrics."""

from .demo import demo_dataset, demo_image_processor, demo_model, demo_unet
from .demo_cells import demo_cells
from .metrics import build_compute_metrics
from .segmentation import segmentation_trainer_arguments

__all__ = [
    "build_compute_metrics",
    "demo_cells",
    "demo_dataset",
    "demo_image_processor",
    "demo_model",
    "demo_unet",
    "segmentation_trainer_arguments",
]
