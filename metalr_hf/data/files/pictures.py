"""PNG, TIFF and the other files that Pillow opens, with all their bits; and NumPy arrays."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, UnidentifiedImageError

from .contents import Contents, UnusableFileError, channels_last, require

# Modes of Pillow with more than 8 bits a pixel and channel.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow reads from files of several channels of 16 bits, of which it keeps the upper eight.
DEEP_CHANNELS = re.compile(r"(LA|RGBA?|RGBX|CMYK);16[BLN]")
# Pillow gives these as signed numbers of 32 bits.
UNSIGNED = re.compile(r"I;32[BN]?")
TIFF_HEADS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def raw_modes(image: Image.Image) -> list[str]:
    """How the pixels of a file that is not yet decoded are stored.

    Args:
        image (`PIL.Image.Image`): As `PIL.Image.open` gives it.

    Returns:
        `list[str]`: Pillow's raw modes; none of an image that is decoded.
    """
    modes = []
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        modes += [argument for argument in arguments if isinstance(argument, str)]
    return modes


def deep_channels(image: Image.Image) -> str | None:
    """The raw mode of a file of several channels of 16 bits. An image that is decoded has no more than 8.

    Args:
        image (`PIL.Image.Image`): As `PIL.Image.open` gives it.

    Returns:
        `str`, *optional*
    """
    return next((mode for mode in raw_modes(image) if DEEP_CHANNELS.fullmatch(mode)), None)


def look_at_picture(file: bytes | str, channels: int | None = None) -> Contents:
    """What the header of a picture says of its pixels.

    Args:
        file (`bytes` or `str`): The file or its path.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        [`~metalr_hf.data.files.contents.Contents`]

    Raises:
        UnusableFileError: if some of its bits or pages would be lost.
        ImportError: if it is a TIFF file that Pillow does not read as it is, and tifffile is not installed.
        OSError: if it cannot be read.
    """
    try:
        with Image.open(file if isinstance(file, str) else io.BytesIO(file)) as image:
            if not _is_tiff(image) or not _is_for_tifffile(image, channels):
                _refuse_lost_bits(image)
                refuse_lost_pages(image)
                return Contents(image.mode in DEEP_MODES, len(image.getbands()), image.has_transparency_data)
    except UnidentifiedImageError:
        # Of TIFF files that Pillow does not know, tifffile may.
        pass
    content = Path(file).read_bytes() if isinstance(file, str) else file
    if content[:4] not in TIFF_HEADS:
        raise UnidentifiedImageError("cannot identify image file")
    values = _read_tiff(content, channels)
    return Contents(values.dtype != np.uint8, values.shape[2] if values.ndim == 3 else 1)


def read_picture(entry: Mapping[str, Any], content: bytes, channels: int | None = None) -> Image.Image | np.ndarray:
    """A picture: as `datasets.Image` gives it where it has 8 bits a channel, else an array of its values.

    Args:
        entry (`Mapping`): `bytes` and `path` of the file.
        content (`bytes`): The file.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        `PIL.Image.Image` or `numpy.ndarray`

    Raises:
        UnusableFileError: if some of its bits or pages would be lost.
        ImportError: if it is a TIFF file that Pillow does not read as it is, and tifffile is not installed.
        OSError: if it cannot be read.
    """
    if needs_tifffile(content, channels):
        return _read_tiff(content, channels)
    with Image.open(io.BytesIO(content)) as image:
        _refuse_lost_bits(image)
        refuse_lost_pages(image)
    decoded = datasets.Image().decode_example({"bytes": content, "path": entry.get("path")})
    return np.asarray(decoded) if decoded.mode in DEEP_MODES else decoded


def look_at_array(content: bytes, channels: int | None = None) -> Contents:
    """What an npy file holds.

    Args:
        content (`bytes`): The file.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        [`~metalr_hf.data.files.contents.Contents`]

    Raises:
        UnusableFileError: if it holds no image.
    """
    values = read_array(content, channels)
    return Contents(values.dtype != np.uint8, values.shape[2] if values.ndim == 3 else 1)


def read_array(content: bytes, channels: int | None = None) -> np.ndarray:
    """The image in an npy file.

    Args:
        content (`bytes`): The file.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        `numpy.ndarray` of shape `(height, width)` or `(height, width, channels)`

    Raises:
        UnusableFileError: if it holds no image.

    Example:

    ```python
    >>> import io
    >>> import numpy as np
    >>> from metalr_hf.data.files.pictures import read_array
    >>> file = io.BytesIO()
    >>> np.save(file, np.zeros((4, 20, 30), "uint16"))
    >>> read_array(file.getvalue()).shape
    (20, 30, 4)

    ```
    """
    try:
        values = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise UnusableFileError(f"it is no array of numbers ({error}). Save it with numpy.save") from error
    return channels_last(values, channels)


def needs_tifffile(content: bytes, channels: int | None) -> bool:
    """Whether a file is a TIFF that Pillow does not read as it is.

    Args:
        content (`bytes`): The file.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        `bool`
    """
    if content[:4] not in TIFF_HEADS:
        return False
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _is_for_tifffile(image, channels)
    except UnidentifiedImageError:
        return True


def _is_tiff(image: Image.Image) -> bool:
    return image.format == "TIFF"


def _is_for_tifffile(image: Image.Image, channels: int | None) -> bool:
    several = channels not in (None, 1, 3) and len(image.getbands()) != channels
    return several or deep_channels(image) is not None or any(map(UNSIGNED.fullmatch, raw_modes(image)))


def _read_tiff(content: bytes, channels: int | None) -> np.ndarray:
    tifffile = require("tifffile", "TIFF (16-bit colours, several channels)")
    try:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            values = file.series[0].asarray()
    except (tifffile.TiffFileError, IndexError) as error:
        raise OSError(f"cannot identify image file ({error})") from error
    return channels_last(values, channels)


def _refuse_lost_bits(image: Image.Image) -> None:
    if raw := deep_channels(image):
        raise UnusableFileError(
            f"the image has 16 bits a channel (mode {raw}), of which the lower half would be lost. Save it as TIFF, or "
            "bring its values to 8 bits with a window that shows what matters"
        )


def refuse_lost_pages(image: Image.Image, advice: str | None = None) -> None:
    """Raises `UnusableFileError` if an image is a TIFF file of several pages, of which Pillow reads the first.

    Args:
        image (`PIL.Image.Image`): As `PIL.Image.open` gives it.
        advice (`str`, *optional*): What to do; by default that for an image to learn from.
    """
    # Of other formats, counting the frames may mean to decode them all.
    pages = getattr(image, "n_frames", 1) if _is_tiff(image) else 1
    if pages == 1:
        return
    size = image.size
    image.seek(1)
    # A smaller one is a thumbnail, or a level of a pyramid.
    if image.size == size:
        advice = advice or (
            "Save those to learn from as files of one page each, or give "
            f"num_channels={pages} if they are the channels of one image"
        )
        raise UnusableFileError(f"the TIFF file has {pages} pages, of which only the first would be read. {advice}")
    image.seek(0)
