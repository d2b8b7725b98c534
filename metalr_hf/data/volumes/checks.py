"""Whether volumes and masks fit together, found out before training."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...messages import first_line
from ...models.volume_processor import open_nifti
from ..columns import IMAGE, LABEL, place
from ..files.nifti import corners_of, refuse_elsewhere


@dataclass(frozen=True)
class Geometry:
    """Size of a volume from left to right, back to front and bottom to top.

    Args:
        shape (`tuple[int, ...]`): Voxels along each axis.
        spacing (`tuple[float, ...]`): Size in mm of a voxel along each axis.
        channels (`int`): How many values a voxel has.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    channels: int


def channels_of(row: Mapping[str, Any]) -> list[Any]:
    """The files of a row's volume: one, or one a channel.

    Args:
        row (`Mapping[str, Any]`): With `image`.

    Returns:
        `list`
    """
    return list(row[IMAGE]) if isinstance(row[IMAGE], (list, tuple)) else [row[IMAGE]]


def geometry_of(row: Mapping[str, Any]) -> Geometry:
    """The size of a row's volume, from the headers of its files.

    Args:
        row (`Mapping[str, Any]`): With `image`.

    Returns:
        [`Geometry`]
    """
    import nibabel

    files = [open_nifti(entry) for entry in channels_of(row)]
    # Which axis of the file is which of the body.
    axes = nibabel.orientations.io_orientation(files[0].affine)[:, 0].argsort()
    sizes = nibabel.affines.voxel_sizes(files[0].affine)
    return Geometry(
        tuple(int(files[0].shape[axis]) for axis in axes),
        tuple(float(sizes[axis]) for axis in axes),
        count_channels(files),
    )


def count_channels(images: Sequence[Any]) -> int:
    """How many values a voxel has.

    Args:
        images (`Sequence[nibabel.Nifti1Image]`): The files of a volume.

    Returns:
        `int`
    """
    return sum(image.shape[3] if len(image.shape) == 4 else 1 for image in images)


def check_channels(where: str, entries: Sequence[Any]) -> list[Any]:
    """Opens the files of a volume and reads them once.

    Args:
        where (`str`): Which volume, for the message.
        entries (`Sequence`): One file, or one a channel.

    Returns:
        `list[nibabel.Nifti1Image]`

    Raises:
        ValueError: if one cannot be read, they do not fit, or a value is not finite; it names the file.
    """
    images = [_opened(place(where, entry), entry) for entry in entries]
    for entry, image in zip(entries, images, strict=True):
        _check_fit(place(where, entry), image, "channel", images[0])
        if not np.isfinite(_voxels(place(where, entry), image)).all():
            raise ValueError(
                f"{place(where, entry)}: the volume holds values that are not finite. Mend it or leave it out."
            )
    return images


def check_volumes(name: str, rows: Any) -> dict[int, str]:
    """Reads every volume and its mask once.

    Args:
        name (`str`): Of the split.
        rows (`datasets.Dataset`): With `image` and `label`.

    Returns:
        `dict[int, str]`: every value that masks hold, and where it is first.

    Raises:
        ValueError: if one cannot be read, they do not fit, or a value is none that can be learned from; it names the
            file.
    """
    first: dict[int, str] = {}
    channels: dict[int, str] = {}
    for number, row in enumerate(rows):
        where = f"Split {name!r}, row {number}"
        if row[LABEL] is None or any(entry is None for entry in channels_of(row)):
            raise ValueError(f"{where}: there is no {'mask' if row[LABEL] is None else 'image'}. Leave the row out.")
        images = check_channels(where, channels_of(row))
        mask = _opened(place(where, row[LABEL]), row[LABEL])
        _check_fit(place(where, row[LABEL]), mask, "mask", images[0])
        channels.setdefault(count_channels(images), place(where, channels_of(row)[0]))
        for value in _values(place(where, row[LABEL]), mask):
            first.setdefault(value, place(where, row[LABEL]))
    if len(channels) > 1:
        (fewer, here), (more, there) = itertools.islice(channels.items(), 2)
        raise ValueError(f"{there}: the volume has {more} channels, but {here} has {fewer}. All must have as many.")
    return first


def _opened(where: str, entry: Any) -> Any:
    try:
        image = open_nifti(entry)
    except (OSError, ValueError, zlib.error, EOFError, _nibabel_error()) as error:
        raise ValueError(f"{where}: this is no NIfTI file that can be read ({first_line(error)}).") from error
    if len(image.shape) not in (3, 4) or min(image.shape[:3]) < 2:
        size = " × ".join(map(str, image.shape))
        raise ValueError(f"{where}: the file holds {size} voxels, which is no volume of three axes. Leave it out.")
    affine = np.asarray(image.affine, dtype=float)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ValueError(f"{where}: its affine does not say how large a voxel is. Mend the header of the file.")
    return image


def _nibabel_error() -> type[Exception]:
    from nibabel.filebasedimages import ImageFileError

    return ImageFileError


def _check_fit(where: str, file: Any, what: str, image: Any) -> None:
    """Raises `ValueError` if a mask or a further channel lies elsewhere than the image."""
    if file.shape[:3] != image.shape[:3] or (what == "mask" and len(file.shape) == 4):
        sizes = (" × ".join(map(str, one.shape)) for one in (file, image))
        raise ValueError(f"{where}: the {what} has {' voxels, its image '.join(sizes)}. Resample one to the other.")
    corners, others = (corners_of(one.affine, image.shape) for one in (file, image))
    refuse_elsewhere(where, what, corners, others, image)


def _voxels(where: str, image: Any) -> np.ndarray:
    try:
        return np.asanyarray(image.dataobj)
    except (OSError, ValueError, zlib.error, EOFError) as error:
        raise ValueError(f"{where}: the voxels cannot be read ({first_line(error)}). Mend the file.") from error


def _values(where: str, mask: Any) -> Sequence[int]:
    found = np.unique(_voxels(where, mask))
    whole = np.nan_to_num(found, nan=0.5).round()
    if (whole != found).any():
        raise ValueError(
            f"{where}: the mask holds the value {found[whole != found][0]:.6g}, but a mask holds class ids, which are "
            "whole numbers. Round them."
        )
    return [int(value) for value in whole]
