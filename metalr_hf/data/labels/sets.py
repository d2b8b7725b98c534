"""Several labels an image: lists of names, 0/1 lists or 0/1 columns to one figure a label, with unknown ones marked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np

from ..columns import is_text
from ..digits import demo_label_sets
from ..files.checks import texts_lost
from ..splits import ImageSplits
from .imbalance import ClassArguments
from .targets import TargetArguments, TargetRows, Targets, figures_of, is_list

# What Trainer takes for a label that does not count, so that it counts the known ones of an accumulated batch.
UNKNOWN = -100.0
# What whole numbers are that say whether an image has a label.
FLAGS = (0, 1, -1, None)
FIGURES = re.compile("bool|float|u?int")
HINT = (
    "It takes a column of lists, or several columns of 0 and 1, named with target_column_names; text such as "
    "'edema|effusion' is divided by label_separator."
)


@dataclass
class LabelSetArguments(TargetArguments, ClassArguments):
    """Where images with several labels each come from.

    Args:
        label_separator (`str`, *optional*):
            What stands between the labels of a column of text, such as `|`. Nothing but the separator is taken away.
        class_names (`list[str]`, *optional*):
            The labels to learn, by default all. For 0/1 lists their names, in the order of the figures.

    All others are those of [`~metalr_hf.data.labels.targets.TargetArguments`] and
    [`~metalr_hf.data.labels.imbalance.ClassArguments`]. Labels are lists of names or numbers, lists of 0 and 1, or
    columns of 0 and 1. An empty entry, NaN and -1 are unknown: they take no part in loss and metrics. Shares that are
    held out have every label in its share where that is possible; one that is too rare for both is trained on.
    """

    label_separator: str | None = field(
        default=None,
        metadata={"help": "What stands between the labels of a column of text, such as `|`."},
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={"help": "The labels to learn, by default all. For 0/1 lists their names, in the figures' order."},
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("macro_auroc", "macro_f1", "mean_average_precision")


def load_label_sets(args: LabelSetArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
    """Loads a data set of images with several labels each.

    Args:
        args ([`LabelSetArguments`]): Which data set, columns and splits.
        seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

    Returns:
        [`~metalr_hf.data.splits.ImageSplits`]: with the columns `image` and `label`, a list of 1, 0 or -100
            (unknown).

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a column or a split is missing, an entry is no label, or a label never occurs in the training
            split.

    Example:

    ```python
    >>> from metalr_hf.data import LabelSetArguments, load_label_sets
    >>> splits = load_label_sets(LabelSetArguments())
    >>> splits.class_names, splits.train[0]["label"]
    (('even', 'above four', 'with a loop'), [0.0, 0.0, 0.0])

    ```
    """
    rows = TargetRows(args, demo_label_sets, lambda features: _candidates(features, args), keep_columns, HINT)
    read = {name: _read(targets, args) for name, targets in rows.targets.items()}
    if args.target_column_names or _are_flags(read.values()):
        known, figures = _from_flags(read, rows, args)
    else:
        known, figures = _from_names(read, rows)
    names = known if args.class_names is None or len(known) == 0 else tuple(args.class_names)
    if missing := [name for name in names if name not in known]:
        raise ValueError(
            f"class_names: {missing[0]!r} is no label of the split {rows.names.train!r}. Its labels: "
            f"{', '.join(known[:20])}{', ...' if len(known) > 20 else ''}."
        )
    chosen = [known.index(name) for name in names]
    splits = ImageSplits(
        class_names=names, **rows.arranged({name: values[:, chosen] for name, values in figures.items()}, seed)
    )
    _refuse_absent(splits, rows.names.train)
    return splits


def _candidates(features: Any, args: LabelSetArguments) -> list[str]:
    if args.label_separator is not None:
        text = [name for name, feature in features.items() if is_text(feature)]
        return [name for name in text if name in ("label", "labels")] or text
    return [name for name, feature in features.items() if is_list(feature)]


@dataclass(frozen=True)
class _Lists:
    """A list or `None` a row, and what its entries are."""

    targets: Targets
    column: str
    lists: list[Any]
    inner: Any


def _read(targets: Targets, args: LabelSetArguments) -> _Lists:
    columns = list(targets.values)
    if args.target_column_names:
        rows: list[Any] = [list(row) for row in zip(*targets.values.values(), strict=True)]
        return _Lists(targets, columns[0], rows, datasets.Value("float32"))
    column = columns[0]
    feature, values = targets.features[column], targets.values[column]
    if is_list(feature):
        return _Lists(targets, column, values, feature.feature)
    separator = args.label_separator
    if separator and is_text(feature):
        if args.folder is not None and None in values:
            _refuse_lost(args.folder, targets.split, column, separator)
        lists = [None if v is None else [part for p in v.split(separator) if (part := p.strip())] for v in values]
        return _Lists(targets, column, lists, datasets.Value("string"))
    shown = next((value for value in values if value is not None), None)
    raise ValueError(f"{targets.place(column, 0)}: the labels are no lists but such as {shown!r}. {HINT}")


def _refuse_lost(folder: str, split: str, column: str, separator: str) -> None:
    """Images without findings would be left out of the training and of the test where a table calls them `None`."""
    if lost := texts_lost(folder, split, column):
        texts = ", ".join(f"{text!r} in {count} rows" for text, count in lost.items())
        raise ValueError(
            f"Split {split!r}, column {column!r}: the metadata.csv holds {texts}, which is read as an empty entry, so "
            f"that the labels of these images would be unknown. Write {separator!r} and nothing else for an image that "
            "has none of the labels, leave the entry empty where they are unknown, or use another word for a label."
        )


def _are_flags(read: Iterable[_Lists]) -> bool:
    """Whether lists hold a 0 or a 1 for each label, rather than the labels that there are."""
    # The labels of a test split may be held back, so that its lists say nothing.
    given = [one for one in read if any(one.lists)]
    kinds = [str(getattr(one.inner, "dtype", "")) for one in given]
    if any(isinstance(one.inner, datasets.ClassLabel) for one in given) or not all(map(FIGURES.match, kinds)):
        return False
    numbers = [
        row for one, kind in zip(given, kinds, strict=True) if "int" in kind for row in one.lists if row is not None
    ]
    if not numbers:
        return True
    lengths = {len(row) for row in numbers}
    signs = (
        len(lengths) == 1 and max(lengths) > 1,
        all(value in FLAGS for row in numbers for value in row),
        # No image has the same label twice.
        any(len(set(row)) < len(row) for row in numbers),
    )
    # With one odd entry, or one odd length, they still are, and the row is told.
    return sum(signs) >= 2


def _flag(value: Any) -> float | None:
    """1, 0 or unknown; `None` for what is no such thing."""
    if value is None or (isinstance(value, float) and math.isnan(value)) or value == -1:
        return UNKNOWN
    return float(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def _from_flags(
    read: dict[str, _Lists], rows: TargetRows, args: LabelSetArguments
) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    longest = max((len(row) for row in read[rows.names.train].lists if row is not None), default=0)
    names = tuple(args.target_column_names or args.class_names or map(str, range(longest)))
    figures = {}
    for split, one in read.items():
        columns = args.target_column_names or [one.column] * len(names)
        values = np.full((len(one.lists), len(names)), UNKNOWN)
        for i, row in enumerate(one.lists):
            if row is None:
                continue
            if len(row) != len(names):
                raise ValueError(
                    f"{one.targets.place(one.column, i)} has {len(row)} figures for {len(names)} labels "
                    f"({', '.join(names[:5])}). Give each row a 0, a 1 or -1 (unknown) for every label."
                )
            for k, value in enumerate(row):
                flag = _flag(value)
                if flag is None:
                    raise ValueError(
                        f"{one.targets.place(columns[k], i)} holds {value!r}, which is neither 0 nor 1, nor empty or "
                        "-1 for unknown. Mend the entry, or name the columns of 0 and 1 with target_column_names."
                    )
                values[i, k] = flag
        figures[split] = values
    return names, figures


def _from_names(read: dict[str, _Lists], rows: TargetRows) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    train = read[rows.names.train]
    named: dict[str, list[Any]] = {}
    for split, one in read.items():
        inner = one.inner
        lists = named[split] = []
        for i, row in enumerate(one.lists):
            for value in row or ():
                if value is None or value != value or (isinstance(inner, datasets.ClassLabel) and value < 0):
                    raise ValueError(
                        f"{one.targets.place(one.column, i)}: a label in the list is {value!r}. Leave it out of the "
                        "list; a list that is empty altogether (null) is unknown."
                    )
            is_class = isinstance(inner, datasets.ClassLabel)
            lists.append(None if row is None else [inner.int2str(v) if is_class else str(v) for v in row])
    if isinstance(train.inner, datasets.ClassLabel):
        names = tuple(train.inner.names)
    else:
        names = tuple(map(str, sorted({value for row in train.lists for value in row or ()})))
    numbers = {name: k for k, name in enumerate(names)}
    figures = {}
    for split, lists in named.items():
        values = np.zeros((len(lists), len(names)))
        for i, row in enumerate(lists):
            if row is None:
                values[i] = UNKNOWN
                continue
            for name in row:
                if name not in numbers:
                    raise ValueError(
                        f"{read[split].targets.place(read[split].column, i)} has the label {name!r}, which no image of "
                        f"the split {rows.names.train!r} has. Its labels: {', '.join(names[:10])}."
                    )
                values[i, numbers[name]] = 1.0
        figures[split] = values
    return names, figures


def _refuse_absent(splits: ImageSplits, train_name: str) -> None:
    figures = figures_of(splits.train)
    absent = [name for name, column in zip(splits.class_names, figures.T, strict=True) if not (column == 1).any()]
    if absent or not splits.class_names:
        what = f"the label {absent[0]!r} never occurs" if absent else "no label occurs"
        more = f" (nor do {len(absent) - 1} others)" if len(absent) > 1 else ""
        raise ValueError(
            f"In the {len(figures)} training images of the split {train_name!r} {what}{more}, so that it cannot be "
            "learned. Name the labels to learn with class_names or target_column_names, or add images that have it."
        )
