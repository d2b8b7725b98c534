"""Classification: one class an image, learned with cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    TimmWrapperConfig,
    default_data_collator,
)
from transformers.trainer_utils import PredictionOutput

from ..data.columns import LABEL
from ..data.intensity import set_window
from ..data.labels.imbalance import ClassArguments, class_weights, warn_of_rare_classes
from ..data.loading import DataArguments, load_images
from ..data.splits import ImageSplits
from ..data.transforms import ImageTransform, Transform
from ..models.channels import RGB, load_with_channels
from ..models.loading import ModelArguments, load_config, naming_the_model
from ..models.target_losses import ClassLoss
from .base import Task
from .metrics import CLASS_SCORES, build_compute_metrics, score_classes
from .registry import register_task

SINGLE_LABEL = "single_label_classification"


@register_task("classification")
class Classification(Task):
    """One class an image; see [`~metalr_hf.tasks.base.Task`] for its methods.

    Attributes:
        problem_type (`str`, *optional*):
            What `transformers` calls the task, by which its pipelines and losses know it. Of one class an image it
            finds that out by itself.
    """

    problem_type: ClassVar[Any] = None

    pipeline_tag = "image-classification"
    data_arguments: ClassVar[type[DataArguments]] = ClassArguments
    demo_name = "digits"
    demo_description = "scikit-learn's digits"
    demo_augment = "crop"
    scores = CLASS_SCORES

    def load_splits(self, data: Any, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
        splits = load_images(data, seed=seed, keep_columns=keep_columns)
        warn_of_rare_classes(splits.train, splits.class_names, getattr(data, "class_weights", None))
        return splits

    def load_model(
        self,
        arguments: ModelArguments,
        id2label: Mapping[int, str],
        image_size: int | None = None,
        num_channels: int | None = None,
    ) -> PreTrainedModel:
        name = arguments.model_name_or_path
        if name is None:
            from ..models.demo import demo_model

            model = demo_model(id2label, num_channels or RGB)
            model.config.problem_type = self.problem_type
            return model
        with naming_the_model(name, "model"):
            config = load_config(name, trust_remote_code=arguments.trust_remote_code)
            config.id2label = dict(id2label)
            config.label2id = {label: i for i, label in id2label.items()}
            # The model may come from another task.
            config.problem_type = self.problem_type
            if hasattr(config, "label_names"):
                # timm's own list of the classes, which would be saved instead of the new ones.
                config.label_names = list(id2label.values())

            def load(config: Any) -> PreTrainedModel:
                return AutoModelForImageClassification.from_pretrained(
                    name, config=config, ignore_mismatched_sizes=True, trust_remote_code=arguments.trust_remote_code
                )

            return load_with_channels(load, config, num_channels)

    def transforms(
        self, splits: ImageSplits, processor: BaseImageProcessor, augment: str
    ) -> tuple[Transform, Transform]:
        set_window(processor, splits.window)
        return ImageTransform(processor, augment), ImageTransform(processor)

    def fit(self, model: nn.Module, rows: Any, processor: BaseImageProcessor, data: Any) -> dict[str, Any]:
        weights = getattr(data, "class_weights", None)
        if weights is None:
            return {}
        return {"compute_loss_func": ClassLoss(class_weights(weights, rows, rows.features[LABEL].names))}

    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        return {"data_collator": default_data_collator, "compute_metrics": build_compute_metrics(metrics, class_names)}

    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        return score_classes(output.predictions, output.label_ids, class_names)

    def made(self, config: Any) -> bool:
        is_classifier = isinstance(config, TimmWrapperConfig) or any(
            "ForImageClassification" in name for name in config.architectures or ()
        )
        # Models of one class an image often do not say so.
        own = self.problem_type or SINGLE_LABEL
        return is_classifier and (config.problem_type or SINGLE_LABEL) == own

    def answer_columns(self, class_names: Sequence[str]) -> list[str]:
        return ["prediction", *(f"probability_{name}" for name in class_names)]

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        columns = self.answer_columns(class_names)
        return [
            dict(zip(columns, [class_names[row.argmax()], *row.tolist()], strict=True))
            for row in logits.float().softmax(-1).cpu()
        ]
