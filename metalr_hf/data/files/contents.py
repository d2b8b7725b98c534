"""What is known of an image file before its pixels are decoded, and what is said of one that cannot be used."""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple

import numpy as np


class UnusableFileError(ValueError):
    """A file that is whole and can still not be learned from, such as a DICOM report without pixels."""


class BrokenFileError(ValueError):
    """A file that its reader cannot read, such as one that a copy has left short."""


class Contents(NamedTuple):
    """What an image file holds, as its header says.

    Args:
        deep (`bool`): Whether its pixels have more than 8 bits a channel.
        channels (`int`): How many values a pixel has.
        transparent (`bool`): Whether pixels may be transparent, which alone may hold what the image shows.
    """

    deep: bool
    channels: int
    transparent: bool = False


def require(package: str, kind: str) -> Any:
    """Imports the package that reads a kind of file.

    Args:
        package (`str`): Its name.
        kind (`str`): What it reads, for the message.

    Returns:
        `module`

    Raises:
        ImportError: if it is not installed. The message names the extra that brings it.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError(f'{kind} files are read by {package}: pip install "metalr-hf[medical]"') from error


def channels_last(values: np.ndarray, channels: int | None = None) -> np.ndarray:
    """Brings an array to the shape `(height, width)` or `(height, width, channels)`.

    Args:
        values (`numpy.ndarray`): An image, its channels first or last.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        `numpy.ndarray`

    Raises:
        UnusableFileError: if it is no image of numbers.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.files.contents import channels_last
    >>> channels_last(np.zeros((5, 32, 48)), channels=5).shape
    (32, 48, 5)

    ```
    """
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise UnusableFileError(
            f"it holds values of the type {values.dtype}, not numbers. Save it as integers or floats"
        )
    if values.ndim == 3:
        few = range(1, 5)
        first, last = values.shape[0], values.shape[-1]
        is_first = (first == channels and last != channels) or (
            channels not in (first, last) and first in few and last not in few
        )
        values = np.moveaxis(values, 0, -1) if is_first else values
        values = values[..., 0] if values.shape[-1] == 1 else values
    if (values.ndim != 2 and values.ndim != 3) or 0 in values.shape:
        raise UnusableFileError(
            f"it holds an array of the shape {values.shape}, but an image is (height, width) or (height, width, "
            "channels). Save each image as a file of its own"
        )
    return values
