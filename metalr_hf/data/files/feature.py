"""A column of image files of any format, as a type of `datasets`."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import datasets
from datasets.features.features import register_feature

from .reading import read_image

NAME = "MetaLRImageFile"


@dataclass
class ImageFile(datasets.Image):
    """A column of image files: what `datasets.Image` reads, and DICOM, NIfTI, npy and TIFF of any kind besides.

    Photographs and other files of 8 bits a channel come as `datasets.Image` gives them, all others as an array with
    the values in the file.

    Args:
        voi (`bool`, *optional*, defaults to `False`): Whether DICOM files are shown with the window that each holds.
        channels (`int`, *optional*): How many channels are expected, where that is not 1 or 3.

    Example:

    ```python
    >>> import datasets
    >>> import numpy as np
    >>> from metalr_hf.data.files import ImageFile
    >>> images = datasets.Image().encode_example(np.full((4, 6), 4095, "uint16"))
    >>> rows = datasets.Dataset.from_dict({"image": [images]}).cast_column("image", ImageFile())
    >>> rows[0]["image"].max()
    np.uint16(4095)

    ```
    """

    voi: bool = False
    channels: int | None = None
    _type: str = field(default=NAME, init=False, repr=False)

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """Reads a file.

        Args:
            value (`dict`): `bytes` and `path`; anything else is returned as it is.
            token_per_repo_id (`dict`, *optional*): Not needed.

        Returns:
            `PIL.Image.Image` or `numpy.ndarray`
        """
        if not isinstance(value, dict):
            return value
        return read_image(value, voi=self.voi, channels=self.channels)


with warnings.catch_warnings():
    # It warns of being experimental, which a user of this package can do nothing about.
    warnings.simplefilter("ignore")
    register_feature(ImageFile, NAME)
