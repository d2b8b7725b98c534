"""Images in: from a Hub id, a folder or files to rows that a model takes."""

from .cells import CLASS_NAMES, demo_cells
from .digits import demo_dataset
from .labels.imbalance import ClassArguments
from .labels.quantities import QuantityArguments, load_quantities
from .labels.sets import LabelSetArguments, load_label_sets
from .loading import DataArguments, load_images
from .masks import MaskArguments, MaskSplits, load_masks
from .splits import ImageSplits
from .transforms import ImageTransform, load_image_processor, prepare_images

__all__ = [
    "CLASS_NAMES",
    "ClassArguments",
    "DataArguments",
    "ImageSplits",
    "ImageTransform",
    "LabelSetArguments",
    "MaskArguments",
    "MaskSplits",
    "QuantityArguments",
    "demo_cells",
    "demo_dataset",
    "load_image_processor",
    "load_images",
    "load_label_sets",
    "load_masks",
    "load_quantities",
    "prepare_images",
]
