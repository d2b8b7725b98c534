"""The loss after the best temperature scaling."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from metalr_hf.tasks.metrics import refined_losses


def refined_loss(logits, labels):
    losses = refined_losses(logits, labels)
    return None if losses is None else losses.mean()


def test_it_is_the_lowest_loss_of_any_temperature():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    logits = rng.normal(size=(200, 5)) + 2 * np.eye(5)[labels]
    lowest = min(
        cross_entropy(torch.tensor(logits) / t, torch.tensor(labels)).item() for t in torch.logspace(-2, 2, 800)
    )
    for sure in (0.1, 1.0, 20.0):
        assert refined_loss((sure * logits).astype("float32"), labels) == pytest.approx(lowest, abs=1e-4)
    # Unknown labels are left out, and answers that are no better than none cost what a constant answer costs.
    with_unknown = np.concatenate([logits, rng.normal(size=(9, 5))]), np.concatenate([labels, np.full(9, -100)])
    assert refined_loss(*with_unknown) == pytest.approx(lowest, abs=1e-4)
    assert refined_loss(-logits, labels) == pytest.approx(np.log(5), abs=0.05)


def test_what_are_no_logits_of_classes_has_none():
    logits, labels = np.zeros((4, 3)), np.zeros(4, int)
    assert refined_loss(logits, labels) == pytest.approx(np.log(3))
    others = [(None, labels), (logits, None), (logits, np.zeros((4, 3))), (logits, np.zeros(4))]
    others += [(np.zeros((4, 8, 8)), np.zeros((4, 8, 8), int)), (np.zeros((4, 1)), labels), (logits, labels - 1)]
    assert [refined_loss(*other) for other in others] == [None] * len(others)
    assert np.isnan(refined_loss(np.full((4, 3), np.nan), labels))
