"""Generated micrographs of cells with their membranes as masks: the default data of segmentation."""

from __future__ import annotations

import datasets
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

CLASS_NAMES = ("inside", "membrane")
IMAGE_SIZE = 96
ROWS = {"train": 96, "test": 32}


def demo_cells(size: int = IMAGE_SIZE, seed: int = 0, rows: dict[str, int] | None = None) -> datasets.DatasetDict:
    """Images like electron micrographs of tissue, with the membranes between the cells as masks.

    Cells are the regions nearest to random points, a membrane is where two are almost equally near. Organelles as dark
    as membranes, uneven staining, blur and noise make it a task to tell them apart.

    Args:
        size (`int`, *optional*, defaults to 96): Height and width in pixels.
        seed (`int`, *optional*, defaults to 0): Of the generator.
        rows (`dict[str, int]`, *optional*): Images a split; 96 in `train` and 32 in `test` by default.

    Returns:
        `datasets.DatasetDict`: with `image` (grey) and `mask` (0 inside a cell, 1 on a membrane).

    Example:

    ```python
    >>> from metalr_hf.data.cells import demo_cells
    >>> demo_cells(size=32, rows={"train": 2, "test": 1}).num_rows
    {'train': 2, 'test': 1}

    ```
    """
    generator = np.random.default_rng(seed)
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    splits = {}
    for name, count in (ROWS if rows is None else rows).items():
        pairs = [_micrograph(size, generator) for _ in range(count)]
        columns = {key: [Image.fromarray(pair[i]) for pair in pairs] for i, key in enumerate(("image", "mask"))}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return datasets.DatasetDict(splits)


def _micrograph(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, both uint8 `(size, size)`."""
    margin = size // 4
    spacing = generator.uniform(0.16, 0.26) * size
    # On a jittered grid: cells are of about one size.
    grid = np.mgrid[-margin : size + margin : spacing, -margin : size + margin : spacing].reshape(2, -1).T
    cells = grid + generator.uniform(-0.5, 0.5, grid.shape) * spacing
    rows, columns = np.mgrid[:size, :size].astype(float)
    # Membranes are bent.
    bend, width = size * 0.03, size / 10
    rows += bend * _smooth_noise(size, width, generator)
    columns += bend * _smooth_noise(size, width, generator)
    distances, nearest = cKDTree(cells).query(np.stack([rows, columns], axis=-1), k=2)
    mask = distances[..., 1] - distances[..., 0] < generator.uniform(0.02, 0.03) * size
    brightness = generator.normal(0.65, 0.05, len(cells))[nearest[..., 0]]
    brightness += 0.06 * _smooth_noise(size, 1.5, generator)
    organelles = generator.uniform(0, size, (generator.integers(10, 20), 2))
    near, which = cKDTree(organelles).query(np.stack([rows, columns], axis=-1))
    radius = generator.uniform(0.02, 0.05, len(organelles))[which] * size
    brightness[(near < radius) & ~mask] -= generator.uniform(0.2, 0.35)
    brightness[mask] = generator.normal(0.3, 0.03)
    brightness = gaussian_filter(brightness, generator.uniform(0.6, 1.1))
    brightness += 0.08 * _smooth_noise(size, size / 4, generator) + generator.normal(0, 0.06, (size, size))
    return (np.clip(brightness, 0, 1) * 255).astype(np.uint8), mask.astype(np.uint8)


def _smooth_noise(size: int, width: float, generator: np.random.Generator) -> np.ndarray:
    noise = gaussian_filter(generator.normal(size=(size, size)), width, mode="wrap")
    return noise / noise.std()
