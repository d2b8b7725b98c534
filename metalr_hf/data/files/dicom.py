"""DICOM files: stored values to values in their units, and what there is to say of files that have none."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from .contents import Contents, UnusableFileError, require

# Nothing else is read: no name, no date and no private tag can get into a message, a log or a file.
TAGS = (
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("VOILUTSequence", "VOILUTFunction", "WindowCenter", "WindowWidth"),
    *(
        f"{colour}PaletteColorLookupTable{what}"
        for colour in ("Red", "Green", "Blue")
        for what in ("Data", "Descriptor")
    ),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData"),
    *("SegmentedBluePaletteColorLookupTableData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *("PixelData", "FloatPixelData", "DoubleFloatPixelData"),
)
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
# Larger values are left in the file where only the header is asked for.
HEADER_VALUE_BYTES = 4096


def look_at_dicom(file: BinaryIO | str) -> Contents:
    """What the header of a DICOM file says of its pixels.

    Args:
        file (`BinaryIO` or `str`): The file or its path.

    Returns:
        [`~metalr_hf.data.files.contents.Contents`]

    Raises:
        UnusableFileError: if it has no pixels, several frames, or is compressed with a codec that is not installed.
        ImportError: if pydicom is not installed.
    """
    with _quietly():
        dataset = _header(file)
        _refuse(dataset)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            return Contents(int(dataset.RedPaletteColorLookupTableDescriptor[2]) > 8, 3)
        return Contents(not _is_shallow(dataset), int(dataset.get("SamplesPerPixel", 1)))


def read_dicom(file: BinaryIO | str, *, voi: bool = False) -> np.ndarray:
    """The pixels of a DICOM file in their units, high values bright.

    Rescale slope and intercept or the modality table are applied, so that CT comes in Hounsfield units. Images in
    which high values are dark (`MONOCHROME1`) are turned within the range of values that can be stored. Pixels that
    the file calls padding are NaN, and black where the image has 8 bits, which hold no NaN.

    Args:
        file (`BinaryIO` or `str`): The file or its path.
        voi (`bool`, *optional*, defaults to `False`):
            Whether to apply the window (VOI, values of interest) that the file holds; the result is then float32
            from 0 to 255.

    Returns:
        `numpy.ndarray` of shape `(height, width)` or `(height, width, 3)`

    Raises:
        UnusableFileError: if it has no pixels, several frames, is compressed with a codec that is not installed, or
            is to be shown with a window that it does not have.
        ImportError: if pydicom is not installed.

    Example:

    ```python
    from metalr_hf.data.files.dicom import read_dicom

    hounsfield_units = read_dicom("scan.dcm")
    ```
    """
    pixels = require("pydicom.pixels", "DICOM")
    with _quietly():
        dataset = _open(file)
        _refuse(dataset)
        stored = pixels.pixel_array(dataset)
        kind = dataset.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            return pixels.apply_color_lut(stored, dataset)
        if int(dataset.get("SamplesPerPixel", 1)) > 1:
            return stored
        values = pixels.apply_modality_lut(stored, dataset)
        # Of what can be stored, in the units.
        ends = pixels.apply_modality_lut(_stored_range(dataset, stored.dtype), dataset)
        shallow = _is_shallow(dataset)
        if shallow and not _has_window(dataset):
            voi = False
        if voi:
            values, ends = _windowed(values, dataset, pixels)
        if kind == "MONOCHROME1":
            values = (ends[0] + ends[-1] - values).astype(values.dtype)
        padding = _padding(dataset, stored)
        if shallow and not voi:
            # The check before training goes by the header: floats would have no window here.
            return np.where(False if padding is None else padding, 0, values).astype(np.uint8)
        if padding is not None and padding.any():
            values = np.where(padding, np.nan, values).astype(np.float32)
        return values


def is_tag(keyword: str) -> bool:
    """Whether a word is the keyword of a tag of DICOM files, such as `PatientID`.

    Args:
        keyword (`str`): The word.

    Returns:
        `bool`: not so where pydicom is not installed.

    Example:

    ```python
    >>> from metalr_hf.data.files.dicom import is_tag
    >>> is_tag("PatientID"), is_tag("patient")
    (True, False)

    ```
    """
    try:
        return require("pydicom.datadict", "DICOM").tag_for_keyword(keyword) is not None
    except ImportError:
        return False


def tag_of(file: BinaryIO | str, keyword: str) -> str | None:
    """The value of one tag.

    Args:
        file (`BinaryIO` or `str`): The file or its path.
        keyword (`str`): Its keyword, such as `"PatientID"`.

    Returns:
        `str`, *optional*: `None` where the file does not have it.
    """
    pydicom = require("pydicom", "DICOM")
    with _quietly():
        dataset = pydicom.dcmread(file, force=True, specific_tags=[keyword], stop_before_pixels=True)
        value = str(dataset.get(keyword, "")).strip()
    return value or None


@contextmanager
def _quietly() -> Iterator[None]:
    """What pydicom warns of may quote values of the file."""
    config = require("pydicom", "DICOM").config
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _open(file: BinaryIO | str, **options: Any) -> Any:
    pydicom = require("pydicom", "DICOM")
    return pydicom.dcmread(file, force=True, specific_tags=list(TAGS), **options)


def _header(file: BinaryIO | str) -> Any:
    return _open(file, defer_size=HEADER_VALUE_BYTES) if isinstance(file, str) else _open(file)


def _refuse(dataset: Any) -> None:
    pydicom, pixels = require("pydicom", "DICOM"), require("pydicom.pixels", "DICOM")
    if not any(name in dataset for name in PIXELS) or "Rows" not in dataset:
        raise UnusableFileError("the DICOM file has no pixels (a report, a plan or a record). Leave it out")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UnusableFileError(
            f"the DICOM file has {frames} frames. Save those to learn from as files of one frame each, or the volume "
            "as NIfTI"
        )
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        # Without a header of the file, as in old archives, it is not compressed.
        dataset.file_meta.TransferSyntaxUID = syntax = (
            pydicom.uid.ImplicitVRLittleEndian
            if dataset.original_encoding[0]
            else pydicom.uid.ExplicitVRLittleEndian
            if dataset.original_encoding[1]
            else pydicom.uid.ExplicitVRBigEndian
        )
    try:
        readable = not syntax.is_compressed or pixels.get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):
        readable = False
    if not readable:
        raise UnusableFileError(
            f"the DICOM file is compressed as {syntax.name}, whose codec is not installed. Install it (pip install "
            "python-gdcm, or pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg), or save the file uncompressed"
        )


def _in_other_units(dataset: Any) -> bool:
    slope, intercept = dataset.get("RescaleSlope"), dataset.get("RescaleIntercept")
    return "ModalityLUTSequence" in dataset or float(slope or 1) != 1 or float(intercept or 0) != 0


def _is_shallow(dataset: Any) -> bool:
    signed = bool(dataset.get("PixelRepresentation"))
    return dataset.get("BitsAllocated") in (1, 8) and not signed and not _in_other_units(dataset)


def _has_window(dataset: Any) -> bool:
    return "VOILUTSequence" in dataset or dataset.get("WindowWidth") is not None


def _stored_range(dataset: Any, kind: np.dtype) -> np.ndarray:
    if kind.kind == "f":
        return np.zeros(2, kind)
    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dataset.PixelRepresentation else (0, 2**bits - 1)
    return np.array([low, high], kind)


def _windowed(values: np.ndarray, dataset: Any, pixels: Any) -> tuple[np.ndarray, np.ndarray]:
    if not _has_window(dataset):
        raise UnusableFileError(
            "intensity_window='voi': the DICOM file has no window of its own. Give one for all images, as in "
            "--intensity_window -160 240, or leave the argument out"
        )
    shown = pixels.apply_voi_lut(values, dataset).astype(np.float64)
    # What the darkest and the brightest possible values become.
    extremes = np.array([-(2**30), 2**30], np.float64 if values.dtype.kind == "f" else np.int64)
    low, high = pixels.apply_voi_lut(extremes, dataset).astype(np.float64)
    return ((shown - low) / (high - low) * 255).astype(np.float32), np.array([0.0, 255.0], np.float32)


def _padding(dataset: Any, stored: np.ndarray) -> np.ndarray | None:
    value = dataset.get("PixelPaddingValue")
    if not isinstance(value, (int, float)):
        return None
    other = dataset.get("PixelPaddingRangeLimit")
    low, high = sorted([value, other if isinstance(other, (int, float)) else value])
    return (stored >= low) & (stored <= high)
