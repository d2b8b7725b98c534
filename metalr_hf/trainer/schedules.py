"""The shape that a schedule gives to the tuned learning rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

DECAY_SHARE = 0.7
# Arguments of schedules in units of the learning rate, and what to give instead.
ABSOLUTE_FLOORS = {
    "min_lr": "Give min_lr_rate, the share of the start rates to end at, or lr_min for a lower bound of tuning.",
    "lr_end": 'Use lr_scheduler_type="cosine_with_min_lr" with min_lr_rate, the share of the start rates to end at.',
}


def schedule_shape(
    args: TrainingArguments, num_training_steps: int, fixed_lr: float | None = None
) -> Callable[[int], float]:
    """The shape s(t) of a schedule of transformers, as a function of the optimizer step.

    Args:
        args (`TrainingArguments`): Their `lr_scheduler_type`, `lr_scheduler_kwargs` and warm-up say which.
            `warmup_stable_decay` decays linearly over the last 70 % of the steps, or from the end of a longer warm-up
            on; with `num_decay_steps` it has transformers' own form (`decay_type`, `cosine` by default).
        num_training_steps (`int`): Length of the run in optimizer steps.
        fixed_lr (`float`, *optional*): The learning rate, if it is known and neither calibrated nor tuned.

    Returns:
        `Callable[[int], float]`: optimizer step 0, 1, ... to the factor of the learning rates.

    Raises:
        ValueError: if the schedule has a floor in absolute units while the rates are calibrated or tuned.

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
    if fixed_lr is None:
        _refuse_absolute_floors(args, options)
    if SchedulerType(args.lr_scheduler_type) == SchedulerType.WARMUP_STABLE_DECAY and "num_decay_steps" not in options:
        decay_steps = min(round(DECAY_SHARE * num_training_steps), num_training_steps - warmup_steps)
        options = {"num_decay_steps": decay_steps, "decay_type": "linear"} | options
    # `polynomial` ends at 1e-7 by default: next to nothing beside any rate.
    stand_in = torch.optim.SGD([torch.zeros(1)], lr=1.0 if fixed_lr is None else fixed_lr)
    schedule = get_scheduler(
        args.lr_scheduler_type,
        optimizer=stand_in,
        num_warmup_steps=warmup_steps,
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=options,
    )
    return schedule.lr_lambdas[0]


def _refuse_absolute_floors(args: TrainingArguments, options: dict[str, Any]) -> None:
    for name, instead in ABSOLUTE_FLOORS.items():
        # Zero is the same in any units.
        if options.get(name):
            raise ValueError(
                f"lr_scheduler_kwargs={{{name!r}: {options[name]!r}}}: a schedule multiplies the rates of the layers, "
                f"which are found in the run, so that a floor in absolute units would be none. {instead}"
            )
