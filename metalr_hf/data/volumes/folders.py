"""Folders of volumes in the layout of nnU-Net and of the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet

from ...messages import first_line
from ...models.volume_processor import open_nifti
from ..columns import IMAGE, LABEL

DATASET_FILE = "dataset.json"
ENDINGS = (".nii.gz", ".nii")
IGNORED = "ignore"
NIFTI_FEATURE = '"_type": "Nifti"'


@dataclass(frozen=True)
class FolderFacts:
    """What the `dataset.json` of a folder says.

    Args:
        class_names (`list[str]`, *optional*): Name of class 0, 1, ...
        ignore_index (`int`, *optional*): Value in the masks of voxels that do not count.
        is_ct (`bool`): Whether every channel is computed tomography.
    """

    class_names: list[str] | None
    ignore_index: int | None
    is_ct: bool


def is_volume_folder(folder: str | None) -> bool:
    """Whether a folder is in nnU-Net's layout.

    Args:
        folder (`str`, *optional*): A folder.

    Returns:
        `bool`
    """
    return folder is not None and all(os.path.exists(os.path.join(folder, n)) for n in (DATASET_FILE, "imagesTr"))


def refuse_missing_file(folder: str | None) -> None:
    """Raises `FileNotFoundError` if a folder is in nnU-Net's layout but for its `dataset.json`.

    Args:
        folder (`str`, *optional*): A folder.
    """
    if folder is not None and os.path.isdir(os.path.join(folder, "imagesTr")) and not is_volume_folder(folder):
        raise FileNotFoundError(
            f"{os.path.join(folder, DATASET_FILE)} is missing: nnU-Net's layout has it beside imagesTr and labelsTr, "
            'and it names the classes, as in {"labels": {"background": 0, "lesion": 1}}. Add it.'
        )


def holds_volumes(folder: str | None) -> bool:
    """Whether a folder holds volumes: nnU-Net's layout, or NIfTI files or columns, the first of them no single slice.

    Args:
        folder (`str`, *optional*): A folder.

    Returns:
        `bool`
    """
    if folder is None:
        return False
    if is_volume_folder(folder):
        return True
    for path in sorted(Path(folder).rglob("*")):
        if path.name.endswith(ENDINGS):
            return _is_volume(str(path))
        if path.name == "dataset_info.json" and NIFTI_FEATURE in path.read_text(encoding="utf-8", errors="replace"):
            return _holds_volumes(datasets.load_from_disk(str(path.parent)))
        if path.suffix == ".parquet":
            described = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"huggingface", b"")
            if NIFTI_FEATURE.encode() in described:
                batch = next(pyarrow.parquet.ParquetFile(path).iter_batches(1))
                return any(_is_volume(v) for v in batch.to_pylist()[0].values() if isinstance(v, dict))
    return False


def _holds_volumes(rows: datasets.Dataset) -> bool:
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Nifti)]
    for name in columns:
        rows = rows.cast_column(name, datasets.Nifti(decode=False))
    return any(_is_volume(rows[0][name]) for name in columns)


def _is_volume(entry: Any) -> bool:
    """Whether a file has three axes; what is wrong with one that cannot be opened, the reader of volumes tells."""
    try:
        shape = open_nifti(entry).shape
    except (ImportError, OSError, ValueError, EOFError, KeyError, TypeError):
        return True
    return len(shape) > 2 and min(shape[:3]) > 1


def read_volume_folder(folder: str) -> tuple[dict[str, datasets.Dataset], FolderFacts]:
    """Finds the volumes of a folder in nnU-Net's layout, and their masks.

    Args:
        folder (`str`): With `dataset.json`, `imagesTr` and `labelsTr`; `imagesTs` is used where `labelsTs` is there.

    Returns:
        `tuple[dict[str, datasets.Dataset], FolderFacts]`: the splits `train` and, perhaps, `test`, with the columns
            `image` (a list of channels) and `label`, and what `dataset.json` says.

    Raises:
        FileNotFoundError: if an image has no mask, a mask no image, or there are none.
        ValueError: if `dataset.json` cannot be used.
    """
    root = Path(folder)
    file = root / DATASET_FILE
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        channels = said.get("channel_names") or said.get("modality") or {"0": ""}
        labels = said["labels"]
        # nnU-Net writes names to numbers, the Decathlon numbers to names.
        if all(str(key).isdigit() for key in labels):
            labels = {name: int(value) for value, name in labels.items()}
        facts = _facts(labels, channels, file)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read: {type(error).__name__}: {first_line(error)}. It must hold `labels`, and "
            "`channel_names` where images have several channels."
        ) from error
    splits = {"train": _rows(root, "Tr", "train")}
    if any((root / "labelsTs").glob("*")):
        splits["test"] = _rows(root, "Ts", "test")
    return splits, facts


def _facts(labels: Mapping[str, Any], channels: Any, file: Path) -> FolderFacts:
    if any(isinstance(value, list) for value in labels.values()):
        raise ValueError(f"{file} has labels that are several regions at once. Give each class one number.")
    names = {int(value): str(name) for name, value in labels.items() if str(name) != IGNORED}
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{file}: the labels must be 0, 1, 2 ... without a gap, not {sorted(names)}.")
    modalities = channels.values() if isinstance(channels, dict) else channels
    ignored = labels.get(IGNORED)
    return FolderFacts(
        class_names=[names[i] for i in range(len(names))],
        ignore_index=None if ignored is None else int(ignored),
        is_ct=all(str(modality).upper() == "CT" for modality in modalities),
    )


def _case(path: Path) -> str | None:
    """The name of a file without its ending; `None` of a file that is no volume or hidden."""
    ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
    return None if ending is None or path.name.startswith(".") else path.name.removesuffix(ending)


def _rows(root: Path, part: str, split: str) -> datasets.Dataset:
    images, masks = root / f"images{part}", root / f"labels{part}"
    if not masks.is_dir():
        raise FileNotFoundError(f"{masks} is missing: the folder of the masks of {images}.")
    found = {_case(path): path for path in sorted(masks.iterdir())}
    found.pop(None, None)
    by_case: dict[str, list[Path]] = {}
    for path in sorted(images.iterdir()):
        case = _case(path)
        if case is None:
            continue
        # nnU-Net ends the name of an image in the number of its channel.
        stem, _, channel = case.rpartition("_")
        owner = stem if case not in found and stem and channel.isdigit() and len(channel) == 4 else case
        by_case.setdefault(owner, []).append(path)
    if not by_case:
        raise FileNotFoundError(
            f"{images} holds no NIfTI files ({' or '.join(ENDINGS)}). Convert the volumes to NIfTI."
        )
    for case, files in by_case.items():
        if case not in found:
            raise FileNotFoundError(f"{files[0]} has no mask: there is no {case}.nii.gz in {masks}. Add or remove one.")
    for case, mask in found.items():
        if case not in by_case:
            raise FileNotFoundError(f"{mask} has no image: there is no {case}.nii.gz in {images}. Add or remove one.")
    entry = datasets.Nifti(decode=False)
    features = datasets.Features({IMAGE: datasets.List(entry), LABEL: entry})
    rows = {
        IMAGE: [[str(path) for path in files] for files in by_case.values()],
        LABEL: [str(found[case]) for case in by_case],
    }
    # By which a share that is held out of it is told from a split of its own.
    return datasets.Dataset.from_dict(rows, features=features, split=datasets.NamedSplit(split))
