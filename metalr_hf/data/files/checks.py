"""What of a folder of images would be left out without a word."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from ...messages import first_line
from .folders import NEVER_IMAGES, is_image_file, walk
from .layout import ARCHIVE, TRAIN, folders_of_splits, has_metadata, holds_images

# Of many folders and files, how many a message names.
NAMED = 6
READ = (*ImageFolder.METADATA_FILENAMES, ARCHIVE)
TABLE = "metadata.csv"
NAMES_FILES = re.compile("(.*_)?file_names?")
HOW_A_TABLE_IS = (
    "The columns of a metadata.csv are divided by commas, an entry with a comma in it is put in double quotes, and its "
    "text is UTF-8."
)


def check_folder(folder: str, splits: Mapping[str, Sequence[Path]], has_scans: bool = False) -> None:
    """Refuses a folder of images, or warns of it, if not all that lies in it would be read.

    Args:
        folder (`str`): The folder.
        splits (`Mapping[str, Sequence[pathlib.Path]]`):
            What [`~metalr_hf.data.files.layout.folders_of_splits`] found in it.
        has_scans (`bool`, *optional*, defaults to `False`): Whether `datasets` alone does not know all its images.

    Raises:
        ValueError: if a link leads nowhere, a table lies beside the folders of splits or cannot be read, a folder may
            be a split or a class, or an archive is not read.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.data.files.checks import check_folder
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "train").mkdir()
    ...     check_folder(folder, {"train": [Path(folder) / "train"]})

    ```
    """
    parts = [path for paths in splits.values() for path in paths]
    # Walked through once: a folder may be large.
    files = {part: [file for level in walk(str(part)) for file in level.files] for part in parts}
    _refuse_dead_links(folder, files)
    if parts != [Path(folder)]:
        _refuse_table_beside(parts)
        _check_images_beside(parts, splits.get(TRAIN, ()))
    tables = {file.path: _read_table(file.path) for inside in files.values() for file in inside if file.name == TABLE}
    for part in parts:
        _refuse_archives(part, files[part], has_scans)
        _warn_of_empty_folders(part, files[part])
        _check_listing(part, files[part], tables)


def texts_lost(folder: str, split: str, column: str) -> dict[str, int]:
    r"""The texts of a column of the `metadata.csv` of a split that are read as if there were none, such as `None`.

    Args:
        folder (`str`): The folder of images.
        split (`str`): The split.
        column (`str`): The column.

    Returns:
        `dict[str, int]`: each to the number of its rows; an empty entry and `nan` are none.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.data.files.checks import texts_lost
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder) / "metadata.csv"
    ...     _ = table.write_text("file_name,findings\n0.png,edema\n1.png,None\n2.png,\n")
    ...     texts_lost(folder, "train", "findings")
    {'None': 1}

    ```
    """
    lost: Counter[str] = Counter()
    for part in folders_of_splits(folder).get(split, []):
        for file in (file for level in walk(str(part)) for file in level.files if file.name == TABLE):
            read, written = (pd.read_csv(file.path, dtype=str, keep_default_na=how) for how in (True, False))
            if column in read:
                lost.update(written[column][read[column].isna()])
    return {text: count for text, count in lost.items() if text.strip("-").lower() not in ("", "nan")}


def _refuse_dead_links(folder: str, files: Mapping[Path, Sequence[os.DirEntry[str]]]) -> None:
    dead = [path for inside in files.values() for path in _dead_links(inside, _has_table(inside))]
    if list(files) != [Path(folder)]:
        beside = next(walk(str(next(iter(files)).parent)))
        dead += _dead_links(beside.files, False)
    if dead:
        raise ValueError(
            f"The folder {folder!r} has links to files or folders that are not there: {len(dead)}, the first "
            f"{os.path.relpath(dead[0], folder)!r} to {os.readlink(dead[0])!r}. Fetch or mount what they stand for, or "
            "take them away."
        )


def _dead_links(files: Sequence[os.DirEntry[str]], tabled: bool) -> list[str]:
    """Those that may stand for what is read. Where a table lists the images, each is looked at later."""
    return [
        file.path
        for file in files
        if file.is_symlink()
        and not file.name.startswith(".")
        and (file.name.lower().endswith(READ) or not (tabled or file.name.lower().endswith(NEVER_IMAGES)))
        and not os.path.exists(file.path)
    ]


def _refuse_table_beside(parts: Sequence[Path]) -> None:
    for name in ImageFolder.METADATA_FILENAMES:
        table = parts[0].parent / name
        if table.is_file():
            raise ValueError(
                f"The table {str(table)!r} is not read, for it lies beside the folders of splits ({_listed(parts)}). "
                f"Give each a {name} of its own, with names of files relative to that folder, and take this one away."
            )


def _read_table(path: str) -> pd.DataFrame:
    try:
        table = pd.read_csv(path, dtype=str)
    except ValueError as error:
        raise ValueError(f"The table {path!r} cannot be read ({first_line(error)}). {HOW_A_TABLE_IS}") from error
    if not any(map(NAMES_FILES.fullmatch, table.columns)):
        raise ValueError(
            f"The table {path!r} has no column file_name, which names the image of each row. Its columns: "
            f"{', '.join(map(repr, table.columns))}. "
            f"{'Call one of them so.' if len(table.columns) > 1 else HOW_A_TABLE_IS}"
        )
    return table


def _warn_of_empty_folders(part: Path, files: Sequence[os.DirEntry[str]]) -> None:
    if not part.is_dir() or _has_table(files):
        return
    filled = {Path(file.path).relative_to(part).parts[0] for file in files if not file.name.startswith(".")}
    folders = [path for path in sorted(part.iterdir()) if path.is_dir() and not path.name.startswith((".", "__"))]
    empty = [path for path in folders if path.name not in filled]
    if empty:
        warnings.warn(
            f"The folder {str(part)!r} has folders without a file: {_listed(empty)}. They make no class.",
            UserWarning,
            stacklevel=2,
        )


def _check_listing(part: Path, files: Sequence[os.DirEntry[str]], tables: Mapping[str, pd.DataFrame]) -> None:
    """Warns of images that a metadata.csv does not list, and of those that it lists again."""
    lists = [file.path for file in files if file.name in ImageFolder.METADATA_FILENAMES]
    if not lists or any(path not in tables for path in lists):
        return
    listed: set[str] = set()
    again: list[str] = []
    for path in lists:
        table = tables[path]
        for column in filter(NAMES_FILES.fullmatch, table.columns):
            listed |= {os.path.normpath(os.path.join(os.path.dirname(path), name)) for name in table[column].dropna()}
        if "file_name" in table:
            again += table["file_name"][table["file_name"].duplicated()].dropna().tolist()
    endings = tuple(ImageFolder.EXTENSIONS)
    images = [file.path for file in files if file.name.lower().endswith(endings) and file.is_file()]
    left_out = [os.path.relpath(path, part) for path in images if os.path.normpath(path) not in listed]
    if left_out:
        warnings.warn(
            f"The metadata.csv of {str(part)!r} does not list {len(left_out)} of its {len(images)} images, the first "
            f"{left_out[0]!r}. They are left out.",
            UserWarning,
            stacklevel=2,
        )
    if again:
        warnings.warn(
            f"The metadata.csv of {str(part)!r} lists images again in {len(again)} rows, the first {again[0]!r}. They "
            "count as often as they are listed, and may be both trained on and tested on.",
            UserWarning,
            stacklevel=2,
        )


def _check_images_beside(parts: Sequence[Path], trains: Sequence[Path]) -> None:
    root = parts[0].parent
    beside = [
        path
        for path in sorted(root.iterdir())
        if path not in parts
        and not path.name.startswith(".")
        and (holds_images(path) or (path.is_file() and is_image_file(str(path))))
    ]
    if any(path.is_dir() for path in beside) and all(map(_may_be_class, trains)):
        raise ValueError(
            f"The folder {str(root)!r} has {_listed(trains)}, which is named as a split but has no folders of classes, "
            f"beside {_listed(beside)}. If all are classes, put them into one more folder called train, as "
            f"train/{trains[0].name}/ and train/{beside[0].name}/. If {trains[0].name!r} is the split, sort its images "
            "into folders of their classes, or give it a metadata.csv, and take the others away."
        )
    if beside:
        warnings.warn(
            f"The folder {str(root)!r} has splits ({_listed(parts)}), so that what lies beside them is not read: "
            f"{_listed(beside)}. Folders of splits are called train, validation or test.",
            UserWarning,
            stacklevel=2,
        )


def _may_be_class(path: Path) -> bool:
    """Whether images lie in a folder, and nothing says of which class they are."""
    if not path.is_dir() or has_metadata(path):
        return False
    inside = list(path.iterdir())
    return any(is_image_file(str(file)) for file in inside) and not any(map(holds_images, inside))


def _has_table(files: Sequence[os.DirEntry[str]]) -> bool:
    return any(file.name in ImageFolder.METADATA_FILENAMES for file in files)


def _refuse_archives(part: Path, files: Sequence[os.DirEntry[str]], has_scans: bool) -> None:
    found = [Path(file.path) for file in files] if part.is_dir() else [part]
    archives = [str(path) for path in found if path.suffix.lower() == ARCHIVE and not path.name.startswith(".")]
    tabled = _has_table(files)
    has_images = bool(archives) and any(is_image_file(file.path) for file in files)
    for archive in archives:
        if _has_table_inside(archive):
            reason = "beside DICOM, NIfTI and npy files, and images that no table lists, no archive is"
            is_read = not has_scans and (tabled or not has_images)
        else:
            reason = "it has no metadata.csv, and classes are read from folders, but not from those in an archive"
            # Nothing is that the table does not list.
            is_read = tabled
        if not is_read:
            raise ValueError(
                f"The archive {archive!r} is not read: {reason}. Unpack it, and move it out of the folder."
            )


def _has_table_inside(archive: str) -> bool:
    try:
        with zipfile.ZipFile(archive) as file:
            return any(Path(name).name in ImageFolder.METADATA_FILENAMES for name in file.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(
            f"The archive {archive!r} cannot be opened ({first_line(error)}). Fetch it again, or move it out of the "
            "folder."
        ) from error


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(repr(path.name) for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
