"""Images to the 8 bits a channel that image processors take, or a refusal where that would lose their content."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .files.pictures import deep_channels


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel as RGB.

    Args:
        image (`PIL.Image.Image`): Of any size and mode.

    Returns:
        `PIL.Image.Image`: of mode `RGB`, what `convert("RGB")` gives.

    Raises:
        ValueError: if it has 16 bits a channel, or its content is in its transparency alone.

    Example:

    ```python
    >>> from PIL import Image
    >>> from metalr_hf.data.eight_bits import to_rgb
    >>> to_rgb(Image.new("L", (4, 4))).mode
    'RGB'

    ```
    """
    if raw := deep_channels(image):
        raise ValueError(
            f"the image has 16 bits a channel (mode {raw}), of which Pillow keeps the upper half. Open it with "
            "metalr_hf.data.files.read_image, or save it with 8 bits"
        )
    refuse_hidden_content(image)
    return image.convert("RGB")


def fits_8_bits(values: np.ndarray) -> bool:
    """Whether 8 bits hold the values of an image as they are.

    Args:
        values (`numpy.ndarray`): Of any real type. Floats of which none is above 1 are shares of white, and not the two
            darkest of 256 levels.

    Returns:
        `bool`

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.eight_bits import fits_8_bits
    >>> fits_8_bits(np.array([0.0, 255.0])), fits_8_bits(np.array([0.5])), fits_8_bits(np.array([256]))
    (True, False, False)
    >>> fits_8_bits(np.array([0.0, 1.0])), fits_8_bits(np.array([0, 1]))
    (False, True)

    ```
    """
    if np.issubdtype(values.dtype, np.floating) and 0 < values.max(initial=0) <= 1:
        return False
    with np.errstate(invalid="ignore"):
        return bool((values.astype(np.uint8) == values).all())


def refuse_hidden_content(image: Image.Image) -> None:
    """Raises `ValueError` if the content of an image is in its transparency alone, which a model does not see.

    Args:
        image (`PIL.Image.Image`): Of any size and mode.
    """
    if not image.has_transparency_data:
        return
    colours: Any = image.convert("RGB").getextrema()
    thinnest, thickest = image.convert("RGBA").getchannel("A").getextrema()
    if thinnest != thickest and all(darkest == lightest for darkest, lightest in colours):
        raise ValueError(
            f"the image has one colour only, {tuple(darkest for darkest, _ in colours)}, and its content in its "
            f"transparency (mode {image.mode}), which the model does not see. Put it on a ground of another colour "
            "and save it without transparency"
        )
