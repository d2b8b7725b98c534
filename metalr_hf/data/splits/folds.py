"""Which rows a run trains and tests on: folds, subsets and label noise."""

from __future__ import annotations

import datasets
import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold, train_test_split

from ..columns import LABEL
from .several_labels import divide_rows


def fold_rows(
    data: datasets.Dataset, folds: int, seed: int, group_column: str | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows of every fold, stratified by class where the labels are classes, and by each where rows have several.

    Args:
        data (`datasets.Dataset`): Rows with `label`.
        folds (`int`): How many.
        seed (`int`): Of the shuffling.
        group_column (`str`, *optional*): Rows that share a value of it stay in one fold.

    Returns:
        `list[tuple[numpy.ndarray, numpy.ndarray]]`: training and test rows of every fold.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits import fold_rows
    >>> data = datasets.Dataset.from_dict({"label": [0, 1] * 4, "patient": ["a", "a", "b", "b", "c", "c", "d", "d"]})
    >>> for train, test in fold_rows(data, folds=2, seed=0, group_column="patient"):
    ...     print(len(train), len(test), {*data[train]["patient"]} & {*data[test]["patient"]})
    4 4 set()
    4 4 set()

    ```
    """
    rows, strata, how = np.arange(len(data)), strata_of(data), {"shuffle": True, "random_state": seed}
    groups = None if group_column is None else np.array(data.with_format(None)[group_column])
    parts = divide_rows(data, [len(data) / folds] * folds, seed, groups)
    if parts is not None:
        return [(np.flatnonzero(parts != fold), np.flatnonzero(parts == fold)) for fold in range(folds)]
    if groups is None:
        kind = KFold if strata is None else StratifiedKFold
        return list(kind(folds, **how).split(rows, strata))
    return list((GroupKFold if strata is None else StratifiedGroupKFold)(folds, **how).split(rows, strata, groups))


def stratified_subset(data: datasets.Dataset, size: int, seed: int) -> datasets.Dataset:
    """Some rows, each class in its share where the labels are classes, and each label where rows have several.

    Args:
        data (`datasets.Dataset`): Rows with `label`.
        size (`int`): How many to take; all if there are not more.
        seed (`int`): Of the choice.

    Returns:
        `datasets.Dataset`

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits import stratified_subset
    >>> data = datasets.Dataset.from_dict({"label": [0] * 30 + [1] * 10})
    >>> sorted(stratified_subset(data, 4, seed=0)["label"])
    [0, 0, 0, 1]

    ```
    """
    if size >= len(data):
        return data
    if (parts := divide_rows(data, (size, len(data) - size), seed)) is not None:
        return data.select(np.flatnonzero(parts == 0))
    rows, _ = train_test_split(np.arange(len(data)), train_size=size, stratify=strata_of(data), random_state=seed)
    return data.select(rows)


def flip_labels(data: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """Gives a share of the rows the label of another class.

    Args:
        data (`datasets.Dataset`): Rows with `label`, a `ClassLabel`.
        share (`float`): In [0, 1).
        seed (`int`): Of the choice of rows and classes.

    Returns:
        `datasets.Dataset`

    Raises:
        ValueError: if the labels are no classes.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits import flip_labels
    >>> features = datasets.Features(label=datasets.ClassLabel(names=["benign", "malignant"]))
    >>> data = datasets.Dataset.from_dict({"label": [0] * 10}, features=features).add_column("row", [*range(10)])
    >>> sum(flip_labels(data, 0.3, seed=0)["label"])
    3

    ```
    """
    labels, feature = strata_of(data), data.features[LABEL]
    if labels is None:
        raise ValueError(f"noise={share!r}: only class labels can be flipped, and these are {feature}. Leave it at 0.")
    generator = np.random.default_rng(seed)
    flipped = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[flipped] = (labels[flipped] + generator.integers(1, feature.num_classes, len(flipped))) % feature.num_classes
    return data.remove_columns(LABEL).add_column(LABEL, labels, feature=feature)


def strata_of(data: datasets.Dataset) -> np.ndarray | None:
    """What rows are stratified by.

    Args:
        data (`datasets.Dataset`): Rows with `label`.

    Returns:
        `numpy.ndarray` of shape `(rows,)`, *optional*: the class of every row; `None` where the labels are no classes.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits.folds import strata_of
    >>> strata_of(datasets.Dataset.from_dict({"label": [0.5, 1.5]})) is None
    True

    ```
    """
    feature = data.features[LABEL]
    is_class = isinstance(feature, datasets.ClassLabel) or getattr(feature, "dtype", "").startswith("int")
    return np.array(data.with_format(None)[LABEL]) if is_class else None
