"""The labels of classification in one form: a class number a row, the same names in every split."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from ..columns import IMAGE, LABEL, as_whole, place
from ..files.folders import walk
from ..files.layout import refuse_nested_classes

# Of a folder, what is looked at to say what was found in it.
FILES_LOOKED_AT = 10_000
FOLDERS_NAMED = 6


def class_labels(
    splits: Mapping[str, Any],
    train_name: str,
    streaming: bool = False,
    folder: str | None = None,
    column: str = LABEL,
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Gives all splits the same class labels.

    Args:
        splits (`Mapping[str, datasets.Dataset or datasets.IterableDataset]`): Name to rows with `image` and `label`.
        train_name (`str`): The split that says which classes there are.
        streaming (`bool`, *optional*, defaults to `False`): Whether the splits are streams.
        folder (`str`, *optional*): The local folder that they come from, for the messages.
        column (`str`, *optional*, defaults to `"label"`): What the data set calls the labels, for the messages.

    Returns:
        `tuple[tuple[str, ...], dict[str, Any]]`: the names of class 0, 1, ... and the splits, their labels being
            `datasets.ClassLabel`.

    Raises:
        ValueError: if a row has no label, there are not two classes, the labels are no classes, the training split
            does not have those of another split, or the folders of classes hold folders.

    Example:

    ```python
    >>> import datasets
    >>> from metalr_hf.data.labels.classes import class_labels
    >>> names, splits = class_labels({"train": datasets.Dataset.from_dict({"label": [True, False]})}, "train")
    >>> names, list(splits["train"]["label"])
    (('False', 'True'), [1, 0])

    ```
    """
    train = splits[train_name]
    feature = train.features[LABEL] if train.features else None
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        if folder is not None:
            refuse_nested_classes(folder)
        if not streaming:
            _refuse_missing(splits, folder)
            _refuse_one_class([names[value] for value in train.unique(LABEL)], train_name)
    elif streaming:
        raise ValueError(
            f"The labels of the data set are no class labels but {feature}, so the classes of a stream are not known "
            "before its end. Leave out streaming."
        )
    else:
        _refuse_missing(splits, folder)
        values = [as_whole(value) for value in train.unique(LABEL)]
        others = [value for value in values if isinstance(value, (float, list, dict))]
        if others:
            advice = ", or learn the numbers with --task regression" if isinstance(others[0], float) else ""
            raise ValueError(
                f"The labels of the training split, in the column {column!r}, are no classes: {others[:3]}. Name the "
                f"column of the classes with label_column_name{advice}."
            )
        _refuse_one_class(values, train_name)
        names = tuple(str(value) for value in sorted(values))
    _warn_of_like_names(names)
    numbered = {name: _cast_labels(name, split, names) for name, split in splits.items()}
    if not streaming:
        _warn_of_unseen_classes(numbered, train_name, names)
    return names, numbered


def layout_hint(folder: str | None) -> str:
    """What to say of a folder of images that has no labels: what lies in it, and what is expected.

    Args:
        folder (`str`, *optional*): The folder that was given, if it was one.

    Returns:
        `str`: one or more sentences; nothing if it is no folder with images.

    Example:

    ```python
    >>> from metalr_hf.data.labels.classes import layout_hint
    >>> layout_hint("user/data-set-of-the-hub")
    ''

    ```
    """
    if folder is None or not os.path.isdir(folder):
        return ""
    counts: dict[str, int] = {}
    seen = 0
    for level in walk(folder):
        images = [file.name for file in level.files if os.path.splitext(file.name)[1].lower() in _image_endings()]
        if images:
            inside = os.path.relpath(level.folder, folder)
            name = "the folder itself" if inside == os.curdir else f"{inside}{os.sep}"
            # One that strayed there is named.
            counts[name if len(images) > 1 else os.path.normpath(os.path.join(inside, images[0]))] = len(images)
        seen += len(level.files)
        if seen > FILES_LOOKED_AT:
            break
    if not counts:
        return ""
    found = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:FOLDERS_NAMED])
    return (
        f"Images were found in {found}{', ...' if len(counts) > FOLDERS_NAMED else ''}. Classes are read from folders, "
        "two or more, where every image lies in one: train/<class>/ and test/<class>/, or <class>/ alone. Take a test "
        "folder without classes away, or give each split a metadata.csv with the columns file_name and label."
    )


def _image_endings() -> Sequence[str]:
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return ImageFolder.EXTENSIONS


def _refuse_missing(splits: Mapping[str, Any], folder: str | None) -> None:
    for name, split in splits.items():
        # Those of a class label are -1 on the Hub, where the labels of a test split are held back.
        is_class = isinstance(split.features[LABEL], datasets.ClassLabel)

        def is_missing(value: Any, is_class: bool = is_class) -> bool:
            return value is None or value != value or value == "" or (is_class and value < 0)

        if not any(map(is_missing, split.unique(LABEL))):
            continue
        rows = [row for row, value in enumerate(split.with_format(None)[LABEL]) if is_missing(value)]
        where = f"in row {rows[0]}"
        if isinstance(split.features.get(IMAGE), datasets.Image):
            where = place(where, split.cast_column(IMAGE, datasets.Image(decode=False))[rows[0]][IMAGE])
        advice = "Give them one or leave them out."
        if len(rows) == len(split):
            # A split has none where all its images lie in one folder.
            advice = layout_hint(folder) or "Use another split."
        raise ValueError(
            f"Split {name!r} has images without a label: {len(rows)} of {len(split)}, the first {where}. {advice}"
        )


def _refuse_one_class(values: Sequence[Any], train_name: str) -> None:
    if len(values) < 2:
        has = f"has only the class {str(values[0])!r}" if values else "has no rows"
        raise ValueError(
            f"The split {train_name!r} {has}, but it takes two classes or more to tell apart. Add images of another "
            "class, or name the column of the classes with label_column_name."
        )


def _warn_of_unseen_classes(splits: Mapping[str, Any], train_name: str, names: Sequence[str]) -> None:
    """A class label knows its classes from all splits, whichever of them have images of it."""
    known = set(splits[train_name].unique(LABEL))
    for name, split in splits.items():
        if unseen := sorted(set(split.unique(LABEL)) - known):
            shown = ", ".join(repr(names[value]) for value in unseen[:5])
            warnings.warn(
                f"The split {name!r} has images of {len(unseen)} class{'es' if len(unseen) > 1 else ''} that the split "
                f"{train_name!r} has none of ({shown}{', ...' if len(unseen) > 5 else ''}). They cannot be learned and "
                "count as wrong.",
                UserWarning,
                stacklevel=2,
            )


def _warn_of_like_names(names: Sequence[str]) -> None:
    """Labels that were typed by hand are often one class in several spellings."""
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault("".join(name.split()).casefold(), []).append(name)
    if several := [found for found in alike.values() if len(found) > 1]:
        shown = "; ".join(", ".join(map(repr, found)) for found in several[:5])
        warnings.warn(
            f"Some classes have names that differ in blanks or in upper and lower case alone: {shown}"
            f"{'; ...' if len(several) > 5 else ''}. If they are one class, give them one name.",
            UserWarning,
            stacklevel=2,
        )


def _cast_labels(name: str, split: Any, class_names: tuple[str, ...]) -> Any:
    target = datasets.ClassLabel(names=list(class_names))
    if isinstance(split, datasets.IterableDataset):
        return split
    feature = split.features[LABEL]
    if not isinstance(feature, datasets.ClassLabel):
        values = {str(as_whole(value)) for value in split.unique(LABEL)}
        if values - set(class_names):
            raise ValueError(
                f"Split {name!r} has the labels {sorted(values - set(class_names))[:5]}, which the training split does "
                f"not have. Its classes: {', '.join(class_names[:10])}."
            )
        if feature.dtype == "bool":
            # As strings they would be `true` and `false`; as numbers they are the classes in their order.
            return split.cast_column(LABEL, datasets.Value("int64")).cast_column(LABEL, target)
        if str(feature.dtype).startswith("float"):
            split = split.cast_column(LABEL, datasets.Value("int64"))
        return split.cast_column(LABEL, datasets.Value("string")).cast_column(LABEL, target)
    if tuple(feature.names) != class_names:
        raise ValueError(
            f"Split {name!r} has other classes than the training split: {feature.names[:10]} and "
            f"{list(class_names[:10])}."
        )
    return split
