"""A Trainer that measures answers in the process that gave them, where they cannot be exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput


class MeasuringTrainer(Trainer):
    """[`~transformers.Trainer`] for answers and labels whose size differs from row to row, in several processes.

    Trainer pads labels along one axis and exchanges them between the processes, which volumes of several sizes do not
    survive. A `preprocess_logits_for_metrics` that makes all figures there are to know of a batch has the attribute
    `measures`, which is true: it is called before anything is padded, and its figures take the place of the labels too.

    Args:
        *args: Of `Trainer`, in its order.
        **kwargs: Of `Trainer`, by keyword.
    """

    _measure: Callable[[Any, Any], Tensor] | None = None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's; a measure of that kind is called by [`~MeasuringTrainer.prediction_step`]."""
        measure = self.preprocess_logits_for_metrics
        if not getattr(measure, "measures", False):
            return super().evaluation_loop(*args, **kwargs)
        self._measure, self.preprocess_logits_for_metrics = measure, None
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._measure, self.preprocess_logits_for_metrics = None, measure

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Trainer's; of answers that are measured here the figures, as logits and as labels."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if self._measure is None or logits is None or labels is None:
            return loss, logits, labels
        with torch.no_grad():
            figures = self._measure(logits, labels)
        return loss, figures, figures

    # Trainer's own place to count what a loss is a mean over.
    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Tensor | int | None:
        """Trainer's; rows that are measured one by one count alike, whatever the size of those of other processes."""
        return None if self._measure is not None else super()._get_num_items_in_batch(*args, **kwargs)
