"""A Trainer that evaluates, saves and ends with an average of the weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils import logging

from ..tuning.averaging import POLYNOMIAL, WeightAverage
from ..tuning.contexts import preserve_random_state
from .batches import EmptyMetaSetError, larger_batch, spare_batches
from .defaults import NO_AVERAGE

logger = logging.get_logger(__name__)

AVERAGE_FILE = "weight_average.pt"
# Training batches that the statistics of batch norm are estimated from: from smaller ones, or from two, they are those
# of a few images, and cost up to ten points. From eight they are hardly better.
STATISTICS_BATCHES, FEWEST_BATCHES = 6, 4


def statistics_batches(batch_size: int) -> tuple[int, int]:
    """How many batches the statistics of batch norm are estimated from, and of how many images.

    Args:
        batch_size (`int`): Images that are trained on at a time.

    Returns:
        `tuple[int, int]`

    Example:

    ```python
    >>> from metalr_hf.trainer.averaging import statistics_batches
    >>> statistics_batches(32), statistics_batches(8), statistics_batches(2)
    ((6, 32), (4, 32), (4, 8))

    ```
    """
    size = larger_batch(batch_size)
    return max(FEWEST_BATCHES, math.ceil(STATISTICS_BATCHES * batch_size / size)), size


class AveragingTrainer(Trainer):
    """[`~transformers.Trainer`] with an average of the weights along the run.

    The steps are taken with the weights as they are. `evaluate`, `predict` and `save_model` see the average, and after
    `train()` it is what the model holds. Checkpoints hold the average as the model, and both in a file of their own, so
    that a run goes on from its own weights.

    Args:
        *args: Of `Trainer`, in its order.
        average_weights (`str`, *optional*): Which average, by default what `args.average_weights` says, if it is there.
        **kwargs: Of `Trainer`, by keyword.
    """

    args: Any
    model: Any
    optimizer: Any
    weight_average: WeightAverage | None = None
    # What estimating the statistics of batch norm has cost, in training passes; a forward alone counts as a third.
    statistics_passes: float = 0.0

    def __init__(self, *args: Any, average_weights: str | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._given_average = average_weights
        self._listen_to_steps()

    @property
    def average_weights(self) -> str | None:
        """Which average there is, as the arguments say by now: a search changes them from trial to trial."""
        chosen = self._given_average or getattr(self.args, "average_weights", None)
        return None if chosen in NO_AVERAGE else chosen

    def _listen_to_steps(self) -> None:
        if self.average_weights is None:
            return
        if "schedule_free" in self.args.optim:
            raise ValueError(
                f"average_weights={self.average_weights!r}: a schedule-free optimizer averages the weights itself. "
                "Leave average_weights out."
            )
        # Before callbacks that look at the end of a step or of the run.
        if not any(isinstance(callback, _UpdateAverage) for callback in self.callback_handler.callbacks):
            self.callback_handler.callbacks.insert(0, _UpdateAverage(self))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's, with the average of the weights."""
        with self.averaged():
            return super().evaluation_loop(*args, **kwargs)

    # Callbacks that keep the weights of an evaluation are to find those that were evaluated.
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, with the average of the weights, also for the callbacks that it calls."""
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Trainer's, with the average of the weights, also for the callbacks that it calls."""
        with self.averaged():
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with the average of the weights."""
        with self.averaged():
            super().save_model(*args, **kwargs)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the model holds the average of its weights, while it is trained."""
        average = self.weight_average
        with nullcontext() if average is None else average.applied(self._statistics_forwards, self._refine_average):
            yield

    def _refine_average(self) -> None:
        """What a subclass makes better of the averaged weights, while they are in the model."""

    def _statistics_forwards(self) -> None:
        count, size = statistics_batches(self._train_batch_size)
        batches = spare_batches(self, count * size, size)
        if batches is None:
            logger.warning_once(
                "The statistics of batch norm are averaged along with the weights, since batches to estimate them from "
                "cannot be drawn beside those that are trained on. With batch norm, lr_scheduler_type="
                "'warmup_stable_decay' may do better than the average."
            )
            return
        # The same ones in every process: it may be the only one that saves.
        with preserve_random_state(self.args.device), suppress(EmptyMetaSetError):
            # What the loss is divided by does not matter here. To count it, Trainer would wait for other processes.
            items = None if self.compute_loss_func is None else torch.ones((), device=self.args.device)
            for batch in batches:
                with self.compute_loss_context_manager():
                    self.compute_loss(self.model, self._prepare_inputs(batch), num_items_in_batch=items)
                self.statistics_passes += size / self._train_batch_size / 3

    # Of a run's beginning and of checkpoints, Trainer has no public hooks.
    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        self.weight_average, self.statistics_passes = None, 0.0
        self._listen_to_steps()
        return super()._init_training_state(*args, **kwargs)

    def _start_average(self) -> WeightAverage:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        return WeightAverage(self.model, self.average_weights or POLYNOMIAL, trained)

    def _update_average(self) -> None:
        # In float16 a step that overflowed was not taken. One that did harm stays in the average where it is taken back
        # only when the next batch has shown it; it weighs little there.
        if self.average_weights is None or self.accelerator.optimizer_step_was_skipped:
            return
        if self.weight_average is None:
            self.weight_average = self._start_average()
        self.weight_average.update()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # With FSDP, the model of a checkpoint is written here, and read from here as the best one.
        with self.averaged() if self.is_fsdp_enabled else nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)
        state = None if self.weight_average is None else self.weight_average.state_dict()
        if state is not None and self.args.should_save:
            torch.save(state, os.path.join(output_dir, AVERAGE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        file = os.path.join(checkpoint or "", AVERAGE_FILE)
        if checkpoint is None or not os.path.isfile(file):
            return
        # A run that averages no more goes on from its own weights too.
        self.weight_average = self._start_average()
        self.weight_average.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        if self.average_weights is None:
            self.weight_average = None

    def _end_average(self) -> None:
        if self.weight_average is not None:
            self.weight_average.copy_to_model(self._statistics_forwards, self._refine_average)
            self.weight_average = None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        # What was loaded is an average already.
        self.weight_average = None


class _UpdateAverage(TrainerCallback):
    def __init__(self, trainer: AveragingTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._update_average()

    # Other callbacks come after this one: what they save at the end is the average.
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._end_average()
