"""NIfTI files of one slice, turned as a radiologist sees it."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.volume_processor import NiftiFrame, mask_like
from .contents import Contents, UnusableFileError, require


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
