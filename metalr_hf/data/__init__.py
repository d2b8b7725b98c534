"""Images in: from a Hub id, a folder or files to rows that a model takes."""

from .loading import DataArguments, ImageSplits, load_images
from .masks import MaskSplits, load_masks
from .transforms import ImageTransform, load_image_processor, prepare_images

__all__ = [
    "DataArguments",
    "ImageSplits",
    "ImageTransform",
    "MaskSplits",
    "load_image_processor",
    "load_images",
    "load_masks",
    "prepare_images",
]
