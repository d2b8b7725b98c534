"""NIfTI files of one slice, turned as a radiologist sees it."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.volume_processor import NiftiFrame, mask_like
from .contents import Contents, UnusableFileError, require

# How far a corner of a mask may lie from that of its image: files are written with rounded numbers.
TOLERANCE_IN_VOXELS = 0.1


def look_at_nifti(content: bytes) -> Contents:
    """What the header of a NIfTI file says of its pixels.

    Args:
        content (`bytes`): The file, compressed by gzip or not.

    Returns:
        [`~metalr_hf.data.files.contents.Contents`]

    Raises:
        UnusableFileError: if it holds more than one slice.
        ImportError: if nibabel is not installed.
    """
    image = _open(content)
    _slice_axes(image)
    kind = image.get_data_dtype()
    slope, intercept = image.header.get_slope_inter()
    scaled = slope not in (None, 1.0) or intercept not in (None, 0.0)
    colours = kind.fields is not None
    return Contents(not colours and (kind != np.uint8 or scaled), 3 if colours else 1)


def read_nifti(content: bytes) -> np.ndarray:
    """The pixels of a NIfTI file of one slice.

    The affine says how the slice lies in the body. An axial slice comes with the front of the body on top and its
    right side on the left, as DICOM files do; coronal and sagittal ones with the head on top.

    Args:
        content (`bytes`): The file, compressed by gzip or not.

    Returns:
        `numpy.ndarray` of shape `(height, width)`, or `(height, width, 3)` of colours

    Raises:
        UnusableFileError: if it holds more than one slice.
        ImportError: if nibabel is not installed.

    Example:

    ```python
    from pathlib import Path
    from metalr_hf.data.files.nifti import read_nifti

    values = read_nifti(Path("slice.nii.gz").read_bytes())
    ```
    """
    image = _open(content)
    _slice_axes(image)
    values = np.asanyarray(image.dataobj)
    if values.dtype.fields is not None:
        # Colours are stored as a value of three named parts.
        values = np.stack([values[name] for name in ("R", "G", "B")], -1)
    return _upright(values, image)


@dataclass(frozen=True)
class NiftiSlice:
    """Where the pixels of a slice, as [`read_nifti`] gives them, lie in its file.

    Args:
        frame ([`~metalr_hf.models.volume_processor.NiftiFrame`]): Shape, affine and header of the file.

    Example:

    ```python
    >>> import nibabel
    >>> import numpy as np
    >>> from metalr_hf.data.files.nifti import NiftiSlice, read_nifti
    >>> values = np.arange(6, dtype=np.uint8).reshape(3, 2, 1)
    >>> content = nibabel.Nifti1Image(values, np.eye(4)).to_bytes()
    >>> mask = NiftiSlice.of(content).mask(read_nifti(content))
    >>> bool((np.asarray(mask.dataobj) == values).all())
    True

    ```
    """

    frame: NiftiFrame

    @classmethod
    def of(cls, content: bytes) -> NiftiSlice:
        """That of a file.

        Args:
            content (`bytes`): The file, compressed by gzip or not.

        Returns:
            [`NiftiSlice`]
        """
        return cls(NiftiFrame.of(_open(content)))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the slice."""
        height, width = self._places().shape
        return height, width

    def mask(self, ids: np.ndarray) -> Any:
        """A NIfTI mask in the geometry of the file.

        Args:
            ids (`numpy.ndarray` of shape `(height, width)`): Class ids.

        Returns:
            `nibabel.Nifti1Image`
        """
        voxels = np.zeros(int(np.prod(self.frame.shape)), np.uint8)
        voxels[self._places()] = ids
        return mask_like(voxels.reshape(self.frame.shape), self.frame)

    def _places(self) -> np.ndarray:
        """The number of each pixel in the file."""
        return _upright(np.arange(int(np.prod(self.frame.shape))), self.frame)


def _upright(values: np.ndarray, image: Any) -> np.ndarray:
    """The values of a slice in the order of the file, or of its three colours, as a radiologist sees them."""
    nibabel = require("nibabel", "NIfTI")
    shape = (*image.shape, 1, 1)[:3]
    values = values.reshape(*shape, *((3,) if values.size > np.prod(shape) else ()))
    orientation = nibabel.io_orientation(image.affine)
    if np.isfinite(orientation).all():
        values = nibabel.apply_orientation(values, orientation)
    # The axis of one voxel; of a single row or column the last one.
    thin = [axis for axis in range(3) if values.shape[axis] == 1][-1]
    upright = values.take(0, axis=thin)[::-1, ::-1].swapaxes(0, 1)
    return np.ascontiguousarray(upright)


def check_place(where: str, mask: bytes, image: bytes) -> None:
    """Refuses the mask of a slice that lies elsewhere than its image; how the two are stored may differ.

    Args:
        where (`str`): Which mask, for the message.
        mask (`bytes`): The NIfTI file of the mask.
        image (`bytes`): The NIfTI file of the image, of the same height and width.

    Raises:
        ValueError: if their affines say so.
    """
    one, other = (_corners(_open(content)) for content in (mask, image))
    refuse_elsewhere(where, "mask", one, other, _open(image))


def refuse_elsewhere(where: str, what: str, corners: np.ndarray, others: np.ndarray, image: Any) -> None:
    """Refuses a file that lies elsewhere than the image that it belongs to.

    Args:
        where (`str`): Which file, for the message.
        what (`str`): What it is.
        corners (`numpy.ndarray` of shape `(8, 3)`): Where its corners are, in mm.
        others (`numpy.ndarray` of shape `(8, 3)`): Where those of the image are.
        image (`nibabel.Nifti1Image`): The image.

    Raises:
        ValueError: if a corner is further away than files with rounded numbers have it.
    """
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    # How thick a slice is makes no difference to where it lies.
    along = [size for size, voxels in zip(sizes, (*image.shape, 1, 1), strict=False) if voxels > 1]
    moved = np.linalg.norm(corners - others, axis=1).max()
    if moved > TOLERANCE_IN_VOXELS * min(along, default=1.0):
        raise ValueError(
            f"{where}: the {what} lies elsewhere than its image: up to {moved:.3g} mm apart, by their affines. "
            "Resample one to the other, or copy the affine of the image if you know that the voxels belong together."
        )


def corners_of(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Where the corners of an image are.

    Args:
        affine (`numpy.ndarray` of shape `(4, 4)`): Voxels to mm.
        shape (`Sequence[int]`): Voxels along each axis.

    Returns:
        `numpy.ndarray` of shape `(8, 3)`: in mm.
    """
    corners = itertools.product(*((0, size - 1) for size in shape[:3]))
    return np.array([[*corner, 1] for corner in corners]) @ np.asarray(affine, dtype=float).T[:, :3]


def _corners(image: Any) -> np.ndarray:
    """Those of a slice, in the order in which [`read_nifti`] has them."""
    nibabel = require("nibabel", "NIfTI")
    shape, orientation = (*image.shape, 1, 1)[:3], nibabel.io_orientation(image.affine)
    if not np.isfinite(orientation).all():
        return corners_of(image.affine, shape)
    affine = image.affine @ nibabel.orientations.inv_ornt_aff(orientation, shape)
    return corners_of(affine, [shape[axis] for axis in orientation[:, 0].argsort()])


def _open(content: bytes) -> Any:
    nibabel = require("nibabel", "NIfTI")
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    kind = nibabel.Nifti2Image if content[4:7] == b"n+2" else nibabel.Nifti1Image
    return kind.from_bytes(content)


def _slice_axes(image: Any) -> None:
    shape = image.shape
    sizes = [size for size in shape if size > 1]
    if len(shape) < 2 or len(sizes) > 2 or any(size > 1 for size in shape[3:]):
        raise UnusableFileError(
            f"the NIfTI file is a volume of the shape {shape}, not one slice. Save the slices to learn from as files "
            "of their own"
        )
