"""How far a backbone may be moved, and what several looks at its ladder say together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from .ladder import LADDER, TOLERANCE, raised

# Where a look has seen the loss so much above its start, further rungs are not tried. They all count as that bad and
# no worse, or one odd batch would outvote two.
HOPELESS = 0.15
# Of the greatest gain along the ladder; and on the rung below it, where a loss that changes as the rate does has 0.32.
KEPT_GAIN, KEPT_BELOW = 0.5, 0.3
# With batches of 32. A longer step, as a share of the norm of what it moves, makes a backbone forget what it was
# trained for, even where the loss falls along it: towards a constant answer, if the fresh head does worse than that.
LARGEST_STEP = 0.01


def largest_backbone_lr(sizes: Sequence[float], step_lrs: Sequence[float], largest_step: float = LARGEST_STEP) -> float:
    """The learning rate with which the step would move the median layer by so much of its norm.

    Args:
        sizes (`Sequence[float]`): By which share of its norm the step moved every layer.
        step_lrs (`Sequence[float]`): The learning rate that the step was taken with, in every layer.
        largest_step (`float`, *optional*, defaults to 0.01): The share of its norm.

    Returns:
        `float`: 1 if no layer has a norm and was moved.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.backbone import largest_backbone_lr
    >>> round(largest_backbone_lr([0.01, 0.02, 0.5], [1e-3, 1e-3, 1e-3]), 6)
    0.0005

    ```
    """
    rates = [rate / size for size, rate in zip(sizes, step_lrs, strict=True) if 0 < size < math.inf]
    return largest_step * median(rates) if rates else LADDER[-1]


def losses_down_a_ladder(
    ladder: Sequence[float], loss_at: Callable[[float], float], start_loss: float, below: Sequence[float] = ()
) -> dict[float, float]:
    """Walks down a ladder to the first rung that gains less than the one above it.

    For most backbones the highest rung, where a step is as long as it may be, is the best one, and the two highest say
    so. Where a rung does harm the walk goes on, for the mean of several looks may have a valley where a single one has
    none. Above a rung with a hopeless loss all count as infinitely bad: a gain behind such a hill is often a collapse
    towards a constant output.

    Args:
        ladder (`Sequence[float]`): Learning rates, in rising order.
        loss_at (`Callable[[float], float]`): The loss after a step with that learning rate.
        start_loss (`float`): The loss before the step.
        below (`Sequence[float]`, *optional*, defaults to `()`): Further rungs, below the ladder, in rising order. Those
            are walked only if the lowest rung of the ladder does harm, or is the best.

    Returns:
        `dict[float, float]`: every rung walked, with its loss, in rising order.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.backbone import losses_down_a_ladder
    >>> losses = {1e-5: 2.2, 1e-4: 2.0, 1e-3: 1.8, 1e-2: 3.0, 1e-1: 0.9}
    >>> losses_down_a_ladder(list(losses), losses.get, start_loss=2.3)
    {0.0001: 2.0, 0.001: 1.8, 0.01: 3.0, 0.1: inf}

    ```
    """
    losses: dict[float, float] = {}
    above = math.inf
    for rate in reversed(ladder):
        loss = loss_at(rate)
        hopeless = not loss <= start_loss + HOPELESS * abs(start_loss)
        if hopeless:
            losses = dict.fromkeys(losses, math.inf)
        losses[rate] = loss
        if above < loss < start_loss:
            return dict(sorted(losses.items()))
        above = math.inf if hopeless else loss
    lowest = losses[ladder[0]] if ladder else start_loss
    for rate in reversed(below):
        harms = lowest > raised(start_loss, TOLERANCE)
        is_best = lowest < raised(start_loss, -TOLERANCE) and lowest <= min(losses.values())
        if not (harms or is_best):
            break
        losses[rate] = lowest = loss_at(rate)
    return dict(sorted(losses.items()))


def highest_useful(changes: Sequence[dict[float, float]], ladder: Sequence[float]) -> float | None:
    """The highest learning rate with at least half of the greatest gain, in the mean of several looks.

    The gain of a single step is greatest at a rate below the one that is best for many steps. But where the next rung
    does harm already, many steps would too, and the rung below is taken if it gains enough. Below the rungs that a look
    has walked, its loss is taken to change as the rate does: such steps are short.

    Args:
        changes (`Sequence[dict[float, float]]`): Learning rate to relative change of the loss, a mapping a look.
        ladder (`Sequence[float]`): Learning rates, in rising order.

    Returns:
        `float | None`: the rate, or `None` if no rate lowers the loss.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.backbone import highest_useful
    >>> looks = [{1e-4: 0.0, 1e-3: -0.1, 1e-2: 0.4}, {1e-4: 0.01, 1e-3: 0.02, 1e-2: -0.1}]
    >>> highest_useful(looks, [1e-4, 1e-3, 1e-2])
    0.001

    ```
    """

    def change(look: dict[float, float], rate: float) -> float:
        lowest = min(look, default=rate)
        found = look[lowest] * rate / lowest if rate < lowest else look.get(rate, HOPELESS)
        return min(found, HOPELESS) if math.isfinite(found) else HOPELESS

    if not changes or not ladder:
        return None
    means = {rate: sum(change(look, rate) for look in changes) / len(changes) for rate in ladder}
    lowest = min(means.values())
    if lowest > -TOLERANCE:
        return None
    rates = sorted(means)
    found = max(i for i, rate in enumerate(rates) if means[rate] <= KEPT_GAIN * lowest)
    next_harms = found + 1 < len(rates) and means[rates[found + 1]] > 0
    if next_harms and found > 0 and means[rates[found - 1]] <= KEPT_BELOW * lowest:
        found -= 1
    return rates[found]


def agree(changes: Sequence[dict[float, float]]) -> bool:
    """Whether several looks find the same learning rate, each by itself and in their mean.

    Args:
        changes (`Sequence[dict[float, float]]`): Learning rate to relative change of the loss, a mapping a look.

    Returns:
        `bool`: `False` for a single look.

    Example:

    ```python
    >>> from metalr_hf.tuning.calibration.backbone import agree
    >>> agree([{1e-4: 0.0, 1e-3: -0.1, 1e-2: 0.4}, {1e-4: -0.01, 1e-3: -0.1, 1e-2: 0.2}])
    True
    >>> agree([{1e-4: 0.0, 1e-3: -0.1, 1e-2: 0.4}, {1e-4: 0.01, 1e-3: 0.02, 1e-2: -0.1}])
    False

    ```
    """
    ladder = sorted({rate for look in changes for rate in look})
    found = {highest_useful(looks, ladder) for looks in (changes, *([look] for look in changes))}
    return len(changes) > 1 and len(found) == 1 and None not in found
