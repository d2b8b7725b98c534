"""Metrics of one or several numbers an image, by scikit-learn, in the units of the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from transformers import EvalPrediction

from ...models.losses import first_logits
from .labels import mean_known

# Truth and answers of one number to a figure.
NumberMetric = Callable[[np.ndarray, np.ndarray], float]


def _r2(truth: np.ndarray, answers: np.ndarray) -> float:
    return float(r2_score(truth, answers)) if np.ptp(truth) > 0 else math.nan


def _pearson(truth: np.ndarray, answers: np.ndarray) -> float:
    return float(np.corrcoef(truth, answers)[0, 1]) if np.ptp(truth) > 0 and np.ptp(answers) > 0 else math.nan


NUMBER_METRICS: Mapping[str, NumberMetric] = {
    "mae": lambda truth, answers: float(mean_absolute_error(truth, answers)),
    "rmse": lambda truth, answers: float(root_mean_squared_error(truth, answers)),
    "r2": _r2,
    "pearson": _pearson,
}


def number_scores(name: str, answers: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """A metric of every number.

    Args:
        name (`str`): `mae`, `rmse`, `r2` or `pearson`.
        answers (`numpy.ndarray` of shape `(rows, numbers)`): Of the model, in units.
        truth (`numpy.ndarray` of shape `(rows, numbers)`): In the same units.

    Returns:
        `numpy.ndarray` of shape `(numbers,)`: NaN where it is not defined, as R² and the correlation of a number that
            is the same in all rows.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics.numbers import number_scores
    >>> number_scores("mae", np.array([[40.0], [50.0]]), np.array([[41.0], [53.0]])).tolist()
    [2.0]

    ```
    """
    pairs = zip(truth.astype(np.float64).T, answers.astype(np.float64).T, strict=True)
    return np.array([NUMBER_METRICS[name](true, answered) for true, answered in pairs])


def build_number_metrics(metrics: Sequence[str], names: Sequence[str]) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for one or several numbers an image.

    Args:
        metrics (`Sequence[str]`): `mae`, `rmse`, `r2` or `pearson`.
        names (`Sequence[str]`): What the numbers are called.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: every metric, of several numbers the mean over them and, as
            `<metric>_<name>`, that of each.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from metalr_hf.tasks.metrics import build_number_metrics
    >>> answers, truth = np.array([[40.0, 1.0], [50.0, 1.0]]), np.array([[41.0, 1.0], [53.0, 2.0]])
    >>> build_number_metrics(["mae"], ["age", "grade"])(EvalPrediction(answers, truth))
    {'mae': 1.25, 'mae_age': 2.0, 'mae_grade': 0.5}

    ```
    """

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        answers: Any = first_logits(prediction.predictions)
        truth: Any = prediction.label_ids
        results: dict[str, float] = {}
        if not np.isfinite(answers).all():
            return dict.fromkeys(metrics, math.nan)
        for metric in metrics:
            scores = number_scores(metric, answers, truth)
            results[metric] = mean_known(scores)
            if len(names) > 1:
                results |= {f"{metric}_{name}": float(score) for name, score in zip(names, scores, strict=True)}
        return results

    return compute_metrics


def score_numbers(answers: Any, truth: Any, names: Sequence[str], loss: float) -> dict[str, Any]:
    """What a comparison reports of a run's test rows, rounded to six digits.

    Args:
        answers (`numpy.ndarray` of shape `(rows, numbers)`): Of the model, or a tuple that begins with them.
        truth (`numpy.ndarray` of shape `(rows, numbers)`): In the same units.
        names (`Sequence[str]`): What the numbers are called.
        loss (`float`): The mean squared error over the variance of the training set.

    Returns:
        `dict`: the four metrics, `test_loss` and `class_r2` (of every number); `None` where the answers are not finite
            or a figure is not defined.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics import score_numbers
    >>> score_numbers(np.array([[40.0], [50.0]]), np.array([[41.0], [53.0]]), ["age"], loss=0.1)["rmse"]
    2.236068

    ```
    """
    answers = first_logits(answers)
    if not np.isfinite(answers).all():
        return {**dict.fromkeys(NUMBER_METRICS), "test_loss": None, "class_r2": {}}
    figures: dict[str, float] = {name: mean_known(number_scores(name, answers, truth)) for name in NUMBER_METRICS}
    rounded = {name: round(v, 6) if math.isfinite(v) else None for name, v in {**figures, "test_loss": loss}.items()}
    each = number_scores("r2", answers, truth).round(6)
    return {**rounded, "class_r2": dict(zip(names, map(float, each), strict=True))}
