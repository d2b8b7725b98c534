"""Metrics of several labels an image, by scikit-learn, over the labels that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, log_loss, roc_auc_score
from transformers import EvalPrediction

from ...models.losses import first_logits

# Truth and probability of one label, of the images of which it is known, to a figure.
LabelMetric = Callable[[np.ndarray, np.ndarray], float]


def _f1(truth: np.ndarray, probability: np.ndarray) -> float:
    return float(f1_score(truth, probability > 0.5, zero_division=0.0))


LABEL_METRICS: Mapping[str, LabelMetric] = {
    "macro_auroc": lambda truth, probability: float(roc_auc_score(truth, probability)),
    "macro_f1": _f1,
    "mean_average_precision": lambda truth, probability: float(average_precision_score(truth, probability)),
}


def label_scores(name: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """A metric of every label.

    Args:
        name (`str`): `macro_auroc`, `macro_f1` (of answers above a half) or `mean_average_precision`.
        logits (`numpy.ndarray` of shape `(rows, labels)`): Of the model.
        labels (`numpy.ndarray` of shape `(rows, labels)`): 1, 0, or below zero where it is unknown.

    Returns:
        `numpy.ndarray` of shape `(labels,)`: NaN for a label that all images have or none of those that are known.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics.labels import label_scores
    >>> logits = np.array([[2.0, 1.0], [-1.0, 1.0], [1.0, 3.0]])
    >>> labels = np.array([[1.0, 1.0], [0.0, 1.0], [-100.0, 1.0]])
    >>> label_scores("macro_auroc", logits, labels)
    array([ 1., nan])

    ```
    """
    scores = []
    for truth, probability in zip(labels.T, expit(logits.astype(np.float64)).T, strict=True):
        known = truth >= 0
        both = len(np.unique(truth[known])) == 2
        scores.append(LABEL_METRICS[name](truth[known], probability[known]) if both else float("nan"))
    return np.array(scores)


def build_label_metrics(names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for several labels an image.

    Args:
        names (`Sequence[str]`): Of the metrics: `macro_auroc`, `macro_f1`, `mean_average_precision`.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: the mean over the labels that some of the known images have and
            others have not; NaN if there are none.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from metalr_hf.tasks.metrics import build_label_metrics
    >>> compute_metrics = build_label_metrics(["macro_auroc"])
    >>> compute_metrics(EvalPrediction(np.array([[2.0], [-1.0]]), np.array([[1.0], [0.0]])))
    {'macro_auroc': 1.0}

    ```
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = first_logits(prediction.predictions)
        labels: Any = prediction.label_ids
        return {name: mean_known(label_scores(name, logits, labels)) for name in names}

    return compute_metrics


def mean_known(scores: np.ndarray) -> float:
    """The mean of the figures that are defined.

    Args:
        scores (`numpy.ndarray`): Figures, some of them NaN.

    Returns:
        `float`: NaN if none is defined.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics.labels import mean_known
    >>> mean_known(np.array([0.5, np.nan, 1.0]))
    0.75

    ```
    """
    known = scores[~np.isnan(scores)]
    return float(known.mean()) if len(known) else float("nan")


def score_label_sets(predictions: Any, labels: Any, names: Sequence[str]) -> dict[str, Any]:
    """What a comparison reports of a run's test rows, rounded to six digits.

    Args:
        predictions (`numpy.ndarray` of shape `(rows, labels)`): Logits, or a tuple that begins with them.
        labels (`numpy.ndarray` of shape `(rows, labels)`): 1, 0, or below zero where it is unknown.
        names (`Sequence[str]`): The labels.

    Returns:
        `dict`: the three metrics, `test_loss` (binary cross-entropy without weights) and `class_macro_auroc` (of every
            label); `None` where the logits are not finite or a figure is not defined.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics import score_label_sets
    >>> logits, labels = np.array([[2.0, 1.0], [-1.0, -1.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> score_label_sets(logits, labels, ["edema", "effusion"])["class_macro_auroc"]
    {'edema': 1.0, 'effusion': 0.0}

    ```
    """
    logits: Any = first_logits(predictions)
    if not np.isfinite(logits).all():
        return {**dict.fromkeys(LABEL_METRICS), "test_loss": None, "class_macro_auroc": {}}
    known = labels >= 0
    probability = expit(logits.astype(np.float64))[known]
    loss = log_loss(labels[known], probability, labels=[0, 1]) if known.any() else float("nan")
    return {
        **{name: _rounded(mean_known(label_scores(name, logits, labels))) for name in LABEL_METRICS},
        "test_loss": _rounded(loss),
        "class_macro_auroc": dict(
            zip(names, map(float, label_scores("macro_auroc", logits, labels).round(6)), strict=True)
        ),
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 6) if np.isfinite(value) else None
