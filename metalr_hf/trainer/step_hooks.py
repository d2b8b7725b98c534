"""What tuning does around every step, whatever a subclass makes of `training_step` and `compute_loss`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils.operations import recursively_apply
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuning.calibration import LOOKS
from ..tuning.contexts import untouched


class StepHooks(TrainerCallback):
    """Calibrates before a step and fetches a validation batch after its backward, where `training_step` has not.

    A `training_step` or `compute_loss` of a subclass need not call that of [`~metalr_hf.MetaLRTrainer`].

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer whose run it is.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.coming_batch: Any = None

    def note(self, batches: list[Any]) -> None:
        """Notes the batches of the coming step, if the step before waits for one to be calibrated on.

        Args:
            batches (`list`): As the data loader gives them.
        """
        if batches and getattr(self.trainer.lr_scheduler, "calibration_is_late", False):
            self.coming_batch = batches[0]

    # The first moment after the batches are fetched and, in a run that is resumed, random numbers are as they were.
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.coming_batch is not None:
            calibrate_on(self.trainer, self.coming_batch)
        self.coming_batch = None
        if state.global_step >= len(LOOKS):
            self.trainer.fresh_head.fit_when_due(self.trainer)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.lr_scheduler.meta_loss is None:
            fetch_validation_batch(self.trainer)


@contextmanager
def step_hooks(trainer: Any) -> Iterator[StepHooks]:
    """A context in which a trainer has [`StepHooks`], after the callbacks of the user.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, about to train.

    Returns:
        [`StepHooks`]: while the context is open.
    """
    hooks = StepHooks(trainer)
    # For the run alone: a user who looks at the callbacks finds those of the stock Trainer.
    trainer.callback_handler.callbacks.append(hooks)
    try:
        yield hooks
    finally:
        trainer.callback_handler.callbacks.remove(hooks)


def calibrate_on(trainer: Any, batch: Any) -> None:
    """Calibrates the step before on the batch of the coming one: no other batch, loader or collator is needed.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer.
        batch (`Any`): The batch as the data loader gives it. It is not changed, even by a loss that works in place.
    """
    scheduler, model = trainer.lr_scheduler, trainer.model
    if not scheduler.calibration_is_late:
        return

    def loss() -> torch.Tensor:
        return trainer.compute_meta_loss(recursively_apply(torch.clone, batch))

    if model.training:
        scheduler.calibrate(loss)
        return
    # As an evaluation leaves it, and as Trainer's own training step would find it.
    with untouched(model):
        model.train()
        scheduler.calibrate(loss)


def fetch_validation_batch(trainer: Any) -> None:
    """Fetches the batch of a step that is tuned by a stream.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, between the backward and the optimizer's step.
    """
    scheduler, stream = trainer.lr_scheduler, trainer._meta_stream
    # A batch of a step that overflowed and was not taken is let go: no checkpoint would know of it.
    if stream is not None and scheduler.will_tune:
        # The scale is as large as training gradients bear. Those of a validation batch may be larger.
        scheduler.meta_loss_scale = trainer._loss_scale(trainer.args.device, headroom=8)
        scheduler.meta_loss = partial(trainer.compute_meta_loss, next(stream))
