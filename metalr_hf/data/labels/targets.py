"""Labels that are several figures an image, in one form: a list of numbers a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from ...messages import did_you_mean
from ..columns import IMAGE, LABEL, find_column
from ..loading import DataArguments, Demo, as_image_files, image_columns, load_splits
from ..splits import SplitNames, arrange


@dataclass
class TargetArguments(DataArguments):
    """Where images with several figures each come from.

    Args:
        target_column_names (`list[str]`, *optional*):
            Columns of the labels, one figure an image in each. By default one column, `label_column_name`.

    All others are those of [`~metalr_hf.data.loading.DataArguments`].
    """

    target_column_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the labels, one figure an image in each. By default one column, `label_column_name`."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.metrics:
            if name not in self.default_metrics:
                hint = did_you_mean(name, self.default_metrics, f"There are: {', '.join(self.default_metrics)}.")
                raise ValueError(f"metrics={name!r} is no metric of this task.{hint}")
        if self.streaming:
            raise ValueError("streaming: the labels of this task are looked at before training. Leave out streaming.")
        if self.target_column_names and self.label_column_name:
            raise ValueError(
                "target_column_names and label_column_name are both given. Leave out one: the first names several "
                "columns of one figure each, the second a single column."
            )


@dataclass(frozen=True)
class Targets:
    """The labels of a split as they were read.

    Args:
        split (`str`): The split's name.
        values (`Mapping[str, list]`): Column to its values, a value a row.
        features (`Mapping[str, Any]`): Column to its type.
    """

    split: str
    values: Mapping[str, list[Any]]
    features: Mapping[str, Any]

    def place(self, column: str, row: int) -> str:
        """A place, for messages.

        Args:
            column (`str`): The column.
            row (`int`): The row.

        Returns:
            `str`
        """
        return f"Split {self.split!r}, column {column!r}, row {row}"


class TargetRows:
    """The images of a data set and, beside them, the columns of their labels.

    Args:
        args ([`TargetArguments`]): Which data set, columns and splits.
        demo (`Callable`): Makes the splits that are loaded where no data set is named.
        candidates (`Callable`): Takes a split's features and returns the columns that a label may be in.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.
        hint (`str`, *optional*): A sentence for who names no column where it takes one.

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a column or a split is missing.
    """

    def __init__(
        self, args: TargetArguments, demo: Demo, candidates: Any, keep_columns: Sequence[str] = (), hint: str = ""
    ):
        splits, names = load_splits(args, demo)
        self.args, self.names = args, names
        self.images: dict[str, datasets.Dataset] = {}
        self.targets: dict[str, Targets] = {}
        kept = args.kept_columns(keep_columns)
        for name in names.used:
            features = splits[name].features
            image = find_column(features, "image", args.image_column_name, image_columns(features))
            columns = args.target_column_names or [
                find_column(features, "label", args.label_column_name, candidates(features), hint)
            ]
            for column in columns:
                if column not in features:
                    raise ValueError(
                        f"target_column_names: {column!r} is not a column of the split {name!r}. Its columns: "
                        f"{', '.join(map(repr, features))}."
                    )
            labels = splits[name].select_columns(columns).with_format(None)
            self.targets[name] = Targets(
                name, {column: list(labels[column]) for column in columns}, {c: features[c] for c in columns}
            )
            others = [column for column in kept if column in features and column not in (image, LABEL)]
            rows = splits[name].select_columns([image, *others])
            rows = rows if image == IMAGE else rows.rename_column(image, IMAGE)
            self.images[name] = as_image_files(rows, args)

    @property
    def train(self) -> Targets:
        """The labels of the split to train on."""
        return self.targets[self.names.train]

    def arranged(self, figures: Mapping[str, np.ndarray], seed: int) -> dict[str, Any]:
        """Puts the figures beside the images, and takes the splits that a run uses.

        Args:
            figures (`Mapping[str, numpy.ndarray]`): Split to figures of shape `(rows, labels)`.
            seed (`int`): Of the held-out share and of the subset.

        Returns:
            `dict[str, Any]`: `train`, `test`, `meta`, `validation` and `window` of an
                [`~metalr_hf.data.splits.ImageSplits`], with the columns `image` and `label`, a list of numbers.

        Raises:
            ValueError: if splits share a group, a share cannot be taken, or an image cannot be learned from.
        """
        kind = datasets.List(datasets.Value("float32"))
        chosen = {
            name: rows.add_column(LABEL, [row.tolist() for row in figures[name]], feature=kind)
            for name, rows in self.images.items()
        }
        names: SplitNames = self.names
        return arrange(chosen, names, self.args, seed)


def figures_of(rows: datasets.Dataset) -> np.ndarray:
    """The labels of rows as numbers.

    Args:
        rows (`datasets.Dataset`): Rows with `label`, a list of numbers in each.

    Returns:
        `numpy.ndarray` of shape `(rows, labels)`, float64

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.targets import figures_of
    >>> figures_of(datasets.Dataset.from_dict({"label": [[0.0, 1.0], [1.0, 1.0]]})).mean(0).tolist()
    [0.5, 1.0]

    ```
    """
    return np.array(list(rows.with_format(None)[LABEL]), dtype=np.float64)


LIST_KINDS: tuple[type, ...] = (datasets.List, datasets.LargeList)


def is_list(feature: Any) -> bool:
    """Whether a column holds a list in each row.

    Args:
        feature (`Any`): The column's type, of `datasets.Features`.

    Returns:
        `bool`

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.targets import is_list
    >>> is_list(datasets.List(datasets.Value("string"))), is_list(datasets.Value("string"))
    (True, False)

    ```
    """
    return isinstance(feature, LIST_KINDS)
