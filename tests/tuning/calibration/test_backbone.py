import math

import pytest

from metalr_hf.tuning.calibration.backbone import agree, highest_useful, largest_backbone_lr, losses_down_a_ladder
from metalr_hf.tuning.calibration.ladder import LADDER


def test_the_median_layer_sets_the_limit_and_those_without_a_norm_or_a_step_do_not_count():
    sizes, rates = [0.001, 0.002, 0.5, math.inf, 0.0], [1e-3, 1e-3, 1e-3, 1e-3, 1e-3]
    assert largest_backbone_lr(sizes, rates) == pytest.approx(0.01 * 1e-3 / 0.002)
    assert largest_backbone_lr([math.inf, 0.0], [1e-3, 1e-3]) == LADDER[-1]


def test_a_walk_ends_where_less_is_gained_and_goes_on_over_hills():
    losses = {1e-5: 2.2, 1e-4: 2.1, 1e-3: 2.25, 1e-2: 2.31, 1e-1: 2.29}
    assert list(losses_down_a_ladder(list(losses), losses.get, 2.3)) == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert list(losses_down_a_ladder([1e-4, 1e-3, 1e-2], {1e-2: 1.5, 1e-3: 2.0}.get, 2.3)) == [1e-3, 1e-2]


def test_what_lies_behind_a_hopeless_rung_does_not_count():
    losses = {1e-4: 2.4, 1e-3: 2.2, 1e-2: 2.31, 1e-1: 2.8, 1.0: 0.1}
    assert losses_down_a_ladder(list(losses), losses.get, 2.3) == {**losses, 1.0: math.inf}
    walked = losses_down_a_ladder([1e-4, 1e-3], {1e-4: 0.1, 1e-3: math.nan}.get, 2.3)
    assert walked[1e-4] == 0.1
    assert math.isnan(walked[1e-3])


def test_where_the_lowest_rung_does_harm_the_walk_goes_down_to_the_first_that_does_none():
    losses = {1e-6: 0.1, 1e-5: 2.3, 1e-4: 2.4, 1e-3: 2.5, 1e-2: 2.3}
    walked = losses_down_a_ladder([1e-3, 1e-2], losses.get, 2.3, below=[1e-6, 1e-5, 1e-4])
    assert list(walked) == [1e-5, 1e-4, 1e-3, 1e-2]
    assert list(losses_down_a_ladder([1e-2], losses.get, 2.3, below=[1e-4, 1e-3])) == [1e-2]
    assert losses_down_a_ladder([], losses.get, 2.3) == {}


def test_where_the_lowest_rung_is_the_best_the_walk_goes_down_to_the_first_that_is_not_better():
    losses = {1e-6: 0.1, 1e-5: 2.2, 1e-4: 2.0, 1e-3: 2.1, 1e-2: 2.4}
    walked = losses_down_a_ladder([1e-3, 1e-2], losses.get, 2.3, below=[1e-6, 1e-5, 1e-4])
    assert list(walked) == [1e-5, 1e-4, 1e-3, 1e-2]
    assert list(losses_down_a_ladder([1e-4, 1e-3], losses.get, 2.3, below=[1e-6, 1e-5])) == [1e-5, 1e-4, 1e-3]
    assert list(losses_down_a_ladder([1e-5, 1e-4], losses.get, 2.3, below=[1e-6])) == [1e-5, 1e-4]


def test_below_what_a_look_has_walked_its_loss_changes_as_the_rate_does():
    looks = [{1e-4: -0.05, 1e-3: 0.15}, {1e-3: -0.2}]
    # In the mean -0.035 and -0.025.
    assert highest_useful(looks, [1e-4, 1e-3]) == 1e-3
    assert highest_useful([looks[0], {1e-3: -0.1}], [1e-4, 1e-3]) == 1e-4


def test_one_odd_batch_does_not_outvote_two():
    odd = {1e-4: 0.5, 1e-3: 20.0, 1e-2: math.nan}
    right = {1e-4: -0.1, 1e-3: -0.3, 1e-2: 0.1}
    assert highest_useful([odd], list(right)) is None
    assert highest_useful([odd, right, right], list(right)) == 1e-3


def test_a_hill_before_the_lowest_loss_is_passed_and_the_highest_rate_with_half_of_the_gain_is_taken():
    hill = {1e-4: 0.02, 1e-3: 0.05, 1e-2: -0.2, 1e-1: -0.101, 1.0: -0.099}
    assert highest_useful([hill], list(hill)) == 1e-1
    assert highest_useful([{1e-4: 0.02, 1e-3: -0.002}], [1e-4, 1e-3]) is None
    assert highest_useful([], [1e-4]) is None


def test_a_rate_whose_next_rung_does_harm_is_left_for_the_rung_below():
    sharp = {1e-5: -0.05, 1e-4: -0.15, 1e-3: -0.08, 1e-2: 0.14}
    assert highest_useful([sharp], list(sharp)) == 1e-4
    # The end of the ladder is a limit of its own.
    assert highest_useful([sharp], [1e-5, 1e-4, 1e-3]) == 1e-3
    # Where that gains next to nothing, the step was too short to learn from.
    assert highest_useful([{**sharp, 1e-4: -0.01}], list(sharp)) == 1e-3


def test_looks_agree_where_each_by_itself_finds_the_same_rate():
    right = {1e-4: -0.05, 1e-3: -0.3, 1e-2: 0.1}
    assert agree([right, {1e-4: -0.02, 1e-3: -0.11}])
    # The rung that one of them did not walk was beyond hope there.
    assert not agree([right, {1e-4: -0.1, 1e-3: 0.2}])
    # Each by itself finds 1e-3, but both together ten times as much, or nothing.
    assert not agree([{1e-4: -0.1, 1e-3: -0.05, 1e-2: -0.04}, {1e-4: 0.0, 1e-3: -0.1, 1e-2: -0.049}])
    assert not agree([{1e-4: -0.0032, 1e-3: -0.0017, 1e-2: 0.1}, {1e-4: 0.0, 1e-3: -0.0032, 1e-2: 0.1}])
    assert not agree([right])
    assert not agree([{1e-4: 0.1}, {1e-4: 0.2}])
    assert not agree([])
