"""Metrics that need no download, as `evaluate.Metric` classes computed by scikit-learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, recall_score, roc_auc_score
from transformers import EvalPrediction

_ClassIds = datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64"))
_Scores = datasets.Features(
    prediction_scores=datasets.Sequence(datasets.Value("float64")), references=datasets.Value("int64")
)
_Masks = datasets.Features(
    predictions=datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
    references=datasets.Sequence(datasets.Sequence(datasets.Value("int64"))),
)


class _BuiltIn(evaluate.Metric):
    features: datasets.Features
    description: str
    # What compute() takes of a prediction: class ids, or scores of the classes.
    takes_scores = False

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.description, citation="", inputs_description="", features=self.features
        )


class Accuracy(_BuiltIn):
    """Share of right predictions: `accuracy` (`sklearn.metrics.accuracy_score`)."""

    features, description = _ClassIds, "Share of right predictions."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_BuiltIn):
    """Mean over the classes of the F1 score: `macro_f1` (`sklearn.metrics.f1_score`)."""

    features, description = _ClassIds, "Mean over the classes of the F1 score."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class AUROC(_BuiltIn):
    """Area under the receiver operating characteristic: `auroc` (`sklearn.metrics.roc_auc_score`).

    Of several classes it is the mean over each against the rest. NaN if a class does not occur, where it is undefined.
    """

    features, description = _Scores, "Area under the receiver operating characteristic, mean over the classes."
    takes_scores = True

    def _compute(self, prediction_scores: Sequence[Sequence[float]], references: Sequence[int]) -> dict[str, float]:
        scores, labels = np.asarray(prediction_scores), np.asarray(references)
        if len(np.unique(labels)) < scores.shape[1]:
            return {"auroc": float("nan")}
        if scores.shape[1] == 2:
            return {"auroc": float(roc_auc_score(labels, scores[:, 1]))}
        one_hot = np.eye(scores.shape[1])[labels]
        return {"auroc": float(roc_auc_score(one_hot, scores, average="macro"))}


class Dice(_BuiltIn):
    """Overlap of predicted and true masks, 2 |A ∩ B| / (|A| + |B|): `dice` (mean over the classes), `dice_<class>`.

    Over all pixels of all masks. A class that occurs in neither is left out of the mean. `compute(...)` takes
    `num_classes` (`int`) and `ignore_index` (`int`, *optional*, defaults to 255).
    """

    features, description = _Masks, "Overlap of predicted and true masks."

    def _compute(
        self, predictions: Any, references: Any, num_classes: int, ignore_index: int = 255
    ) -> dict[str, float]:
        guess = np.concatenate([np.asarray(mask).ravel() for mask in predictions])
        truth = np.concatenate([np.asarray(mask).ravel() for mask in references])
        kept = truth != ignore_index
        counts = confusion_matrix(truth[kept], guess[kept], labels=range(num_classes))
        sizes = counts.sum(0) + counts.sum(1)
        dice = np.where(sizes > 0, 2 * np.diag(counts) / np.maximum(sizes, 1), np.nan)
        return {"dice": float(np.nanmean(dice)), **{f"dice_{i}": float(value) for i, value in enumerate(dice)}}


METRICS: dict[str, type[_BuiltIn]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "auroc": AUROC,
    "dice": Dice,
}


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Loads a metric: a built-in one without a download, any other through `evaluate.load`.

    Args:
        name (`str`): `"accuracy"`, `"macro_f1"`, `"auroc"`, `"dice"`, or what `evaluate.load` takes.

    Returns:
        `evaluate.EvaluationModule`

    Example:

    ```python
    >>> from metalr_hf.metrics import load_metric
    >>> load_metric("accuracy").compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]
    0.6666666666666666

    ```
    """
    if name in METRICS:
        # In memory: nothing is written to the cache folder.
        return METRICS[name](keep_in_memory=True)
    return evaluate.load(name)


def build_compute_metrics(
    names: Sequence[str] = ("accuracy", "macro_f1"),
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for image classification.

    Args:
        names (`Sequence[str]`, *optional*, defaults to `("accuracy", "macro_f1")`): Metrics for [`load_metric`].

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: takes logits of shape `(rows, classes)` and class ids.

    Example:

    ```python
    trainer = MetaLRTrainer(model=model, args=args, compute_metrics=build_compute_metrics(["accuracy", "auroc"]))
    ```
    """
    metrics = [load_metric(name) for name in names]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        labels = prediction.label_ids
        results: dict[str, float] = {}
        for metric in metrics:
            if getattr(metric, "takes_scores", False):
                values = metric.compute(prediction_scores=softmax(logits), references=labels)
            else:
                values = metric.compute(predictions=logits.argmax(-1), references=labels)
            results |= values or {}
        return results

    return compute_metrics


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of shape `(rows, classes)`, float64, from logits."""
    powers = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def score_classes(predictions: Any, labels: Any, classes: Sequence[str]) -> dict[str, Any]:
    """What a comparison reports of a run's test rows, rounded to six digits.

    Args:
        predictions (`numpy.ndarray` of shape `(rows, classes)`): Logits, or a tuple that begins with them.
        labels (`numpy.ndarray` of shape `(rows,)`): Class ids.
        classes (`Sequence[str]`): Class names.

    Returns:
        `dict`: `accuracy`, `macro_f1`, `test_loss` (cross-entropy) and `class_accuracy` (share of each class's rows
            that are right); `None` where the logits are not finite.
    """
    logits = predictions[0] if isinstance(predictions, tuple) else predictions
    if not np.isfinite(logits).all():
        return {"accuracy": None, "macro_f1": None, "test_loss": None, "class_accuracy": {}}
    guess, ids = logits.argmax(-1), list(range(len(classes)))
    probabilities = softmax(logits)
    by_class = recall_score(labels, guess, labels=ids, average=None, zero_division=0.0)
    return {
        "accuracy": round(float(accuracy_score(labels, guess)), 6),
        "macro_f1": round(float(f1_score(labels, guess, average="macro")), 6),
        "test_loss": round(float(log_loss(labels, probabilities, labels=ids)), 6),
        "class_accuracy": {name: round(float(value), 6) for name, value in zip(classes, by_class, strict=True)},
    }
