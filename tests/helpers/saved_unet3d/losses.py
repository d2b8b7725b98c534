"""The loss of segmentation networks: cross-entropy plus Dice, in two or three dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# As `semantic_loss_ignore_index` of transformers' models.
IGNORE_INDEX = 255


def segmentation_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross-entropy plus Dice loss, the usual sum in medical imaging (nnU-Net: Isensee et al. 2021).

    It is a `compute_loss_func` for every model with `logits`, such as SegFormer, whose own loss is cross-entropy alone.
    Logits of another size than the masks are resized first, as transformers' models do.

    Args:
        outputs (`torch.Tensor`, or an output of a model that has or begins with one):
            Logits of shape `(batch, classes, height, width)` or `(batch, classes, depth, height, width)`.
        labels (`torch.Tensor` of shape `(batch, height, width)` or `(batch, depth, height, width)`, int64):
            Class ids.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            Pixels of the whole accumulated batch, as `Trainer` counts them. The loss is then this batch's part of it.
        ignore_index (`int`, *optional*, defaults to 255):
            Class id of pixels that do not count; negative ids never do.

    Returns:
        `torch.Tensor` of shape `()`: 0 if no pixel counts.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.losses import segmentation_loss
    >>> labels = torch.tensor([[[0, 1], [1, 255]]])
    >>> right = torch.nn.functional.one_hot(labels.clamp(max=1), 2).movedim(-1, 1) * 20.0
    >>> round(segmentation_loss(right, labels).item(), 4)
    0.0
    >>> round(segmentation_loss(torch.zeros(1, 2, 2, 2), labels).item(), 4)  # log 2, and a Dice of 0.4 and 0.5714
    1.2074

    ```
    """
    logits = resize_logits(first_logits(outputs), labels.shape[1:]).float()
    kept = (labels != ignore_index) & (labels >= 0)
    truth = labels.where(kept, 0)
    log_probabilities = logits.log_softmax(1)
    true_log_probabilities = log_probabilities.gather(1, truth[:, None])[:, 0]
    cross_entropy = -(true_log_probabilities * kept).sum() / kept.sum().clamp(min=1)
    loss = cross_entropy + dice_loss(log_probabilities.exp(), truth, kept)
    # Trainer counts the labels of a step that are not -100.
    return loss if num_items_in_batch is None else loss * labels.ne(-100).sum() / num_items_in_batch


def dice_loss(probabilities: Tensor, truth: Tensor, kept: Tensor) -> Tensor:
    """One minus the soft Dice coefficient, mean over the classes that occur in the batch (Milletari et al. 2016).

    Pixels of the whole batch are counted together, as in nnU-Net: small structures are not in every image. The batch is
    that of one process and one forward.

    Args:
        probabilities (`torch.Tensor` of shape `(batch, classes, ...)`): Probabilities of the classes.
        truth (`torch.Tensor` of shape `(batch, ...)`, int64): Class ids.
        kept (`torch.Tensor` of shape `(batch, ...)`, bool): Pixels that count.

    Returns:
        `torch.Tensor` of shape `()`

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.losses import dice_loss
    >>> truth = torch.tensor([[0, 1, 1, 1]])
    >>> right = torch.nn.functional.one_hot(truth, 2).movedim(-1, 1).float()
    >>> dice_loss(right, truth, kept=truth >= 0).item(), dice_loss(1 - right, truth, kept=truth >= 0).item()
    (0.0, 1.0)

    ```
    """
    weight = kept[:, None].to(probabilities.dtype)
    # Scattered to distinct places, which is deterministic on every device.
    one_hot = torch.zeros_like(probabilities).scatter_(1, truth[:, None], weight)
    pixels = [axis for axis in range(probabilities.dim()) if axis != 1]
    overlap = (probabilities * one_hot).sum(pixels)
    true_size = one_hot.sum(pixels)
    dice = 2 * overlap / ((probabilities * weight).sum(pixels) + true_size).clamp(min=1e-8)
    occurs = true_size > 0
    return ((1 - dice) * occurs).sum() / occurs.sum().clamp(min=1)


def resize_logits(logits: Tensor, size: torch.Size) -> Tensor:
    """Brings logits to the size of the masks, (bi- or tri-)linearly.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes, ...)`): With two or three spatial dimensions.
        size (`torch.Size`): The spatial size of the masks.

    Returns:
        `torch.Tensor` of shape `(batch, classes, *size)`

    Raises:
        ValueError: if the masks have another number of dimensions.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.losses import resize_logits
    >>> resize_logits(torch.zeros(2, 3, 8, 8), torch.Size([32, 32])).shape
    torch.Size([2, 3, 32, 32])

    ```
    """
    if logits.dim() != len(size) + 2:
        raise ValueError(
            f"The model's logits have the shape {tuple(logits.shape)} and the masks {tuple(size)} each: logits must be "
            "(batch, classes, height, width), with a depth before the height for volumes, and masks hold a class id a "
            "pixel."
        )
    if logits.shape[2:] == size:
        return logits
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return functional.interpolate(logits, size=size, mode=mode, align_corners=False)


def first_logits(outputs: Any) -> Tensor:
    """The logits in what a model returns: its `logits`, the first of a tuple, or the tensor itself.

    Args:
        outputs (`Any`): What a model returned, or the predictions that a Trainer made of it.

    Returns:
        `torch.Tensor` or `numpy.ndarray`: the logits as they came.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.losses import first_logits
    >>> logits = torch.zeros(2, 3)
    >>> all(first_logits(outputs) is logits for outputs in (logits, (logits, "hidden states"), {"logits": logits}))
    True

    ```
    """
    if isinstance(outputs, Mapping):
        return outputs["logits"]
    return outputs[0] if isinstance(outputs, (tuple, list)) else outputs
