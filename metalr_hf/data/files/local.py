"""A local folder of images to the rows of its splits."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.data_files import FILES_TO_IGNORE

from ..columns import is_text
from .checks import check_folder
from .folders import FOLDER_BUILDER, walk
from .layout import builder_of, folders_of_splits, has_metadata

NUMBERS = ("int", "uint", "float")


def load_folder(
    folder: str, config_name: str | None = None, streaming: bool = False, builder: str | None = None
) -> Any:
    """Loads a folder of image files.

    Args:
        folder (`str`): With folders of classes, of splits and classes, or a `metadata.csv` a split.
        config_name (`str`, *optional*): A name for it in the cache of `datasets`.
        streaming (`bool`, *optional*, defaults to `False`): Read the files while training.
        builder (`str`, *optional*):
            What [`~metalr_hf.data.files.layout.builder_of`] says of the folder, where it has been asked before.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`

    Raises:
        ValueError: if the tables of the splits have columns that do not go together, or a part of the folder would be
            left out.
    """
    builder = builder or builder_of(folder, is_one_of_images=True)
    splits = folders_of_splits(folder)
    check_folder(folder, splits, has_scans=builder == FOLDER_BUILDER)
    files = {
        split: [pattern for path in paths for pattern in _patterns(path.absolute())] for split, paths in splits.items()
    }

    def load(patterns: Mapping[str, list[str]]) -> Any:
        return datasets.load_dataset(builder, config_name, data_files=dict(patterns), streaming=streaming)

    if len(files) == 1 or not any(has_metadata(path) for paths in splits.values() for path in paths):
        return load(files)
    # Each by itself, for `datasets` refuses whole numbers in one table beside fractions or blanks in that of another.
    parts = {split: load({split: patterns})[split] for split, patterns in files.items()}
    container = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    return container(_with_common_types(parts))


def _patterns(path: Path) -> list[str]:
    """What `datasets` finds the files of a folder by, whose name may have brackets."""
    if not path.is_dir():
        return [glob.escape(path.as_posix())]
    # It follows no link that it meets further down, and takes no pattern that finds nothing.
    starts = dict.fromkeys(
        level.start
        for level in walk(path.as_posix())
        if any(not file.name.startswith(".") and file.name not in FILES_TO_IGNORE for file in level.files)
    )
    return [f"{glob.escape(start)}/**" for start in starts or [path.as_posix()]]


def _with_common_types(parts: Mapping[str, Any]) -> dict[str, Any]:
    common = dict(parts)
    for column in dict.fromkeys(name for rows in parts.values() for name in rows.features):
        types = {split: rows.features.get(column) for split, rows in parts.items()}
        if all(kind == next(iter(types.values())) for kind in types.values()):
            continue
        if all(map(is_text, types.values())):
            kind = datasets.Value("string")
        elif all(isinstance(kind, datasets.Value) and kind.dtype.startswith(NUMBERS) for kind in types.values()):
            kind = datasets.Value("float64")
        else:
            found = ", ".join(f"{_described(kind)} in {split}" for split, kind in types.items())
            raise ValueError(
                f"The splits have different columns: {column!r} is {found}. Give every folder of a split a "
                "metadata.csv with the same columns, and a column entries of one kind in all: numbers, or text."
            )
        common = {split: rows.cast_column(column, kind) for split, rows in common.items()}
    return common


def _described(kind: Any) -> str:
    if kind is None:
        return "missing"
    if is_text(kind):
        return "text"
    return kind.dtype if isinstance(kind, datasets.Value) else type(kind).__name__
