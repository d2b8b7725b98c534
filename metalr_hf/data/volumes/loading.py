"""Volumes with masks: from a folder, a data set or the demo to checked training, meta and test sets."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np

from ..columns import IMAGE, LABEL, find_column, is_text
from ..loading import load_splits
from ..masks.loading import MASK_NAME, MaskSplits, named_classes, named_columns
from ..splits import divide
from .arguments import VolumeArguments
from .checks import check_volumes
from .demo import CLASS_NAMES, demo_volumes
from .folders import FolderFacts, is_volume_folder, read_volume_folder, refuse_missing_file
from .plan import VolumePlan, make_plan

PACKAGES = ("monai", "nibabel")
EXPECTED = (
    "Volumes are columns of NIfTI (datasets.Nifti), or a folder in nnU-Net's layout: dataset.json, imagesTr and "
    "labelsTr."
)


@dataclass(frozen=True)
class VolumeSplits(MaskSplits):
    """Volumes and masks in splits, with the columns `image` and `label`, which are not yet decoded.

    Args:
        plan ([`VolumePlan`]): How they are prepared.
    """

    plan: VolumePlan


def load_volumes(args: VolumeArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> VolumeSplits:
    """Loads a data set of volumes with masks, looks at every one, and plans how they are prepared.

    Args:
        args ([`VolumeArguments`]): Which data set, columns and splits.
        seed (`int`, *optional*, defaults to 42): Of the held-out share and of the subset.
        keep_columns (`Sequence[str]`, *optional*): Other columns to keep.

    Returns:
        [`VolumeSplits`]

    Raises:
        ImportError: if MONAI or nibabel is not installed.
        FileNotFoundError: if there is no such data set, or an image has no mask.
        ValueError: if a volume and its mask do not fit, or a value of a mask is no class; it names the file.

    Example:

    ```python
    >>> from metalr_hf.data.volumes import VolumeArguments, load_volumes
    >>> splits = load_volumes(VolumeArguments())
    >>> splits.class_names, splits.plan.patch_size
    (('background', 'organ', 'lesion'), (32, 32, 16))

    ```
    """
    if missing := [package for package in PACKAGES if importlib.util.find_spec(package) is None]:
        raise ImportError(f'Volumes need {" and ".join(missing)}: pip install "metalr-hf[medical]"')
    facts = FolderFacts(list(CLASS_NAMES) if args.is_demo else None, None, False)
    read = None
    refuse_missing_file(args.folder)
    if is_volume_folder(args.folder):
        found, facts = read_volume_folder(str(args.folder))
        read = lambda *given: found  # noqa: E731
    if args.class_names is None and facts.class_names is not None:
        args = replace(args, class_names=facts.class_names)
    if args.ignore_index is None and facts.ignore_index is not None:
        args = replace(args, ignore_index=facts.ignore_index)
    splits, names = load_splits(args, demo_volumes, read)
    kept = args.kept_columns(keep_columns)
    chosen = {name: _choose_columns(splits[name], args, kept) for name in names.used}
    values = {name: check_volumes(name, rows) for name, rows in chosen.items()}
    classes = named_classes(args, values[names.train], values[names.train])
    for seen in values.values():
        for value, where in seen.items():
            try:
                classes.ids(np.array([value]))
            except ValueError as error:
                raise ValueError(f"{where}: {error}. Mend the mask, or name its class.") from error
    divided = divide(chosen, names, args, seed)
    plan = make_plan(divided["train"], args, facts.is_ct)
    return VolumeSplits(class_names=classes.names, classes=classes, plan=plan, **divided)


def _described(feature: Any) -> str:
    if isinstance(feature, datasets.Image):
        return "images"
    return "text" if is_text(feature) else str(getattr(feature, "dtype", type(feature).__name__))


def _choose_columns(rows: Any, args: VolumeArguments, keep_columns: Sequence[str]) -> Any:
    def is_nifti(feature: Any) -> bool:
        return isinstance(getattr(feature, "feature", feature), datasets.Nifti)

    features = rows.features
    given = (args.image_column_name, args.mask_column_name)
    there = [name for name, feature in features.items() if is_nifti(feature) and name not in given]
    masks = [name for name in there if MASK_NAME.fullmatch(name)]
    others = [name for name in there if name not in masks]
    if not any(map(is_nifti, features.values())):
        kinds = ", ".join(f"{name!r} holds {_described(feature)}" for name, feature in features.items())
        raise ValueError(
            f"The data set has no column of volumes: {kinds}. {EXPECTED} The files that a metadata.csv names are read "
            "as images: bring them into that layout."
        )
    image = find_column(features, "image", args.image_column_name, others, EXPECTED)
    mask = find_column(features, "mask", args.mask_column_name, masks, EXPECTED)
    for name in (image, mask):
        if not is_nifti(features[name]):
            raise ValueError(f"The column {name!r} holds no NIfTI files, but {features[name]}. {EXPECTED}")
    rows = named_columns(rows, image, mask, [name for name in keep_columns if name in features])
    entry = datasets.Nifti(decode=False)
    wanted = {IMAGE: entry if isinstance(rows.features[IMAGE], datasets.Nifti) else datasets.List(entry), LABEL: entry}
    for name, feature in wanted.items():
        if rows.features[name] != feature:
            rows = rows.cast_column(name, feature)
    return rows
