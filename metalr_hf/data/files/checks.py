"""What of a folder of images would be left out without a word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

# Of many folders and files, how many a message names.
NAMED = 6


def check_folder(folder: str, splits: Mapping[str, Sequence[Path]]) -> None:
    """Refuses a folder of images if not all that lies in it would be read.

    Args:
        folder (`str`): The folder.
        splits (`Mapping[str, Sequence[pathlib.Path]]`):
            What [`~metalr_hf.data.files.layout.folders_of_splits`] found in it.

    Raises:
        ValueError: if a table lies beside the folders of splits.

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
    if parts != [Path(folder)]:
        _refuse_table_beside(parts)


def _refuse_table_beside(parts: Sequence[Path]) -> None:
    for name in ImageFolder.METADATA_FILENAMES:
        table = parts[0].parent / name
        if table.is_file():
            raise ValueError(
                f"The table {str(table)!r} is not read, for it lies beside the folders of splits ({_listed(parts)}). "
                f"Give each a {name} of its own, with names of files relative to that folder, and take this one away."
            )


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(repr(path.name) for path in paths[:NAMED]) + (", ..." if len(paths) > NAMED else "")
