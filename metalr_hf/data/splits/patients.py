"""Groups of images that no column tells, but a tag of their DICOM files does: patients, studies, devices."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from typing import Any

import datasets

from ..columns import IMAGE, place
from ..files.dicom import is_tag, tag_of
from ..files.reading import file_bytes, format_of

PSEUDONYM_CHARACTERS = 12


def with_groups(splits: Mapping[str, Any], column: str | None, image_column: str | None) -> Mapping[str, Any]:
    """Adds the column of the groups where it is a tag of the DICOM files, such as `PatientID`.

    Its values are pseudonyms, the same for the same value: what the files say of a patient stays in them.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Name to rows.
        column (`str`, *optional*): The column of the groups, or the keyword of a tag.
        image_column (`str`, *optional*): The column of the images, by default the only one.

    Returns:
        `Mapping[str, datasets.Dataset]`: the splits, unless the column is missing and a tag has its name.

    Raises:
        ValueError: if one of the files is no DICOM file.
    """
    if column is None or all(column in (rows.column_names or [column]) for rows in splits.values()):
        return splits
    if any(isinstance(rows, datasets.IterableDataset) for rows in splits.values()):
        return splits
    if not any(isinstance(kind, datasets.Image) for rows in splits.values() for kind in rows.features.values()):
        return splits
    if not is_tag(column):
        return splits
    grouped = {}
    for name, rows in splits.items():
        images = image_column or next(c for c, kind in rows.features.items() if isinstance(kind, datasets.Image))
        files = rows.select_columns([images]).rename_column(images, IMAGE) if images != IMAGE else rows
        files = files.select_columns([IMAGE]).cast_column(IMAGE, datasets.Image(decode=False)).with_format(None)
        values = [_pseudonym(f"Split {name!r}, row {row}", file[IMAGE], column) for row, file in enumerate(files)]
        grouped[name] = rows.add_column(column, values, feature=datasets.Value("string"))
    return grouped


def _pseudonym(where: str, entry: Mapping[str, Any], tag: str) -> str | None:
    path = str(entry.get("path") or "")
    is_local = entry.get("bytes") is None and os.path.isfile(path)
    content: Any = b"" if is_local else file_bytes(entry)
    if is_local:
        with open(path, "rb") as file:
            content = file.read(1024)
    if format_of(content, path) != "dicom":
        raise ValueError(
            f"{place(where, entry)}: group_column={tag!r} is no column but a tag of DICOM files, and this is none. "
            "Give the images a column of that name in a metadata.csv."
        )
    value = tag_of(path if is_local else io.BytesIO(content), tag)
    return None if value is None else hashlib.sha256(value.encode()).hexdigest()[:PSEUDONYM_CHARACTERS]
