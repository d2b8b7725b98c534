"""Several labels an image, each there or not, learned with binary cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import BaseImageProcessor, default_data_collator
from transformers.trainer_utils import PredictionOutput

from ..data.labels.imbalance import label_weights, warn_of_rare_labels
from ..data.labels.sets import LabelSetArguments, load_label_sets
from ..data.labels.targets import figures_of
from ..data.splits import ImageSplits
from ..models.target_losses import LabelSetLoss
from .classification import Classification
from .metrics import LABEL_METRICS, build_label_metrics, score_label_sets
from .registry import register_task

# Of a table of predictions: labels that an image more likely has than not are named.
LIKELY = 0.5
BETWEEN = "|"


@register_task("multi_label")
class MultiLabel(Classification):
    """Several labels an image; see [`~metalr_hf.tasks.base.Task`] for its methods."""

    data_arguments = LabelSetArguments
    problem_type = "multi_label_classification"
    activation = "sigmoid"
    purpose = "multi-label image classification"
    demo_name = "labels of digits"
    demo_description = "scikit-learn's digits with several labels each"
    card_sentence = "It says which of {count} labels an image has: {names}"
    metric = "macro_auroc"
    scores = tuple(LABEL_METRICS)

    def load_splits(self, data: LabelSetArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
        splits = load_label_sets(data, seed=seed, keep_columns=keep_columns)
        warn_of_rare_labels(figures_of(splits.train), splits.class_names, data.class_weights)
        return splits

    def fit(self, model: nn.Module, rows: Any, processor: BaseImageProcessor, data: Any) -> dict[str, Any]:
        if data.class_weights is None:
            return {}
        figures = figures_of(rows)
        names = list(getattr(model.config, "id2label", {}).values()) or [""] * figures.shape[1]
        return {"compute_loss_func": LabelSetLoss(label_weights(data.class_weights, figures, names))}

    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        return {
            "data_collator": default_data_collator,
            "compute_metrics": build_label_metrics(metrics),
            "compute_loss_func": LabelSetLoss(),
        }

    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        return score_label_sets(output.predictions, output.label_ids, class_names)

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        columns = self.answer_columns(class_names)
        rows = logits.float().sigmoid().cpu().tolist()
        named = [
            BETWEEN.join(name for name, value in zip(class_names, row, strict=True) if value > LIKELY) for row in rows
        ]
        return [dict(zip(columns, [names, *row], strict=True)) for names, row in zip(named, rows, strict=True)]
