"""Dice and Hausdorff distance of volumes, against figures worked out by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from transformers import EvalPrediction

from metalr_hf.tasks.metrics import build_volume_metrics, measure_volumes


def box(*corners, shape=(12, 12, 12), value=1):
    mask = torch.zeros(shape, dtype=torch.int64)
    mask[tuple(slice(*corner) for corner in corners)] = value
    return mask


def logits_of(mask, classes):
    return torch.nn.functional.one_hot(mask, classes).movedim(-1, 0)[None].float()


def measure(guess, truth, spacing=(1.0, 1.0, 1.0), classes=2):
    labels = (truth[None], torch.tensor([spacing]))
    return measure_volumes(logits_of(guess, classes), labels)[0]


def test_dice_and_distance_of_a_box_that_is_shifted():
    truth, guess = box((2, 6), (2, 6), (2, 6)), box((4, 8), (2, 6), (2, 6))
    dice, distance = measure(guess, truth, spacing=(2.5, 1.0, 1.0))[0].tolist()
    assert dice == pytest.approx(0.5)
    assert distance == pytest.approx(5.0)


def test_the_distance_is_the_95th_percentile_of_the_surfaces_in_mm():
    spacing = (1.5, 1.0, 3.0)
    truth, guess = box((2, 9), (3, 8), (2, 9)), box((3, 11), (3, 9), (1, 7))

    def surface(mask):
        crossed = torch.zeros_like(mask, dtype=torch.bool)
        for axis in range(3):
            for step in (1, -1):
                crossed |= mask.roll(step, axis) == 0
        return np.argwhere((mask.bool() & crossed).numpy()) * spacing

    one, other = surface(guess), surface(truth)
    distances = cdist(one, other)
    expected = max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))
    assert measure(guess, truth, spacing)[0, 1].item() == pytest.approx(expected, rel=1e-5)


def test_a_class_that_is_missed_is_as_far_away_as_the_volume_is_large():
    empty, truth = box((0, 0), (0, 0), (0, 0)), box((2, 6), (2, 6), (2, 6))
    diagonal = 12 * math.sqrt(1 + 4 + 9)
    for guess, mask in ((empty, truth), (truth, empty)):
        assert measure(guess, mask, (1.0, 2.0, 3.0))[0].tolist() == pytest.approx([0.0, diagonal])
    assert torch.isnan(measure(empty, empty)).all()


def test_voxels_that_do_not_count_are_left_out():
    truth = box((2, 6), (2, 6), (2, 6))
    truth[:, :, 8:] = 255
    guess = box((2, 6), (2, 6), (2, 6)) + box((2, 6), (2, 6), (9, 12))
    assert measure(guess, truth)[0].tolist() == [1.0, 0.0]


def test_logits_at_another_voxel_size_are_brought_to_that_of_the_masks():
    truth = box((2, 6), (2, 6), (2, 6))
    small = torch.nn.functional.interpolate(logits_of(truth, 2), scale_factor=0.5, mode="nearest")
    figures = measure_volumes(small, (truth[None], torch.ones(1, 3)))
    assert figures[0, 0, 0] > 0.9


def test_means_are_over_the_volumes_in_which_a_class_is():
    compute = build_volume_metrics(["background", "liver", "lesion"])
    nan = float("nan")
    first, second = [[[0.9, 1.0], [nan, nan]]], [[[0.7, 3.0], [0.4, 8.0]]]
    assert compute(EvalPrediction(torch.tensor(first), None), compute_result=False) == {}
    found = compute(EvalPrediction(torch.tensor(second), None), compute_result=True)
    assert found == pytest.approx(
        {
            "dice": 0.6,
            "hausdorff95": 5.0,
            "dice_liver": 0.8,
            "hausdorff95_liver": 2.0,
            "dice_lesion": 0.4,
            "hausdorff95_lesion": 8.0,
        }
    )
    nothing = compute(EvalPrediction(torch.full((1, 2, 2), nan), None), compute_result=True)
    assert all(math.isnan(value) for value in nothing.values())
