"""Which columns of a data set are meant, and the files in them."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
from PIL import Image

from ..messages import first_line

# The columns of every data set once it is loaded.
IMAGE, LABEL = "image", "label"
# Which of them a table's text becomes depends on the version of pandas.
TEXT_TYPES = ("string", "large_string", "string_view")


def find_column(
    columns: Collection[str], what: str, wanted: str | None, candidates: Sequence[str], hint: str = ""
) -> str:
    """The column that is named, or the only one that it can be.

    Args:
        columns (`Collection[str]`): The names of all columns.
        what (`str`): What it holds; the argument that names it is `<what>_column_name`.
        wanted (`str`, *optional*): The name that was given.
        candidates (`Sequence[str]`): Those that it can be where none is named.
        hint (`str`, *optional*): A further sentence for who has too many or none.

    Returns:
        `str`: the column's name.

    Raises:
        ValueError: if the column that is named is not there, or there is not one candidate.

    Example:

    ```python
    >>> from metalr_hf.data.columns import find_column
    >>> find_column(["photo", "class"], "image", None, candidates=["photo"])
    'photo'

    ```
    """
    argument, there = f"{what}_column_name", ", ".join(map(repr, columns))
    if wanted is not None:
        if wanted not in columns:
            table = " A table beside the images is read if it is called metadata.csv and has a column file_name."
            raise ValueError(
                f"{argument}={wanted!r} is not a column of the data set. Its columns: {there}."
                f"{table if len(columns) == 1 else ''}"
            )
        return wanted
    if len(candidates) != 1:
        names = ", ".join(map(repr, candidates))
        seen = f"{len(candidates)} {what} columns ({names})" if candidates else f"no {what} column"
        message = f"The data set has {seen}. Name the one to use with {argument}. Its columns: {there}. {hint}"
        raise ValueError(message.rstrip())
    return candidates[0]


def is_text(feature: Any) -> bool:
    """Whether a column holds text.

    Args:
        feature (`Any`): The type of the column.

    Returns:
        `bool`

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.columns import is_text
    >>> is_text(datasets.Value("large_string")), is_text(datasets.Value("int64")), is_text(datasets.Image())
    (True, False, False)

    ```
    """
    return getattr(feature, "dtype", None) in TEXT_TYPES


def as_whole(value: Any) -> Any:
    """A value as it was before a table turned it into a fraction.

    Whole numbers are fractions to pandas once their column had a blank, or was joined to another table.

    Args:
        value (`Any`): What a row holds.

    Returns:
        `Any`: a whole number where it is a fraction without a remainder, and all else as it is.

    Example:

    ```python
    >>> from metalr_hf.data.columns import as_whole
    >>> as_whole(7.0), as_whole(0.5), as_whole("7.0")
    (7, 0.5, '7.0')

    ```
    """
    return int(value) if isinstance(value, float) and value.is_integer() else value


def place(where: str, entry: Mapping[str, Any] | None) -> str:
    """A place with the path of a file, where that is known.

    Args:
        where (`str`): Which row.
        entry (`Mapping`, *optional*): What an undecoded `datasets.Image` column holds.

    Returns:
        `str`

    Example:

    ```python
    >>> from metalr_hf.data.columns import place
    >>> place("row 3", {"bytes": None, "path": "scan.png"})
    'row 3 (scan.png)'

    ```
    """
    path = None if entry is None else entry.get("path")
    return f"{where} ({path})" if path else where


def read_at(where: str, read: Callable[[Any], Any], entry: Any) -> Any:
    """Reads a file, and names it if that fails.

    Args:
        where (`str`): Which file, for the message.
        read (`Callable`): What reads it.
        entry (`Any`): What it takes.

    Returns:
        `Any`: what it returns.

    Raises:
        ValueError: if it raises a `ValueError`, or an `OSError` as of files that are broken.

    Example:

    ```python
    >>> from metalr_hf.data.columns import read_at
    >>> read_at("row 3 (scan.png)", int, "x")
    Traceback (most recent call last):
        ...
    ValueError: row 3 (scan.png): invalid literal for int() with base 10: 'x'.

    ```
    """
    try:
        return read(entry)
    except OSError as error:
        raise ValueError(
            f"{where}: the file cannot be read ({first_line(error)}). Repair it, or leave out its row."
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error


def open_image(entry: Mapping[str, Any]) -> Image.Image:
    """Opens the image of `bytes` or a `path`, without decoding it where that can wait.

    Args:
        entry (`Mapping`): What an undecoded `datasets.Image` column holds: `bytes` and `path`.

    Returns:
        `PIL.Image.Image`

    Example:

    ```python
    >>> import datasets
    >>> from PIL import Image
    >>> from metalr_hf.data.columns import open_image
    >>> open_image(datasets.Image().encode_example(Image.new("L", (4, 2)))).size
    (4, 2)

    ```
    """
    if entry["bytes"] is not None:
        return Image.open(io.BytesIO(entry["bytes"]))
    path = str(entry["path"])
    # Others are in archives or on the Hub.
    return Image.open(path) if os.path.isfile(path) else datasets.Image().decode_example(dict(entry))
