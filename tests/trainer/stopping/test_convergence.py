"""The rule by which a run stops: when it looks, and what it takes for better."""

import math

from metalr_hf.trainer.stopping.convergence import (
    EVALUATION_SHARE,
    Evaluated,
    best_evaluation,
    evaluation_steps,
    has_converged,
    is_clearly_worse,
)


def test_spacing_grows_and_bounds_the_cost():
    for cost in (0.01, 0.4, 3.0, 40.0):
        steps = [0]
        while len(steps) < 40:
            steps.append(evaluation_steps(steps[-1], cost))
            assert cost * (len(steps) - 1) <= EVALUATION_SHARE * steps[-1] * (1 + 1e-9)
        assert sorted(set(steps)) == steps
    assert steps[1] == 40 / EVALUATION_SHARE


def seen(*rows):
    return [Evaluated(*row) for row in rows]


def test_noise_and_creeping_do_not_count_as_better():
    creeping = seen(*[(step, 0.5 ** (step / 20)) for step in range(20, 600, 20)])
    assert best_evaluation(creeping, False).step < 200
    assert has_converged(creeping[:14], False)
    falling = seen(*[(step, 1 - step / 1000) for step in range(20, 600, 20)])
    assert not has_converged(falling, False)
    assert has_converged([one._replace(error=0.6) for one in falling], False)
    assert has_converged(seen((100, math.nan), (200, math.nan)), False)
    assert not has_converged(seen((100, math.nan), (190, math.nan)), False)
    assert not has_converged([], False)
    # The higher the better.
    assert best_evaluation(seen((20, 0.5), (40, 0.9), (60, 0.902)), True) == (40, 0.9, 0.0)


def test_what_is_clearly_worse_than_the_best():
    # Within two standard errors, and beyond.
    assert not is_clearly_worse(seen((20, 1.0, 0.1), (40, 0.5, 0.1), (60, 0.69, 0.1)), False)
    assert is_clearly_worse(seen((20, 1.0, 0.1), (40, 0.5, 0.1), (60, 0.71, 0.1)), False)
    # Where no image is answered badly, the error of that evaluation says nothing.
    assert not is_clearly_worse(seen((20, 0.07, 0.05), (40, 0.0, 0.0), (60, 0.03, 0.02)), False)
    # Of figures without an error, by a fiftieth of the largest.
    assert not is_clearly_worse(seen((20, 0.80), (40, 0.90), (60, 0.885)), True)
    assert is_clearly_worse(seen((20, 0.80), (40, 0.90), (60, 0.88)), True)
    assert is_clearly_worse(seen((20, 0.80), (40, math.nan)), True)
