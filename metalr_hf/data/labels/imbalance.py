"""Classes of which some are rare: weights in the loss, and a warning before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers.utils import logging

from ..columns import LABEL
from ..loading import DataArguments

logger = logging.get_logger(__name__)

BALANCED = "balanced"
FEWEST_IMAGES, SMALLEST_SHARE = 10, 0.05
CLASSES_NAMED = 5


@dataclass
class ClassArguments(DataArguments):
    """Where images with classes come from, and what a class counts in the loss.

    Args:
        class_weights (`list[str]`, *optional*):
            `balanced`, by which all classes count the same in the loss however many images they have, or a number for
            each class in their order; only their ratios matter. Of several labels an image it is the weight of the
            images that have a label, `balanced` as much as those that have it not. By default all images count
            the same.

    All others are those of [`~metalr_hf.data.loading.DataArguments`].

    Example:

    ```python
    >>> from metalr_hf.data import ClassArguments
    >>> ClassArguments(class_weights=["1", "3.5"]).class_weights
    [1.0, 3.5]

    ```
    """

    class_weights: list[str] | None = field(
        default=None,
        metadata={
            "help": "`balanced`, by which all classes count the same in the loss however many images they have, or a "
            "number for each class in their order. By default all images count the same."
        },
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1", "balanced_accuracy", "auroc")

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.class_weights
        if given is None or given in (BALANCED, [BALANCED]):
            self.class_weights = None if given is None else [BALANCED]
            return
        try:
            weights = [float(weight) for weight in given]
        except (TypeError, ValueError):
            weights = []
        if not weights or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"class_weights={given!r} must be `balanced`, or a number above 0 for each class.")
        self.class_weights = weights  # type: ignore[assignment]


def class_weights(weights: Sequence[Any], rows: Any, names: Sequence[str]) -> list[float]:
    """What each class counts in the loss; the mean over the training images is 1.

    Args:
        weights (`Sequence`): `["balanced"]`, or a number for each class.
        rows (`datasets.Dataset` or `datasets.IterableDataset`): To train on, with `label`, a class number.
        names (`Sequence[str]`): Name of class 0, 1, ...

    Returns:
        `list[float]`: a weight for each class.

    Raises:
        ValueError: if there is another number of classes, or the images of a stream would have to be counted.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.imbalance import class_weights
    >>> class_weights(["balanced"], datasets.Dataset.from_dict({"label": [0, 0, 0, 1]}), ["healthy", "ill"])
    [0.6666666666666666, 2.0]

    ```
    """
    streams = isinstance(rows, datasets.IterableDataset)
    counts = np.ones(len(names)) if streams else class_counts(rows, len(names))
    if list(weights) == [BALANCED]:
        if streams:
            raise ValueError(
                "class_weights=balanced: the images of a stream are not counted before its end. Give a number for each "
                "class, or leave out streaming."
            )
        # A class without images has no weight of its own.
        values = np.where(counts > 0, 1 / np.maximum(counts, 1), 1 / max(counts.max(), 1))
    else:
        values = np.array(_one_each(weights, names))
    return (values * counts.sum() / (values * counts).sum()).tolist()


def label_weights(weights: Sequence[Any], figures: np.ndarray, names: Sequence[str]) -> list[float]:
    """What the images that have a label count, beside the others.

    Args:
        weights (`Sequence`): `["balanced"]`, or a number for each label.
        figures (`numpy.ndarray` of shape `(rows, labels)`): 1, 0, or below zero where it is unknown.
        names (`Sequence[str]`): The labels.

    Returns:
        `list[float]`: a weight for each label.

    Raises:
        ValueError: if there is another number of labels.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.labels.imbalance import label_weights
    >>> label_weights(["balanced"], np.array([[1], [0], [0], [0], [-100]]), ["edema"])
    [3.0]

    ```
    """
    if list(weights) != [BALANCED]:
        return _one_each(weights, names)
    have, others = (figures == 1).sum(0), (figures == 0).sum(0)
    # Where no image is known to be without a label, there is nothing to balance.
    return np.where(others > 0, others / np.maximum(have, 1), 1.0).tolist()


def class_counts(rows: datasets.Dataset, classes: int) -> np.ndarray:
    """How many images each class has.

    Args:
        rows (`datasets.Dataset`): With `label`, a class number.
        classes (`int`): How many classes there are.

    Returns:
        `numpy.ndarray` of shape `(classes,)`, int64

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.imbalance import class_counts
    >>> class_counts(datasets.Dataset.from_dict({"label": [0, 2, 2]}), classes=3).tolist()
    [1, 0, 2]

    ```
    """
    labels = np.array(list(rows.with_format(None)[LABEL]), dtype=np.int64)
    return np.bincount(labels[labels >= 0], minlength=classes)


def rare(counts: Sequence[int], images: int, names: Sequence[str], smallest_share: float = SMALLEST_SHARE) -> str:
    """What is to be said of classes or labels with few images.

    Args:
        counts (`Sequence[int]`): Images of each.
        images (`int`): Training images in all.
        names (`Sequence[str]`): What they are called.
        smallest_share (`float`, *optional*, defaults to 0.05): The share of the images below which one is rare.

    Returns:
        `str`: a sentence; empty if none is rare.

    Example:

    ```python
    >>> from metalr_hf.data.labels.imbalance import rare
    >>> rare([100, 4], 104, ["healthy", "ill"])
    "Of 104 training images, 'ill' has 4: fewer than ten, or under 5 %, are little to learn from."

    ```
    """
    few = [
        f"{name!r} has {count}"
        for name, count in zip(names, counts, strict=True)
        if count < FEWEST_IMAGES or count < smallest_share * images
    ]
    if not few:
        return ""
    more = f" and {len(few) - CLASSES_NAMED} others have as few" if len(few) > CLASSES_NAMED else ""
    return (
        f"Of {images} training images, {', '.join(few[:CLASSES_NAMED])}{more}: fewer than ten, or under "
        f"{100 * smallest_share:.2g} %, are little to learn from."
    )


def warn_of_rare_classes(rows: Any, names: Sequence[str], weights: Sequence[Any] | None) -> None:
    """Warns of classes with fewer than ten training images or under 5 % of them; of many, under half an equal share.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): To train on; a stream is not looked at.
        names (`Sequence[str]`): Name of class 0, 1, ...
        weights (`Sequence`, *optional*): `class_weights`, which are advised if there are none.
    """
    if isinstance(rows, datasets.IterableDataset):
        return
    counts = class_counts(rows, len(names)).tolist()
    _warn(rare(counts, len(rows), names, min(SMALLEST_SHARE, 0.5 / len(names))), counts, weights)


def warn_of_rare_labels(figures: np.ndarray, names: Sequence[str], weights: Sequence[Any] | None) -> None:
    """Warns of labels that few training images have, or of which none is known to be without.

    Few are fewer than ten, or under 5 % of them.

    Args:
        figures (`numpy.ndarray` of shape `(rows, labels)`): 1, 0, or below zero where it is unknown.
        names (`Sequence[str]`): The labels.
        weights (`Sequence`, *optional*): `class_weights`, which are advised if there are none.
    """
    counts = (figures == 1).sum(0).tolist()
    _warn(rare(counts, len(figures), names), counts, weights)
    always = [name for name, column in zip(names, figures.T, strict=True) if not (column == 0).any()]
    if always:
        more = f" (nor without each of {len(always) - 1} more)" if len(always) > 1 else ""
        logger.warning(
            f"No training image is known to be without the label {always[0]!r}{more}, so that it will be answered for "
            "every image. An empty entry or -1 means unknown; 0 says that an image does not have it."
        )


def _warn(said: str, counts: Sequence[int], weights: Sequence[Any] | None) -> None:
    if said:
        # A class without images has nothing that could be weighted.
        there = [count for count in counts if count]
        # Of classes that are all as rare, weights would change nothing.
        advised = weights is None and max(counts) >= 2 * min(there, default=1)
        which = "all" if len(there) == len(counts) else "all that have images"
        advice = f" --class_weights balanced makes {which} count the same in the loss." if advised else ""
        logger.warning(said + advice)


def _one_each(weights: Sequence[Any], names: Sequence[str]) -> list[float]:
    if len(weights) != len(names):
        raise ValueError(
            f"class_weights has {len(weights)} numbers for {len(names)} classes ({', '.join(names[:10])}"
            f"{', ...' if len(names) > 10 else ''}). Give one for each, in this order, or `balanced`."
        )
    return [float(weight) for weight in weights]
