import math

import pytest

from metalr_hf.tuning.calibration.ladder import HEAD_LADDER, LOWER_HEAD_LADDER, first_valley, head_valley


@pytest.mark.parametrize(
    ("losses", "found", "walked"),
    [
        ([2.2, 1.8, 2.6, 0.9], 1e-3, 3),
        ([2.29, 2.2, 2.1, 2.0], 1e-1, 4),
        ([2.2, 1.8, math.nan, 0.1], 1e-3, 3),
        ([2.3, 2.3, 2.3, 2.3], None, 4),
        ([2.3, 2.3, 2.4, 2.0], 1e-3, 3),
        ([2.4, 2.5, 1.0, 1.0], None, 1),
        ([2.2, 1.8, 1.803, 1.0], 1e-2, 3),
        ([2.2, 1.9, 1.88, 0.9], 1e-3, 3),
        ([2.29, 2.285, 2.302, 1.5], 1e-3, 3),
    ],
    ids=["valley", "falling", "not-finite", "flat", "no-harm", "up-at-once", "highest-of-the-lowest", "shelf", "hill"],
)
def test_first_valley(losses, found, walked):
    ladder = [1e-4, 1e-3, 1e-2, 1e-1]
    rate, tried = first_valley(ladder, dict(zip(ladder, losses, strict=True)).get, 2.3)
    assert rate == found
    assert len(tried) == walked


@pytest.mark.parametrize("shift", [0.0, -3.0, -100.0])
def test_a_valley_below_zero_is_found(shift):
    losses = dict(zip((1e-4, 1e-3, 1e-2, 1e-1), [2.0, 1.0, 3.0, 0.5], strict=True))
    found, walked = first_valley(list(losses), lambda rate: losses[rate] + shift, 2.3 + shift)
    assert (found, len(walked)) == (1e-3, 3)


WHOLE = [*LOWER_HEAD_LADDER, *HEAD_LADDER]


@pytest.mark.parametrize("best", WHOLE[:8], ids="{:.0e}".format)
def test_lower_rates_of_a_head_are_tried_only_where_the_higher_ones_are_too_high(best):
    def loss(rate):
        return 2.3 + 0.03 * abs(math.log10(rate / best))

    start = loss(WHOLE[0]) + 0.05
    assert head_valley(loss, start)[0] == first_valley(WHOLE, loss, start)[0] == best
    _, walked = head_valley(loss, start)
    assert (min(walked) < HEAD_LADDER[0]) == (best <= HEAD_LADDER[0])
    assert list(walked) == sorted(walked)


def test_the_bounds_hold_for_a_head():
    found, walked = head_valley(lambda rate: 2.0 - rate, 2.3, lr_min=5e-6, lr_max=2e-4)
    assert (found, list(walked)) == (1e-4, [1e-5, 1e-4])
