"""Which rows a run trains on, evaluates on while it trains, and is tested on: splits, held-out shares and groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any, NamedTuple, TypeVar

import datasets
import numpy as np
from sklearn.model_selection import GroupShuffleSplit, StratifiedGroupKFold

from ...messages import first_line
from ...settings import check_seed
from ..columns import LABEL, as_whole
from ..intensity import IntensityWindow, find_window, parse_window
from .folds import strata_of
from .several_labels import divide_rows

SHARES = ("test_share", "validation_share", "meta_split")
# How often whole groups are drawn: where no classes have to be in both parts, and where each draw is a set of folds.
TRIES, STRATIFIED_TRIES = 20, 5
Splits = TypeVar("Splits", bound="ImageSplits")


@dataclass(frozen=True)
class ImageSplits:
    """Images in splits, with the columns `image` and `label`, or prepared as inputs of a model.

    Args:
        train (`datasets.Dataset` or `datasets.IterableDataset`): To train on.
        test (`datasets.Dataset` or `datasets.IterableDataset`): To measure the result on, once.
        meta (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): To tune the learning rates on.
        class_names (`tuple[str, ...]`): Name of class 0, 1, ...
        validation (`datasets.Dataset` or `datasets.IterableDataset`, *optional*): To evaluate on while training.
        held_back (`datasets.Dataset`, *optional*): Of `validation`, to train on too once the run has converged.
        window ([`~metalr_hf.data.intensity.IntensityWindow`], *optional*): Of images of more than 8 bits.
    """

    train: Any
    test: Any
    meta: Any
    class_names: tuple[str, ...]
    validation: Any = field(default=None, kw_only=True)
    held_back: Any = field(default=None, kw_only=True)
    window: IntensityWindow | None = field(default=None, kw_only=True)

    @property
    def id2label(self) -> dict[int, str]:
        """Class number to class name, as model configurations have it."""
        return dict(enumerate(self.class_names))


class SplitNames(NamedTuple):
    """The splits of a data set that a run uses; `None` where a share of the training split takes the place or none is.

    Args:
        train (`str`): To train on.
        test (`str`, *optional*): To measure the result on.
        validation (`str`, *optional*): To evaluate on while training.
        meta (`str`, *optional*): To tune the learning rates on.
    """

    train: str
    test: str | None
    validation: str | None
    meta: str | None

    @property
    def used(self) -> list[str]:
        """Those that there are."""
        return [name for name in dict.fromkeys(self) if name is not None]


def arrange(chosen: Mapping[str, Any], names: SplitNames, args: Any, seed: int) -> dict[str, Any]:
    """Takes the splits that a run uses, holds out a share to test on where there is none, and cuts the training split.

    Args:
        chosen (`Mapping[str, Any]`): Name to rows, in their columns.
        names ([`SplitNames`]): Which are used for what.
        args ([`~metalr_hf.data.loading.DataArguments`]): Shares, sizes and the column of the groups.
        seed (`int`): Of the held-out share and of the subset.

    Returns:
        `dict[str, Any]`: `train`, `test`, `meta`, `validation` and `window` of an [`ImageSplits`].

    Raises:
        ValueError: if splits share a group, a share cannot be taken, or an image cannot be learned from.
    """
    divided = divide(chosen, names, args, seed)
    window = parse_window(args.intensity_window)
    # What a stream holds is seen as it comes.
    if not (args.streaming or args.is_demo):
        window = find_window({name: chosen[name] for name in names.used}, divided["train"], window, args.num_channels)
    return {"window": window, **divided}


def divide(chosen: Mapping[str, Any], names: SplitNames, args: Any, seed: int) -> dict[str, Any]:
    """As [`arrange`], of rows whose images are not looked at.

    Args:
        chosen (`Mapping[str, Any]`): Name to rows, in their columns.
        names ([`SplitNames`]): Which are used for what.
        args ([`~metalr_hf.data.loading.DataArguments`]): Shares, sizes and the column of the groups.
        seed (`int`): Of the held-out share and of the subset.

    Returns:
        `dict[str, Any]`: `train`, `test`, `meta` and `validation` of an [`ImageSplits`].

    Raises:
        ValueError: if splits share a group, or a share cannot be taken.
    """
    if args.group_column is not None and not args.allow_shared_groups:
        refuse_shared_groups({name: chosen[name] for name in names.used}, args.group_column)
    train, test = chosen[names.train], None if names.test is None else chosen[names.test]
    if test is None and args.test_share > 0:
        train, test = hold_out_rows(
            train, "test_share", round(args.test_share * len(train)), seed, group_column=args.group_column
        )
    if args.max_train_samples is not None:
        if args.streaming:
            train = train.take(args.max_train_samples)
        elif args.max_train_samples < len(train):
            _, train = hold_out_rows(train, "max_train_samples", args.max_train_samples, seed)
    others = {"meta": names.meta, "validation": names.validation}
    return {"train": train, "test": test, **{what: name and chosen[name] for what, name in others.items()}}


def hold_out(splits: Splits, what: str, argument: str, share: float, seed: int, group_column: str | None) -> Splits:
    """Takes a share of the training rows for another use.

    Args:
        splits ([`ImageSplits`]): Not yet prepared.
        what (`str`): `"validation"` or `"meta"`.
        argument (`str`): The argument that says how much, for the message.
        share (`float`): The share of the training rows, in (0, 1).
        seed (`int`): Of the choice.
        group_column (`str`, *optional*): Rows that share a value of it stay together.

    Returns:
        [`ImageSplits`], of the class that was given

    Raises:
        ValueError: if the training split is a stream, or such a share cannot be taken.
    """
    if isinstance(splits.train, datasets.IterableDataset):
        raise ValueError(
            f"A stream has no share to hold out for {argument}={share}. Name a split with {what}_split"
            f"{'_name' if what == 'meta' else ''}, or leave out streaming."
        )
    size = max(1, round(share * len(splits.train)))
    train, held = hold_out_rows(splits.train, argument, size, seed, group_column=group_column)
    return replace(splits, train=train, **{what: held})


def hold_out_rows(
    rows: datasets.Dataset, argument: str, size: int, seed: int, *, group_column: str | None = None
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Divides rows in two, stratified by class where the labels are classes, and by each where rows have several.

    Args:
        rows (`datasets.Dataset`): Rows with `label`.
        argument (`str`): The argument that says how many, for the message.
        size (`int`): How many rows to hold out; about as many where whole groups are held out.
        seed (`int`): Of the choice.
        group_column (`str`, *optional*): Rows that share a value of it stay together.

    Returns:
        `tuple[datasets.Dataset, datasets.Dataset]`: the rest and the rows held out.

    Raises:
        ValueError: if that is not possible with every class, or every group, on one side or both.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.splits.held_out import hold_out_rows
    >>> data = datasets.Dataset.from_dict({"label": [0] * 8, "patient": ["a", "a", "b", "b", "c", "c", "d", "d"]})
    >>> rest, held = hold_out_rows(data, "test_share", 2, seed=0, group_column="patient")
    >>> len(held), {*rest["patient"]} & {*held["patient"]}
    (2, set())

    ```
    """
    check_seed("seed", seed)
    strata, groups = strata_of(rows), None
    try:
        groups = None if group_column is None else groups_of(rows, group_column, "training")
        if size < 1 and (groups is not None or strata is None):
            raise ValueError("that is less than one image")
        part_of = divide_rows(rows, (len(rows) - size, size), seed, groups) if 0 < size < len(rows) else None
        if part_of is not None:
            rest, held = np.flatnonzero(part_of == 0), np.flatnonzero(part_of == 1)
        elif groups is None:
            column = None if strata is None else LABEL
            parts = rows.train_test_split(test_size=size, stratify_by_column=column, seed=seed)
            return parts["train"], parts["test"]
        else:
            rest, held = _divide_groups(groups, size, seed, strata)
    except ValueError as error:
        kept = "every class" if group_column is None else f"each value of {group_column!r} on one side and every class"
        enough = _enough(argument, size, strata) if group_column is None else ""
        raise ValueError(
            f"{argument}: {size} of {len(rows)} training images cannot be taken with {kept} in both parts "
            f"({first_line(error)}).{enough or _one(argument, size, rows, groups)}{_single(rows, strata)}"
        ) from error
    if groups is not None and abs(len(held) - size) > size / 2:
        largest = np.unique(groups, return_counts=True)[1].max()
        warnings.warn(
            f"{argument}: {size} of {len(rows)} training images were to be held out, but it became {len(held)}, for "
            f"images that share a value of group_column={group_column!r} stay together, up to {largest} of them. Put "
            "images aside in a split of their own, or ask for another share.",
            UserWarning,
            stacklevel=2,
        )
    return rows.select(rest), rows.select(held)


def _divide_groups(
    groups: np.ndarray, size: int, seed: int, strata: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Of several divisions that keep groups whole, the one with every class in both parts that is closest in size."""

    def off(parts: tuple[np.ndarray, np.ndarray]) -> int:
        return abs(len(parts[1]) - size)

    if strata is None:
        shuffled = GroupShuffleSplit(TRIES, test_size=size / len(groups), random_state=seed)
        return min(shuffled.split(groups, groups=groups), key=off)
    classes = np.unique(strata)
    for one in classes:
        if len(np.unique(groups[strata == one])) == 1:
            raise ValueError("all images of a class are of one group")
    folds = min(len(np.unique(groups)), max(2, round(len(groups) / size)))
    for attempt in range(STRATIFIED_TRIES):
        how = StratifiedGroupKFold(folds, shuffle=True, random_state=(seed + attempt) % 2**32)
        whole = [
            parts
            for parts in how.split(groups, strata, groups)
            if all(len(np.unique(strata[part])) == len(classes) for part in parts)
        ]
        if whole:
            return min(whole, key=off)
    raise ValueError(f"none was found in {STRATIFIED_TRIES} tries")


def _enough(argument: str, size: int, strata: np.ndarray | None) -> str:
    """The least that has an image of every class, where too few were asked for and so many can be spared."""
    if strata is None:
        return ""
    counts = np.unique(strata, return_counts=True)[1]
    if not size < len(counts) <= len(strata) / 2 or counts.min() < 2:
        return ""
    if argument == "max_train_samples":
        return f" Take more, as with --{argument} {len(counts)}."
    if argument not in SHARES:
        return ""
    return f" Take a larger share, as with --{argument} {math.ceil(100 * len(counts) / len(strata)) / 100:g}."


def _one(argument: str, size: int, rows: datasets.Dataset, groups: np.ndarray | None) -> str:
    """The least that is one image, or one group, where not one was asked for."""
    units = len(rows) if groups is None else len(np.unique(groups))
    if size > 0 or argument not in SHARES or units < 2:
        return ""
    return f" Take a larger share, as with --{argument} {math.ceil(100 / units) / 100:g}."


def _single(rows: datasets.Dataset, strata: np.ndarray | None) -> str:
    """Which class has a single image, often by a slip of the pen."""
    if strata is None:
        return ""
    classes, first, counts = np.unique(strata, return_index=True, return_counts=True)
    alone = np.flatnonzero(counts == 1)
    if not len(alone):
        return ""
    if len(alone) > len(classes) / 2:
        return " Most classes have a single image. Are these labels numbers (--task regression) or names of patients?"
    names = getattr(rows.features[LABEL], "names", None)
    name = classes[alone[0]] if names is None else names[classes[alone[0]]]
    return (
        f" The class {str(name)!r} has a single image (row {first[alone[0]]}): correct its label, give it more images, "
        "or leave it out."
    )


def groups_of(rows: datasets.Dataset, column: str, name: str) -> np.ndarray:
    """The group of every row, such as its patient.

    Args:
        rows (`datasets.Dataset`): The rows.
        column (`str`): The column of the groups.
        name (`str`): What the rows are called, for the message.

    Returns:
        `numpy.ndarray` of shape `(rows,)`

    Raises:
        ValueError: if there is no such column, or a row has no group.
    """
    if column not in rows.column_names:
        raise ValueError(f"group_column={column!r} is not a column of the data set: {rows.column_names}.")
    values = list(rows.with_format(None)[column])
    missing = [row for row, value in enumerate(values) if value is None or value != value or value == ""]
    if missing:
        raise ValueError(
            f"group_column={column!r}: {len(missing)} of the {name} images have no group, the first in row "
            f"{missing[0]}. Give each image one, a name of its own where nothing is known, or leave it out."
        )
    return np.array([str(as_whole(value)) for value in values])


def refuse_shared_groups(splits: Mapping[str, Any], column: str) -> None:
    """Raises `ValueError` if two splits share a group, such as a patient.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): Name to rows.
        column (`str`): The column of the groups.
    """
    streams = [name for name, rows in splits.items() if isinstance(rows, datasets.IterableDataset)]
    if streams:
        raise ValueError(f"group_column={column!r}: the groups of a stream cannot be looked at. Leave out streaming.")
    groups = {name: set(groups_of(rows, column, name)) for name, rows in splits.items()}
    for one, other in combinations(groups, 2):
        if shared := sorted(groups[one] & groups[other]):
            raise ValueError(
                f"group_column={column!r}: the splits {one!r} and {other!r} share {len(shared)} of its values "
                f"({', '.join(shared[:3])}{', ...' if len(shared) > 3 else ''}), so that results on one would tell "
                "too much of the other. Divide the rows by it, or train all the same with --allow_shared_groups."
            )
