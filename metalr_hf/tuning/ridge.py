"""A linear classification head in closed form: ridge regression on what a backbone makes of some images."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Penalties as shares of the largest squared singular value of the features, and factors of the answers.
PENALTIES = torch.logspace(-6, 1, 22, dtype=torch.float64)
SCALES = torch.logspace(0, 2, 25, dtype=torch.float64)
# The standard deviation of the logits over the images, at most. The head is right as often at any scale, but one that
# is sure of itself leaves little loss, and so little for the backbone to learn from.
LOGIT_STD = 0.1


@dataclass(frozen=True)
class FittedHead:
    """A linear head and what it is worth.

    Args:
        weight (`torch.Tensor` of shape `(classes, features)`, float32): Its weight.
        bias (`torch.Tensor` of shape `(classes,)`, float32): Its bias.
        loss (`float`): The mean cross-entropy of every image by the head that all others give, at the best scale, times
            the weight of its class.
    """

    weight: Tensor
    bias: Tensor
    loss: float


@torch.no_grad()
def fit_head(features: Tensor, labels: Tensor, classes: int, weights: Tensor | None = None) -> FittedHead:
    """Fits a linear head to the features of some images, without a step and without a setting.

    Ridge regression from the features to one number a class, 1 for the image's own and 0 for the others. The penalty
    and the scale of the answers are those with the lowest cross-entropy of images that are left out one by one, which
    ridge regression gives in closed form (Hastie, Tibshirani and Friedman, *The Elements of Statistical Learning*,
    equation 7.64). The head then gets a small scale, with which it points the right way and all is still to be learned.

    Args:
        features (`torch.Tensor` of shape `(images, features)`): What the head is given.
        labels (`torch.Tensor` of shape `(images,)`, int64): Their classes.
        classes (`int`): How many classes there are; some may have no image.
        weights (`torch.Tensor` of shape `(classes,)`, *optional*): By how much the images of a class count.

    Returns:
        [`FittedHead`]: on the CPU. Its loss is infinite if the features are not finite, all images are of one class, or
        there are more classes than images.

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tuning import fit_head
    >>> _ = torch.manual_seed(0)
    >>> labels = torch.arange(60) % 3
    >>> features = torch.nn.functional.one_hot(labels, 8) + 0.3 * torch.randn(60, 8)
    >>> head = fit_head(features, labels, classes=3)
    >>> answers = torch.nn.functional.linear(features, head.weight, head.bias).argmax(1)
    >>> (answers == labels).float().mean().item() > 0.9, head.loss < 0.5
    (True, True)

    ```
    """
    # An accelerator may have no float64, and the matrix is small.
    x, labels = features.detach().to("cpu", torch.float64), labels.detach().cpu().long()
    if classes > len(x) or len(labels.unique()) < 2 or not bool(x.isfinite().all()):
        return FittedHead(torch.zeros(classes, x.shape[1]), torch.zeros(classes), math.inf)
    targets = functional.one_hot(labels, classes).double()
    counts = torch.ones(len(x), dtype=torch.float64) if weights is None else weights.detach().cpu().double()[labels]
    share = counts / counts.sum()
    center, rates = share @ x, share @ targets
    root = counts.sqrt()[:, None]
    u, sizes, v = torch.linalg.svd(root * (x - center), full_matrices=False)
    explained = u.T @ (root * (targets - rates))
    squares = sizes.square()
    best = (math.inf, 0.0, 1.0)
    for penalty in (PENALTIES * squares[0].clamp(min=torch.finfo(torch.float64).tiny)).tolist():
        kept = squares / (squares + penalty)
        residuals = targets - rates - u @ (kept[:, None] * explained) / root
        leverage = u.square() @ kept + share
        left_out = targets - residuals / (1 - leverage).clamp(min=1e-6)[:, None]
        scale, mean = _best_scale(left_out, labels, counts)
        best = min(best, (mean, penalty, scale))
    loss, penalty, scale = best
    weight = ((sizes / (squares + penalty))[:, None] * explained).T @ v
    bias = rates - weight @ center
    logits = functional.linear(x, weight, bias)
    spread = (logits - logits.mean(1, keepdim=True)).std(0).square().mean().sqrt().item()
    scale = min(scale, LOGIT_STD / spread) if spread > 0 else scale
    return FittedHead((scale * weight).float(), (scale * bias).float(), loss)


def _best_scale(logits: Tensor, labels: Tensor, counts: Tensor) -> tuple[float, float]:
    """The scale at which logits have the lowest mean cross-entropy, and that; it is convex in the scale."""

    def loss(place: int) -> float:
        losses = functional.cross_entropy(SCALES[place] * logits, labels, reduction="none")
        return (losses @ counts / len(labels)).item()

    place = bisect_left(range(len(SCALES) - 1), True, key=lambda place: loss(place) <= loss(place + 1))
    return SCALES[place].item(), loss(place)
