"""How volumes are prepared and in what patches they are seen, as their sizes and intensities suggest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...models.monai_networks import kernels_and_strides
from ...models.volume_processor import VolumeImageProcessor, open_nifti
from ..columns import LABEL
from .arguments import VolumeArguments
from .checks import channels_of, geometry_of

# Voxels of a patch: as many as nnU-Net and MONAI's examples give a GPU.
MOST_VOXELS = 96**3
# Of the training volumes' foreground, as in nnU-Net.
PERCENTILES = (0.5, 99.5)
SAMPLES_PER_VOLUME = 10_000


@dataclass(frozen=True)
class VolumePlan:
    """How volumes are prepared.

    Args:
        channels (`int`): Channels of the volumes.
        spacing (`tuple[float, ...]`): Size in mm of the voxels that the network sees.
        patch_size (`tuple[int, ...]`): Voxels that it sees at once.
        window (`tuple[float, float]`, *optional*): Intensities that count.
        mean (`float`, *optional*): What is subtracted; by default the mean of each volume.
        std (`float`, *optional*): By what it is divided; by default the deviation of each volume.
        given (`frozenset[str]`): Which of these the user chose, so that they go before those of a saved processor.
        network_args (`dict[str, Any]`): Arguments of the network that were given.
    """

    channels: int
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]
    window: tuple[float, float] | None
    mean: float | None
    std: float | None
    given: frozenset[str]
    network_args: dict[str, Any]

    def processor(self) -> VolumeImageProcessor:
        """What prepares volumes in this way."""
        return VolumeImageProcessor(self.spacing, self.patch_size, self.window, self.mean, self.std)


def make_plan(rows: Any, args: VolumeArguments, is_ct: bool) -> VolumePlan:
    """Looks at the training volumes and fills in what the arguments leave open.

    Args:
        rows (`datasets.Dataset`): To train on, with `image` and `label`.
        args ([`VolumeArguments`]): What was given.
        is_ct (`bool`): Whether the data set says that it is computed tomography.

    Returns:
        [`VolumePlan`]
    """
    sizes = [geometry_of(row) for row in rows]
    median = np.median([size.spacing for size in sizes], axis=0)
    spacing = tuple(args.spacing or (round(float(mm), 4) for mm in median))
    resampled = [np.array(size.shape) * size.spacing / spacing for size in sizes]
    patch = tuple(args.patch_size or patch_size_for(np.median(resampled, axis=0).tolist(), spacing))
    window, mean, std = args.window, None, None
    if window is not None:
        mean, std = sum(window) / 2, (window[1] - window[0]) / 2
    elif (args.normalization or ("ct" if is_ct else "zscore")) == "ct":
        window, mean, std = _foreground(rows)
    chosen = {"spacing": args.spacing, "patch_size": args.patch_size}
    given = {name for name, value in chosen.items() if value is not None}
    if args.window is not None or args.normalization is not None:
        given |= {"window", "mean", "std"}
    return VolumePlan(sizes[0].channels, spacing, patch, window, mean, std, frozenset(given), args.network_options)


def patch_size_for(size: Sequence[float], spacing: Sequence[float]) -> tuple[int, ...]:
    """The size of patches for volumes of a size: as large, but of 96³ voxels at most.

    Args:
        size (`Sequence[float]`): Voxels of the volumes along each axis.
        spacing (`Sequence[float]`): Size in mm of a voxel.

    Returns:
        `tuple[int, ...]`: such that a U-Net can halve each axis as often as it will.

    Example:

    ```python
    >>> from metalr_hf.data.volumes.plan import patch_size_for
    >>> patch_size_for([36, 50, 35], (1.0, 1.0, 1.0)), patch_size_for([512, 512, 40], (0.8, 0.8, 3.0))
    ((40, 56, 40), (160, 160, 40))

    ```
    """
    patch = [float(max(1, voxels)) for voxels in size]
    while math.prod(patch) > MOST_VOXELS:
        longest = int(np.argmax(patch))
        patch[longest] *= 0.9
    _, strides = kernels_and_strides([math.ceil(voxels) for voxels in patch], spacing)
    factors = np.prod(strides, axis=0)
    return tuple(int(math.ceil(voxels / factor) * factor) for voxels, factor in zip(patch, factors, strict=True))


def _foreground(rows: Any) -> tuple[tuple[float, float], float, float]:
    """Percentiles, mean and deviation of the intensities inside the masks."""
    random = np.random.default_rng(0)
    samples = []
    for row in rows:
        mask = np.asanyarray(open_nifti(row[LABEL]).dataobj) > 0
        for entry in channels_of(row):
            image = np.asanyarray(open_nifti(entry).dataobj)
            values = image[mask] if mask.any() else image.ravel()
            samples.append(random.choice(values.ravel(), min(SAMPLES_PER_VOLUME, values.size), replace=False))
    intensities = np.concatenate(samples).astype(np.float64)
    low, high = np.percentile(intensities, PERCENTILES)
    # A set of one intensity has no deviation.
    return (float(low), float(high)), float(intensities.mean()), float(intensities.std()) or 1.0
