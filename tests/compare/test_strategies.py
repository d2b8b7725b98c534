import math

import pytest
import torch
from small_runs import images, resnet
from torch import nn
from watched import LAYERS, cosine, run

from metalr_hf.compare.layer_factors import AutoLR, sorting_score
from metalr_hf.compare.strategies import STRATEGIES, Job, get_strategy


def test_layer_decay_moves_every_layer_at_its_decayed_rate(tmp_path):
    watch, groups, _ = run(tmp_path, "layer_decay")
    assert list(groups) == LAYERS
    for step, rates in enumerate(watch.rates):
        expected = {layer: 1e-2 * 0.75 ** (3 - j) * cosine(step) for j, layer in enumerate(LAYERS)}
        assert rates == pytest.approx(expected)


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


def test_gradual_unfreezing_begins_with_the_head_and_ends_with_all(tmp_path):
    watch, groups, moved = run(tmp_path, "gradual_unfreeze", steps=9)
    thawed = [
        [layer for layer, names in groups.items() if any(step[name] is not None for name in names)]
        for step in watch.gradients
    ]
    assert thawed[0] == ["head"]
    assert thawed[2] == ["layer1.1", "head"]
    assert thawed[6] == thawed[8] == LAYERS
    assert all(moved.values())


def test_head_only_trains_the_head_alone(tmp_path):
    _, _, moved = run(tmp_path, "head_only")
    assert moved == {"stem": False, "layer1.0": False, "layer1.1": False, "head": True}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("cosine", [cosine(step) for step in range(6)]),
        ("linear_warmup", [0, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5]),
    ],
)
def test_schedules_have_their_shape(tmp_path, name, shape):
    watch, _, _ = run(tmp_path, name)
    assert [rates[0] for rates in watch.rates] == pytest.approx([1e-2 * s for s in shape])


def test_tuned_strategies_tune(tmp_path):
    for name in ("metalr", "metalr_paper"):
        watch, _, _ = run(tmp_path / name, name, learning_rate=1e-3)
        assert list(watch.rates[0]) == LAYERS
        assert len(set(watch.rates[-1].values())) > 1


def test_prodigy_needs_no_learning_rate(tmp_path):
    pytest.importorskip("prodigyopt")
    _, _, moved = run(tmp_path, "prodigy")
    assert moved["head"]
    assert not STRATEGIES["prodigy"].uses_learning_rate


@pytest.mark.parametrize("name", ["layer_decay", "auto_rgn", "autolr"])
def test_with_a_rate_a_layer_the_same_decays_as_in_the_stock_trainer(tmp_path, name):
    def decayed(trainer):
        optimizer = trainer.optimizer or trainer.create_optimizer()
        names = {id(p): name for name, p in model.named_parameters()}
        return {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}

    # Its norms are called "normalization", and their weights decay in Trainer.
    model = resnet()
    arguments = {"output_dir": str(tmp_path), "max_steps": 2, "weight_decay": 0.1, "report_to": "none", "use_cpu": True}
    job = Job(model, 1e-3, arguments, {"train_dataset": images()})
    assert decayed(get_strategy(name).make_trainer(job)) == decayed(job.trainer())


def test_rates_that_stay_up_to_the_end(tmp_path):
    watch, _, _ = run(tmp_path, "metalr_constant", steps=50)
    decayed, _, _ = run(tmp_path, "metalr", steps=50)
    assert watch.rates[41:] == [watch.rates[41]] * 9
    assert decayed.rates[-1]["head"] < 0.1 * watch.rates[-1]["head"]


@pytest.mark.parametrize("name", ["cosine", "auto_rgn", "metalr"])
def test_every_strategy_can_have_the_average_of_its_weights(tmp_path, name):
    plain, _, _ = run(tmp_path / "a", name)
    watch, _, _ = run(tmp_path / "b", f"{name}+average")
    # It takes the same steps.
    assert watch.rates == plain.rates
    for one, other in zip(plain.weights, watch.weights, strict=True):
        assert all(torch.equal(value, other[parameter]) for parameter, value in one.items())
    assert get_strategy(f"{name}+average").uses_learning_rate == get_strategy(name).uses_learning_rate


def test_what_averages_already_is_not_averaged(tmp_path):
    with pytest.raises(ValueError, match=r"average_weights='polynomial': a schedule-free optimizer averages"):
        run(tmp_path, "schedule_free+average")


def test_an_average_of_an_unknown_strategy_is_refused():
    with pytest.raises(ValueError, match=r"strategies='cosin\+average' is not one"):
        get_strategy("cosin+average")
