import math

import pytest
import torch
from torch import nn
from watched import LAYERS, cosine, run

from metalr_hf.compare.strategies.layer_factors import AutoLR, sorting_score


def test_auto_rgn_scales_by_the_relative_gradient_norm(tmp_path):
    watch, groups, _ = run(tmp_path, "auto_rgn")
    for step, rates in enumerate(watch.rates):
        relative = {}
        for layer, names in groups.items():
            gradient = math.sqrt(sum(float((watch.gradients[step][name] ** 2).sum()) for name in names))
            weight = math.sqrt(sum(float((watch.weights[step][name] ** 2).sum()) for name in names))
            relative[layer] = gradient / weight
        largest = max(relative.values())
        expected = {layer: 1e-2 * cosine(step) * value / largest for layer, value in relative.items()}
        assert rates == pytest.approx(expected, rel=1e-4)


def test_autolr_makes_variations_grow_towards_the_output():
    strategy = AutoLR()
    before = [nn.Parameter(torch.zeros(4)) for _ in range(4)]
    layers = dict(zip(LAYERS, [[p] for p in before], strict=True))
    strategy.before = {layer: [p.detach().clone() for p in parameters] for layer, parameters in layers.items()}
    # Variations ‖Δθ‖ / n of 0.5 · (4, 2, 1): sorted the wrong way round.
    with torch.no_grad():
        for parameter, size in zip(before, (4.0, 2.0, 1.0, 9.0), strict=True):
            parameter.fill_(size)
    scales = strategy.adjust(layers)
    low, high = 0.5 * 3, 2.0 * 0.4
    wanted = [low, (low + high) / 2, high]
    assert scales == pytest.approx(
        {layer: w / v for layer, w, v in zip(LAYERS[:3], wanted, (2.0, 1.0, 0.5), strict=True)}
    )
    strategy.scales = {"stem": 0.5}
    with torch.no_grad():
        for parameter, size in zip(before, (1.0, 2.0, 4.0, 9.0), strict=True):
            parameter.fill_(size)
    assert strategy.adjust(layers) == {"stem": 0.5}, "sorted already"


def test_autolr_adjusts_once_an_epoch(tmp_path):
    watch, _, _ = run(tmp_path, "autolr")
    ratios = [
        {layer: rate / (1e-2 * cosine(step)) for layer, rate in rates.items()} for step, rates in enumerate(watch.rates)
    ]
    # Two steps an epoch.
    assert ratios[0] == ratios[1] == pytest.approx(dict.fromkeys(LAYERS, 1.0))
    assert ratios[2] == pytest.approx(ratios[3])
    assert all(ratio["head"] == pytest.approx(1.0) for ratio in ratios)


def test_how_well_values_are_sorted():
    assert sorting_score([1.0, 2.0, 3.0, 4.0]) == 1.0
    # Ranks 3 2 1 0 against 0 1 2 3: differences 3 + 1 + 1 + 3 = 8.
    assert sorting_score([4.0, 3.0, 2.0, 1.0]) == pytest.approx(1 - 2 * 8 / 16)
