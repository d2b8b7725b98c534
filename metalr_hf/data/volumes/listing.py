"""Volumes without masks, one after the other: NIfTI files, folders of them, and columns of a data set."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from ..files.folders import image_files
from ..listing import Files, ImageList, is_table, list_files, list_rows, refuse_for_files, refuse_twice
from ..masks.loading import MASK_NAME
from .folders import ENDINGS, is_volume_folder

# nnU-Net ends the name of an image in the number of its channel.
CHANNEL = re.compile(r"(.+)_(\d{4})(\.nii(?:\.gz)?)", re.IGNORECASE)


@dataclass(frozen=True)
class VolumeFiles:
    """Volumes on disk.

    Args:
        names (`Sequence[str]`): Their names; that of one whose channels are files of their own lacks the number.
        paths (`Sequence[Sequence[str]]`): The files of each, in the order of its channels.
    """

    names: Sequence[str]
    paths: Sequence[Sequence[str]]

    def entry(self, number: int) -> Any:
        """`bytes` and `path` of a volume, or a list of those of its channels."""
        entries = [{"bytes": None, "path": path} for path in self.paths[number]]
        return entries if len(entries) > 1 else entries[0]


def list_volumes(
    sources: Sequence[str],
    channels: int,
    split: str | None = None,
    image_column_name: str | None = None,
    leave_out: str | None = None,
) -> ImageList:
    """Lists the volumes that are meant.

    Args:
        sources (`Sequence[str]`):
            NIfTI files and folders of them, in folders below too, of one in nnU-Net's layout the images; or one data
            set with a column of NIfTI: a Hub id, a parquet file, or a folder of parquet or arrow files.
        channels (`int`):
            How many channels the model takes. Files that end in `_0000`, `_0001` ... up to that number are the channels
            of one volume, as in nnU-Net's folders; if such numbers go further, they number volumes.
        split (`str`, *optional*): Of a data set; by default all.
        image_column_name (`str`, *optional*): Of a data set; by default the only column of volumes that are no masks.
        leave_out (`str`, *optional*): A folder whose files are not listed.

    Returns:
        [`~metalr_hf.data.listing.ImageList`]

    Raises:
        FileNotFoundError: if there are no volumes.
        ValueError: if there is no such split or column, or one is named for files and folders.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.data.volumes.listing import list_volumes
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("a_0000.nii.gz", "a_0001.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"):
    ...         (Path(folder) / name).touch()
    ...     list_volumes([folder], channels=2).names, len(list_volumes([folder], channels=1).names)
    (['a.nii.gz', 'b.nii.gz'], 4)

    ```
    """
    if len(sources) == 1 and is_table(sources[0]):
        return list_rows(sources[0], split, image_column_name, _volume_columns, _undecoded)
    refuse_for_files(sources, split, image_column_name)
    return _by_volume(list_files(sources, _volume_files, leave_out, "NIfTI files"), channels)


def _volume_files(folder: str) -> Iterator[str]:
    labelled = is_volume_folder(folder)
    for path in image_files(folder):
        is_mask = labelled and os.path.relpath(path, folder).startswith("labels")
        if path.lower().endswith(ENDINGS) and not is_mask:
            yield path


def _by_volume(files: Files, channels: int) -> VolumeFiles:
    numbered: dict[str, list[int]] = {}
    parts = {name: (part[1] + part[3], int(part[2])) for name in files.names if (part := CHANNEL.fullmatch(name))}
    for volume, channel in parts.values():
        numbered.setdefault(volume, []).append(channel)
    there = set(files.names)
    volumes: dict[str, list[tuple[int, str]]] = {}
    for name, path in zip(files.names, files.paths, strict=True):
        volume, channel = parts.get(name, (name, 0))
        is_channel = volume not in there and max(numbered.get(volume, [0])) < channels
        volumes.setdefault(volume if is_channel else name, []).append((channel, path))
    refuse_twice(list(volumes))
    return VolumeFiles(list(volumes), [[path for _, path in sorted(found)] for found in volumes.values()])


def _volume_columns(features: Mapping[str, Any]) -> list[str]:
    there = [name for name, feature in features.items() if isinstance(_element(feature), datasets.Nifti)]
    return [name for name in there if not MASK_NAME.fullmatch(name)]


def _undecoded(feature: Any) -> Any:
    entry = datasets.Nifti(decode=False)
    return entry if _element(feature) is feature else datasets.List(entry)


def _element(feature: Any) -> Any:
    """The type of a column's entries, or of those of its lists, where channels are files of their own."""
    return getattr(feature, "feature", feature)
