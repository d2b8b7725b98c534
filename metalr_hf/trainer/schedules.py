"""The shape that a schedule gives to the tuned learning rates."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

DECAY_SHARE = 0.7


def schedule_shape(args: TrainingArguments, num_training_steps: int) -> Callable[[int], float]:
    """The shape s(t) of a schedule of transformers, as a function of the optimizer step.

    Args:
        args (`TrainingArguments`): Their `lr_scheduler_type`, `lr_scheduler_kwargs` and warm-up say which.
            `warmup_stable_decay` decays linearly over the last 70 % of the steps, or from the end of a longer warm-up
            on, unless `num_decay_steps` or `decay_type` (transformers' own is `cosine`) are given.
        num_training_steps (`int`): Length of the run in optimizer steps.

    Returns:
        `Callable[[int], float]`: optimizer step 0, 1, ... to the factor of the learning rates.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from metalr_hf.trainer.schedules import schedule_shape
    >>> args = TrainingArguments("out", lr_scheduler_type="cosine")
    >>> shape = schedule_shape(args, num_training_steps=100)
    >>> shape(0), round(shape(50), 3)
    (1.0, 0.5)

    ```
    """
    options = dict(args.lr_scheduler_kwargs or {})  # type: ignore[arg-type]
    warmup_steps = args.get_warmup_steps(num_training_steps)
    if SchedulerType(args.lr_scheduler_type) == SchedulerType.WARMUP_STABLE_DECAY:
        decay_steps = min(round(DECAY_SHARE * num_training_steps), num_training_steps - warmup_steps)
        options = {"num_decay_steps": decay_steps, "decay_type": "linear"} | options
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=warmup_steps,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=options,
    )
    return schedule.lr_lambdas[0]
