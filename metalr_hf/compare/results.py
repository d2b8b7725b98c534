"""The files of a comparison: their names, how they are read, and a lock so that one process at a time writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RESULTS = "results.jsonl"
TIMINGS = "timings.jsonl"
SETTINGS = "settings.json"

# The status of a run: completed; loss or outputs not finite; ended by an error, so that it is run again.
DONE, DIVERGED, FAILED = "done", "diverged", "failed"


def read_results(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The results of a folder. A last line that is being written, or was cut off by a crash, is left out.

    Args:
        folder (`str` or `os.PathLike`): The output folder of a comparison.

    Returns:
        `list[dict]`: a row per run, whose `status` is `"done"`, `"diverged"` (its loss or outputs were not finite) or
            `"failed"` (an error ended it, its `reason`).

    Example:

    ```python
    >>> from metalr_hf.compare.results import read_results
    >>> read_results("no/such/folder")
    []

    ```
    """
    return read_lines(Path(folder) / RESULTS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; an incomplete last line is skipped. The file is left as it is.

    Args:
        file (`pathlib.Path`): The file; no rows if there is none.

    Returns:
        `list[dict]`: the rows.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import append_line, read_lines
    >>> append_line(Path("rows.jsonl"), {"seed": 0})
    >>> read_lines(Path("rows.jsonl"))
    [{'seed': 0}]

    ```
    """
    return [json.loads(line) for line in _whole_lines(file)]


def append_line(file: Path, row: dict[str, Any]) -> None:
    """Appends a row to a file of JSON lines, and waits until it is on the disk.

    Args:
        file (`pathlib.Path`): The file, made if there is none.
        row (`dict`): The row.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import append_line
    >>> append_line(Path("appended.jsonl"), {"seed": 0})

    ```
    """
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def mend_lines(file: Path, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    r"""Removes a last line cut off by a crash from a file of JSON lines, and rows that are not to be kept.

    Only for the process that writes the file: see [`only_process`].

    Args:
        file (`pathlib.Path`): The file.
        keep (`Callable[[dict], bool]`, *optional*): Whether a row stays; all do by default.

    Returns:
        `list[dict]`: the rows that are left.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import mend_lines
    >>> written = Path("cut.jsonl").write_text('{"seed": 0}\n{"see')
    >>> mend_lines(Path("cut.jsonl")), Path("cut.jsonl").read_text()
    ([{'seed': 0}], '{"seed": 0}\n')

    ```
    """
    return _replace_lines(file, [line for line in _whole_lines(file) if keep(json.loads(line))])


def sort_lines(file: Path, key: Callable[[dict[str, Any]], int]) -> list[dict[str, Any]]:
    """Puts the rows of a file of JSON lines in order; those of one key stay as they are to each other.

    Args:
        file (`pathlib.Path`): The file.
        key (`Callable[[dict], int]`): What to order by.

    Returns:
        `list[dict]`: the rows in their order.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import append_line, sort_lines
    >>> for seed in (1, 0):
    ...     append_line(Path("sorted.jsonl"), {"seed": seed})
    >>> sort_lines(Path("sorted.jsonl"), lambda row: row["seed"])
    [{'seed': 0}, {'seed': 1}]

    ```
    """
    return _replace_lines(file, sorted(_whole_lines(file), key=lambda line: key(json.loads(line))))


def _replace_lines(file: Path, lines: list[str]) -> list[dict[str, Any]]:
    text = "".join(line + "\n" for line in lines)
    if file.exists() and file.read_text(encoding="utf-8") != text:
        # At once, so that neither a reader nor a crash finds half of it.
        new = file.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)
    return [json.loads(line) for line in lines]


def _whole_lines(file: Path) -> list[str]:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings that all runs of a folder share, or compares them with those that are there.

    Args:
        folder (`pathlib.Path`): The output folder of a comparison.
        settings (`dict`): Name to value, as JSON has them.

    Raises:
        ValueError: if others are there.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import keep_settings
    >>> keep_settings(Path("."), {"steps": 60})
    >>> keep_settings(Path("."), {"steps": 60})

    ```
    """
    file, own = folder / SETTINGS, json.loads(json.dumps(settings))
    if not file.exists():
        file.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        return
    there = json.loads(file.read_text(encoding="utf-8"))
    other = {name: (there.get(name), own.get(name)) for name in {*there, *own} if there.get(name) != own.get(name)}
    if other:
        raise ValueError(
            f"output_dir={str(folder)!r} holds a comparison with other settings (there, here): {other}. Use "
            "another folder, or the same settings."
        )


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """A context in which no other process is at work in a folder.

    Args:
        folder (`pathlib.Path`): The output folder of a comparison.

    Raises:
        BlockingIOError: if there is one.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from metalr_hf.compare.results import only_process
    >>> with only_process(Path(".")):
    ...     print("alone")
    alone

    ```
    """
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise BlockingIOError(f"Another process is at work in output_dir={str(folder)!r}: wait for it.") from error
