"""A loss that does not mind how sure a classifier is: when to stop, told from few images."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

# Of the logarithm of the temperature: answers a hundred times as sure, or as unsure.
WIDEST = np.log(100.0)


def refined_losses(logits: Any, labels: Any) -> np.ndarray | None:
    """The cross-entropy of every image after the best temperature scaling.

    A classifier that trains on becomes surer of all its answers, the wrong ones among them: its loss on other images
    rises while its answers still get better. With the logits divided by the one number that makes their mean lowest,
    what is left says how good the answers are, as the accuracy does, but not in steps of one image (Berta et al. 2025,
    *Rethinking Early Stopping: Refine, Then Calibrate*).

    Args:
        logits (`numpy.ndarray` of shape `(images, classes)`): What the model answered.
        labels (`numpy.ndarray` of shape `(images,)`): The class numbers; negative ones are left out.

    Returns:
        `numpy.ndarray` of shape `(images,)`, *optional*: `None` if these are not logits and classes.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics import refined_losses
    >>> logits, labels = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), np.array([0, 1, 1])
    >>> [round(float(refined_losses(sure * logits, labels).mean()), 3) for sure in (1, 10)]
    [0.637, 0.637]

    ```
    """
    if not isinstance(logits, np.ndarray) or not isinstance(labels, np.ndarray):
        return None
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        return None
    known = labels >= 0
    if logits.shape[1] < 2 or not known.any():
        return None
    answers, classes = logits[known].astype(np.float64), labels[known]
    if not np.isfinite(answers).all():
        return np.full(len(classes), np.nan)

    def losses(log_temperature: float) -> np.ndarray:
        return -log_softmax(answers / np.exp(log_temperature), axis=1)[np.arange(len(classes)), classes]

    best = minimize_scalar(lambda value: losses(value).mean(), bounds=(-WIDEST, WIDEST), method="bounded")
    return losses(best.x)
