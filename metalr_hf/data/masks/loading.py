"""Images with masks: from a Hub id, a folder or the demo to checked training, meta and test sets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import datasets
import numpy as np
from transformers.utils import logging

from ...models.losses import IGNORE_INDEX
from ..cells import CLASS_NAMES, demo_cells
from ..columns import IMAGE, LABEL, find_column, place, read_at
from ..files.nifti import check_place
from ..files.reading import file_bytes
from ..loading import SHUFFLE_BUFFER_SIZE, DataArguments, as_image_files, image_columns, load_splits
from ..splits import ImageSplits, arrange
from .reading import BLACK_AND_WHITE, kind_of, read_mask, size_of

logger = logging.get_logger(__name__)

MASK_NAME = re.compile(
    r"(.*_)?(masks?|labels?|annotations?|segmentations?(_maps?)?|seg|targets?|ground_truth|gt)(_.*)?", re.IGNORECASE
)
# As an 8-bit image of 0 and 1 shows nothing, masks of two classes are often written so.
WHITE = BLACK_AND_WHITE[-1]
# Masks of a stream that are looked at before it is trained on, at the least.
FIRST_MASKS = 16
CLASSES_NAMED = 5
FOLDER_OF_MASKS = "A folder of images names its masks in a metadata.csv with the columns file_name and mask_file_name."


@dataclass
class MaskArguments(DataArguments):
    """Where images with masks come from and how they are prepared.

    Args:
        mask_column_name (`str`, *optional*):
            Column of the masks, images of one channel that hold class ids; by default the one called `mask`, `label`,
            `annotation` or similar.
        class_names (`list[str]`, *optional*):
            Names of the classes of the masks, from id 0 on. By default numbers, as many as the training masks hold.
        ignore_index (`int`, *optional*):
            Id in the masks of pixels that do not count. By default 255, unless the masks are black and white (0 and 255
            only), which makes it a class.

    All others are those of [`~metalr_hf.data.loading.DataArguments`].
    """

    mask_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column of the masks, images of one channel that hold class ids; by default the one called `mask`, "
            "`label`, `annotation` or similar."
        },
    )
    class_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of the classes of the masks, from id 0 on. By default numbers, as many as the training "
            "masks hold."
        },
    )
    ignore_index: int | None = field(
        default=None,
        metadata={
            "help": "Id in the masks of pixels that do not count. By default 255, unless the masks are black and white "
            "(0 and 255 only), which makes it a class."
        },
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("dice",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics != list(self.default_metrics):
            measured = " and ".join(self.default_metrics)
            raise ValueError(f"metrics={self.metrics}: segmentation is measured by {measured}. Leave the argument out.")


@dataclass(frozen=True)
class MaskClasses:
    """What the values of the pixels of masks mean.

    Args:
        names (`tuple[str, ...]`): Name of class 0, 1, ...
        values (`tuple[int, ...]`): The value that class 0, 1, ... has in the masks.
        ignore_index (`int`): The value of pixels that do not count; -1 if all do.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.data.masks import MaskClasses
    >>> MaskClasses(("background", "vessel"), values=(0, 255), ignore_index=-1).ids(np.array([[0, 255]]))
    array([[0, 1]], dtype=uint8)

    ```
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    ignore_index: int

    def ids(self, mask: np.ndarray) -> np.ndarray:
        """Class ids of a mask's values, uint8, 255 for pixels that do not count.

        Args:
            mask (`numpy.ndarray` of shape `(height, width)`): Values as the file has them.

        Raises:
            ValueError: if a value is no class.
        """
        table = np.full(max(*self.values, self.ignore_index, 0) + 2, -1, dtype=np.int64)
        if self.ignore_index >= 0:
            table[self.ignore_index] = IGNORE_INDEX
        # Second, so that a mask of 0 and 255 has both as classes.
        table[list(self.values)] = range(len(self.values))
        # The last entry is that of all other values.
        last = len(table) - 1
        ids = table[np.where(mask < 0, last, np.minimum(mask.astype(np.int64), last))]
        if (ids < 0).any():
            span = " and " if len(self.values) == 2 else " to "
            raise ValueError(
                f"the mask holds the class id {int(mask[ids < 0][0])}, which is none of the {len(self.names)} classes "
                f"({self.values[0]}{span}{self.values[-1]}; ignore_index={self.ignore_index})"
            )
        return ids.astype(np.uint8)


@dataclass(frozen=True)
class MaskSplits(ImageSplits):
    """Images and masks in splits, with the columns `image` and `label`, a mask that is not yet decoded.

    Args:
        classes ([`MaskClasses`]): What the values of the masks mean.
    """

    classes: MaskClasses


def load_masks(args: MaskArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> MaskSplits:
    """Loads a data set of images with masks, brings it into one form, and looks at every mask.

    Masks hold a class id a pixel, from 0 on. Masks of 0 and 255 only, black and white, are two classes, unless
    `ignore_index=255` is given. Of a stream the first masks tell whether they are black and white, and the rest is
    looked at as it comes.

    Args:
        args ([`MaskArguments`]): Which data set, columns and splits.
        seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

    Returns:
        [`MaskSplits`]

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a column or a split is missing, or a mask is of another size than its image or holds a value that
            is no class, naming the row, the file and the value; or if the first masks of a stream leave open what 255
            is.

    Example:

    ```python
    >>> from metalr_hf.data.masks import MaskArguments, load_masks
    >>> load_masks(MaskArguments()).class_names
    ('inside', 'membrane')

    ```
    """
    if args.is_demo and args.class_names is None:
        args = replace(args, class_names=list(CLASS_NAMES))
    splits, names = load_splits(args, demo_cells)
    chosen = {name: _choose_columns(splits[name], args, args.kept_columns(keep_columns)) for name in names.used}
    if args.streaming:
        if args.class_names is None:
            raise ValueError(
                "The classes of a stream of masks are not known before its end. Name them with class_names, or leave "
                "out streaming."
            )
        classes = named_classes(args, _first_values(chosen[names.train], names.train, args))
    else:
        classes = _check_masks(chosen, names.train, args)
    return MaskSplits(class_names=classes.names, classes=classes, **arrange(chosen, names, args, seed))


def _choose_columns(split: Any, args: MaskArguments, keep_columns: Sequence[str]) -> Any:
    features = split.features or dict.fromkeys(next(iter(split)))
    given = (args.image_column_name, args.mask_column_name)
    images = [name for name in image_columns(features) if name not in given]
    masks = [name for name in images if MASK_NAME.fullmatch(name)]
    others = [name for name in images if name not in masks]
    wanted = [("image", args.image_column_name, others), ("mask", args.mask_column_name, masks)]
    # A name that was given and is not there is told before anything is guessed.
    wanted.sort(key=lambda column: column[1] is None)
    found = {what: find_column(features, what, name, there, FOLDER_OF_MASKS) for what, name, there in wanted}
    image, mask = found["image"], found["mask"]
    split = named_columns(split, image, mask, [name for name in keep_columns if name in features])
    return as_image_files(split, args).cast_column(LABEL, datasets.Image(decode=False))


def named_columns(rows: Any, image: str, mask: str, others: Sequence[str]) -> Any:
    """Calls the columns of images and masks `image` and `label`.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Rows.
        image (`str`): The column of the images.
        mask (`str`): The column of the masks.
        others (`Sequence[str]`): Columns to keep besides.

    Returns:
        as `rows`
    """
    rows = rows.select_columns([image, mask, *others])
    # By way of names that no data set has: an image column may be called `label`.
    return rows.rename_columns({image: "_image", mask: "_mask"}).rename_columns({"_image": IMAGE, "_mask": LABEL})


def _check_masks(splits: Mapping[str, Any], train_name: str, args: MaskArguments) -> MaskClasses:
    """Looks at the size and the values of every mask, and says which classes the training masks hold."""
    size = partial(size_of, channels=args.num_channels)
    first: dict[str, dict[int, str]] = {}
    for name, split in splits.items():
        first[name] = {}
        for row, entry in enumerate(split.cast_column(IMAGE, datasets.Image(decode=False))):
            where, of_image = (place(f"Split {name!r}, row {row}", entry[column]) for column in (LABEL, IMAGE))
            if entry[LABEL] is None or entry[IMAGE] is None:
                raise ValueError(f"{where}: there is no {'mask' if entry[LABEL] is None else 'image'}.")
            mask = read_at(where, read_mask, entry[LABEL])
            check_size(where, mask.shape, read_at(of_image, size, entry[IMAGE]))
            if "nifti" == kind_of(entry[LABEL]) == kind_of(entry[IMAGE]):
                check_place(where, file_bytes(entry[LABEL]), file_bytes(entry[IMAGE]))
            first[name] = dict.fromkeys(_values(mask), where) | first[name]
    classes = named_classes(args, set(first[train_name]), first[train_name])
    for seen in first.values():
        for value, where in seen.items():
            read_at(where, classes.ids, np.array([[value]]))
    return classes


def _first_values(stream: Any, name: str, args: MaskArguments) -> set[int]:
    """The values of a stream's first masks, of as many as it takes to tell whether they are black and white."""
    values: set[int] = set()
    if len(args.class_names or ()) != 2 or args.ignore_index == WHITE:
        return values
    # No more rows than are read before the first step in any case.
    for row, entry in enumerate(stream.select_columns([LABEL]).take(SHUFFLE_BUFFER_SIZE)):
        if row >= FIRST_MASKS and len(values) > 1:
            break
        where = place(f"Split {name!r}, row {row}", entry[LABEL])
        if entry[LABEL] is None:
            raise ValueError(f"{where}: there is no mask.")
        values.update(_values(read_at(where, read_mask, entry[LABEL])))
    if args.ignore_index is None and len(values) == 1 and values < set(BLACK_AND_WHITE):
        raise ValueError(
            f"The first masks of the stream hold the value {values.pop()} only, which leaves open whether {WHITE} is a "
            "class (black-and-white masks) or pixels that do not count. If these do not count, say so with "
            f"ignore_index={WHITE}; else leave out streaming, or put masks with both classes first."
        )
    return values


def _values(mask: np.ndarray) -> list[int]:
    # Much quicker than sorting, which would take longer than decoding.
    values = np.flatnonzero(np.bincount(mask.ravel())) if mask.dtype == np.uint8 else np.unique(mask)
    return values.tolist()


def named_classes(args: MaskArguments, values: Iterable[int], first: Mapping[int, str] | None = None) -> MaskClasses:
    """The classes of masks, from their names or from the values that the training masks hold.

    Warns of classes that were named and that no training mask holds.

    Args:
        args ([`MaskArguments`]): The names and the value that does not count, where they were given.
        values (`Iterable[int]`): What the training masks hold.
        first (`Mapping[int, str]`, *optional*): Where each value is first, for the message. `None` if `values` are not
            those of all training masks.

    Returns:
        [`MaskClasses`]

    Raises:
        ValueError: if the values are no classes, or there are too few or too many.
    """
    found, names, ignored = sorted(values), args.class_names, args.ignore_index
    if tuple(found) == BLACK_AND_WHITE and ignored != WHITE and (names is None or len(names) == 2):
        return MaskClasses(tuple(names or ("0", "255")), BLACK_AND_WHITE, -1 if ignored is None else ignored)
    ignored = IGNORE_INDEX if ignored is None else ignored
    if names is None:
        ids = [value for value in found if value != ignored]
        gap = next((value for i, value in enumerate(ids) if value != i), None)
        if gap is not None:
            assert first is not None
            raise ValueError(
                f"{first[gap]}: the mask holds the class id {gap}, but the ids of the training masks are not 0, 1, 2 "
                f"... without a gap: {ids[:8]}{' ...' if len(ids) > 8 else ''}. Name the classes with class_names, or "
                "mend the mask."
            )
        if found == [0]:
            raise ValueError(
                "The training masks have one class: every mask is empty (only 0). Check that the masks are those of "
                "the images, and that no class was lost when they were saved."
            )
        names = [str(value) for value in ids]
    if not 2 <= len(names) <= IGNORE_INDEX:
        raise ValueError(
            f"The masks have {len(names)} classes ({', '.join(names[:5])}); from 2 to {IGNORE_INDEX} are possible. "
            f"Pixels of the value ignore_index={ignored} do not count."
        )
    absent = [repr(name) for value, name in enumerate(names) if value not in found]
    if absent and first is not None:
        more = f" and {len(absent) - CLASSES_NAMED} more" if len(absent) > CLASSES_NAMED else ""
        logger.warning(
            f"No training mask holds a pixel of {', '.join(absent[:CLASSES_NAMED])}{more}, which cannot be learned. "
            "class_names are the names of the ids 0, 1, 2 ... in this order."
        )
    return MaskClasses(tuple(names), tuple(range(len(names))), ignored)


def check_size(where: str, mask: tuple[int, ...], image: tuple[int, ...]) -> None:
    """Raises `ValueError` if a mask is of another size (height, width) than its image.

    Args:
        where (`str`): Which row, for the message.
        mask (`tuple[int, ...]`): Height and width of the mask in pixels.
        image (`tuple[int, ...]`): Those of the image.
    """
    if mask != image:
        raise ValueError(
            f"{where}: the mask is {mask[1]} × {mask[0]} pixels (width × height), its image {image[1]} × {image[0]}. "
            "Resize the mask with nearest neighbour, which makes no new values, or leave out its row."
        )
