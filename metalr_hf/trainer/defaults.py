"""What the arguments of tuning mean where they are left out."""

from __future__ import annotations

import math
from typing import Any

from transformers.trainer_utils import SchedulerType, has_length

from ..tasks.metrics import lower_is_better
from ..tuning.averaging import POLYNOMIAL

# `None` means that it was left out.
NO_AVERAGE = ("none", False)
# From calibrated rates a large trust region is a random walk of the rates: one batch's hypergradient is mostly noise.
CALIBRATED_LR_CHANGE, UNCALIBRATED_LR_CHANGE = 1.1, 2.0
# More often costs a pass each, and found no better rates.
STREAM_EVERY = 2


class FilledIn(str):
    """A value that stands where none was given. What `dataclasses.replace` and `to_dict` hand on can so be told apart.

    Example:

    ```python
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> from metalr_hf.trainer.defaults import FilledIn
    >>> given, left_out = MetaLRTrainingArguments(average_weights="polynomial"), MetaLRTrainingArguments()
    >>> [isinstance(args.average_weights, FilledIn) for args in (given, left_out)]
    [False, True]
    >>> given.average_weights == left_out.average_weights
    True

    ```
    """


def fill_in_schedule(args: Any) -> None:
    """Sets how a run ends where no schedule was chosen: constant rates and an average of the weights.

    Rates decay where the form of a decay is given by `lr_scheduler_kwargs`, or where `average_weights` is `"none"`.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, before transformers has looked at them.

    Example:

    ```python
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> args = MetaLRTrainingArguments("runs/example")
    >>> args.lr_scheduler_type.value, args.average_weights
    ('constant_with_warmup', 'polynomial')
    >>> args = MetaLRTrainingArguments("runs/example", lr_scheduler_type="cosine")
    >>> args.lr_scheduler_type.value, args.average_weights
    ('cosine', None)

    ```
    """
    averages = args.average_weights not in NO_AVERAGE
    if not averages:
        args.average_weights = None
    if args.lr_scheduler_type is not None:
        return
    if not averages or args.lr_scheduler_kwargs:
        args.lr_scheduler_type = SchedulerType.WARMUP_STABLE_DECAY
        return
    # Also without a warm-up, which may be set afterwards, by a search for one.
    args.lr_scheduler_type = SchedulerType.CONSTANT_WITH_WARMUP
    if args.average_weights is None:
        args.average_weights = FilledIn(POLYNOMIAL)


def fill_in_direction(args: Any) -> None:
    """Sets that the lowest value of `metric_for_best_model` is the best one where it is an error, such as `mae`.

    By transformers it is the highest one of all figures but losses.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, before transformers has looked at them.

    Example:

    ```python
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> [MetaLRTrainingArguments(metric_for_best_model=name).greater_is_better for name in ("mae", "r2")]
    [False, True]

    ```
    """
    name = args.metric_for_best_model
    if args.greater_is_better is None and name is not None and lower_is_better(name):
        args.greater_is_better = False


def leave_out_again(args: Any) -> None:
    """Undoes [`fill_in_schedule`] where `dataclasses.replace` or `to_dict` has handed on what it had filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, before anything is filled in.

    Example:

    ```python
    >>> from dataclasses import replace
    >>> from metalr_hf import MetaLRTrainingArguments
    >>> args = replace(MetaLRTrainingArguments("runs/example"), lr_scheduler_type="cosine")
    >>> args.lr_scheduler_type.value, args.average_weights
    ('cosine', None)

    ```
    """
    if not isinstance(args.average_weights, FilledIn):
        return
    args.average_weights = None
    if args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP:
        args.lr_scheduler_type = None


def calibrates(args: Any) -> bool:
    """Whether the start rates are calibrated, with the default filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.

    Returns:
        `bool`
    """
    return args.hyper_lr > 0 if args.calibrate is None else args.calibrate


def fits_head(args: Any) -> bool:
    """Whether a fresh head is fitted after the third step, with the default filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.

    Returns:
        `bool`
    """
    return calibrates(args) if args.fit_head is None else args.fit_head


def lr_change_of(args: Any) -> float:
    """The trust region of one update, with the default filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.

    Returns:
        `float`: the factor by which a rate changes at most.
    """
    if args.max_lr_change is not None:
        return args.max_lr_change
    return CALIBRATED_LR_CHANGE if calibrates(args) else UNCALIBRATED_LR_CHANGE


def meta_every_of(args: Any, meta_source: str) -> int:
    """How many steps apart the rates are tuned, with the default filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.
        meta_source (`str`): `"stream"` or `"next_batch"`.

    Returns:
        `int`
    """
    if args.meta_every is not None:
        return args.meta_every
    return STREAM_EVERY if meta_source == "stream" else 1


def meta_source_of(args: Any, has_meta_dataset: bool) -> str:
    """Where the validation gradient comes from, with the default filled in.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.
        has_meta_dataset (`bool`): Whether the trainer was given a `meta_dataset`.

    Returns:
        `str`: `"stream"` or `"next_batch"`.

    Raises:
        ValueError: if there is a meta set that the source would leave unused.
    """
    has_meta_set = has_meta_dataset or args.meta_split > 0
    if args.meta_source is None:
        return "stream" if has_meta_set or args.lookahead == "sgd" else "next_batch"
    if args.meta_source == "next_batch" and has_meta_set:
        given = "meta_dataset" if has_meta_dataset else f"meta_split={args.meta_split}"
        raise ValueError(
            f'meta_source="next_batch" takes the validation gradient from the next training batch and would leave '
            f'{given} unused. Set meta_source="stream", or leave out {given.split("=")[0]}.'
        )
    return args.meta_source


def head_hold_steps_of(args: Any, train_dataset: Any, batch_size: int | None = None) -> int:
    """How many optimizer steps the head is held at its learning rate.

    Args:
        args ([`MetaLRTrainingArguments`]): The arguments, or others that have the same.
        train_dataset (`datasets.Dataset` or torch dataset): The training set.
        batch_size (`int`, *optional*): What `auto_find_batch_size` has found; `args.train_batch_size` by default.

    Returns:
        `int`

    Raises:
        ValueError: if the head is to be held and the set has no length.
    """
    if args.head_hold_epochs == 0:
        return 0
    if not has_length(train_dataset):
        raise ValueError(
            f"head_hold_epochs={args.head_hold_epochs} needs a training set with a length, to know how many steps "
            "an epoch has. Leave it at 0 for a streamed training set."
        )
    batches = len(train_dataset) / ((batch_size or args.train_batch_size) * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.head_hold_epochs * steps)
