"""A run that has stopped by itself goes on from its best weights with the images that it was evaluated on."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import ConcatDataset
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import TrainOutput, has_length

from .stopping import StoppingTrainer

# How many steps the run goes on for, as a share of those that its best weights took. The average of the weights then is
# one over steps with all images, mostly.
FURTHER_STEPS = 1 / 3
# In the log of the run, from the step on at which it goes on.
CONVERGED_AT, GOES_ON_FROM = "converged_at_step", "goes_on_from_step"


class FinishingTrainer(StoppingTrainer):
    """[`StoppingTrainer`] that trains on the images that were held back, too, once the run has converged.

    A run that stops by itself needs images that it is not trained on, and where there are few, they are missed: what
    it lost against one of the best length was what the same length lost without these images. So it goes back to its
    best weights and trains on for a third of their steps, with all images. Nothing is evaluated any more by then.

    Args:
        *args: Of `Trainer`, in its order.
        held_back (torch dataset, *optional*): With `args.stop_when_converged`, images that are trained on only when
            the run has converged, prepared like the training set: those of `eval_dataset`.
        **kwargs: Of `Trainer`, by keyword.

    Raises:
        ValueError: if `held_back` is given and the run does not stop by itself, or a data set has no length.
    """

    def __init__(self, *args: Any, held_back: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.held_back = held_back
        if held_back is None:
            return
        if not self.args.stop_when_converged:
            raise ValueError(
                "held_back is for runs that stop by themselves. Set stop_when_converged=True, or put its images into "
                "train_dataset."
            )
        if self.args.save_only_model:
            raise ValueError(
                "save_only_model=True leaves no checkpoint to go on from when the run has converged. Leave out "
                "save_only_model, or held_back."
            )
        for name, dataset in (("train_dataset", self.train_dataset), ("held_back", held_back)):
            if not has_length(dataset):
                raise ValueError(
                    f"held_back needs data sets with a length, and {name} is a {type(dataset).__name__}, which has "
                    "none. Leave out held_back."
                )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains; see [`~metalr_hf.MetaLRTrainer.train`]."""
        if self.held_back is None:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        checkpoint, first, log = resume_from_checkpoint, None, _log_of(resume_from_checkpoint)
        places = next(((row[CONVERGED_AT], row[GOES_ON_FROM]) for row in log if CONVERGED_AT in row), None)
        if places is None:
            first = super().train(checkpoint, *args, **kwargs)
            checkpoint = self.state.best_model_checkpoint
            if not self.has_converged() or checkpoint is None:
                return first
            places = self.state.global_step, self.state.best_global_step
        with self._with_all_images(*places):
            if first is not None:
                # Their states are those of the checkpoint again.
                self._forget_optimizer()
            last = super().train(checkpoint, *args, **kwargs)
        return last if first is None else _joined(first, last)

    @contextmanager
    def _with_all_images(self, converged_at: int, goes_on_from: int) -> Iterator[None]:
        before = self.train_dataset, self.args.max_steps, self.args.load_best_model_at_end
        limit = self.args.max_steps if self.args.max_steps > 0 else math.inf
        further = math.ceil(round(FURTHER_STEPS * goes_on_from, 6))
        kept: Any = self.train_dataset
        self.train_dataset = ConcatDataset([kept, self.held_back])
        self.args.max_steps, self.args.load_best_model_at_end = int(min(goes_on_from + further, limit)), False
        self.goes_on = {CONVERGED_AT: converged_at, GOES_ON_FROM: goes_on_from}
        try:
            yield
        finally:
            self.goes_on = None
            self.train_dataset, self.args.max_steps, self.args.load_best_model_at_end = before

    def _forget_optimizer(self) -> None:
        """Lets the optimizer be made anew, if it is not the user's own."""

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # What is evaluated by now is trained on.
        return self.goes_on is None and super()._determine_best_metric(metrics, trial)


def _log_of(checkpoint: Any) -> list[dict[str, Any]]:
    file = os.path.join(str(checkpoint or ""), TRAINER_STATE_NAME)
    return TrainerState.load_from_json(file).log_history if checkpoint and os.path.isfile(file) else []


def _joined(first: TrainOutput, last: TrainOutput) -> TrainOutput:
    """What both parts of a run gave together."""
    runtimes = [part.metrics["train_runtime"] for part in (first, last)]
    metrics = {**last.metrics, "train_runtime": sum(runtimes)}
    for name in ("train_samples_per_second", "train_steps_per_second"):
        done = sum(part.metrics[name] * runtime for part, runtime in zip((first, last), runtimes, strict=True))
        metrics[name] = round(done / max(sum(runtimes), 1e-9), 3)
    return TrainOutput(last.global_step, last.training_loss, metrics)
