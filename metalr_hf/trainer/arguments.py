"""MetaLRTrainingArguments: transformers' TrainingArguments and what tuning adds to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from ..settings import (
    LAYER_GRANULARITIES,
    META_MODES,
    check_choice,
    check_count,
    check_flag,
    check_number,
    check_settings,
)
from ..tuning.averaging import averaging_share
from ..tuning.rules import get_rule
from .defaults import FilledIn, calibrates, fill_in_direction, fill_in_schedule, leave_out_again
from .faults import refuse_deepspeed
from .stopping import prepare_stopping

# Chen et al. 2023, section 3.1, and the reference code, with the sign of the paper's equation.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "hyper_lr": 0.1,
        "lr_rule": "proportional",
        "lr_min": 1e-6,
        "lr_max": 1e-2,
        "max_lr_change": math.inf,
        "meta_source": "stream",
        "meta_every": 1,
        "tuning_steps": 0,
        "calibrate": False,
        "head_hold_epochs": 5.0,
        "lookahead": "sgd",
        "lr_scheduler_type": SchedulerType.CONSTANT,
    }
}


@dataclass
class MetaLRTrainingArguments(TrainingArguments):
    """Arguments of [`MetaLRTrainer`]: all of [`~transformers.TrainingArguments`], and the following.

    `learning_rate` is where every layer starts if `calibrate` is off. `lr_scheduler_type` and warm-up are the shape
    that multiplies the tuned rates. If it is left out, they stay constant after the warm-up, and weights are averaged.
    `warmup_stable_decay` is linear decay over the last 70 % of the steps
    (`lr_scheduler_kwargs={"num_decay_steps": ..., "decay_type": "cosine"}` changes its length and form).
    `layer_granularity` and `head_module` (names as in `model.named_modules()`) are handed to [`layer_groups`]; a map of
    layers given to the trainer goes before them.

    Args:
        hyper_lr (`float`, *optional*, defaults to 0.1):
            Step size η of the learning rates; 0 switches tuning off.
        lr_rule (`str`, *optional*, defaults to `"proportional"`):
            Learning-rate rule: `additive`, `proportional`, `adam`, or one registered with `register_rule`.
        lr_min (`float`, *optional*, defaults to 1e-8):
            Lower bound of every learning rate.
        lr_max (`float`, *optional*, defaults to 1.0):
            Upper bound of every learning rate.
        max_lr_change (`float`, *optional*):
            Trust region: one update changes a learning rate at most by this factor; `inf` switches it off. By default
            1.1 where the start rates are calibrated, so that tuning corrects them gently, and 2 where it has to find
            them.
        tuning_steps (`int`, *optional*, defaults to 40):
            Tune at the first so many optimizer steps and those that are calibrated, then keep the rates found and leave
            them to the schedule; 0 tunes to the end.
        calibrate (`bool`, *optional*):
            Find the start rates along the first steps (two or three, and later ones in doubt), so that `learning_rate`
            makes no difference. On by default, unless `hyper_lr` is 0.
        fit_head (`bool`, *optional*):
            Fit a classifier's fresh linear head in closed form: after the third step to up to 512 training images and,
            for the averaged weights, in part to the last 512. On by default where rates are calibrated.
        meta_source (`str`, *optional*):
            Where the validation gradient comes from: `stream` (validation batches, one more forward and backward) or
            `next_batch` (the next training batch, no extra pass). By default `stream` when there is a `meta_dataset`
            or a `meta_split`, else `next_batch`.
        meta_every (`int`, *optional*):
            Tune at every k-th optimizer step. By default every second with `stream`, which finds as good rates for half
            of the cost, and every one with `next_batch`, which costs next to nothing.
        meta_batch_size (`int`, *optional*):
            Validation images per device and step; the training batch size by default.
        meta_split (`float`, *optional*, defaults to 0.0):
            Share of the training set held out for validation batches, stratified by label; 0 holds nothing out.
        meta_mode (`str`, *optional*, defaults to `"train"`):
            How batch-norm and dropout work in the validation pass: `train` or `eval`; running statistics are never
            touched by it.
        lookahead (`str`, *optional*, defaults to `"optimizer"`):
            `optimizer` differentiates the step really taken, `sgd` the raw-gradient step of the paper.
        head_lr_multiplier (`float`, *optional*, defaults to 1.0):
            With `calibrate=False`, the head starts at `learning_rate` times this.
        head_hold_epochs (`float`, *optional*, defaults to 0.0):
            The head keeps its start rate for so many first epochs; if they last longer than `tuning_steps`, to the end.
        layer_granularity (`str`, *optional*, defaults to `"block"`):
            What gets a learning rate of its own: every `block`, every `stage` of blocks, or every `tensor`.
        head_module (`list[str]`, *optional*):
            The module or modules that are the head, where they are not recognised.
        average_weights (`str`, *optional*):
            Evaluate, save and end with an average of the weights along the run: `polynomial`, over a fixed share of the
            steps so far (Shamir and Zhang 2013), the decay of an exponential moving average, such as `0.99`, or `none`,
            with which rates decay at the end unless a schedule is chosen. By default `polynomial` if
            `lr_scheduler_type` is left out, and otherwise `none`.
        stop_when_converged (`bool`, *optional*, defaults to `False`):
            Stop when the best evaluation has not been beaten in the last third of the steps, and go back to its
            weights. No number of epochs or steps is needed; one that is given is a limit, and its last quarter also
            trains on images that are held back. Rates are constant and weights averaged unless set otherwise.
        max_minutes (`float`, *optional*):
            With `stop_when_converged`: stop after so many minutes at the latest.
        preset (`str`, *optional*):
            `paper` gives the settings of the paper to all of these that are left at their defaults, and a constant
            schedule.

    Example:

    ```python
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> args = MetaLRTrainingArguments("runs/example", learning_rate=1e-4, meta_split=0.2)
    >>> args.hyper_lr, args.tuning_steps
    (0.1, 40)

    ```
    """

    # None tells transformers' default from one that was given.
    lr_scheduler_type: SchedulerType | str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "The shape that multiplies the tuned rates. By default they stay constant, and weights are "
            "averaged. `warmup_stable_decay` goes down linearly over the last seven tenths of the steps unless "
            "`lr_scheduler_kwargs` says otherwise."
        },
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Number of epochs: 3 by default, and without a limit with `stop_when_converged`."},
    )
    hyper_lr: float = field(default=0.1, metadata={"help": "Step size η of the learning rates; 0 switches tuning off."})
    lr_rule: str = field(
        default="proportional",
        metadata={
            "help": "Learning-rate rule: `additive`, `proportional`, `adam`, or one registered with `register_rule`."
        },
    )
    lr_min: float = field(default=1e-8, metadata={"help": "Lower bound of every learning rate."})
    lr_max: float = field(default=1.0, metadata={"help": "Upper bound of every learning rate."})
    max_lr_change: float | None = field(
        default=None,
        metadata={
            "help": "Trust region: one update changes a learning rate at most by this factor; `inf` switches it off. "
            "By default 1.1 where the start rates are calibrated, so that tuning corrects them gently, and 2 where it "
            "has to find them."
        },
    )
    tuning_steps: int = field(
        default=40,
        metadata={
            "help": "Tune at the first so many optimizer steps and those that are calibrated, then keep the rates "
            "found and leave them to the schedule; 0 tunes to the end."
        },
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Find the start rates along the first steps (two or three, and later ones in doubt), so that "
            "`learning_rate` makes no difference. On by default, unless `hyper_lr` is 0."
        },
    )
    fit_head: bool | None = field(
        default=None,
        metadata={
            "help": "Fit a classifier's fresh linear head in closed form: after the third step to up to 512 training "
            "images and, for the averaged weights, in part to the last 512. On by default where rates are calibrated."
        },
    )
    meta_source: str | None = field(
        default=None,
        metadata={
            "help": "Where the validation gradient comes from: `stream` (validation batches, one more forward and "
            "backward) or `next_batch` (the next training batch, no extra pass). By default `stream` when there is a "
            "`meta_dataset` or a `meta_split`, else `next_batch`."
        },
    )
    meta_every: int | None = field(
        default=None,
        metadata={
            "help": "Tune at every k-th optimizer step. By default every second with `stream`, which finds as good "
            "rates for half of the cost, and every one with `next_batch`, which costs next to nothing."
        },
    )
    meta_batch_size: int | None = field(
        default=None, metadata={"help": "Validation images per device and step; the training batch size by default."}
    )
    meta_split: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training set held out for validation batches, stratified by label; 0 holds nothing "
            "out."
        },
    )
    meta_mode: str = field(
        default="train",
        metadata={
            "help": "How batch-norm and dropout work in the validation pass: `train` or `eval`; running statistics are "
            "never touched by it."
        },
    )
    lookahead: str = field(
        default="optimizer",
        metadata={
            "help": "`optimizer` differentiates the step really taken, `sgd` the raw-gradient step of the paper."
        },
    )
    head_lr_multiplier: float = field(
        default=1.0, metadata={"help": "With `calibrate=False`, the head starts at `learning_rate` times this."}
    )
    head_hold_epochs: float = field(
        default=0.0,
        metadata={
            "help": "The head keeps its start rate for so many first epochs; if they last longer than "
            "`tuning_steps`, to the end."
        },
    )
    layer_granularity: str = field(
        default="block",
        metadata={
            "help": "What gets a learning rate of its own: every `block`, every `stage` of blocks, or every `tensor`."
        },
    )
    head_module: list[str] | None = field(
        default=None,
        metadata={"help": "The module or modules that are the head, where they are not recognised."},
    )
    average_weights: str | None = field(
        default=None,
        metadata={
            "help": "Evaluate, save and end with an average of the weights along the run: `polynomial`, over a fixed "
            "share of the steps so far (Shamir and Zhang 2013), the decay of an exponential moving average, such as "
            "`0.99`, or `none`, with which rates decay at the end unless a schedule is chosen. By default `polynomial` "
            "if `lr_scheduler_type` is left out, and otherwise `none`."
        },
    )
    stop_when_converged: bool = field(
        default=False,
        metadata={
            "help": "Stop when the best evaluation has not been beaten in the last third of the steps, and go back to "
            "its weights. No number of epochs or steps is needed; one that is given is a limit, and its last quarter "
            "also trains on images that are held back. Rates are constant and weights averaged unless set otherwise."
        },
    )
    max_minutes: float | None = field(
        default=None,
        metadata={"help": "With `stop_when_converged`: stop after so many minutes at the latest."},
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "`paper` gives the settings of the paper to all of these that are left at their defaults, and a "
            "constant schedule."
        },
    )

    def __post_init__(self) -> None:
        # transformers would want DeepSpeed installed first.
        refuse_deepspeed(self)
        for name in ("calibrate", "fit_head", "stop_when_converged"):
            check_flag(name, getattr(self, name))
        leave_out_again(self)
        self._apply_preset()
        fill_in_schedule(self)
        _refuse_watching_schedules(self)
        prepare_stopping(self)
        fill_in_direction(self)
        super().__post_init__()
        # A run that stops by itself averages whatever its schedule.
        self._average_is_default = isinstance(self.average_weights, FilledIn) and not self.stop_when_converged
        self.load_best_model_at_end |= self.stop_when_converged
        _check_tuning_arguments(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A schedule chosen afterwards, also by `set_lr_scheduler` and by a search, takes the place of the average.
        if name in ("lr_scheduler_type", "average_weights") and getattr(self, "_average_is_default", False):
            self._average_is_default = False
            if name == "lr_scheduler_type":
                self.average_weights = None

    def _apply_preset(self) -> None:
        if self.preset is None:
            return
        check_choice("preset", self.preset, tuple(PRESETS))
        defaults = {f.name: f.default for f in fields(self)}
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) == defaults[name]:
                setattr(self, name, value)


def with_tuning_arguments(args: TrainingArguments | None) -> TrainingArguments:
    """Gives plain `TrainingArguments`, of any class, what tuning adds: the defaults of all that they lack.

    Args:
        args (`TrainingArguments`, *optional*): What a Trainer was given. It stays the same object.

    Returns:
        `TrainingArguments`: the same object, or [`MetaLRTrainingArguments`] where none was given.

    Raises:
        ValueError: if they ask for something that cannot be tuned.

    Example:

    ```python
    >>> from transformers import TrainingArguments
    >>> from metalr_hf.trainer.arguments import with_tuning_arguments
    >>> args = TrainingArguments("runs/example")
    >>> with_tuning_arguments(args) is args, args.hyper_lr
    (True, 0.1)

    ```
    """
    if args is None:
        return MetaLRTrainingArguments()
    if not isinstance(args, MetaLRTrainingArguments):
        stock = {f.name for f in fields(TrainingArguments)}
        for f in fields(MetaLRTrainingArguments):
            if f.name not in stock and not hasattr(args, f.name):
                setattr(args, f.name, f.default)
        refuse_deepspeed(args)
        _refuse_watching_schedules(args)
        _check_tuning_arguments(args)
    return args


def _refuse_watching_schedules(args: TrainingArguments) -> None:
    """Raises `ValueError` if a schedule is not a function of the step.

    Args:
        args (`TrainingArguments`): The arguments.
    """
    if SchedulerType(args.lr_scheduler_type) in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        raise ValueError(
            f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value!r} watches a metric to change the "
            "learning rate, which tuning does already. Use a schedule that depends on the step alone, such as "
            "cosine, linear or constant."
        )


def _check_tuning_arguments(args: Any) -> None:
    """Raises if an argument that tuning adds is of the wrong type or out of range.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.
    """
    check_settings(
        hyper_lr=args.hyper_lr,
        lr_min=args.lr_min,
        lr_max=args.lr_max,
        max_lr_change=args.max_lr_change,
        meta_source=args.meta_source or "stream",
        meta_every=1 if args.meta_every is None else args.meta_every,
        tuning_steps=args.tuning_steps or None,
        lookahead=args.lookahead,
    )
    get_rule(args.lr_rule, args.hyper_lr)
    if args.average_weights is not None:
        averaging_share(args.average_weights)
    check_choice("meta_mode", args.meta_mode, META_MODES)
    check_choice("layer_granularity", args.layer_granularity, LAYER_GRANULARITIES)
    if args.meta_batch_size is not None:
        check_count("meta_batch_size", args.meta_batch_size)
    check_number("meta_split", args.meta_split)
    if not 0 <= args.meta_split < 1:
        raise ValueError(
            f"meta_split={args.meta_split!r} must be in [0, 1): the share of the training set held out to tune on."
        )
    for name in ("head_lr_multiplier", "head_hold_epochs"):
        check_number(name, getattr(args, name))
        if getattr(args, name) < 0:
            raise ValueError(f"{name}={getattr(args, name)!r} must not be negative.")
    if args.head_lr_multiplier != 1 and calibrates(args):
        raise ValueError(
            f"head_lr_multiplier={args.head_lr_multiplier!r} would be ignored: the calibration finds where the "
            "head starts. Set calibrate=False to start from learning_rate, or leave it out."
        )
