"""Which images the start rates are measured on, where those of the coming step are too few."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import has_length

from ...tuning.calibration.backbone import LARGEST_STEP
from ...tuning.contexts import preserve_random_state
from .collated import EmptyMetaSetError
from .sets import spare_batches

if TYPE_CHECKING:
    from ..metalr import MetaLRTrainer


# Eight images of ten classes cannot tell a good rate of the head from a thousandth of it. Without gradients four times
# as many images fit in at a time as are trained on.
LOOK_IMAGES, TIMES_AS_MANY = 32, 4
# A calibration takes 8 to 20 forward passes. This share of the images that a run sees, at most, goes into each.
LOOK_SHARE = 1 / 30
# A mask answers for every pixel, so that eight images say enough.
AXES_OF_A_LABEL = 2


def larger_batch(batch_size: int) -> int:
    """How many images a batch without gradients has where those that are trained on are small.

    Args:
        batch_size (`int`): Images that are trained on at a time.

    Returns:
        `int`: at least the batch size.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches.calibrating import larger_batch
    >>> larger_batch(2), larger_batch(8), larger_batch(64)
    (8, 32, 64)

    ```
    """
    return max(batch_size, min(LOOK_IMAGES, TIMES_AS_MANY * batch_size))


def images_of_a_look(batch_size: int, images_of_the_run: int) -> int:
    """How many images the start rates are measured on.

    Args:
        batch_size (`int`): Images that a step is trained on, in all processes together.
        images_of_the_run (`int`): Those of all steps.

    Returns:
        `int`: at least the batch size, and two.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches.calibrating import images_of_a_look
    >>> [images_of_a_look(batch_size, 240 * batch_size) for batch_size in (2, 8, 32, 64)]
    [8, 32, 32, 64]
    >>> images_of_a_look(8, 60 * 8)
    16

    ```
    """
    # A single image tells nothing apart.
    return max(batch_size, 2, min(larger_batch(batch_size), int(LOOK_SHARE * images_of_the_run)))


def batches_to_look_at(trainer: MetaLRTrainer, coming: Sequence[Any]) -> list[Any]:
    """The batches that the step before is judged on: those of the coming step, or others where they are too few.

    They are too few with small batches, and where an epoch ends with the few images that are left. With gradient
    accumulation, no more of its batches are taken than are needed.

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a step.
        coming (`Sequence`): The batches of the coming step, at least one, as the data loader gives them.

    Returns:
        `list`: as the data loader gives them. Neither the order of the training images nor random numbers change.
    """
    args, own = trainer.args, trainer._train_batch_size
    if any(_images_of(batch) is None for batch in coming):
        return list(coming[:1])
    of_a_step = args.gradient_accumulation_steps * args.world_size * own
    images = images_of_a_look(of_a_step, trainer.state.max_steps * of_a_step)
    # Where a batch has that many by itself, the others of an accumulated step are not needed.
    images = min(images, max(LOOK_IMAGES, own * args.world_size))
    if has_length(trainer.train_dataset):
        images = min(images, len(trainer.train_dataset))
    size = math.ceil(images / args.world_size)
    # Losses and sharded models meet the other processes in every batch, so that all have to take as many.
    enough = _highest(trainer, _how_many_are_enough(coming, size, may_skip=args.world_size == 1))
    if enough <= len(coming):
        return [batch for batch in coming[:enough] if _images_of(batch) != 0]
    spare: list[Any] = []
    # A process may have no row of a stream.
    with preserve_random_state(args.device), suppress(EmptyMetaSetError):
        # Another seed at every step: each look has images of its own, and a resumed run the same ones.
        at_a_time = min(size, TIMES_AS_MANY * own)
        spare += spare_batches(trainer, size, at_a_time, seed=trainer.state.global_step, alone=False) or ()
    if fewest := -_highest(trainer, -len(spare)):
        return spare[:fewest]
    some = [batch for batch in coming if _images_of(batch) != 0] if args.world_size == 1 else coming
    return list(some or coming[:1])


def _how_many_are_enough(coming: Sequence[Any], size: int, may_skip: bool) -> int:
    """With how many of these batches there are so many images; more than there are if that does not suffice."""
    found = 0
    for number, batch in enumerate(coming, 1):
        images = _images_of(batch) or 0
        # A collator may have left out all of one.
        if images == 0 and not may_skip:
            break
        found += images
        if found >= size:
            return number
    return len(coming) + 1


def _highest(trainer: MetaLRTrainer, number: int) -> int:
    """The highest of the numbers of all processes."""
    if trainer.args.world_size == 1:
        return number
    return int(trainer.accelerator.gather(torch.tensor([number], device=trainer.args.device)).max())


def largest_step(trainer: MetaLRTrainer, coming: Sequence[Any]) -> float:
    """By which share of its norm a step with the start rates may move the backbone.

    Steps of fewer images are noisier. With Adam they do as well where they are shorter by the square root of the number
    (Malladi et al. 2022, *On the SDEs and Scaling Rules for Adaptive Gradient Algorithms*).

    Args:
        trainer ([`~metalr_hf.MetaLRTrainer`]): The trainer, before a step.
        coming (`Sequence`): The batches of the coming step, as the data loader gives them.

    Returns:
        `float`
    """
    args = trainer.args
    images = trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size
    if any(_images_of(batch) is None for batch in coming):
        return LARGEST_STEP
    return LARGEST_STEP * math.sqrt(min(1.0, images / LOOK_IMAGES))


def _images_of(batch: Any) -> int | None:
    """How many images a batch has; `None` if that cannot be told, or if one of them is enough."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return len(labels) if isinstance(labels, Tensor) and 0 < labels.dim() <= AXES_OF_A_LABEL else None
