"""One or several numbers an image, learned standardised and answered in the units of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoConfig, BaseImageProcessor, PreTrainedModel, default_data_collator
from transformers.trainer_utils import PredictionOutput

from ..data.labels.quantities import QuantityArguments, load_quantities, unit_of
from ..data.splits import ImageSplits
from ..data.transforms import model_input
from ..models.loading import ModelArguments, naming_the_model
from ..models.target_losses import QuantityLoss
from ..models.units import answer_in_units
from .classification import Classification
from .metrics import build_number_metrics, score_numbers
from .registry import register_task


@register_task("regression")
class Regression(Classification):
    """One or several numbers an image; see [`~metalr_hf.tasks.base.Task`] for its methods."""

    data_arguments = QuantityArguments
    problem_type = "regression"
    activation = "none"
    purpose = "image regression"
    demo_name = "ink of digits"
    demo_description = "scikit-learn's digits and how much ink each has"
    demo_augment = "none"
    card_sentence = "It estimates, in the units of the data: {names}"
    metric = "r2"
    scores: ClassVar[tuple[str, ...]] = ("r2", "pearson")

    def load_splits(self, data: QuantityArguments, *, seed: int = 42, keep_columns: Sequence[str] = ()) -> ImageSplits:
        return load_quantities(data, seed=seed, keep_columns=keep_columns)

    def load_model(
        self,
        arguments: ModelArguments,
        id2label: Mapping[int, str],
        image_size: int | None = None,
        num_channels: int | None = None,
    ) -> PreTrainedModel:
        model: Any = super().load_model(arguments, id2label, image_size, num_channels)
        model.answers_in_units = self._is_trained(arguments, len(id2label))
        return model

    def _is_trained(self, arguments: ModelArguments, numbers: int) -> bool:
        """Whether the head that was loaded has been trained on as many numbers."""
        name = arguments.model_name_or_path
        if name is None:
            return False
        with naming_the_model(name, "model"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
        return config.problem_type == self.problem_type and config.num_labels == numbers

    def fit(self, model: nn.Module, rows: Any, processor: BaseImageProcessor, data: Any) -> dict[str, Any]:
        mean, scale = unit_of(rows, list(getattr(model.config, "id2label", {}).values()))
        was_trained = getattr(model, "answers_in_units", False)
        answer_in_units(model, model_input(processor), mean.tolist(), scale.tolist(), was_trained=was_trained)
        return {"compute_loss_func": QuantityLoss(scale.tolist())}

    def trainer_arguments(self, class_names: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
        return {
            "data_collator": default_data_collator,
            "compute_metrics": build_number_metrics(metrics, class_names),
        }

    def score(self, output: PredictionOutput, class_names: Sequence[str]) -> dict[str, Any]:
        loss = (output.metrics or {}).get("test_loss", float("nan"))
        return score_numbers(output.predictions, output.label_ids, class_names, loss)

    def answer_columns(self, class_names: Sequence[str]) -> list[str]:
        return [f"prediction_{name}" for name in class_names]

    def answers(self, logits: Tensor, class_names: Sequence[str], sources: Sequence[Any]) -> list[dict[str, Any]]:
        # The saved model answers in the units of the data.
        rows = logits.float().cpu().reshape(-1, len(class_names)).tolist()
        return [dict(zip(self.answer_columns(class_names), row, strict=True)) for row in rows]
