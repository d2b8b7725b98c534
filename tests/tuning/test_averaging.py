import copy

import pytest
import torch
from torch import nn

from metalr_hf import MetaLRScheduler, WeightAverage
from metalr_hf.tuning.averaging import POLYNOMIAL_ETA, estimated_statistics

STEPS = 12


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 2))


def trained(model, after_step):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(16, 4, generator=generator)
        model(images.to(next(model.parameters()).dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step()


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def test_the_polynomial_average_is_that_of_a_plain_loop_over_saved_weights():
    model, saved = network(), []
    average = WeightAverage(model)
    trained(model, lambda: (saved.append(weights(model)), average.update()))
    # The recursion written out: step s weighs s (s + 1) ... (s + η - 1), near s to the power of η.
    by_step = torch.tensor(
        [float(torch.tensor([s + i for i in range(int(POLYNOMIAL_ETA))]).double().prod()) for s in range(1, STEPS + 1)],
        dtype=torch.float64,
    )
    by_step /= by_step.sum()
    with average.applied():
        for name, value in weights(model).items():
            expected = sum(w * step[name].double() for w, step in zip(by_step, saved, strict=True))
            torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, saved[-1][name]) for name, value in weights(model).items())


def test_statistics_that_were_estimated_are_not_those_of_an_average_that_is_loaded():
    images = torch.randn(32, 4) + 3
    averages = []
    for shift in (0.0, 1.0):
        model = network()
        model[0].bias.data += shift
        averages.append(WeightAverage(model))
        trained(model, averages[-1].update)

    def statistics(average):
        with average.applied(lambda: average._model(images)):
            return weights(average._model)

    statistics(averages[0])
    averages[0].load_state_dict(averages[1].state_dict())
    first, second = map(statistics, averages)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_what_is_thawed_later_is_averaged_if_it_was_given_and_refused_if_not():
    model = network()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    looking, given = WeightAverage(model), WeightAverage(model, parameters=model.parameters())
    looking.update()
    given.update()
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.weight' is trained, but was frozen when the average was made"):
        looking.update()
    saved = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    given.update()
    with given.applied():
        assert (model[0].weight > saved).all()
        assert (model[0].weight < saved + 1).all()


def test_an_exponential_average_is_torchs_once_it_is_warm():
    model = network(norm=False)
    average = WeightAverage(model, 0.2)
    other = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.2))
    # (1 + 2) / (10 + 2) is above 0.2 from the second step on.
    trained(model, lambda: (average.update(), other.update_parameters(model)))
    with average.applied():
        for ours, theirs in zip(model.parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_slow_exponential_average_does_not_hold_on_to_the_first_weights():
    model = network(norm=False)
    model[0].weight.requires_grad_(False).zero_()
    average = WeightAverage(model, 0.9999, parameters=[model[0].weight])
    average.update()
    model[0].weight.fill_(1.0)
    for _ in range(50):
        average.update()
    with average.applied():
        assert float(model[0].weight.min()) > 0.99


@pytest.mark.parametrize("kind", ["mean", "1", 0.0, 1.0, "nan"])
def test_another_kind_is_refused(kind):
    with pytest.raises(ValueError, match=r"average_weights=.* must be \"polynomial\", or the decay"):
        WeightAverage(network(), kind)


def test_in_half_precision_the_average_is_in_float32():
    model = network(norm=False).to(torch.bfloat16)
    average, saved = WeightAverage(model, 0.5), []
    trained(model, lambda: (saved.append(weights(model)["0.weight"].float()), average.update()))
    expected = saved[0]
    for t, value in enumerate(saved[1:], start=2):
        expected = expected.lerp(value, 1 - min(0.5, (1 + t) / (10 + t)))
    state = average.state_dict()["average"]["0.weight"]
    assert state.dtype == torch.float32
    assert torch.equal(state, expected)
    with average.applied():
        assert torch.equal(model[0].weight, expected.to(torch.bfloat16))


def test_only_what_is_trained_is_copied():
    model = network()
    model[0].requires_grad_(False)
    average = WeightAverage(model)
    average.update()
    names = {"1.weight", "1.bias", "1.running_mean", "1.running_var", "3.weight", "3.bias"}
    assert average.state_dict()["average"].keys() == names


def test_the_state_goes_on_bitwise_and_holds_both_weights():
    whole, model = network(), network()
    average = WeightAverage(whole)
    trained(whole, average.update)
    with average.applied():
        # A state that is taken while the average is in place, too.
        state = copy.deepcopy(average.state_dict())
    again = WeightAverage(model)
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(whole).values(), strict=True))
    for one, its_model in ((average, whole), (again, model)):
        its_model[0].weight.data.add_(1.0)
        one.update()
        one.copy_to_model()
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(whole).values(), strict=True))


def test_a_state_of_other_parameters_is_refused():
    average = WeightAverage(network())
    average.update()
    with pytest.raises(ValueError, match=r"of other parameters: 1\.bias and 3 more"):
        WeightAverage(network(norm=False)).load_state_dict(average.state_dict())


def test_a_restart_forgets():
    model = network(norm=False)
    average = WeightAverage(model)
    trained(model, average.update)
    average.restart()
    last = weights(model)
    with average.applied():
        assert all(torch.equal(value, last[name]) for name, value in weights(model).items())
    average.update()
    with average.applied():
        assert all(torch.equal(value, last[name]) for name, value in weights(model).items())


def test_contexts_are_nested_and_end_with_an_error():
    model = network()
    average = WeightAverage(model)
    trained(model, average.update)
    last = weights(model)

    def look():
        with average.applied():
            outer = weights(model)
            with average.applied():
                inner = weights(model)
            assert all(torch.equal(value, outer[name]) for name, value in inner.items())
            assert all(torch.equal(value, outer[name]) for name, value in weights(model).items())
            raise KeyError

    with pytest.raises(KeyError):
        look()
    assert all(torch.equal(value, last[name]) for name, value in weights(model).items())


def test_statistics_estimated_anew_are_those_of_torchs_update_bn():
    model, images = network(), torch.randn(32, 4, generator=torch.Generator().manual_seed(2))
    average, calls = WeightAverage(model), []
    trained(model, average.update)
    last, count, momentum = weights(model), int(model[1].num_batches_tracked), model[1].momentum

    def forwards():
        calls.append(0)
        for batch in images.split(8):
            model(batch)

    with average.applied(forwards):
        other = copy.deepcopy(model)
        torch.optim.swa_utils.update_bn(images.split(8), other)
        assert torch.equal(model[1].running_var, other[1].running_var)
        assert torch.equal(model[1].running_mean, other[1].running_mean)
    with average.applied(forwards):
        assert torch.equal(model[1].running_var, other[1].running_var)
    # Once a step, however often the average is looked at.
    assert len(calls) == 1
    assert all(torch.equal(value, last[name]) for name, value in weights(model).items())
    assert (int(model[1].num_batches_tracked), model[1].momentum) == (count, momentum)


def test_a_batch_norm_that_is_held_in_eval_mode_keeps_its_statistics():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(Frozen(4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model.train()
    images = torch.randn(64, 4) + 3
    with estimated_statistics(model):
        model(images)
    assert torch.equal(model[0].running_mean, torch.zeros(4))
    # Dropout is off, as it will be when the network is used.
    torch.testing.assert_close(model[2].running_mean, model[0](images).mean(0), rtol=1e-5, atol=1e-5)
    assert [module.training for module in model] == [False, True, True]


def test_with_the_scheduler_in_a_loop_of_ones_own():
    model = network(norm=False)
    optimizer = torch.optim.SGD([{"params": model.parameters(), "layer": "all"}], lr=0.1)
    scheduler, average, seen = MetaLRScheduler(optimizer), WeightAverage(model), []
    for _ in range(4):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step(lambda: model(torch.randn(8, 4)).square().mean())
        optimizer.zero_grad()
        average.update()
        seen.append(weights(model)["0.weight"])
    with average.applied():
        assert seen[0].min() <= model[0].weight.max()
        assert not torch.equal(model[0].weight, seen[-1])
