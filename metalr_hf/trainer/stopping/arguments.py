"""What the arguments of a run that stops by itself mean, and which contradict it."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy, SchedulerType

from ...settings import check_number
from ...tuning.averaging import POLYNOMIAL

# Trainer counts in epochs or steps, and has no word for a run without a limit.
UNLIMITED_EPOCHS = 1e6
REFINED_LOSS = "refined_loss"
# Arguments that a run which stops by itself sets itself, or leaves open.
SETS_ITSELF = ("num_train_epochs", "max_steps", "lr_scheduler_type", "save_strategy", "save_total_limit")
# Shapes of the learning rate that are the same whatever the length of the run.
ENDLESS = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP, SchedulerType.INVERSE_SQRT)


def prepare_stopping(args: Any) -> None:
    """Fills in what a run that stops by itself needs, and refuses what contradicts it.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, before transformers has looked at them.

    Raises:
        ValueError: if an argument contradicts `stop_when_converged`.
    """
    epochs = args.num_train_epochs
    if args.max_minutes is not None:
        check_number("max_minutes", args.max_minutes)
        if not args.max_minutes > 0:
            raise ValueError(f"max_minutes={args.max_minutes!r} must be above 0; leave it out for no limit.")
        if not args.stop_when_converged:
            raise ValueError(
                f"max_minutes={args.max_minutes!r} is a limit of runs that stop by themselves: set "
                "stop_when_converged=True too, or set max_steps."
            )
    if epochs is None:
        args.num_train_epochs = UNLIMITED_EPOCHS if args.stop_when_converged else TrainingArguments.num_train_epochs
    if not args.stop_when_converged:
        return
    if args.average_weights is None:
        args.average_weights = POLYNOMIAL
    schedule = SchedulerType(args.lr_scheduler_type)
    if args.max_steps <= 0 and args.num_train_epochs == UNLIMITED_EPOCHS:
        if schedule not in ENDLESS:
            raise ValueError(
                f"lr_scheduler_type={schedule.value!r} needs the length of the run, which stop_when_converged=True "
                "leaves open. Leave lr_scheduler_type out, which gives constant rates, or set max_steps."
            )
        for name in ("warmup_steps", "logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None and 0 < value < 1:
                raise ValueError(
                    f"{name}={value!r} is a share of the run, whose length stop_when_converged=True leaves open. Give "
                    "a number of steps, or set max_steps."
                )
    if SaveStrategy(args.save_strategy) == SaveStrategy.NO:
        raise ValueError(
            f"save_strategy={SaveStrategy(args.save_strategy).value!r} would leave no best weights to go back to, as "
            "stop_when_converged=True does. Leave save_strategy out."
        )
    if SaveStrategy(args.save_strategy) == SaveStrategy.STEPS and args.save_steps == TrainingArguments.save_steps:
        args.save_strategy = SaveStrategy.BEST
        if args.save_total_limit is None:
            args.save_total_limit = 1
    if args.metric_for_best_model is None:
        args.metric_for_best_model = REFINED_LOSS
    # Transformers would refuse it without an eval_strategy. It is set to True afterwards.
    args.load_best_model_at_end = False
