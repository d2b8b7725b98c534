import math

import pytest
import torch
from small_runs import images, resnet
from watched import LAYERS, cosine, run

from metalr_hf.compare.strategies import Job, get_strategy


def test_layer_decay_moves_every_layer_at_its_decayed_rate(tmp_path):
    watch, groups, _ = run(tmp_path, "layer_decay")
    assert list(groups) == LAYERS
    for step, rates in enumerate(watch.rates):
        expected = {layer: 1e-2 * 0.75 ** (3 - j) * cosine(step) for j, layer in enumerate(LAYERS)}
        assert rates == pytest.approx(expected)


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


def test_lp_ft_trains_the_head_first_and_then_everything_with_a_decay_each(tmp_path):
    watch, groups, moved = run(tmp_path, "lp_ft", steps=8)
    thawed = [
        [layer for layer, names in groups.items() if any(step[name] is not None for name in names)]
        for step in watch.gradients
    ]
    assert thawed == [["head"]] * 4 + [LAYERS] * 4
    assert [rates[0] for rates in watch.rates] == pytest.approx(
        [1e-2 * 0.5 * (1 + math.cos(math.pi * (step % 4) / 4)) for step in range(8)]
    )
    stem = groups["stem"]
    assert all(torch.equal(watch.weights[0][name], watch.weights[4][name]) for name in stem)
    assert all(moved.values())


def test_autogluon_s_recipe_has_its_rates_whatever_is_given(tmp_path):
    watch, _, _ = run(tmp_path, "autogluon_recipe", steps=20, learning_rate=1.0)
    for step, rates in enumerate(watch.rates):
        shape = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
        assert rates == pytest.approx({layer: 1e-4 * 0.9 ** (3 - j) * shape for j, layer in enumerate(LAYERS)})
