"""Images with masks: read and checked, and made inputs of a model."""

from .loading import MaskArguments, MaskClasses, MaskSplits, load_masks
from .reading import read_mask
from .transforms import MaskTransform, collate_masks

__all__ = [
    "MaskArguments",
    "MaskClasses",
    "MaskSplits",
    "MaskTransform",
    "collate_masks",
    "load_masks",
    "read_mask",
]
