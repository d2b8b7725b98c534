"""Which image it was that could not be read, when a run has stopped for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from .data import IMAGE
from .meta_batches import UnusableRowError


def name_broken_image(error: Exception, splits: Mapping[str, Any]) -> None:
    """Raises an error that names the file, if images of these splits are why a run stopped.

    Who decodes an image does not know where it comes from. So it is looked for when the run has stopped already, by
    decoding one image after the other.

    Args:
        error (`Exception`): What the run stopped with.
        splits (`Mapping[str, datasets.Dataset or datasets.IterableDataset]`): Name to images, as
            [`~metalr_hf.data.load_images`] gives them.

    Raises:
        ValueError: if an image cannot be decoded. It names the first: split, row and file.
    """
    cause = error.__cause__ if isinstance(error, UnusableRowError) else error
    # Errors of the disk or the network have a number, those of Pillow have none.
    if isinstance(cause, OSError) and cause.errno is not None:
        return
    for name, images in splits.items():
        for row, image in enumerate(images.cast_column(IMAGE, datasets.Image(decode=False))):
            try:
                datasets.Image().decode_example(image[IMAGE])
            except Exception as reason:
                raise ValueError(
                    f"Row {row} of the {name} images ({image[IMAGE]['path'] or 'a file without a name'}) cannot be "
                    f"read: {reason}. Repair the image or leave it out."
                ) from error
