"""The ladder of learning rates that a calibration walks up, and where it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Half a decade apart: what one step says is not finer than that.
LADDER = tuple(10 ** (k / 2) for k in range(-12, 1))
# The loss is convex along a step of a linear head, so that the walk may begin in the middle, near most valleys of fresh
# heads. Only where the lowest of these rates is the best, or none is, are lower ones tried, one by one.
HEAD_LADDER = tuple(rate for rate in LADDER if rate > 3e-3)
LOWER_HEAD_LADDER = (1e-6, 1e-5, 1e-4, *(rate for rate in LADDER if 3e-4 < rate < 3e-3))
RISE, TOLERANCE = 0.01, 0.003
# Behind the knee of the loss, and only where it has fallen by enough to have one.
SHELF, FALL = 0.5, 0.1


def raised(loss: float, share: float) -> float:
    """A loss that is worse than another by a share of its size, or better if the share is below zero.

    Args:
        loss (`float`): Of either sign.
        share (`float`): Between -1 and 1.

    Returns:
        `float`: the loss plus the share of its absolute value.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.ladder import raised
    >>> raised(2.0, 0.5), raised(-2.0, 0.5)
    (3.0, -1.0)

    ```
    """
    return loss * (1 + share if loss >= 0 else 1 - share)


def first_valley(
    ladder: Sequence[float], loss_at: Callable[[float], float], start_loss: float
) -> tuple[float | None, dict[float, float]]:
    """Walks up a ladder of learning rates and stops behind the first valley or shelf of the loss.

    The walk ends where the loss is 1 % above the lowest seen, or back above the start after a fall, or where, after it
    has fallen by a tenth, a rung brings less than half of what the rung before brought. What lies behind may be lower,
    but there the features have often collapsed towards a constant output. Of the rungs walked it takes the highest
    whose loss is within 0.3 % of the lowest.

    Args:
        ladder (`Sequence[float]`): Learning rates, in rising order.
        loss_at (`Callable[[float], float]`): The loss after a step with that learning rate.
        start_loss (`float`): The loss before the step.

    Returns:
        `tuple[float | None, dict[float, float]]`: the rate, or `None` if the loss is flat from end to end or rises at
        the first rung; every rung walked, with its loss.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.ladder import first_valley
    >>> losses = {1e-4: 2.2, 1e-3: 1.8, 1e-2: 2.6, 1e-1: 0.9}
    >>> first_valley(list(losses), losses.get, start_loss=2.3)
    (0.001, {0.0001: 2.2, 0.001: 1.8, 0.01: 2.6})

    ```
    """
    lowest, before, gain = start_loss, start_loss, 0.0
    walked: list[tuple[float, float]] = []
    losses: dict[float, float] = {}
    for rate in ladder:
        losses[rate] = loss = loss_at(rate)
        lost_again = loss > start_loss and lowest < raised(start_loss, -TOLERANCE)
        if not math.isfinite(loss) or loss > raised(lowest, RISE) or lost_again:
            break
        on_shelf = lowest < raised(start_loss, -FALL) and before - loss < SHELF * gain
        if on_shelf and loss < raised(lowest, -TOLERANCE):
            break
        walked.append((rate, loss))
        if on_shelf:
            break
        lowest, gain, before = min(lowest, loss), before - loss, loss
    lowest_rungs = [rate for rate, loss in walked if loss <= raised(lowest, TOLERANCE)]
    flat = lowest > raised(start_loss, -TOLERANCE) and len(walked) == len(ladder)
    return None if flat or not lowest_rungs else lowest_rungs[-1], losses


def head_valley(
    loss_at: Callable[[float], float], start_loss: float, lr_min: float = 0.0, lr_max: float = math.inf
) -> tuple[float | None, dict[float, float]]:
    """The first valley of the loss along the step of a head, fresh or trained before.

    Args:
        loss_at (`Callable[[float], float]`): The loss after a step of the head with that learning rate.
        start_loss (`float`): The loss before the step.
        lr_min (`float`, *optional*, defaults to 0.0), lr_max (`float`, *optional*, defaults to `math.inf`): Rungs
            outside these bounds are left out.

    Returns:
        `tuple[float | None, dict[float, float]]`: as [`first_valley`] does.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.ladder import head_valley
    >>> rate, losses = head_valley(lambda rate: 2.3 + abs(rate - 1e-2), start_loss=2.31)
    >>> rate, len(losses)
    (0.01, 3)

    ```
    """
    losses: dict[float, float] = {}

    def once(rate: float) -> float:
        if rate not in losses:
            losses[rate] = loss_at(rate)
        return losses[rate]

    lower, ladder = ([rate for rate in rates if lr_min <= rate <= lr_max] for rates in (LOWER_HEAD_LADDER, HEAD_LADDER))
    valley, _ = first_valley(ladder, once, start_loss)
    while lower and (valley is None or valley == ladder[0]):
        ladder.insert(0, lower.pop())
        valley, _ = first_valley(ladder, once, start_loss)
    return valley, dict(sorted(losses.items()))
