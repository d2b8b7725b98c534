"""Volumes and masks to model inputs: random patches to train on, whole volumes to test on."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...messages import first_line
from ...models.losses import IGNORE_INDEX
from ...models.volume_processor import VolumeImageProcessor
from ...settings import check_choice
from ..columns import IMAGE, LABEL, place
from ..loading import AUGMENTATIONS
from ..masks import MaskClasses
from .checks import channels_of

PIXELS, MASKS, SPACING = "pixel_values", "labels", "spacing"
# Of MONAI: where in a mask each class is.
PLACES = "_places"
PLACES_PER_CLASS = 10_000


class VolumeTransform:
    """Rows of volumes and masks to model inputs.

    What chance has no part in is done once a volume and kept in a temporary folder (`monai.data.PersistentDataset`).

    Args:
        processor ([`~metalr_hf.models.volume_processor.VolumeImageProcessor`]): The model's processor.
        classes ([`~metalr_hf.data.masks.MaskClasses`]): What the values of the masks mean.
        augment (`str`, *optional*):
            By default the whole volume and its mask at its own voxel size, to test on. Otherwise a random patch around
            a voxel of the background in half of the cases, else of a class drawn at random; with `flip` or `crop_flip`
            mirrored along each axis in half of the cases. Patches are crops already: `crop` adds nothing.

    Example:

    ```python
    >>> from metalr_hf.data.volumes import VolumeArguments, VolumeTransform, load_volumes
    >>> splits = load_volumes(VolumeArguments(patch_size=[16, 16, 16]))
    >>> transform = VolumeTransform(splits.plan.processor(), splits.classes, "flip")
    >>> transform(splits.train[:2])["pixel_values"][0].shape
    torch.Size([1, 16, 16, 16])

    ```
    """

    def __init__(self, processor: VolumeImageProcessor, classes: MaskClasses, augment: str | None = None):
        from monai.transforms import ClassesToIndicesd, Compose, Lambda, RandCropByLabelClassesd, RandFlipd, SpatialPadd

        self.training = augment is not None
        # Of what is no transform of its own MONAI keeps nothing.
        steps: list[Any] = [Lambda(_Prepared(processor, classes, resample_masks=self.training))]
        if augment is not None:
            check_choice("augment", augment, AUGMENTATIONS)
            count, patch, both = len(classes.names), processor.patch_size, [PIXELS, MASKS]
            steps += [
                ClassesToIndicesd(MASKS, PLACES, count, max_samples_per_class=PLACES_PER_CLASS),
                RandCropByLabelClassesd(
                    both,
                    label_key=MASKS,
                    spatial_size=patch,
                    ratios=[count - 1, *[1] * (count - 1)],
                    num_classes=count,
                    indices_key=f"{MASKS}{PLACES}",
                    allow_smaller=True,
                    warn=False,
                ),
                SpatialPadd(PIXELS, patch),
                # What lies outside the volume does not count.
                SpatialPadd(MASKS, patch, value=IGNORE_INDEX),
            ]
            if "flip" in augment:
                steps += [RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)]
        self.steps = Compose(steps)
        self.folder = tempfile.mkdtemp(prefix="metalr_hf_volumes_")
        atexit.register(shutil.rmtree, self.folder, ignore_errors=True)

    def __call__(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Transforms a batch of rows.

        Args:
            rows (`Mapping[str, Sequence]`): `image` and `label`, as [`load_volumes`] gives them.

        Returns:
            `dict[str, list]`: `pixel_values` (float32, `(channels, x, y, z)`), `labels` (int64, `(x, y, z)`, 255 where
                a voxel does not count), and, to test on, `spacing` in mm of the masks.

        Raises:
            ValueError: if a volume cannot be prepared; it names the file.
        """
        prepared = [self._one({IMAGE: i, LABEL: m}) for i, m in zip(rows[IMAGE], rows[LABEL], strict=True)]
        columns = {
            PIXELS: [torch.as_tensor(one[PIXELS]).float() for one in prepared],
            MASKS: [torch.as_tensor(one[MASKS])[0].long() for one in prepared],
        }
        return columns if self.training else columns | {SPACING: [one[SPACING] for one in prepared]}

    def _one(self, row: dict[str, Any]) -> Mapping[str, Any]:
        from monai.data import PersistentDataset

        # Drawn from torch's numbers, which Trainer seeds, and brings back when a run is resumed.
        self.steps.set_random_state(seed=int(torch.randint(2**31, ())))
        try:
            found = PersistentDataset([row], self.steps, self.folder)[0]
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            where = place("A volume", channels_of(row)[0])
            raise ValueError(f"{where} cannot be prepared: {first_line(error.__cause__ or error)}.") from error
        return found[0] if isinstance(found, list) else found


class _Prepared:
    """The steps in which chance has no part."""

    def __init__(self, processor: VolumeImageProcessor, classes: MaskClasses, resample_masks: bool):
        self.processor, self.classes, self.resample_masks = processor, classes, resample_masks

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        volume, mask = self.processor.read(row[IMAGE]), self.processor.read(row[LABEL])
        spacing = mask.pixdim.float()
        if self.resample_masks:
            mask = self.processor.resample(mask, "nearest-exact")
        ids = torch.from_numpy(self.classes.ids(mask.as_tensor().numpy()))
        return {PIXELS: self.processor.prepare(volume), MASKS: ids, SPACING: spacing}


def collate_volumes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks prepared rows to a batch: the data collator of a network for volumes.

    Args:
        rows (`Sequence[Mapping[str, Any]]`): What [`VolumeTransform`] gave, of one size.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values`, `labels` and, where it is there, `spacing`.

    Raises:
        ValueError: if volumes to test on are of several sizes.
    """
    names = [name for name in (PIXELS, MASKS, SPACING) if name in rows[0]]
    if len({(row[PIXELS].shape, row[MASKS].shape) for row in rows}) > 1:
        raise ValueError("Volumes of several sizes are no batch: set per_device_eval_batch_size=1.")
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in names}
