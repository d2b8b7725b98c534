"""A mask's file to class ids, and the size of the image that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, UnidentifiedImageError

from ..columns import open_image
from ..files import read_image
from ..files.pictures import deep_channels, needs_tifffile, refuse_lost_pages
from ..files.reading import file_bytes, format_of

# Masks of one channel; in `P` the colours stand for the ids.
MASK_MODES = ("1", "L", "P", "I", "I;16")
BLACK_AND_WHITE = (0, 255)
TWO_CLASSES = ((0, 1), BLACK_AND_WHITE)


def read_mask(entry: Mapping[str, Any]) -> np.ndarray:
    """The values of a mask.

    Args:
        entry (`Mapping[str, Any]`): `bytes` or `path` of its file, as `datasets.Image(decode=False)` gives them.

    Returns:
        `numpy.ndarray` of shape `(height, width)`, an integer type

    Raises:
        ValueError: if it is a picture with colours or of several pages, some of its bits would be lost, its values
            are no whole numbers, or it is a JPEG file with other values than those of masks of two classes.

    Example:

    ```python
    >>> from metalr_hf.data.masks import MaskArguments, load_masks, read_mask
    >>> mask = read_mask(load_masks(MaskArguments()).train[0]["label"])
    >>> mask.shape, sorted(set(mask.ravel().tolist()))
    ((96, 96), [0, 1])

    ```
    """
    if kind_of(entry) != "picture":
        return _of_one_channel(np.asarray(read_image(entry)))
    try:
        opened = open_image(entry)
    except UnidentifiedImageError:
        if needs_tifffile(file_bytes(entry), None):
            return _of_one_channel(np.asarray(read_image(entry)))
        raise
    with opened as picture:
        refuse_lost_pages(picture, "Save the mask as one page that holds the ids of all classes")
        if raw := deep_channels(picture):
            raise ValueError(
                f"the mask has several channels of 16 bits (mode {raw}), of which the lower half would be lost, but a "
                "mask has one channel that holds class ids. Save it with one channel"
            )
        mode, is_lossy = picture.mode, picture.format == "JPEG"
        values = np.asarray(picture if mode in (*MASK_MODES, "F") else picture.convert("RGB"))
    if is_lossy:
        _refuse_changed_values(values)
    if mode == "F":
        return _whole_numbers(values)
    if mode not in MASK_MODES:
        if (values != values[..., :1]).any():
            raise ValueError(
                f"the mask has colours (mode {mode}), but a mask has one channel that holds class ids. Convert the "
                "colours to ids"
            )
        # Grey, stored as three channels that are equal.
        return values[..., 0]
    return values.astype(np.uint8) if values.dtype == bool else values


def kind_of(entry: Mapping[str, Any]) -> str:
    """The format of a file.

    Args:
        entry (`Mapping[str, Any]`): `bytes` or `path` of it.

    Returns:
        `str`: what [`~metalr_hf.data.files.reading.format_of`] says.
    """
    return format_of(file_bytes(entry), str(entry.get("path") or ""))


def size_of(entry: Mapping[str, Any], channels: int | None = None) -> tuple[int, int]:
    """Height and width of an image as it will be decoded, from its header where that tells.

    Args:
        entry (`Mapping[str, Any]`): `bytes` or `path` of its file.
        channels (`int`, *optional*): How many channels are expected, where that is not 1 or 3.

    Returns:
        `tuple[int, int]`
    """
    content = file_bytes(entry)
    if format_of(content, str(entry.get("path") or "")) != "picture" or needs_tifffile(content, channels):
        height, width = np.asarray(read_image(entry, channels=channels)).shape[:2]
        return height, width
    with open_image(entry) as picture:
        width, height = picture.size
        # The orientations from 5 on lie on their side, and `datasets` turns them when it decodes.
        return (width, height) if picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (height, width)


def _refuse_changed_values(values: np.ndarray) -> None:
    """Raises `ValueError` if a JPEG file holds other values than masks of two classes do: they may have changed."""
    found: list[int] = np.unique(values).tolist()
    if not any({*found} <= {*pair} for pair in TWO_CLASSES):
        shown = ", ".join(map(str, found[:5])) + (" ..." if len(found) > 5 else "")
        raise ValueError(
            f"the mask is a JPEG file, which changes the values of masks: it holds {shown}. Save masks as PNG, made "
            "from the originals"
        )


def _of_one_channel(values: np.ndarray) -> np.ndarray:
    if values.ndim == 3:
        raise ValueError(
            f"the mask has several channels (its shape is {values.shape}), but a mask has one channel that holds "
            "class ids. Convert them to ids"
        )
    return _whole_numbers(values) if values.dtype.kind == "f" else values


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    whole = np.nan_to_num(values, nan=0.5).round().astype(np.int64)
    if (whole != values).any():
        raise ValueError(
            f"the mask holds the value {values[whole != values][0]:.6g} (mode F), but a mask holds class ids, which "
            "are whole numbers. Round them"
        )
    return whole
