"""Optimizers of others do what their sources say."""

import pytest
import torch
from torch import nn
from watched import LAYERS, batches, run, trainer_of

from metalr_hf.compare.strategies import STRATEGIES
from metalr_hf.compare.strategies.rate_free import Parabola


def test_schedule_free_radam_is_trainer_s(tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    watch, _, moved = run(tmp_path, "schedule_free_radam")
    assert isinstance(watch.trainer.optimizer.optimizer, schedulefree.RAdamScheduleFree)
    assert [rates[0] for rates in watch.rates] == [1e-2] * 6
    assert all(moved.values())


def test_prodigy_needs_no_learning_rate(tmp_path):
    pytest.importorskip("prodigyopt")
    _, _, moved = run(tmp_path, "prodigy")
    assert moved["head"]
    assert not STRATEGIES["prodigy"].uses_learning_rate


def test_prodigy_plus_estimates_a_step_size_for_every_layer(tmp_path):
    pytest.importorskip("prodigyplus")
    watch, groups, moved = run(tmp_path, "prodigy_plus", steps=12)
    optimizer = watch.trainer.optimizer.optimizer
    assert [group["layer"] for group in optimizer.param_groups] == LAYERS == list(groups)
    sizes = [float(group["d"]) for group in optimizer.param_groups]
    assert len(set(sizes)) > 1
    assert all(1e-6 <= size <= 1e-6 * 2 ** (12 / 4) * 1.001 for size in sizes), "a fourth root of two a step at most"
    assert [set(rates.values()) for rates in watch.rates] == [{1.0}] * 12
    assert watch.trainer.args.max_grad_norm == 0
    assert all(moved.values())


def test_l_dog_steps_by_distance_over_gradients_and_ends_with_the_average(tmp_path):
    pytest.importorskip("dog")
    watch, groups, _ = run(tmp_path, "l_dog", steps=6)
    final = dict(watch.trainer.model.named_parameters())
    for name in [name for names in groups.values() for name in names]:
        start = watch.weights[0][name].double()
        point, average = start, torch.zeros_like(start)
        distance, gradients = 1e-6 * (1 + start.norm()), torch.tensor(1e-8).double()
        for step in range(6):
            assert watch.weights[step][name].double() == pytest.approx(point, rel=1e-4, abs=1e-7)
            point = watch.weights[step][name].double()
            gradient = watch.gradients[step][name].double() + 0.1 * point
            distance = torch.maximum(distance, (point - start).norm())
            gradients = gradients + gradient.square().sum()
            point = point - distance / gradients.sqrt() * gradient
            # Shamir and Zhang's average with the weight (γ + 1) / (γ + t), γ = 8.
            average = average + 9 / (8 + step + 1) * (point - average)
        assert final[name].detach().double() == pytest.approx(average, rel=1e-4, abs=1e-7)


class Quadratic(nn.Module):
    """A loss whose best step is known: ½ · 4 · ‖w - 1‖², so that gradient descent is there at a rate of ¼."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.float64))

    def forward(self, pixel_values, labels):
        return {"loss": 2 * (self.weight - 1).square().sum()}


@pytest.mark.parametrize(("rate", "wanted"), [(0.2, 0.25), (0.3, 0.25), (0.01, 0.02), (1.0, 0.5)])
def test_gen_goes_a_tenth_of_the_way_to_the_minimum_within_a_factor_of_two(tmp_path, rate, wanted):
    pytest.importorskip("GeN")
    model = Quadratic()
    trainer, optimizer = trainer_of(tmp_path, model), torch.optim.SGD(model.parameters(), rate)
    start = model.weight.detach().clone()
    trainer.compute_loss(model, batches(1)[0]).backward()
    for scale in (1.0, 0.5):
        optimizer.param_groups[0]["lr"] = rate
        Parabola(iter(batches(1)), trainer).look_ahead(model, optimizer, scale, "cpu")
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9 * rate + 0.1 * scale * wanted, rel=1e-5)
        assert model.weight.detach() == pytest.approx(start), "the step is not taken yet"


def test_gen_looks_ahead_at_every_fourth_step_from_its_own_rate(tmp_path):
    pytest.importorskip("GeN")
    watch, _, moved = run(tmp_path, "gen", steps=10)
    rates = [rates[0] for rates in watch.rates]
    assert set(rates[:3]) == {1e-4}
    assert len(set(rates[3:7])) == len(set(rates[7:])) == 1
    assert len(set(rates)) > 1
    assert watch.trainer.extra_passes == 2
    assert all(moved.values())
