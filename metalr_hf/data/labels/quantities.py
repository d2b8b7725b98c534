"""One or several numbers an image, such as an age or a score, in the units of the data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np

from ..digits import demo_quantities
from ..splits import ImageSplits
from .targets import TargetArguments, TargetRows, Targets, figures_of, is_list

NAMES = ("label", "labels", "target", "targets")
HINT = "Several columns are named with target_column_names."
# What Trainer takes for no label. A true value of it (in degrees, for one) is moved to the next number.
NOT_COUNTED = -100.0


@dataclass
class QuantityArguments(TargetArguments):
    """Where images with one or several numbers each come from.

    All arguments are those of [`~metalr_hf.data.labels.TargetArguments`]. Where no column is named, it is the one
    called `label` or `target`, else the only one of fractional numbers.
    """

    default_metrics: ClassVar[tuple[str, ...]] = ("mae", "rmse", "r2", "pearson")


def load_quantities(args: QuantityArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
    """Loads a data set of images with one or several numbers each.

    Args:
        args ([`QuantityArguments`]): Which data set, columns and splits.
        seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

    Returns:
        [`~metalr_hf.data.splits.ImageSplits`]: with the columns `image` and `label`, a list of numbers in their units;
            the names of the numbers take the place of those of classes.

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a column or a split is missing, an entry is no finite number, or all training images have the
            same number.

    Example:

    ```python
    >>> from metalr_hf.data import QuantityArguments, load_quantities
    >>> splits = load_quantities(QuantityArguments())
    >>> splits.class_names, [round(number, 1) for number in splits.train[0]["label"]]
    (('ink',), [35.7])

    ```
    """
    rows = TargetRows(args, demo_quantities, _candidates, keep_columns, HINT)
    read = {name: _numbers(targets) for name, targets in rows.targets.items()}
    names = read[rows.names.train][0]
    for name, (found, _) in read.items():
        if found != names:
            raise ValueError(
                f"The split {name!r} has {len(found)} numbers an image ({', '.join(found[:5])}) where the split "
                f"{rows.names.train!r} has {len(names)} ({', '.join(names[:5])})."
            )
    splits = ImageSplits(
        class_names=names, **rows.arranged({name: figures for name, (_, figures) in read.items()}, seed)
    )
    unit_of(splits.train, names)
    return splits


def unit_of(rows: datasets.Dataset, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the numbers of rows, by which they are standardised.

    Args:
        rows (`datasets.Dataset`): Rows to train on, with `label`, a list of numbers in each.
        names (`Sequence[str]`): What the numbers are called.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: a mean and a standard deviation of every number.

    Raises:
        ValueError: if all rows have the same number.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.quantities import unit_of
    >>> mean, scale = unit_of(datasets.Dataset.from_dict({"label": [[30.0], [50.0]]}), ["age"])
    >>> mean.tolist(), scale.tolist()
    ([40.0], [10.0])

    ```
    """
    figures = figures_of(rows)
    mean, scale = figures.mean(0), figures.std(0)
    for name, centre, width in zip(names, mean, scale, strict=True):
        # Rounding of float32 is no difference.
        if not width > 1e-6 * max(abs(centre), 1e-30):
            raise ValueError(
                f"All {len(figures)} training images have the same number {name!r} ({centre:g}), so that nothing "
                "can be learned of it. Name other columns with target_column_names, or add images with other numbers."
            )
    return mean, scale


def _candidates(features: Any) -> list[str]:
    fractions = [name for name, kind in features.items() if str(getattr(kind, "dtype", "")).startswith("float")]
    return [name for name in NAMES if name in features] or fractions


def _numbers(targets: Targets) -> tuple[tuple[str, ...], np.ndarray]:
    names: list[str] = []
    parts: list[np.ndarray] = []
    for column, values in targets.values.items():
        feature = targets.features[column]
        _refuse_classes(targets, column, feature)
        lists = values if is_list(feature) else [[value] for value in values]
        width = len(lists[0] or ()) if lists else 1
        for row, entry in enumerate(lists):
            if entry is None or len(entry) != width or width == 0:
                raise ValueError(
                    f"{targets.place(column, row)} has {len(entry or ())} numbers, the first row {width}. Give "
                    "each row as many."
                )
        _refuse_text(targets, column, lists)
        for row, entry in enumerate(lists):
            for value in entry:
                _refuse_other(targets, column, row, value)
        parts.append(np.array(lists, dtype=np.float64).reshape(len(lists), width))
        names += [column] if width == 1 else [f"{column}_{i}" for i in range(width)]
    figures = np.concatenate(parts, axis=1)
    figures[figures == NOT_COUNTED] = np.nextafter(np.float32(NOT_COUNTED), np.float32(0))
    return tuple(names), figures


def _refuse_classes(targets: Targets, column: str, feature: Any) -> None:
    inner = feature.feature if is_list(feature) else feature
    if isinstance(inner, datasets.ClassLabel) or getattr(inner, "dtype", None) == "bool":
        raise ValueError(
            f"Split {targets.split!r}: the column {column!r} holds classes, not numbers. Name the column of the "
            "numbers with label_column_name, or train with --task classification."
        )


def _refuse_text(targets: Targets, column: str, lists: list[list[Any]]) -> None:
    """Names the text that is no number, for which `datasets` has read the whole column as text."""
    texts = [(row, value) for row, entry in enumerate(lists) for value in entry if isinstance(value, str)]
    for row, value in texts:
        try:
            float(value)
        except ValueError:
            _refuse_other(targets, column, row, value)
    if texts:
        _refuse_other(targets, column, *texts[0])


def _refuse_other(targets: Targets, column: str, row: int, value: Any) -> None:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(
            f"{targets.place(column, row)} has no number but {value}. Leave such rows out of the data set, or fill the "
            "number in."
        )
    if not isinstance(value, (int, float)):
        raise ValueError(
            f"{targets.place(column, row)} holds {value!r}, which is no number. Make the whole column numbers, or name "
            "another one with label_column_name or target_column_names."
        )
