"""When a run that stops by itself evaluates, and when it has converged."""

from __future__ import annotations

import math
from collections.abc import Sequence

# What the evaluations may cost, as a share of the training.
EVALUATION_SHARE = 0.05
# Two evaluations are at least so many times the steps of the first apart: their number grows as the logarithm.
EVALUATION_GROWTH = 1.1
# The share of the steps taken that may pass without a better evaluation, so that patience grows with the run.
PATIENCE = 1 / 3
# A smaller gain, as a share of the largest value up to then, is noise, or a loss that creeps on without end.
IMPROVEMENT = 0.02
# The rates are tuned during the first 40 steps, and a loss may rise and fall again in the next.
FIRST_STOP = 200
FEWEST_WORSE = 2


def evaluation_steps(step: int, cost: float) -> int:
    """The step of the next evaluation.

    Args:
        step (`int`): The step of the last one, 0 if there was none.
        cost (`float`): What an evaluation costs, in optimizer steps.

    Returns:
        `int`

    Example:

    ```python
    >>> from metalr_hf.trainer.convergence import evaluation_steps
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


def best_evaluation(evaluations: Sequence[tuple[int, float]], greater_is_better: bool) -> tuple[int, float] | None:
    """The last evaluation that beat all before it by more than noise.

    That is by a fiftieth of the largest value up to then. A share of the best would not do: a loss that goes to zero
    halves for ever.

    Args:
        evaluations (`Sequence[tuple[int, float]]`): Step and metric.
        greater_is_better (`bool`): Of the metric.

    Returns:
        `tuple[int, float]`, *optional*: its step and metric; `None` if there is none that is a number.

    Example:

    ```python
    >>> from metalr_hf.trainer.convergence import best_evaluation
    >>> best_evaluation([(20, 1.0), (40, 0.1), (60, 0.09), (80, 0.2)], greater_is_better=False)
    (40, 0.1)
    >>> best_evaluation([(20, 1.0), (40, 0.1), (60, 0.09), (80, 0.07)], greater_is_better=False)
    (80, 0.07)

    ```
    """
    best: tuple[int, float] | None = None
    largest = 0.0
    for step, metric in evaluations:
        if not math.isfinite(metric):
            continue
        largest = max(largest, abs(metric))
        gain = math.inf if best is None else (metric - best[1]) * (1 if greater_is_better else -1)
        if gain > IMPROVEMENT * largest:
            best = step, metric
    return best


def has_converged(evaluations: Sequence[tuple[int, float]], greater_is_better: bool) -> bool:
    """Whether the best evaluation has not been beaten in the last third of the steps taken.

    Nor in two evaluations, and not before step 200, so that noise stops no run at once.

    Args:
        evaluations (`Sequence[tuple[int, float]]`): Step and metric, up to now.
        greater_is_better (`bool`): Of the metric.

    Returns:
        `bool`

    Example:

    ```python
    >>> from metalr_hf.trainer.convergence import has_converged
    >>> evaluations = [(80, 1.0), (160, 0.6), (200, 0.61), (220, 0.62)]
    >>> has_converged(evaluations, greater_is_better=False)
    False
    >>> has_converged([*evaluations, (242, 0.61)], greater_is_better=False)
    True

    ```
    """
    if not evaluations:
        return False
    step = evaluations[-1][0]
    best = best_evaluation(evaluations, greater_is_better)
    best_step = 0 if best is None else best[0]
    return step >= earliest_stop(best_step) and sum(other > best_step for other, _ in evaluations) >= FEWEST_WORSE


def earliest_stop(best_step: int) -> int:
    """The first step at which a run may stop if its best is that of a step.

    Args:
        best_step (`int`): The step of the best, 0 if there is none.

    Returns:
        `int`

    Example:

    ```python
    >>> from metalr_hf.trainer.convergence import earliest_stop
    >>> earliest_stop(0), earliest_stop(200)
    (200, 300)

    ```
    """
    return max(FIRST_STOP, math.ceil(round(best_step / (1 - PATIENCE), 6)))
