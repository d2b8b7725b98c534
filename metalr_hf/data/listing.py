"""Images without labels, one after the other: files, folders, and data sets of the Hub or in parquet."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets

from .columns import find_column
from .files.folders import image_files
from .loading import DataArguments, image_columns, read_splits

TABLES = (".parquet", ".arrow")


class ImageList(Protocol):
    """Images by number, each with a name that nothing else has, and without a path of this machine."""

    @property
    def names(self) -> Sequence[str]:
        """A name for each image."""

    def entry(self, number: int) -> Any:
        """`bytes` and `path` of an image, not decoded; of a volume whose channels are files of their own a list."""


@dataclass(frozen=True)
class Files:
    """Files on disk.

    Args:
        names (`Sequence[str]`): Their names, relative to the folder that was given.
        paths (`Sequence[str]`): Where they are.
    """

    names: Sequence[str]
    paths: Sequence[str]

    def entry(self, number: int) -> Mapping[str, Any]:
        """`bytes` and `path` of an image, not decoded."""
        return {"bytes": None, "path": self.paths[number]}


@dataclass(frozen=True)
class Rows:
    """Rows of data sets.

    Args:
        names (`Sequence[str]`): `<split>/<row>`.
        rows (`datasets.Dataset`): With one column, of encoded images.
    """

    names: Sequence[str]
    rows: datasets.Dataset

    def entry(self, number: int) -> Any:
        """`bytes` and `path` of an image, not decoded; of a volume whose channels are files of their own a list."""
        return next(iter(self.rows[number].values()))


def list_images(
    sources: Sequence[str],
    split: str | None = None,
    image_column_name: str | None = None,
    leave_out: str | None = None,
) -> ImageList:
    """Lists the images that are meant.

    Args:
        sources (`Sequence[str]`):
            Image files and folders of them, in folders below too; or one data set: a Hub id, a parquet file, or a
            folder of parquet or arrow files.
        split (`str`, *optional*): Of a data set; by default all.
        image_column_name (`str`, *optional*): Of a data set; by default the only column of images.
        leave_out (`str`, *optional*): A folder whose files are not listed.

    Returns:
        [`ImageList`]

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if there is no such split or column, or one is named for files and folders.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from metalr_hf.data.listing import list_images
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Image.new("L", (4, 4)).save(Path(folder) / "scan.png")
    ...     list_images([folder]).names
    ['scan.png']

    ```
    """
    if len(sources) == 1 and is_table(sources[0]):
        return list_rows(sources[0], split, image_column_name, image_columns, lambda _: datasets.Image(decode=False))
    refuse_for_files(sources, split, image_column_name)
    return list_files(sources, image_files, leave_out)


def list_files(
    sources: Sequence[str],
    files_of: Callable[[str], Iterable[str]],
    leave_out: str | None = None,
    what: str = "images",
) -> Files:
    """Lists files, and those of folders.

    Args:
        sources (`Sequence[str]`): Files and folders.
        files_of (`Callable[[str], Iterable[str]]`): Finds the files that are meant in a folder.
        leave_out (`str`, *optional*): A folder whose files are not listed.
        what (`str`, *optional*, defaults to `"images"`): What they are called in messages.

    Returns:
        [`Files`]

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if two have one name.
    """
    names, paths = [], []
    # As a table that is written into the folder of its images has its masks below that folder.
    left_out = None if leave_out is None else os.path.join(os.path.realpath(leave_out), "")
    for source in sources:
        if os.path.isdir(source):
            found = [f for f in files_of(source) if left_out is None or not os.path.realpath(f).startswith(left_out)]
            if not found:
                raise FileNotFoundError(f"images={source!r}: there are no {what} in that folder, nor in those below.")
            paths += found
            names += [Path(os.path.relpath(file, source)).as_posix() for file in found]
        elif os.path.isfile(source):
            paths.append(source)
            # Masks are saved under the names of their images, in a folder that they must not lead out of.
            is_below = not os.path.isabs(source) and ".." not in Path(source).parts
            names.append(Path(source).as_posix() if is_below else os.path.basename(source))
        else:
            raise FileNotFoundError(
                f"images={source!r} does not exist. Give image files, folders of them, or one data set: a Hub id or a "
                "parquet file."
            )
    refuse_twice(names)
    return Files(names, paths)


def refuse_for_files(sources: Sequence[str], split: str | None, image_column_name: str | None) -> None:
    """Raises `ValueError` if a split or a column is named for files and folders, of which all images are listed.

    Args:
        sources (`Sequence[str]`): Files and folders.
        split (`str`, *optional*): The split that was named.
        image_column_name (`str`, *optional*): The column that was named.
    """
    if split is not None:
        raise ValueError(
            f"split={split!r}: of a folder of images, such as {sources[0]!r}, all are listed. Give the folder of that "
            f"split in its place, such as {os.path.join(sources[0], split)!r}, and leave out split."
        )
    if image_column_name is not None:
        raise ValueError(
            f"image_column_name={image_column_name!r}: files and folders, such as {sources[0]!r}, have no columns. "
            "Leave it out."
        )


def refuse_twice(names: Sequence[str]) -> None:
    """Raises `ValueError` if two images have one name, or their masks would.

    Args:
        names (`Sequence[str]`): The names of the images.
    """
    # The mask of a NIfTI file is compressed, whether the file is or not.
    name, times = Counter(f"{name}.gz" if name.endswith(".nii") else name for name in names).most_common(1)[0]
    if times > 1:
        raise ValueError(f"images: {times} of the images are called {name!r}. Give the folder that holds them all.")


def is_table(source: str) -> bool:
    """Whether a data set is meant, and not an image or a folder of images.

    Args:
        source (`str`): A path or a Hub id.

    Returns:
        `bool`
    """
    if os.path.isfile(source):
        return source.endswith(TABLES)
    if os.path.isdir(source):
        files = [name for _, _, names in os.walk(source) for name in names]
        return any(name.endswith(TABLES) for name in files) and next(image_files(source), None) is None
    return source.count("/") == 1 and not source.startswith(("/", "."))


def list_rows(
    source: str,
    split: str | None,
    image_column_name: str | None,
    columns_of: Callable[[Mapping[str, Any]], Sequence[str]],
    undecoded: Callable[[Any], Any],
) -> Rows:
    """Lists the rows of a data set.

    Args:
        source (`str`): A Hub id, a parquet file, or a folder of parquet or arrow files.
        split (`str`, *optional*): By default all.
        image_column_name (`str`, *optional*): By default the only one that can be it.
        columns_of (`Callable`): The columns that it can be, by the types of all columns.
        undecoded (`Callable`): The type of its column, so that files are not decoded, by its own.

    Returns:
        [`Rows`]

    Raises:
        ValueError: if there is no such split or column.
    """
    if os.path.isfile(source):
        kind = "arrow" if source.endswith(".arrow") else "parquet"
        splits: Mapping[str, Any] = datasets.load_dataset(kind, data_files={Path(source).stem.split("-")[0]: source})
    else:
        splits = read_splits(DataArguments(dataset_name=source))
    if split is not None and split not in splits:
        raise ValueError(f"split={split!r} is not a split of the data set. Its splits: {', '.join(map(repr, splits))}.")
    names, parts = [], []
    for name, rows in splits.items():
        if split not in (None, name):
            continue
        column = find_column(rows.features, "image", image_column_name, columns_of(rows.features))
        images = rows.select_columns([column]).cast_column(column, undecoded(rows.features[column])).with_format(None)
        parts.append(images.rename_column(column, "image") if column != "image" else images)
        names += [f"{name}/{row}" for row in range(len(rows))]
    return Rows(names, datasets.concatenate_datasets(parts))
