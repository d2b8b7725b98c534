"""Losses of several labels or numbers an image, for the Trainer's `compute_loss_func`.

Each is a sum over the labels that are known, divided by the number of them in the whole accumulated batch, so that
accumulated batches and one large batch have the same gradient. Each also says what a constant answer would cost, by
which [`~metalr_hf.trainer.collapse.CollapseGuard`] knows a run that has collapsed to one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional

from .losses import first_logits


class TargetLoss(ABC):
    """A loss that can be accumulated and that knows what a constant answer costs.

    Attributes:
        description (`str`): What the card says of it.
    """

    description: str

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of every label, zero where it is unknown.

        Args:
            logits (`torch.Tensor` of shape `(batch, labels)`): Of the model, float32.
            labels (`torch.Tensor` of shape `(batch, labels)`): What is known.

        Returns:
            `torch.Tensor` of the shape of the labels
        """

    @abstractmethod
    def reads(self, labels: Any) -> TypeGuard[Tensor]:
        """Whether labels are of the kind that the loss is for.

        Args:
            labels (`Any`): The labels of a batch.
        """

    @abstractmethod
    def constant_loss(self, labels: Tensor) -> Tensor:
        """The loss of the best constant answer to some labels.

        Args:
            labels (`torch.Tensor` of shape `(rows, labels)`): The labels of some steps.

        Returns:
            `torch.Tensor` of shape `()`
        """

    @abstractmethod
    def answers(self, logits: Tensor) -> Tensor:
        """Logits on the scale on which answers to different images are compared.

        Args:
            logits (`torch.Tensor` of shape `(batch, labels)`): Of the model.

        Returns:
            `torch.Tensor`, its first dimension that of the images
        """

    def known(self, labels: Tensor) -> Tensor:
        """Which labels count: all but -100, as Trainer counts them.

        Args:
            labels (`torch.Tensor`): The labels of a batch.
        """
        return labels.ne(-100)

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of a batch, or its part of the loss of an accumulated one.

        Args:
            outputs (`Any`): What the model returned.
            labels (`torch.Tensor`): What is known.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): Known labels of the whole accumulated batch.

        Returns:
            `torch.Tensor` of shape `()`: 0 if nothing is known.
        """
        total = self.losses(first_logits(outputs).float(), labels).sum()
        count = self.known(labels).sum() if num_items_in_batch is None else num_items_in_batch
        return total / torch.as_tensor(count, device=total.device).clamp(min=1)


class ClassLoss(TargetLoss):
    """Cross-entropy in which the images of a class count by its weight.

    It is divided by the number of images and not by the sum of their weights: with weights whose mean over the training
    set is 1, as [`~metalr_hf.data.labels.imbalance.class_weights`] gives them, the two are the same on average, and
    only the first can be accumulated.

    Args:
        weights (`Sequence[float]`, *optional*): A weight for each class; all count alike by default.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.target_losses import ClassLoss
    >>> loss = ClassLoss([0.5, 2.0])
    >>> round(loss(torch.zeros(2, 2), torch.tensor([0, 1])).item(), 4)  # log 2 times the mean of 0.5 and 2
    0.8664

    ```
    """

    def __init__(self, weights: Sequence[float] | None = None):
        self.weights = None if weights is None else torch.tensor(list(weights), dtype=torch.float32)
        self.description = "cross-entropy" if weights is None else f"cross-entropy, classes weighted {_shown(weights)}"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, labels, reduction="none")
        return loss if self.weights is None else loss * self.weights.to(logits.device)[labels.clamp(min=0)]

    def reads(self, labels: Any) -> TypeGuard[Tensor]:
        return isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()

    def constant_loss(self, labels: Tensor) -> Tensor:
        # Negative labels mark images without a class.
        counts = labels[labels >= 0].bincount(minlength=0 if self.weights is None else len(self.weights)).float()
        weighted = counts if self.weights is None else self.weights.to(labels.device) * counts
        return -torch.special.xlogy(weighted, weighted / weighted.sum()).sum() / counts.sum()

    def answers(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)


class LabelSetLoss(TargetLoss):
    """Binary cross-entropy of every label that is known.

    Args:
        pos_weight (`Sequence[float]`, *optional*): Weight of the images that have a label, one for each label.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.target_losses import LabelSetLoss
    >>> loss = LabelSetLoss()
    >>> labels = torch.tensor([[1.0, -100.0], [0.0, 1.0]])  # the second label of the first image is unknown
    >>> round(loss(torch.zeros(2, 2), labels).item(), 4)
    0.6931
    >>> parts = [loss(torch.zeros(1, 2), part, num_items_in_batch=3) for part in labels.split(1)]
    >>> round(sum(parts).item(), 4)
    0.6931

    ```
    """

    def __init__(self, pos_weight: Sequence[float] | None = None):
        self.pos_weight = None if pos_weight is None else torch.tensor(list(pos_weight), dtype=torch.float32)
        weighted = "" if pos_weight is None else f", images that have a label weighted {_shown(pos_weight)}"
        self.description = f"binary cross-entropy of every label that is known{weighted}"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        known = self.known(labels)
        weight = None if self.pos_weight is None else self.pos_weight.to(logits.device)
        truth = labels.where(known, 0).to(logits.dtype)
        loss = functional.binary_cross_entropy_with_logits(logits, truth, pos_weight=weight, reduction="none")
        return loss * known

    def reads(self, labels: Any) -> TypeGuard[Tensor]:
        return isinstance(labels, Tensor) and labels.dim() == 2 and labels.is_floating_point()

    def constant_loss(self, labels: Tensor) -> Tensor:
        known = self.known(labels)
        count = known.sum(0).clamp(min=1)
        positive = (labels == 1).sum(0) / count
        weight = 1.0 if self.pos_weight is None else self.pos_weight.to(labels.device)
        answer = weight * positive / (weight * positive + 1 - positive)
        loss = -weight * torch.special.xlogy(positive, answer) - torch.special.xlogy(1 - positive, 1 - answer)
        return (loss * count).sum() / count.sum()

    def answers(self, logits: Tensor) -> Tensor:
        return torch.cat([functional.logsigmoid(logits), functional.logsigmoid(-logits)], -1)


class QuantityLoss(TargetLoss):
    """Mean squared error of answers in units, over the variance of the training set.

    Args:
        scale (`Sequence[float]`): Standard deviation of every number in the training set, in its units.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.models.target_losses import QuantityLoss
    >>> QuantityLoss(scale=[10.0])(torch.tensor([[45.0]]), torch.tensor([[50.0]])).item()
    0.25

    ```
    """

    def __init__(self, scale: Sequence[float]):
        self.scale = torch.tensor(list(scale), dtype=torch.float32)
        self.description = "mean squared error over the variance of the training set"

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ((logits - labels) / self.scale.to(logits.device)).square()

    def reads(self, labels: Any) -> TypeGuard[Tensor]:
        return isinstance(labels, Tensor) and labels.dim() == 2 and labels.is_floating_point()

    def constant_loss(self, labels: Tensor) -> Tensor:
        return (labels / self.scale.to(labels.device)).var(0, correction=0).mean()

    def answers(self, logits: Tensor) -> Tensor:
        return logits / self.scale.to(logits.device)


def _shown(weights: Sequence[float]) -> str:
    shown = ", ".join(f"{weight:.3g}" for weight in list(weights)[:10])
    return f"{shown}, ..." if len(weights) > 10 else shown
