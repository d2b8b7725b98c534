"""Folders of images that `datasets` alone does not take for images: DICOM, NIfTI and npy beside the usual ones."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
from datasets.packaged_modules.folder_based_builder.folder_based_builder import (
    FolderBasedBuilder,
    FolderBasedBuilderConfig,
)
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .feature import ImageFile
from .reading import DICOM_ENDINGS, DICOM_MARK

# The name by which `datasets.load_dataset` knows the builder.
FOLDER_BUILDER = "metalr_hf_files"
# What `datasets` has no images of.
OTHER_ENDINGS = (*DICOM_ENDINGS, ".nii", ".nii.gz", ".npy")
# The index of a DICOM disc has the mark of an image.
NO_IMAGES = ("DICOMDIR",)
NEVER_IMAGES = (".csv", ".jsonl", ".json", ".parquet", ".arrow", ".zip", ".txt", ".md", ".yaml", ".yml", ".xml")


def is_image_file(path: str) -> bool:
    """Whether a file is one of the images that can be read here. Where its name does not tell, its content does.

    Args:
        path (`str`): The file.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.data.files.folders import is_image_file
    >>> is_image_file("scan.nii.gz"), is_image_file("photo.JPG"), is_image_file("notes.txt")
    (True, True, False)

    ```
    """
    name = os.path.basename(path).lower()
    ending = os.path.splitext(name)[1]
    return name.endswith(OTHER_ENDINGS) or ending in ImageFolder.EXTENSIONS or _is_dicom_by_content(path)


class Level(NamedTuple):
    """The files of one folder.

    Args:
        folder (`str`): The folder.
        files (`list[os.DirEntry]`): What lies in it and is no folder, in alphabetical order.
        start (`str`): The nearest folder above that is a link, or itself; else the one where the walk began.
    """

    folder: str
    files: list[os.DirEntry[str]]
    start: str


def walk(folder: str) -> Iterator[Level]:
    """A folder and those below it, in alphabetical order, without hidden ones.

    Links to folders are followed, for folders of classes may lie elsewhere. One that leads back to a folder that it
    lies in is not, for it has no end.

    Args:
        folder (`str`): The folder.

    Returns:
        `Iterator[Level]`

    Example:

    ```python
    >>> import os
    >>> import tempfile
    >>> from metalr_hf.data.files.folders import walk
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.makedirs(f"{folder}/photos/cat")
    ...     os.symlink("photos", f"{folder}/train")
    ...     [os.path.relpath(level.folder, folder) for level in walk(folder)]
    ['.', 'photos', 'photos/cat', 'train', 'train/cat']

    ```
    """
    return _walk(folder, folder, ())


def _walk(folder: str, start: str, above: tuple[str, ...]) -> Iterator[Level]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        # As `datasets` does with folders that may not be read, such as `lost+found`.
        return
    yield Level(folder, [entry for entry in entries if not _is_folder(entry)], start)
    for entry in entries:
        if _is_folder(entry) and not entry.name.startswith((".", "__")):
            yield from _walk(entry.path, entry.path if entry.is_symlink() else start, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself.
        return False


def image_files(folder: str) -> Iterator[str]:
    """The image files in a folder and those below it, in alphabetical order, without hidden ones.

    Args:
        folder (`str`): The folder.

    Returns:
        `Iterator[str]`: their paths.
    """
    for level in walk(folder):
        # macOS leaves `._scan.png` beside `scan.png` on other disks.
        yield from (file.path for file in level.files if not file.name.startswith(".") and is_image_file(file.path))


def holds_other_images(folder: str) -> bool:
    """Whether there are images in a folder that `datasets` alone does not take for such.

    Args:
        folder (`str`): The folder.

    Returns:
        `bool`
    """
    return any(os.path.splitext(file)[1].lower() not in ImageFolder.EXTENSIONS for file in image_files(folder))


def _is_dicom_by_content(path: str) -> bool:
    """DICOM files often have no ending, or a number in its place."""
    name = os.path.basename(path)
    ending = os.path.splitext(name)[1].lower()
    if name.startswith(".") or name in NO_IMAGES or ending in NEVER_IMAGES or not os.path.isfile(path):
        return False
    if ending and not ending[1:].isdigit():
        return False
    with open(path, "rb") as file:
        return file.read(DICOM_MARK.stop)[DICOM_MARK] == b"DICM"


class _AllButMetadata(list[str]):
    """Endings of images for the builder, which looks at files again that were chosen by [`is_image_file`] before."""

    def __contains__(self, ending: object) -> bool:
        return ending not in NEVER_IMAGES


class FileFolder(FolderBasedBuilder):
    """A folder of images of any format: classes as folders, or with a `metadata.csv`, as `imagefolder` has them."""

    BASE_FEATURE = ImageFile
    BASE_COLUMN_NAME = "image"
    BUILDER_CONFIG_CLASS = FolderBasedBuilderConfig
    EXTENSIONS = _AllButMetadata()

    def _split_files_and_metadata_and_archives(self, data_files: Any) -> Any:
        wanted = self.config.metadata_filenames or self.METADATA_FILENAMES
        metadata = [file for file in data_files if os.path.basename(file) in wanted]
        return [file for file in data_files if is_image_file(str(file))], metadata, []


# By module and a part of the name of its cache; it changes with what the builder makes of files.
_PACKAGED_DATASETS_MODULES[FOLDER_BUILDER] = (__name__, "1")
