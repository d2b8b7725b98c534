"""Any image file to its pixels, and what is known of it before: the format is told by what the file holds."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import Image

from .contents import Contents, UnusableFileError
from .dicom import look_at_dicom, read_dicom
from .nifti import look_at_nifti, read_nifti
from .pictures import look_at_array, look_at_picture, read_array, read_picture

__all__ = ["Contents", "UnusableFileError", "file_bytes", "format_of", "look_at", "read_image"]

DICOM_ENDINGS = (".dcm", ".dicom", ".dic", ".ima")
# Where a DICOM file says that it is one, behind a preamble of any content.
DICOM_MARK = slice(128, 132)
HEAD_BYTES = 352
NIFTI_MARKS = (b"n+1", b"ni1")
# How files of these formats begin, and what stands near the end of those that are whole.
ENDS = ((b"\x89PNG", b"IEND"), (b"\xff\xd8", b"\xff\xd9"))
# Some cameras write notes of their own behind the image.
TAIL_BYTES = 4096


def format_of(head: bytes, name: str = "") -> str:
    r"""The format of a file.

    Args:
        head (`bytes`): Its first 352 bytes or more.
        name (`str`, *optional*): Its name.

    Returns:
        `str`: `"dicom"`, `"nifti"`, `"array"` or `"picture"`, which is all else.

    Example:

    ```python
    >>> from metalr_hf.data.files.reading import format_of
    >>> format_of(bytes(128) + b"DICM"), format_of(b"\x89PNG"), format_of(b"", "scan.dcm")
    ('dicom', 'picture', 'dicom')

    ```
    """
    name = name.lower()
    if head[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
        except zlib.error:
            return "picture"
    if head[344:347] in NIFTI_MARKS or head[4:7] == b"n+2" or name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if head[DICOM_MARK] == b"DICM" or (name.endswith(DICOM_ENDINGS) and not head.startswith(b"\x89PNG")):
        return "dicom"
    return "array" if head.startswith(b"\x93NUMPY") else "picture"


def file_bytes(entry: Mapping[str, Any]) -> bytes:
    """The content of a file, here, in an archive or on the Hub.

    Args:
        entry (`Mapping`): What an undecoded image column holds: `bytes` and `path`.

    Returns:
        `bytes`
    """
    if entry.get("bytes") is not None:
        return entry["bytes"]
    with xopen(str(entry["path"]), "rb") as file:
        return file.read()


def may_be_cut_short(entry: Mapping[str, Any]) -> bool:
    """Whether a PNG or JPEG file lacks its end, as after a copy that broke off; decoding it tells for certain.

    Args:
        entry (`Mapping`): What an undecoded image column holds: `bytes` and `path`.

    Returns:
        `bool`: never of files in an archive or on the Hub, which would be fetched a second time.

    Example:

    ```python
    >>> import datasets
    >>> from PIL import Image
    >>> from metalr_hf.data.files.reading import may_be_cut_short
    >>> entry = datasets.Image().encode_example(Image.new("L", (4, 2)))
    >>> may_be_cut_short(entry), may_be_cut_short({"bytes": entry["bytes"][:-20]})
    (False, True)

    ```
    """
    content, path = entry.get("bytes"), str(entry.get("path") or "")
    if content is not None:
        head, tail = content[:4], content[-TAIL_BYTES:]
    elif os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(4)
            file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
            tail = file.read()
    else:
        return False
    return any(head.startswith(start) and end not in tail for start, end in ENDS)


def look_at(entry: Mapping[str, Any], channels: int | None = None) -> Contents:
    """What a file holds, without decoding its pixels where that can wait.

    Args:
        entry (`Mapping`): What an undecoded image column holds: `bytes` and `path`.
        channels (`int`, *optional*): How many channels are expected.

    Returns:
        [`~metalr_hf.data.files.contents.Contents`]

    Raises:
        UnusableFileError: if it is whole and can still not be learned from.
        ImportError: if the package that reads it is not installed.
        Exception: whatever the package that reads it raises for a file that is broken.
    """
    path = str(entry.get("path") or "")
    if entry.get("bytes") is None and os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(2 * HEAD_BYTES)
        kind = format_of(head, path)
        # Of these the header is read and not the whole file.
        if kind == "dicom":
            return look_at_dicom(path)
        if kind == "picture":
            return look_at_picture(path, channels)
    content = file_bytes(entry)
    kind = format_of(content, path)
    if kind == "dicom":
        return look_at_dicom(io.BytesIO(content))
    if kind == "nifti":
        return look_at_nifti(content)
    return look_at_array(content, channels) if kind == "array" else look_at_picture(content, channels)


def read_image(entry: Mapping[str, Any], *, voi: bool = False, channels: int | None = None) -> Image.Image | np.ndarray:
    """The pixels of a file.

    Args:
        entry (`Mapping`): What an undecoded image column holds: `bytes` and `path`.
        voi (`bool`, *optional*, defaults to `False`):
            Whether DICOM files are shown with the window that each holds, as floats from 0 to 255.
        channels (`int`, *optional*): How many channels are expected, where that is not 1 or 3.

    Returns:
        `PIL.Image.Image` or `numpy.ndarray`: an image of Pillow where 8 bits a channel hold it as it is; otherwise an
            array `(height, width)` or `(height, width, channels)` of the values in the file.

    Raises:
        UnusableFileError: if it is whole and can still not be learned from.
        ImportError: if the package that reads it is not installed.
        Exception: whatever the package that reads it raises for a file that is broken.

    Example:

    ```python
    >>> import datasets
    >>> import numpy as np
    >>> from metalr_hf.data.files import read_image
    >>> read_image(datasets.Image().encode_example(np.full((4, 6), 4095, "uint16"))).max()
    np.uint16(4095)

    ```
    """
    content = file_bytes(entry)
    kind = format_of(content, str(entry.get("path") or ""))
    if kind == "picture":
        values: Any = read_picture(entry, content, channels)
    elif kind == "dicom":
        values = read_dicom(io.BytesIO(content), voi=voi)
    else:
        values = read_nifti(content) if kind == "nifti" else read_array(content, channels)
    if isinstance(values, np.ndarray):
        if voi and values.dtype != np.uint8 and kind != "dicom":
            raise UnusableFileError(
                "intensity_window='voi': only DICOM files have a window of their own. Give one for all images, as in "
                "--intensity_window 0 4095, or leave the argument out"
            )
        if values.dtype == np.uint8 and (values.ndim == 2 or values.shape[2] == 3):
            return Image.fromarray(values)
    return values
