"""Overlap and distance of predicted and true masks of volumes, measured a volume at its own voxel size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ...models.losses import IGNORE_INDEX, first_logits, resize_logits

PERCENTILE = 95
# What is measured of each volume and class.
FIGURES = ("dice", "hausdorff95")


def measure_volumes(logits: Any, labels: tuple[Tensor, Tensor]) -> Tensor:
    """Dice and Hausdorff distance of every volume and class: a `preprocess_logits_for_metrics`.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes, x, y, z)`, or an output that begins with it):
            Brought to the size of the masks before the classes are compared.
        labels (`tuple[torch.Tensor, torch.Tensor]`): True masks, and the size in mm of their voxels.

    Returns:
        `torch.Tensor` of shape `(batch, classes - 1, 2)`: the Dice coefficient and the 95 % Hausdorff distance in mm of
            each class but the first, the background; NaN if a class is in neither mask. If it is in one of the two, the
            distance is the diagonal of the volume: nothing is further.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tasks.metrics import measure_volumes
    >>> truth = torch.zeros(1, 8, 8, 8, dtype=torch.int64)
    >>> truth[:, 2:6, 2:6, 2:6] = 1
    >>> logits = torch.nn.functional.one_hot(truth.roll(1, 1), 2).movedim(-1, 1).float()
    >>> measure_volumes(logits, (truth, torch.tensor([[3.0, 1.0, 1.0]])))
    tensor([[[0.7500, 3.0000]]])

    ```
    """
    masks, spacing = labels
    guesses = resize_logits(first_logits(logits), masks.shape[1:]).argmax(1)
    classes = first_logits(logits).shape[1]
    rows = []
    for guess, mask, mm in zip(guesses, masks, spacing, strict=True):
        counts = mask != IGNORE_INDEX
        rows.append([_figures((guess == i) & counts, mask == i, mm) for i in range(1, classes)])
    return torch.tensor(rows, device=masks.device)


# Volumes are of several sizes, of which MetaLRTrainer's processes exchange the figures alone.
measure_volumes.measures = True  # type: ignore[attr-defined]


def _figures(guess: Tensor, truth: Tensor, spacing: Tensor) -> list[float]:
    from monai.metrics import compute_dice, compute_hausdorff_distance

    there = bool(guess.any()), bool(truth.any())
    if not any(there):
        return [float("nan"), float("nan")]
    one, other = guess[None, None].float(), truth[None, None].float()
    # MONAI's measure has no value for a mask that is empty on one side.
    dice = float(compute_dice(one, other, ignore_empty=False)) if all(there) else 0.0
    if not all(there):
        return [dice, float((torch.tensor(truth.shape) * spacing.cpu()).norm())]
    with warnings.catch_warnings():
        # MONAI warns of an argument that it gives to itself.
        warnings.simplefilter("ignore", FutureWarning)
        distance = compute_hausdorff_distance(
            one, other, include_background=True, percentile=PERCENTILE, spacing=spacing.tolist()
        )
    return [dice, float(distance)]


def build_volume_metrics(class_names: Sequence[str]) -> Callable[..., dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for volumes; it needs `args.batch_eval_metrics=True`.

    Args:
        class_names (`Sequence[str]`): Name of class 0, the background, 1, ...

    Returns:
        `Callable[[EvalPrediction, bool], dict[str, float]]`: takes what [`measure_volumes`] gave, and gives `dice` and
            `hausdorff95`, means over the classes but the background, and those of every class, means over the volumes
            in which it is.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from metalr_hf.tasks.metrics import build_volume_metrics
    >>> compute_metrics = build_volume_metrics(["background", "liver"])
    >>> compute_metrics(EvalPrediction(np.array([[[0.9, 2.0]], [[0.7, 4.0]]]), None), compute_result=True)
    {'dice': 0.8, 'hausdorff95': 3.0, 'dice_liver': 0.8, 'hausdorff95_liver': 3.0}

    ```
    """
    measured: list[np.ndarray] = []

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        found: Any = prediction.predictions
        measured.append(np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found, dtype=np.float64))
        if not compute_result:
            return {}
        volumes = np.ma.masked_invalid(np.concatenate(measured))
        measured.clear()
        by_class = volumes.mean(0)
        values = dict(zip(FIGURES, _numbers(by_class.mean(0)), strict=True))
        for name, figures in zip(class_names[1:], by_class, strict=True):
            values |= {f"{figure}_{name}": v for figure, v in zip(FIGURES, _numbers(figures), strict=True)}
        return values

    return compute_metrics


def _numbers(values: Any) -> list[float]:
    """Of a class that no volume has there is no figure."""
    return [round(float(value), 12) for value in np.ma.filled(values.astype(np.float64), np.nan)]
