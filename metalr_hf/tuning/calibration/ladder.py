"""The ladder of learning rates that a calibration walks up, and where it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

# Half a decade apart: what one step says is not finer than that.
LADDER = tuple(10 ** (k / 2) for k in range(-12, 1))
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
