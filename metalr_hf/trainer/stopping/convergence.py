"""When a run that stops by itself evaluates, and when it has converged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# What the evaluations may cost, as a share of the training.
EVALUATION_SHARE = 0.05
# Two evaluations are at least so many times the steps of the first apart: their number grows as the logarithm.
EVALUATION_GROWTH = 1.1
# The share of the steps taken that may pass without a better evaluation, so that patience grows with the run.
PATIENCE = 1 / 3
# A smaller gain, as a share of the largest value up to then, is noise, or a loss that creeps on without end.
IMPROVEMENT = 0.02
# And this share of the standard error. The images are the same each time, so that the difference has a smaller one.
ERRORS = 0.5
# The rates are tuned during the first 40 steps, and a loss may rise and fall again in the next.
FIRST_STOP = 200
FEWEST_WORSE = 2
WORSE_BY_ERRORS = 2.0


class Evaluated(NamedTuple):
    """What an evaluation gave.

    Args:
        step (`int`): The optimizer step.
        metric (`float`): The metric.
        error (`float`, *optional*, defaults to 0.0): Its standard error, if it is known.
    """

    step: int
    metric: float
    error: float = 0.0


def evaluation_steps(step: int, cost: float) -> int:
    """The step of the next evaluation.

    Args:
        step (`int`): The step of the last one, 0 if there was none.
        cost (`float`): What an evaluation costs, in optimizer steps.

    Returns:
        `int`

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.convergence import evaluation_steps
    >>> steps = [0]
    >>> for _ in range(6):
    ...     steps.append(evaluation_steps(steps[-1], cost=2.0))
    >>> steps
    [0, 40, 80, 120, 160, 200, 240]
    >>> evaluation_steps(1000, cost=2.0)
    1100

    ```
    """
    # Rounded, because 1.1 times 1000 is a little more than 1100.
    return max(step + max(1, math.ceil(cost / EVALUATION_SHARE)), math.ceil(round(step * EVALUATION_GROWTH, 6)))


def best_evaluation(evaluations: Sequence[Evaluated], greater_is_better: bool) -> Evaluated | None:
    """The last evaluation that beat all before it by more than noise.

    That is by a fiftieth of the largest value up to then, and by half of the standard error. A share of the best would
    not do: a loss that goes to zero halves for ever.

    Args:
        evaluations (`Sequence[Evaluated]`): Those up to now.
        greater_is_better (`bool`): Of the metric.

    Returns:
        [`Evaluated`], *optional*: `None` if there is none that is a number.

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.convergence import Evaluated, best_evaluation
    >>> evaluations = [Evaluated(20, 1.0), Evaluated(40, 0.1), Evaluated(60, 0.09)]
    >>> best_evaluation(evaluations, greater_is_better=False).step
    40
    >>> best_evaluation([*evaluations, Evaluated(80, 0.07)], greater_is_better=False).step
    80

    ```
    """
    best: Evaluated | None = None
    largest = 0.0
    for one in evaluations:
        if not math.isfinite(one.metric):
            continue
        largest = max(largest, abs(one.metric))
        if best is None:
            best = one
            continue
        gain = (one.metric - best.metric) * (1 if greater_is_better else -1)
        if gain > max(IMPROVEMENT * largest, ERRORS * best.error):
            best = one
    return best


def has_converged(evaluations: Sequence[Evaluated], greater_is_better: bool) -> bool:
    """Whether the best evaluation has not been beaten in the last third of the steps taken.

    Nor in two evaluations, and not before step 200, so that noise stops no run at once.

    Args:
        evaluations (`Sequence[Evaluated]`): Those up to now.
        greater_is_better (`bool`): Of the metric.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.convergence import Evaluated, has_converged
    >>> evaluations = [Evaluated(80, 1.0), Evaluated(160, 0.6), Evaluated(200, 0.61), Evaluated(220, 0.62)]
    >>> has_converged(evaluations, greater_is_better=False)
    False
    >>> has_converged([*evaluations, Evaluated(242, 0.61)], greater_is_better=False)
    True

    ```
    """
    if not evaluations:
        return False
    step = evaluations[-1].step
    best = best_evaluation(evaluations, greater_is_better)
    best_step = 0 if best is None else best.step
    return step >= earliest_stop(best_step) and sum(other.step > best_step for other in evaluations) >= FEWEST_WORSE


def is_clearly_worse(evaluations: Sequence[Evaluated], greater_is_better: bool) -> bool:
    """Whether the last evaluation is worse than the best by more than noise.

    That is by more than a fiftieth of the largest value up to then, and more than twice the larger of their standard
    errors: the best of many evaluations on few images may be a lucky one, with hardly any error.

    Args:
        evaluations (`Sequence[Evaluated]`): Those up to now, at least one.
        greater_is_better (`bool`): Of the metric.

    Returns:
        `bool`: also `True` if the last one is not a number.

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.convergence import Evaluated, is_clearly_worse
    >>> evaluations = [Evaluated(20, 1.0), Evaluated(40, 0.5), Evaluated(60, 0.51)]
    >>> is_clearly_worse(evaluations, greater_is_better=False)
    False
    >>> is_clearly_worse([*evaluations, Evaluated(80, 0.6)], greater_is_better=False)
    True

    ```
    """
    last, sign = evaluations[-1], 1 if greater_is_better else -1
    finite = [one for one in evaluations if math.isfinite(one.metric)]
    if not math.isfinite(last.metric):
        return True
    best = max(finite, key=lambda one: sign * one.metric)
    noise = max(IMPROVEMENT * max(abs(one.metric) for one in finite), WORSE_BY_ERRORS * max(best.error, last.error))
    return sign * (best.metric - last.metric) > noise


def earliest_stop(best_step: int) -> int:
    """The first step at which a run may stop if its best is that of a step.

    Args:
        best_step (`int`): The step of the best, 0 if there is none.

    Returns:
        `int`

    Example:

    ```python
    >>> from metalr_hf.trainer.stopping.convergence import earliest_stop
    >>> earliest_stop(0), earliest_stop(200)
    (200, 300)

    ```
    """
    return max(FIRST_STOP, math.ceil(round(best_step / (1 - PATIENCE), 6)))
