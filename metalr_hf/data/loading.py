"""Images in: from a Hub id, a folder or the demo to prepared training, meta and test sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
from datasets.exceptions import DatasetGenerationError

from ..messages import first_line
from ..settings import check_choice
from .columns import IMAGE, LABEL, find_column
from .digits import demo_dataset
from .files import ImageFile
from .files.layout import IMAGE_FOLDER, builder_of, folder_of, refuse_file
from .files.local import load_folder
from .intensity import VOI, parse_window
from .labels.classes import class_labels, layout_hint
from .splits import ImageSplits, SplitNames, arrange
from .splits.patients import with_groups

AUGMENTATIONS = ("none", "flip", "crop", "crop_flip")
SHUFFLE_BUFFER_SIZE = 1000
# Makes the splits of a data set that comes along.
Demo = Callable[[], Mapping[str, Any]]


@dataclass
class DataArguments:
    """Where the images come from and how they are prepared.

    Args:
        dataset_name (`str`, *optional*):
            Hub id, local folder (class folders of images, parquet or arrow files, or one written by `save_to_disk`),
            or `imagefolder` with `data_dir`. By default images that come along: scikit-learn's handwritten digits, for
            segmentation generated micrographs of cells.
        dataset_config_name (`str`, *optional*): Configuration of the data set, where it has several.
        data_dir (`str`, *optional*): Folder inside the data set, or the folder of images for `imagefolder`.
        image_column_name (`str`, *optional*): Column of the images; by default the only image column.
        label_column_name (`str`, *optional*): Column of the classes; by default the only column of class labels.
        train_split (`str`, *optional*, defaults to `"train"`): Split to train on.
        test_split (`str`, *optional*):
            Split that the result is measured on, once, after training. By default `test`, else `validation`, else a
            share of the training split that is then not trained on.
        test_share (`float`, *optional*, defaults to 0.2):
            Share of the training split, stratified by class, to test on where there is no split for it.
        validation_split (`str`, *optional*):
            Split that evaluations during training look at. By default `validation`, where it is not what is tested on.
        validation_share (`float`, *optional*):
            Share of the training split to evaluate on during training where there is no split for it. It is held out
            only if evaluations are asked for. By default a fifth; of a run that stops by itself 50 images, if they are
            at most a fifth and at least a tenth. Such a run trains on them too once it has converged.
        group_column (`str`, *optional*):
            Column of the patients, videos or slides, or a tag of DICOM files such as `PatientID`: rows that share a
            value of it stay on one side of every split that is made here, and splits that share one are refused.
        allow_shared_groups (`bool`, *optional*, defaults to `False`): Train on splits that share groups all the same.
        meta_split_name (`str`, *optional*): Split to take the validation batches from that tune the learning rates.
        max_train_samples (`int`, *optional*):
            Train on so many images only, stratified by class; of a stream the first ones.
        streaming (`bool`, *optional*, defaults to `False`): Read the images while training, without a copy on disk.
        image_size (`int`, *optional*): Height and width of the model's input in pixels; by default the model's own.
        intensity_window (`list[str]`, *optional*):
            The two intensities that become black and white in images of more than 8 bits (DICOM, NIfTI, TIFF and PNG
            of 16 bits or floats), in the units of the file: for CT, `-160 240`. `voi` takes the window that each DICOM
            file holds. By default the 0.5th and the 99.5th percentile of the training images.
        num_channels (`int`, *optional*):
            How many channels the images and the model's input have. By default three, for which grey images are
            repeated.
        augment (`str`, *optional*, defaults to `"crop_flip"`):
            Augmentation of the training images: `none`, `flip`, `crop` or `crop_flip`. The demo's digits are only
            cropped, for a mirrored digit is no digit.
        metrics (`list[str]`, *optional*):
            Metrics of the test split, by default those of the task: for classes also `balanced_accuracy` and `auroc`.

    Example:

    ```python
    >>> from metalr_hf.data.loading import DataArguments
    >>> args = DataArguments(dataset_name="imagefolder", data_dir="photos")
    >>> args.metrics, args.is_demo
    (['accuracy', 'macro_f1'], False)

    ```
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, local folder (class folders of images, parquet or arrow files, or one written by "
            "`save_to_disk`), or `imagefolder` with `--data_dir`. By default scikit-learn's handwritten digits, for "
            "segmentation generated micrographs of cells."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, where it has several."}
    )
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the data set, or the folder of images for `imagefolder`."}
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images; by default the only image column."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column of the classes; by default the only column of class labels."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that the result is measured on, once, after training. By default `test`, else "
            "`validation`, else a share of the training split that is then not trained on."
        },
    )
    test_share: float = field(
        default=0.2,
        metadata={
            "help": "Share of the training split, stratified by class, to test on where there is no split for it."
        },
    )
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "Split that evaluations during training look at. By default `validation`, where it is not what is "
            "tested on."
        },
    )
    validation_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the training split to evaluate on during training where there is no split for it. It is "
            "held out only if evaluations are asked for. By default a fifth; of a run that stops by itself 50 images, "
            "if they are at most a fifth and at least a tenth. Such a run trains on them too once it has converged."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the patients, videos or slides, or a tag of DICOM files such as `PatientID`: rows that "
            "share a value of it stay on one side of every split that is made here, and splits that share one are "
            "refused."
        },
    )
    allow_shared_groups: bool = field(
        default=False, metadata={"help": "Train on splits that share groups all the same."}
    )
    meta_split_name: str | None = field(
        default=None,
        metadata={"help": "Split to take the validation batches from that tune the learning rates."},
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on so many images only, stratified by class; of a stream the first ones."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the images while training, without a copy on disk."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width of the model's input in pixels; by default the model's own."},
    )
    intensity_window: list[str] | None = field(
        default=None,
        metadata={
            "help": "The two intensities that become black and white in images of more than 8 bits (DICOM, NIfTI, TIFF "
            "and PNG of 16 bits or floats), in the units of the file: for CT, `-160 240`. `voi` takes the window that "
            "each DICOM file holds. By default the 0.5th and the 99.5th percentile of the training images."
        },
    )
    num_channels: int | None = field(
        default=None,
        metadata={
            "help": "How many channels the images and the model's input have. By default three, for which grey images "
            "are repeated."
        },
    )
    augment: str = field(
        default="crop_flip",
        metadata={
            "help": "Augmentation of the training images: `none`, `flip`, `crop` or `crop_flip`. The demo's digits are "
            "only cropped, for a mirrored digit is no digit."
        },
    )
    metrics: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Metrics of the test split. By default `accuracy`, `macro_f1`, `balanced_accuracy` and `auroc` "
            "in classification, in other tasks their own."
        },
    )
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro_f1")

    def __post_init__(self) -> None:
        check_choice("augment", self.augment, AUGMENTATIONS)
        if isinstance(self.metrics, str):
            self.metrics = [self.metrics]
        self.metrics = self.metrics or list(self.default_metrics)
        for name in ("test_share", "validation_share"):
            share = getattr(self, name)
            if share is not None and not 0 < share < 1:
                raise ValueError(f"{name}={share!r} must be more than 0 and less than 1.")
        parse_window(self.intensity_window)
        # Torch cannot resize to a single pixel.
        for name, least in (("max_train_samples", 1), ("image_size", 2), ("num_channels", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value!r} must be {least} or more.")
        if self.dataset_name == "imagefolder" and self.data_dir is None:
            raise ValueError(
                "dataset_name='imagefolder' needs data_dir: the folder that holds one folder of images per class."
            )

    @property
    def hub_id(self) -> str | None:
        """The data set's name on the Hub, if it comes from there."""
        name = self.dataset_name
        return name if name and "/" in name and not os.path.exists(name) else None

    @property
    def folder(self) -> str | None:
        """The local folder that the images are in, if they are in one."""
        return folder_of(self.dataset_name, self.data_dir)

    def kept_columns(self, others: Sequence[str] = ()) -> list[str]:
        """The columns that rows keep beside images and labels: the one of the groups, and others.

        Args:
            others (`Sequence[str]`, *optional*): Those asked for.
        """
        return [*others, *([self.group_column] if self.group_column else [])]

    @property
    def is_demo(self) -> bool:
        """Whether no data set is named, so that it is one that comes along."""
        return self.dataset_name is None and self.data_dir is None


def load_images(args: DataArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
    """Loads a data set of labelled images and brings it into one form.

    Args:
        args ([`DataArguments`]): Which data set, columns and splits.
        seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

    Returns:
        [`ImageSplits`]: with the columns `image` ([`~metalr_hf.data.files.ImageFile`]) and `label`
            (`datasets.ClassLabel`).

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a column or a split is missing, naming those that are there, a row has no label, or an image
            cannot be learned from.

    Example:

    ```python
    >>> from metalr_hf.data.loading import DataArguments, load_images
    >>> splits = load_images(DataArguments(max_train_samples=500))
    >>> splits.train.num_rows, splits.test.num_rows, splits.class_names[:3]
    (500, 797, ('0', '1', '2'))

    ```
    """
    splits, names = load_splits(args, demo_dataset)
    kept = args.kept_columns(keep_columns)
    read = {name: _choose_columns(splits[name], args, kept) for name in names.used}
    chosen = {name: rows for name, (rows, _) in read.items()}
    class_names, chosen = class_labels(chosen, names.train, args.streaming, args.folder, read[names.train][1])
    return ImageSplits(class_names=class_names, **arrange(chosen, names, args, seed))


def load_splits(
    args: DataArguments, demo: Demo, read: Callable[[DataArguments, Demo], Mapping[str, Any]] | None = None
) -> tuple[Mapping[str, Any], SplitNames]:
    """Loads a data set as it is, and finds the splits to train and to test on.

    Args:
        args ([`DataArguments`]): Which data set and splits.
        demo (`Callable`): Makes the splits that are loaded where no data set is named.
        read (`Callable`, *optional*): Reads the splits, where `datasets` cannot.

    Returns:
        `tuple[Mapping[str, Any], SplitNames]`: the splits by name, and which of them are used for what.

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if a split is missing, naming those that are there.
    """
    splits = (read or read_splits)(args, demo)
    train_name, test_name, validation_name = args.train_split, args.test_split, args.validation_split
    taken = {train_name, test_name, validation_name, args.meta_split_name}
    if test_name is None:
        test_name = next((name for name in ("test", "validation") if name in splits and name not in taken), None)
    if validation_name is None and "validation" in splits and "validation" not in taken | {test_name}:
        validation_name = "validation"
    names = SplitNames(train_name, test_name, validation_name, args.meta_split_name)
    arguments = ("train_split", "test_split", "validation_split", "meta_split_name")
    for argument, name in zip(arguments, names, strict=True):
        if name is not None and name not in splits:
            raise ValueError(
                f"{argument}={name!r} is not a split of the data set. Its splits: {', '.join(map(repr, splits))}."
            )
    splits = with_groups({name: splits[name] for name in splits}, args.group_column, args.image_column_name)
    columns = getattr(splits[train_name], "column_names", None)
    if args.group_column is not None and columns is not None and args.group_column not in columns:
        raise ValueError(f"group_column={args.group_column!r} is neither a column {columns} nor a tag of DICOM files.")
    if test_name is None and args.streaming:
        raise ValueError(
            f"A stream has no share to hold out for the test. Name a split with test_split, of {list(splits)}, or "
            "leave out streaming."
        )
    return splits, names


def read_splits(args: DataArguments, demo: Demo = demo_dataset) -> Mapping[str, Any]:
    """Loads a data set as it is.

    Args:
        args ([`DataArguments`]): Which data set.
        demo (`Callable`, *optional*): Makes the splits that are loaded where no data set is named.

    Returns:
        `Mapping[str, Any]`: the splits by name.

    Raises:
        FileNotFoundError: if there is no such data set, or no network to fetch it.
        ValueError: if it is there and cannot be loaded.
    """
    if args.is_demo:
        splits = demo()
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if args.streaming else splits
    refuse_file(args.dataset_name, args.data_dir)
    name = args.dataset_name or IMAGE_FOLDER
    if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(name)
        splits = saved if isinstance(saved, datasets.DatasetDict) else {args.train_split: saved}
        return {name: split.to_iterable_dataset() for name, split in splits.items()} if args.streaming else splits
    try:
        if args.folder is not None and (builder := builder_of(args.folder, name == IMAGE_FOLDER)) is not None:
            return load_folder(args.folder, args.dataset_config_name, args.streaming, builder)
        return datasets.load_dataset(name, args.dataset_config_name, data_dir=args.data_dir, streaming=args.streaming)
    except (FileNotFoundError, ConnectionError) as error:
        where = f" with data_dir={args.data_dir!r}" if args.data_dir else ""
        raise FileNotFoundError(
            f"dataset_name={name!r}{where} could not be loaded: it is neither a folder with images, parquet or arrow "
            "files nor a data set that can be reached on the Hub. Check the name and the network; private ones need "
            f"`hf auth login`. ({first_line(error)})"
        ) from error
    except (ValueError, DatasetGenerationError) as error:
        # Of what is wrong with a row, such as the file it names, the cause tells.
        reason = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
        raise ValueError(f"dataset_name={name!r} could not be loaded: {first_line(reason)}") from error


def _choose_columns(split: Any, args: DataArguments, keep_columns: Sequence[str]) -> tuple[Any, str]:
    """The rows in the form of all data sets, and what the data set itself calls its labels."""
    features = split.features or dict.fromkeys(next(iter(split)))
    images = image_columns(features)
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    image = find_column(features, "image", args.image_column_name, images)
    candidates = classes or [name for name in ("label", "labels") if name in features]
    hint = "" if candidates or not images else layout_hint(args.folder)
    label = find_column(features, "label", args.label_column_name, candidates, hint)
    if args.group_column in (image, label):
        kind = "labels" if args.group_column == label else "images"
        raise ValueError(f"group_column={args.group_column!r} is the column of the {kind}. Name the one of the groups.")
    kept = [name for name in keep_columns if name in features]
    split = split.select_columns([image, label, *kept]).rename_columns(
        {old: new for old, new in ((image, IMAGE), (label, LABEL)) if old != new}
    )
    return as_image_files(split, args), label


def image_columns(features: Mapping[str, Any]) -> list[str]:
    """The columns of images.

    Args:
        features (`Mapping[str, Any]`): Column to type.

    Returns:
        `list[str]`
    """
    return [name for name, feature in features.items() if isinstance(feature, (datasets.Image, datasets.Nifti))]


def as_image_files(rows: Any, args: DataArguments) -> Any:
    """Makes the column `image` one of files of any format: of images, or of paths or bytes of files.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): Rows with `image`.
        args ([`DataArguments`]): Window and channels.

    Returns:
        as `rows`
    """
    window = parse_window(args.intensity_window)
    return rows.cast_column(
        IMAGE, ImageFile(voi=window is not None and window.source == VOI, channels=args.num_channels)
    )
