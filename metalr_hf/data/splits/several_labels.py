"""Rows with several labels each, divided so that every part has its share of every label."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from ..columns import LABEL

# 0, 1, and what is unknown.
FLAGS = (0.0, 1.0, -100.0)


def label_flags(rows: datasets.Dataset, column: str = LABEL) -> np.ndarray | None:
    """Which labels the rows have.

    Args:
        rows (`datasets.Dataset`): The rows.
        column (`str`, *optional*, defaults to `"label"`): Which of their columns has the labels.

    Returns:
        `numpy.ndarray` of shape `(rows, labels)`, *optional*: whether a row has a label; what is unknown counts as no.
            `None` where the labels are no lists of 0, 1 and -100 (unknown).

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits.several_labels import label_flags
    >>> label_flags(datasets.Dataset.from_dict({"label": [[0.0, 1.0], [-100.0, 1.0]]})).tolist()
    [[False, True], [False, True]]

    ```
    """
    if not isinstance(rows.features[column], (datasets.List, datasets.LargeList)):
        return None
    lists = list(rows.with_format(None)[column])
    if len({None if row is None else len(row) for row in lists}) != 1 or not lists[0]:
        return None
    try:
        values = np.array(lists, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    return values == 1 if values.ndim == 2 and np.isin(values, FLAGS).all() else None


def divide_rows(
    rows: datasets.Dataset,
    sizes: Sequence[float],
    seed: int,
    groups: np.ndarray | None = None,
    column: str = LABEL,
) -> np.ndarray | None:
    """As [`divide_by_labels`], of rows whatever their labels are.

    Args:
        rows (`datasets.Dataset`): The rows.
        sizes (`Sequence[float]`): How many rows each part is to have; without groups it has as many.
        seed (`int`): Of the choice among equals.
        groups (`numpy.ndarray` of shape `(rows,)`, *optional*): Rows of one group go to one part.
        column (`str`, *optional*, defaults to `"label"`): Which of their columns has the labels.

    Returns:
        `numpy.ndarray` of shape `(rows,)`, *optional*: the number of the part; `None` if one would be empty, or where
            rows do not have several labels.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits.several_labels import divide_rows
    >>> rows = datasets.Dataset.from_dict({"label": [[1.0, 0.0], [1.0, 1.0]] * 2})
    >>> sorted(divide_rows(rows, sizes=(2, 2), seed=0).tolist())
    [0, 0, 1, 1]
    >>> divide_rows(datasets.Dataset.from_dict({"label": [0, 1]}), sizes=(1, 1), seed=0) is None
    True

    ```
    """
    flags = label_flags(rows, column)
    return None if flags is None else divide_by_labels(flags, sizes, seed, groups)


def divide_by_labels(
    flags: np.ndarray, sizes: Sequence[float], seed: int, groups: np.ndarray | None = None
) -> np.ndarray | None:
    """Says which part every row goes to: iterative stratification (Sechidis et al. 2011), of whole groups.

    The label that is rarest among what is left comes first, and each row with it goes to the part that lacks most of
    it; of groups the one with most such rows is first.

    Args:
        flags (`numpy.ndarray` of shape `(rows, labels)`): Whether a row has a label.
        sizes (`Sequence[float]`): How many rows each part is to have; without groups it has as many.
        seed (`int`): Of the choice among equals.
        groups (`numpy.ndarray` of shape `(rows,)`, *optional*): Rows of one group go to one part.

    Returns:
        `numpy.ndarray` of shape `(rows,)`, *optional*: the number of the part; `None` if one would be empty.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.splits.several_labels import divide_by_labels
    >>> flags = np.array([[True, False]] * 4 + [[True, True]] * 2 + [[False, False]] * 6)
    >>> parts = divide_by_labels(flags, sizes=(6, 6), seed=0)
    >>> flags[parts == 0].sum(0).tolist(), flags[parts == 1].sum(0).tolist()
    ([3, 1], [3, 1])

    ```
    """
    _, unit_of = np.unique(np.arange(len(flags)) if groups is None else groups, return_inverse=True)
    counts = np.zeros((unit_of.max(initial=-1) + 1, flags.shape[1]))
    np.add.at(counts, unit_of, flags)
    rows = np.bincount(unit_of)
    room = np.array(sizes, dtype=np.float64)
    lacking = np.outer(room / room.sum(), counts.sum(0))
    part_of = np.full(len(counts), -1)
    order = np.random.default_rng(seed).permutation(len(counts))
    while len(left := order[part_of[order] < 0]):
        there = counts[left].sum(0)
        rarest = int(np.where(there > 0, there, np.inf).argmin()) if there.any() else None
        # Rows without any label fill what room there is.
        weights = rows[left] if rarest is None else counts[left, rarest]
        for unit in left[np.argsort(-weights, kind="stable")][: np.count_nonzero(weights)]:
            wanted = room if rarest is None else lacking[:, rarest]
            part = max(np.flatnonzero(room > 0), key=lambda one: (wanted[one], room[one]))
            part_of[unit] = part
            lacking[part] -= counts[unit]
            room[part] -= rows[unit]
    parts = part_of[unit_of]
    return parts if len(np.unique(parts)) == len(room) else None
