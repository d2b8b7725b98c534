"""Which image it was that could not be read, when a run has stopped for it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import datasets

from ..data.columns import IMAGE
from ..data.files import read_image
from ..trainer.batches import UnusableRowError


def name_broken_image(error: Exception, splits: Mapping[str, Any]) -> None:
    """Raises an error that names the file, if images of these splits are why a run stopped.

    Who decodes an image does not know where it comes from. So it is looked for when the run has stopped already, by
    decoding one image after the other.

    Args:
        error (`Exception`): What the run stopped with.
        splits (`Mapping[str, datasets.Dataset or datasets.IterableDataset]`): Name to images, as
            [`~metalr_hf.data.loading.load_images`] gives them.

    Raises:
        ValueError: if an image cannot be decoded. It names the first: split, row and file.
    """
    cause = error.__cause__ if isinstance(error, UnusableRowError) else error
    # Errors of the disk or the network have a number, those of Pillow have none. A file that is not there can be named.
    if isinstance(cause, OSError) and cause.errno is not None and not isinstance(cause, FileNotFoundError):
        return
    for name, images in splits.items():
        rows = iter(images.cast_column(IMAGE, datasets.Image(decode=False)))
        for row in itertools.count():
            # A stream that is mapped decodes its images before.
            path = None
            try:
                image = next(rows)[IMAGE]
                path = image["path"]
                read_image(image)
            except StopIteration:
                break
            except Exception as reason:
                where = f" ({path})" if path else ""
                raise ValueError(
                    f"Row {row} of the {name} images{where} cannot be read: {reason}. Repair the image or leave it out."
                ) from error
