"""Image files, one module a format: photographs and TIFF, DICOM, NIfTI, NumPy arrays; and folders of them."""

from .feature import ImageFile
from .reading import Contents, UnusableFileError, look_at, read_image

__all__ = ["Contents", "ImageFile", "UnusableFileError", "look_at", "read_image"]
