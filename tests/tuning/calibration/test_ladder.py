import math

import pytest

from metalr_hf.tuning.calibration.ladder import first_valley


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
