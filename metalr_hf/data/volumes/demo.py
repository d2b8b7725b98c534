"""Generated volumes to try the package with: a body with an organ, and a lesion in it."""

from __future__ import annotations

import datasets
import numpy as np

from ...models.volume_processor import nifti_bytes
from ..columns import IMAGE, LABEL

CLASS_NAMES = ("background", "organ", "lesion")
SHAPE = (32, 32, 16)
# Slices are further apart than the pixels in them, as in most scans.
SPACING = (1.0, 1.0, 2.0)
TRAIN_COUNT, TEST_COUNT = 24, 8


def demo_volumes() -> dict[str, datasets.Dataset]:
    """Generates volumes and their masks, the same at each call.

    Returns:
        `dict[str, datasets.Dataset]`: `train` and `test`, with the columns `image` and `label` (`datasets.Nifti`).

    Example:

    ```python
    >>> from metalr_hf.data.volumes.demo import demo_volumes
    >>> demo_volumes()["train"][0]["image"].shape
    (32, 32, 16)

    ```
    """
    counts = {"train": TRAIN_COUNT, "test": TEST_COUNT}
    return {split: _rows(count, seed) for seed, (split, count) in enumerate(counts.items())}


def _rows(count: int, seed: int) -> datasets.Dataset:
    random = np.random.default_rng(seed)
    affine = np.diag([*SPACING, 1.0])
    rows: dict[str, list[dict[str, bytes | None]]] = {IMAGE: [], LABEL: []}
    for _ in range(count):
        image, mask = _volume(random)
        for column, voxels in ((IMAGE, image), (LABEL, mask)):
            rows[column].append({"path": None, "bytes": nifti_bytes(voxels, affine)})
    features = datasets.Features({IMAGE: datasets.Nifti(), LABEL: datasets.Nifti()})
    return datasets.Dataset.from_dict(rows, features=features)


def _volume(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One volume in units like those of CT, and its mask."""
    size = np.array(SHAPE)
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    centre = size * random.uniform(0.4, 0.6, 3)
    radii = size * random.uniform(0.2, 0.32, 3)
    organ = (((grid - centre) / radii) ** 2).sum(-1) < 1
    inside = centre + radii * random.uniform(-0.4, 0.4, 3)
    lesion = organ & ((((grid - inside) * SPACING) ** 2).sum(-1) < random.uniform(2.5, 5.0) ** 2)
    mask = (organ.astype(np.uint8) + lesion).astype(np.uint8)
    image = np.array([-20.0, 60.0, 110.0])[mask] + random.normal(0, 25, SHAPE)
    return image.astype(np.int16), mask
