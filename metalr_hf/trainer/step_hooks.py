"""What tuning does around every step, whatever a subclass makes of `training_step` and `compute_loss`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.other import is_compiled_module
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import find_batch_size

from ..layers.names import head_layers
from ..tuning.calibration import LOOKS
from ..tuning.calibration.replay import ReplayedLoss
from ..tuning.contexts import untouched
from .batches import batches_to_look_at, largest_step
from .collapse import undo_collapse

if TYPE_CHECKING:
    from .metalr import MetaLRTrainer


class StepHooks(TrainerCallback):
    """Prepares every step and fetches a validation batch after its backward, where `training_step` has not.

    Before a step it calibrates the one before, fits the head when its turn has come, and undoes a collapse. A
    `compute_loss` of a subclass need not call that of [`~metalr_hf.MetaLRTrainer`], nor need its `training_step` if its
    `get_batch_samples` does.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer whose run it is.
    """

    def __init__(self, trainer: MetaLRTrainer):
        self.trainer = trainer
        self.coming: list[Any] = []

    def note(self, batches: list[Any]) -> None:
        """Notes the batches of the coming step.

        Args:
            batches (`list`): As the data loader gives them.
        """
        self.coming = batches

    # The first moment after the batches are fetched and, in a run that is resumed, random numbers are as they were.
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer, coming, self.coming = self.trainer, self.coming, []
        if coming and not trainer.lr_scheduler.start_is_known:
            trainer.lr_scheduler.largest_step = largest_step(trainer, coming)
        if coming:
            calibrate_on(trainer, coming)
        if state.global_step >= len(LOOKS):
            trainer.fresh_head.fit_when_due(trainer)
        if coming:
            undo_collapse(trainer, coming)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.lr_scheduler.calibration_is_late:
            raise ValueError(
                f"{type(self.trainer).__name__} has a training_step and a get_batch_samples that both do without those "
                "of MetaLRTrainer, so that there is no batch to calibrate the learning rates on. Call the one of super "
                "in one of them, or set calibrate=False."
            )
        if self.trainer.lr_scheduler.meta_loss is None:
            fetch_validation_batch(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The coming step is to fetch a batch of its own, whoever does that.
        self.trainer.lr_scheduler.meta_loss = None


@contextmanager
def step_hooks(trainer: MetaLRTrainer) -> Iterator[StepHooks]:
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


def calibrate_on(trainer: MetaLRTrainer, batches: Sequence[Any]) -> None:
    """Calibrates the step before on the images of the coming one, or on more where those are few.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer.
        batches (`Sequence`): As the data loader gives them. They are not changed, even by a loss that works in place.
    """
    scheduler, model = trainer.lr_scheduler, trainer.model
    if not scheduler.calibration_is_late:
        return
    looked_at, before = batches_to_look_at(trainer, batches), scheduler.calibration_forwards
    images = [find_batch_size(batch) or 1 for batch in looked_at]

    def loss() -> torch.Tensor:
        losses = [trainer.compute_meta_loss(batch) for batch in looked_at]
        # The mean over images: batches need not be of one size.
        return reduce(add, (loss * (count / sum(images)) for loss, count in zip(losses, images, strict=True)))

    meta_loss = replayed(trainer, loss)
    if model.training:
        scheduler.calibrate(meta_loss)
    else:
        # As an evaluation leaves it, and as Trainer's own training step would find it.
        with untouched(model):
            model.train()
            scheduler.calibrate(meta_loss)
    counted = scheduler.calibration_forwards - before
    times = max(1.0, sum(images) / trainer._train_batch_size)
    scheduler.count_forwards(round(times * counted) - counted)


def replayed(trainer: MetaLRTrainer, loss: Callable[[], torch.Tensor]) -> ReplayedLoss:
    """A loss that runs the backbone of a trainer's model once for all rates of its head, where that is safe.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer.
        loss (`Callable`): Takes nothing and returns the scalar loss of the trainer's model.

    Returns:
        [`~metalr_hf.tuning.calibration.replay.ReplayedLoss`]
    """
    args, model, scheduler = trainer.args, trainer.model, trainer.lr_scheduler
    # Hooks that come and go would have a compiled model compiled again.
    compiled = any(is_compiled_module(module) or module._compiled_call_impl is not None for module in model.modules())
    is_safe = args.n_gpu <= 1 and not args.torch_compile and not compiled
    if args.world_size > 1:
        # Each of several processes decides for itself whether to run the backbone, so that they must not meet there.
        meets = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        is_safe = is_safe and not (meets or trainer.is_fsdp_enabled or trainer._own_loss)
    heads = head_layers(scheduler.layers) if is_safe else ()
    groups = [group for group in scheduler.optimizer.param_groups if group.get("layer") in heads]
    return ReplayedLoss(model, [p for group in groups for p in group["params"]], loss)


def fetch_validation_batch(trainer: MetaLRTrainer) -> None:
    """Fetches the batch of a step that is tuned by a stream.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, between the backward and the optimizer's step.
    """
    scheduler, stream = trainer.lr_scheduler, trainer._meta_stream
    # A batch of a step that overflowed and was not taken is let go: no checkpoint would know of it.
    if stream is not None and scheduler.will_tune:
        # The scale is as large as training gradients bear. Those of a validation batch may be larger.
        scheduler.meta_loss_scale = trainer._loss_scale(trainer.args.device, headroom=8)
        loss = partial(trainer.compute_meta_loss, next(stream))
        scheduler.meta_loss = replayed(trainer, loss) if scheduler.will_calibrate else loss
