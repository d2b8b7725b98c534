"""How a folder of images is laid out: which of the folders in it are splits, and which are classes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from datasets import Split
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS
from datasets.load import infer_module_for_data_files_list
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard

from .folders import FOLDER_BUILDER, holds_other_images, image_files, is_image_file, walk

IMAGE_FOLDER = "imagefolder"
CARD = "README.md"
TRAIN = str(Split.TRAIN)
ARCHIVE = ".zip"


def folder_of(dataset_name: str | None, data_dir: str | None = None) -> str | None:
    """The local folder of a data set.

    Args:
        dataset_name (`str`, *optional*): As in [`~metalr_hf.data.loading.DataArguments`].
        data_dir (`str`, *optional*): The same.

    Returns:
        `str`, *optional*: `None` where the data set is not in one.
    """
    folder = _path_of(dataset_name, data_dir)
    return folder if os.path.isdir(folder) else None


def refuse_file(dataset_name: str | None, data_dir: str | None = None) -> None:
    """Raises an error where a file is given in place of a folder, such as an archive.

    Args:
        dataset_name (`str`, *optional*): As in [`~metalr_hf.data.loading.DataArguments`].
        data_dir (`str`, *optional*): The same.

    Raises:
        ValueError: if it is a file.
    """
    path = _path_of(dataset_name, data_dir)
    # A name without an ending may be one of the Hub.
    if os.path.isfile(path) and os.path.splitext(path)[1]:
        argument = f"data_dir={data_dir!r}" if data_dir else f"dataset_name={dataset_name!r}"
        raise ValueError(
            f"{argument} is a file, not a folder. Give the folder that it lies in. If it is an archive, unpack it and "
            "give the folder that it is unpacked to."
        )


def _path_of(dataset_name: str | None, data_dir: str | None) -> str:
    parts = [part for part in (dataset_name, data_dir) if part and part != IMAGE_FOLDER]
    return os.path.join(*parts) if parts else ""


def builder_of(folder: str, is_one_of_images: bool = False) -> str | None:
    """What reads a folder of images: `datasets` goes by the ending that most of the files in it have.

    Args:
        folder (`str`): The folder.
        is_one_of_images (`bool`, *optional*, defaults to `False`): Whether it was given as one.

    Returns:
        `str`, *optional*: `"imagefolder"`, or `FOLDER_BUILDER` where there are images that it does not know. `None` if
            this is no folder of images, or the card in it says what its splits are.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.data.files.layout import builder_of
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "photo.png").touch()
    ...     builder_of(folder)
    'imagefolder'

    ```
    """
    if holds_other_images(folder):
        return FOLDER_BUILDER
    if is_one_of_images:
        return IMAGE_FOLDER
    card = os.path.join(folder, CARD)
    if os.path.isfile(card) and {"configs", "dataset_info"} & DatasetCard.load(card).data.to_dict().keys():
        return None
    files: Any = [file.path for level in walk(folder) for file in level.files]
    return IMAGE_FOLDER if infer_module_for_data_files_list(files)[0] == IMAGE_FOLDER else None


def folders_of_splits(folder: str) -> dict[str, list[Path]]:
    """The splits of a folder of images, as the folders and zip archives directly inside it are named.

    `datasets` looks for the names of splits in those of all folders and files, so that a class called `valid` or a file
    called `patient_3_test.png` would be taken for a part of a split. Where a folder holds nothing but one other folder,
    as an unpacked archive does, the splits may lie in that one.

    Args:
        folder (`str`): The folder.

    Returns:
        `dict[str, list[pathlib.Path]]`: split to its folders and archives; `train` to the folder itself if there are no
            folders of splits.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from PIL import Image
    >>> from metalr_hf.data.files.layout import folders_of_splits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for place in ("train/valid", "train/invalid", "Test/valid", "Test/invalid"):
    ...         (Path(folder) / place).mkdir(parents=True)
    ...         Image.new("L", (4, 4)).save(Path(folder) / place / "scan.png")
    ...     {split: [path.name for path in paths] for split, paths in folders_of_splits(folder).items()}
    {'train': ['train'], 'test': ['Test']}

    ```
    """
    root = Path(folder)
    while True:
        parts = [path for path in sorted(root.iterdir()) if holds_images(path)]
        splits: dict[str, list[Path]] = {split: [] for split in map(str, SPLIT_KEYWORDS)}
        for path in parts:
            if (split := _split_named(path)) is not None:
                splits[split].append(path)
        are_all_named = sum(map(len, splits.values())) == len(parts) > 0
        # Beside folders of other names only one called `train` and no more says so, for a class may be `test tube`.
        if are_all_named or any(_name(path) in SPLIT_KEYWORDS[Split.TRAIN] for path in splits[TRAIN]):
            return {split: paths for split, paths in splits.items() if paths}
        if len(parts) != 1 or not parts[0].is_dir() or any(map(_is_image_or_metadata, root.iterdir())):
            return {TRAIN: [Path(folder)]}
        root = parts[0]


def holds_images(path: Path) -> bool:
    """Whether something in a folder is a folder with images, or an archive, which is not opened here.

    Args:
        path (`pathlib.Path`): What lies in the folder.

    Returns:
        `bool`
    """
    if path.name.startswith((".", "__")):
        return False
    if path.is_dir():
        return any(
            is_image_file(file.path) or file.name.lower().endswith(ARCHIVE)
            for level in walk(str(path))
            for file in level.files
        )
    return path.suffix.lower() == ARCHIVE


def has_metadata(path: Path) -> bool:
    """Whether there is a table of the images in a folder or below it, as `datasets` has them: a `metadata.csv`.

    Args:
        path (`pathlib.Path`): The folder.

    Returns:
        `bool`
    """
    return any(file.name in ImageFolder.METADATA_FILENAMES for level in walk(str(path)) for file in level.files)


def refuse_nested_classes(folder: str) -> None:
    """Raises an error if folders of classes hold folders again, such as one a patient.

    `datasets` takes the innermost folder for the class, so that the patients would be learned.

    Args:
        folder (`str`): A folder whose labels are classes.

    Raises:
        ValueError: if an image lies in a folder of a folder.
    """
    roots = [path for paths in folders_of_splits(folder).values() for path in paths if path.is_dir()]
    if any(map(has_metadata, roots)):
        return
    places = {Path(file).relative_to(root).parent for root in roots for file in image_files(str(root))}
    # A folder that holds all others, as in train/images/<class>, is no class.
    shared = Path(os.path.commonpath(places)) if places else Path()
    nested = sorted(place for place in places if len(place.relative_to(shared).parts) > 1)
    # That walks through the whole folder again, and is asked only where it matters.
    if nested and builder_of(folder) is not None:
        names = sorted({place.name for place in nested})[:2]
        raise ValueError(
            f"The folder {folder!r} has images in folders of folders, such as {str(nested[0])!r}. The classes would be "
            f"the innermost folders: {', '.join(map(repr, names))} ... Put the images directly into the folders of "
            "their classes: <class>/, or train/<class>/ and test/<class>/. Or name the classes in a metadata.csv, "
            "one in each folder of a split, with the columns `file_name`, `label` and, if these folders are patients, "
            "`patient`: --group_column patient then keeps a patient's images together."
        )


def _split_named(path: Path) -> str | None:
    """The split that a folder or archive is named after, as `datasets` reads names: `train`, `val`, `test_images`."""
    name = _name(path)
    for split, words in SPLIT_KEYWORDS.items():
        if re.fullmatch(f"(.*[{NON_WORDS_CHARS}])?({'|'.join(words)})([{NON_WORDS_CHARS}].*)?", name):
            return str(split)
    return None


def _name(path: Path) -> str:
    return (path.name if path.is_dir() else path.stem).lower()


def _is_image_or_metadata(path: Path) -> bool:
    return path.is_file() and (path.name in ImageFolder.METADATA_FILENAMES or is_image_file(str(path)))
