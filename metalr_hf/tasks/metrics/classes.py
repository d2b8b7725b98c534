"""Metrics that need no download, as `evaluate.Metric` classes computed by scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score, roc_auc_score
from transformers import EvalPrediction

from ...models.losses import first_logits, resize_logits

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
    """Share of right predictions: `accuracy` (`sklearn.metrics.accuracy_score`).

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics.classes import Accuracy
    >>> Accuracy(keep_in_memory=True).compute(predictions=[0, 1, 1, 2], references=[0, 1, 2, 2])
    {'accuracy': 0.75}

    ```
    """

    features, description = _ClassIds, "Share of right predictions."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class MacroF1(_BuiltIn):
    """Mean over the classes of the F1 score: `macro_f1` (`sklearn.metrics.f1_score`).

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics.classes import MacroF1
    >>> MacroF1(keep_in_memory=True).compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])["macro_f1"]
    0.42857142857142855

    ```
    """

    features, description = _ClassIds, "Mean over the classes of the F1 score."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"macro_f1": _macro_f1(references, predictions)}


class BalancedAccuracy(_BuiltIn):
    """Mean over the classes that occur of the share of their images that are right: `balanced_accuracy`.

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics.classes import BalancedAccuracy
    >>> BalancedAccuracy(keep_in_memory=True).compute(predictions=[0, 0, 0, 0], references=[0, 0, 0, 1])
    {'balanced_accuracy': 0.5}

    ```
    """

    features, description = _ClassIds, "Mean over the classes of the share of right predictions."

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        # As scikit-learn's `balanced_accuracy_score`, which warns of answers of classes that do not occur.
        return {"balanced_accuracy": _balanced_accuracy(references, predictions)}


class AUROC(_BuiltIn):
    """Area under the receiver operating characteristic: `auroc` (`sklearn.metrics.roc_auc_score`).

    Of several classes it is the mean over each against the rest. NaN if a class does not occur, where it is undefined,
    and if a score is not finite.

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics.classes import AUROC
    >>> scores = [[0.9, 0.1], [0.4, 0.6], [0.3, 0.7]]
    >>> AUROC(keep_in_memory=True).compute(prediction_scores=scores, references=[0, 0, 1])
    {'auroc': 1.0}

    ```
    """

    features, description = _Scores, "Area under the receiver operating characteristic, mean over the classes."
    takes_scores = True

    def _compute(self, prediction_scores: Any, references: Any, names: Any = None) -> dict[str, float]:
        return {"auroc": _auroc(np.asarray(references), np.asarray(prediction_scores), names)}


class Dice(_BuiltIn):
    """Overlap of predicted and true masks, 2 |A ∩ B| / (|A| + |B|): `dice` (mean over the classes), `dice_<class>`.

    Over all pixels of all masks. A class that occurs in neither is left out of the mean. Masks are arrays or tensors of
    class ids from 0 to 255 of any shape; they are counted as they are added, so that no pixel is kept. `compute(...)`
    takes `num_classes` (`int`) and `ignore_index` (`int`, *optional*, defaults to 255); negative true ids are ignored
    as well.

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics.classes import Dice
    >>> metric = Dice(keep_in_memory=True)
    >>> metric.add(prediction=[[0, 1], [1, 1]], reference=[[0, 0], [1, 255]])
    >>> {name: round(value, 3) for name, value in metric.compute(num_classes=2).items()}
    {'dice': 0.667, 'dice_0': 0.667, 'dice_1': 0.667}

    ```
    """

    features, description = _Masks, "Overlap of predicted and true masks."

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._counts = np.zeros((256, 256), dtype=np.int64)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Counts one predicted and one true mask."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Counts predicted and true masks.

        Raises:
            ValueError: if they differ in shape, or a class id is above 255.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            guess, truth = (np.asarray(mask, dtype=np.int64) for mask in (prediction, reference))
            if guess.shape != truth.shape:
                raise ValueError(f"A predicted mask has the shape {guess.shape}, the true one {truth.shape}.")
            kept = truth >= 0
            guess, truth = guess[kept], truth[kept]
            highest = max(guess.max(initial=0), truth.max(initial=0))
            if highest > 255 or guess.min(initial=0) < 0:
                raise ValueError(f"Class ids of masks must be from 0 to 255, not {highest if highest > 255 else -1}.")
            self._counts += np.bincount(truth * 256 + guess, minlength=256 * 256).reshape(256, 256)

    def compute(
        self, *, predictions: Any = None, references: Any = None, num_classes: int, ignore_index: int = 255
    ) -> dict[str, float]:
        """The Dice coefficients of everything added since the last call, and of the masks given here."""
        if predictions is not None:
            self.add_batch(predictions=predictions, references=references)
        counts, self._counts = self._counts, np.zeros_like(self._counts)
        kept = np.arange(256) != ignore_index
        true_sizes, guessed_sizes = counts[kept].sum(1), counts[kept].sum(0)
        sizes = np.zeros(256, dtype=np.int64)
        sizes[kept] += true_sizes
        sizes += guessed_sizes
        overlap = np.where(kept, np.diag(counts), 0)
        dice = np.where(sizes > 0, 2 * overlap / np.maximum(sizes, 1), np.nan)[:num_classes]
        mean = float(np.nanmean(dice)) if (sizes[:num_classes] > 0).any() else float("nan")
        return {"dice": mean, **{f"dice_{i}": float(value) for i, value in enumerate(dice)}}


METRICS: dict[str, type[_BuiltIn]] = {
    "accuracy": Accuracy,
    "macro_f1": MacroF1,
    "balanced_accuracy": BalancedAccuracy,
    "auroc": AUROC,
    "dice": Dice,
}


# What a comparison reports of classes; higher is better.
CLASS_SCORES: tuple[str, ...] = ("accuracy", "macro_f1", "balanced_accuracy", "auroc")


def load_metric(name: str) -> evaluate.EvaluationModule:
    """Loads a metric: a built-in one without a download, any other through `evaluate.load`.

    Args:
        name (`str`): `"accuracy"`, `"macro_f1"`, `"balanced_accuracy"`, `"auroc"`, `"dice"`, or what
            `evaluate.load` takes.

    Returns:
        `evaluate.EvaluationModule`

    Example:

    ```python
    >>> from metalr_hf.tasks.metrics import load_metric
    >>> load_metric("accuracy").compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]
    0.6666666666666666

    ```
    """
    if name in METRICS:
        # In memory: no file is written to the cache folder.
        return METRICS[name](keep_in_memory=True)
    return evaluate.load(name)


def build_compute_metrics(
    names: Sequence[str] = ("accuracy", "macro_f1"),
    class_names: Sequence[str] | None = None,
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for image classification.

    Args:
        names (`Sequence[str]`, *optional*, defaults to `("accuracy", "macro_f1")`): Metrics for [`load_metric`].
        class_names (`Sequence[str]`, *optional*): Name of class 0, 1, ..., for warnings.

    Returns:
        `Callable[[EvalPrediction], dict[str, float]]`: takes logits of shape `(rows, classes)` and class ids.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from metalr_hf.tasks.metrics import build_compute_metrics
    >>> compute_metrics = build_compute_metrics(["accuracy", "auroc"])  # for the Trainer
    >>> logits = np.array([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> compute_metrics(EvalPrediction(logits, np.array([0, 1, 1])))
    {'accuracy': 0.6666666666666666, 'auroc': 1.0}

    ```
    """
    metrics = [load_metric(name) for name in names]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits: Any = first_logits(prediction.predictions)
        labels = prediction.label_ids
        results: dict[str, float] = {}
        for metric in metrics:
            if getattr(metric, "takes_scores", False):
                # Not through `compute`, which would copy all scores into Python lists.
                values = metric._compute(prediction_scores=_probabilities(logits), references=labels, names=class_names)
            else:
                values = metric.compute(predictions=logits.argmax(-1), references=labels)
            results |= values or {}
        return results

    return compute_metrics


def build_dice_metrics(class_names: Sequence[str]) -> Callable[..., dict[str, float]]:
    """Makes the `compute_metrics` of a Trainer for segmentation: the [`Dice`] metric.

    Masks are counted batch by batch with `args.batch_eval_metrics=True`, else once in the end. Give
    [`predicted_classes`] as `preprocess_logits_for_metrics`.

    Args:
        class_names (`Sequence[str]`): Name of class 0, 1, ...

    Returns:
        `Callable[[EvalPrediction, bool], dict[str, float]]`: takes predicted and true class ids, gives `dice`, the mean
            over the classes, and `dice_<class name>`.

    Example:

    ```python
    >>> import numpy as np
    >>> from transformers import EvalPrediction
    >>> from metalr_hf.tasks.metrics import build_dice_metrics
    >>> compute_metrics = build_dice_metrics(["background", "lesion"])  # beside [`predicted_classes`]
    >>> compute_metrics(EvalPrediction(np.array([[[0, 1, 1, 1]]]), np.array([[[0, 0, 1, 1]]])))["dice_lesion"]
    0.8

    ```
    """
    metric = load_metric("dice")

    def compute_metrics(prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        masks = (first_logits(prediction.predictions), prediction.label_ids)
        guess, truth = (mask.cpu() if isinstance(mask, torch.Tensor) else mask for mask in masks)
        metric.add_batch(predictions=guess, references=truth)
        if not compute_result:
            return {}
        values = metric.compute(num_classes=len(class_names)) or {}
        names = {"dice": "dice"} | {f"dice_{i}": f"dice_{name}" for i, name in enumerate(class_names)}
        return {names[key]: value for key, value in values.items()}

    return compute_metrics


def predicted_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The likeliest class of every pixel: a `preprocess_logits_for_metrics`, so that no logits are kept.

    Args:
        logits (`torch.Tensor` of shape `(batch, classes, ...)`, or a tuple that begins with it):
            Brought to the size of the masks before the classes are compared.
        labels (`torch.Tensor` of shape `(batch, ...)`): The true masks.

    Returns:
        `torch.Tensor` of the shape of `labels`, uint8

    Example:

    ```python
    >>> import torch
    >>> from metalr_hf.tasks.metrics import predicted_classes
    >>> logits = torch.tensor([[[[2.0, 0.0]], [[1.0, 1.0]]]])
    >>> predicted_classes(logits, labels=torch.tensor([[[0, 1]]]))
    tensor([[[0, 1]]], dtype=torch.uint8)

    ```
    """
    return resize_logits(first_logits(logits), labels.shape[1:]).argmax(1).to(torch.uint8)


def score_classes(predictions: Any, labels: Any, classes: Sequence[str]) -> dict[str, Any]:
    """What a comparison reports of a run's test rows, rounded to six digits.

    Args:
        predictions (`numpy.ndarray` of shape `(rows, classes)`): Logits, or a tuple that begins with them.
        labels (`numpy.ndarray` of shape `(rows,)`): Class ids.
        classes (`Sequence[str]`): Class names.

    Returns:
        `dict`: `accuracy`, `macro_f1`, `balanced_accuracy`, `auroc`, `test_loss` (cross-entropy) and `class_accuracy`
            (share of each class's rows that are right); `None` where the logits are not finite, and for an AUROC that
            is not defined because a class does not occur.

    Example:

    ```python
    >>> import numpy as np
    >>> from metalr_hf.tasks.metrics import score_classes
    >>> logits = np.array([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    >>> score_classes(logits, np.array([0, 1, 1]), ["benign", "malignant"])["class_accuracy"]
    {'benign': 1.0, 'malignant': 0.5}

    ```
    """
    logits: Any = first_logits(predictions)
    if not np.isfinite(logits).all():
        return {**dict.fromkeys((*CLASS_SCORES, "test_loss")), "class_accuracy": {}}
    guess, ids, probabilities = logits.argmax(-1), list(range(len(classes))), _probabilities(logits)
    by_class = recall_score(labels, guess, labels=ids, average=None, zero_division=0.0)
    auroc = _auroc(labels, probabilities, classes)
    return {
        "accuracy": round(float(accuracy_score(labels, guess)), 6),
        "macro_f1": round(_macro_f1(labels, guess), 6),
        "balanced_accuracy": round(_balanced_accuracy(labels, guess), 6),
        "auroc": None if np.isnan(auroc) else round(auroc, 6),
        "test_loss": round(float(log_loss(labels, probabilities, labels=ids)), 6),
        "class_accuracy": {name: round(float(value), 6) for name, value in zip(classes, by_class, strict=True)},
    }


def _probabilities(logits: np.ndarray) -> np.ndarray:
    return softmax(logits.astype(np.float64), axis=-1)


def _macro_f1(labels: Any, guess: Any) -> float:
    return float(f1_score(labels, guess, average="macro", zero_division=0.0))


def _balanced_accuracy(labels: Any, guess: Any) -> float:
    return float(recall_score(labels, guess, labels=np.unique(labels), average="macro", zero_division=0.0))


def _auroc(labels: np.ndarray, scores: np.ndarray, names: Sequence[str] | None = None) -> float:
    absent = sorted(set(range(scores.shape[1])) - set(labels.tolist()))
    if absent:
        name = absent[0] if names is None else repr(names[absent[0]])
        warnings.warn(
            f"The AUROC is not a number: none of the {len(labels)} images measured is of class {name}.",
            stacklevel=2,
        )
    if absent or not np.isfinite(scores).all():
        return float("nan")
    if scores.shape[1] == 2:
        return float(roc_auc_score(labels, scores[:, 1]))
    return float(roc_auc_score(np.eye(scores.shape[1])[labels], scores, average="macro"))
