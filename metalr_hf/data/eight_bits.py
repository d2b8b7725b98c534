"""Images to the 8 bits a channel that image processors take, or a refusal where that would lose their content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .columns import IMAGE, open_image, place

# Modes of Pillow with more than 8 bits a pixel and channel.
DEEP_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# What Pillow reads from files of several channels of 16 bits, of which it keeps the upper eight.
DEEP_CHANNELS = re.compile(r"(LA|RGBA?|RGBX|CMYK);16[BLN]")
ADVICE = (
    "Bring its values to 8 bits with a window that shows what matters, the same for all images, such as the 0.5th to "
    "the 99.5th percentile of the training images, and save it as an 8-bit PNG"
)


def to_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB.

    Args:
        image (`PIL.Image.Image`): Of any size and mode.

    Returns:
        `PIL.Image.Image`: of mode `RGB`, what `convert("RGB")` gives.

    Raises:
        ValueError: if it has values that 8 bits do not hold, or its content is in its transparency alone.

    Example:

    ```python
    >>> import numpy as np
    >>> from PIL import Image
    >>> from metalr_hf.data.eight_bits import to_rgb
    >>> to_rgb(Image.new("L", (4, 4))).mode
    'RGB'
    >>> to_rgb(Image.fromarray(np.full((4, 4), 4095, "uint16")))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: the image has values from 4095 to 4095 (mode I;16), which 8 bits do not hold. Bring its values to ...

    ```
    """
    if raw := _deep_channels(image):
        raise ValueError(
            f"the image has 16 bits a channel (mode {raw}), of which the lower half would be lost. {ADVICE}"
        )
    if image.mode in DEEP_MODES:
        values, image_mode = np.asarray(image), image.mode
        image = image.convert("RGB")
        if not (np.asarray(image) == values[..., None]).all():
            low, high = (f"{value:.6g}" for value in (values.min(), values.max()))
            kind = "" if np.issubdtype(values.dtype, np.integer) else " with fractions"
            raise ValueError(
                f"the image has values from {low} to {high}{kind} (mode {image_mode}), which 8 bits do not hold. "
                f"{ADVICE}"
            )
        return image
    rgb = image.convert("RGB")
    if image.has_transparency_data:
        colours: Any = rgb.getextrema()
        thinnest, thickest = image.convert("RGBA").getchannel("A").getextrema()
        if thinnest != thickest and all(darkest == lightest for darkest, lightest in colours):
            raise ValueError(
                f"the image has one colour only, {tuple(darkest for darkest, _ in colours)}, and its content in its "
                f"transparency (mode {image.mode}), which the model does not see. Put it on a ground of another colour "
                "and save it without transparency"
            )
    return rgb


def refuse_lost_content(name: str, rows: datasets.Dataset) -> None:
    """Raises `ValueError` if 8 bits do not hold what an image of a split shows. It names the first: row, file and mode.

    Of most images the header tells. One that cannot be read is not told of here, but when it is needed.

    Args:
        name (`str`): Name of the split.
        rows (`datasets.Dataset`): Rows with `image`.
    """
    undecoded = rows.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False))
    for row, entry in enumerate(undecoded.with_format(None)):
        refuse_lost_image(place(f"Split {name!r}, row {row}", entry[IMAGE]), entry[IMAGE])


def refuse_lost_image(where: str, entry: Mapping[str, Any] | None) -> None:
    """Raises `ValueError` if 8 bits do not hold what an image shows.

    Args:
        where (`str`): Which row, for the message.
        entry (`Mapping`, *optional*): What an undecoded `datasets.Image` column holds: `bytes` and `path`.
    """
    if entry is None:
        return
    try:
        with open_image(entry) as image:
            doubtful = image.mode in DEEP_MODES or image.has_transparency_data or _deep_channels(image)
            if not doubtful:
                return
            if not _deep_channels(image):
                image.load()
            problem = _problem(image)
    except Exception:
        # A broken file ends a run where it is read, with what Pillow says of it.
        return
    if problem:
        raise ValueError(f"{where}: {problem}.")


def _problem(image: Image.Image) -> str | None:
    try:
        to_rgb(image)
    except ValueError as error:
        return str(error)
    return None


def _deep_channels(image: Image.Image) -> str | None:
    """The raw mode of a file of several channels of 16 bits. An image that is decoded has no more than 8."""
    for tile in getattr(image, "tile", ()):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        for argument in arguments:
            if isinstance(argument, str) and DEEP_CHANNELS.fullmatch(argument):
                return argument
    return None
