import math

import pytest
import torch

from metalr_hf import MetaLRScheduler
from metalr_hf.tuning.guard import TuningGuard


def test_noise_is_not_harm_and_harm_is_called_once():
    guard = TuningGuard()
    assert not any(guard.harmful(loss) for loss in (2.3, 2.0, 0.5, 0.1, 0.9, 2.4, math.nan, math.inf))
    assert guard.harmful(20.0)
    # The loss needs some steps to come down again.
    assert not any(guard.harmful(20.0) for _ in range(4))
    assert guard.harmful(20.0)
    assert not TuningGuard(active=False).harmful(1e9)


def test_a_step_that_still_goes_down_at_its_end_is_not_to_blame():
    guard = TuningGuard()
    assert not any(guard.harmful(loss, slope=1.0) for loss in (2.3, 2.0, 0.5, 0.1))
    assert not guard.harmful(20.0, slope=-0.01)
    # One odd batch does not make the next harmful step bearable.
    assert guard.mean_loss < 3
    assert guard.harmful(30.0, slope=0.01)
    # What follows a harmful step comes down again, and does not count.
    mean = guard.mean_loss
    assert not any(guard.harmful(loss, slope=-1.0) for loss in (29.0, 20.0, 10.0, 9.0))
    assert guard.mean_loss == mean


def test_a_loss_far_below_that_of_the_beginning_leaves_room_for_noise():
    guard = TuningGuard()
    guard.begin(math.nan)
    guard.begin(0.7)
    guard.begin(9.0)
    assert not any(guard.harmful(loss, slope=1.0) for loss in (0.01, 0.05, 2.0))
    assert guard.harmful(2.2, slope=1.0)
    below_zero = TuningGuard()
    below_zero.begin(-5.0)
    assert not any(below_zero.harmful(loss, slope=1.0) for loss in (0.1, 0.5))


def test_the_state_goes_on_where_it_was():
    guard, other = TuningGuard(), TuningGuard()
    for loss in (2.0, 1.0, 9.0):
        guard.harmful(loss)
    guard.count(False)
    other.load_state_dict(guard.state_dict())
    assert vars(other) == vars(guard)


def quadratic(source, lr):
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.SGD([weight], lr=lr)
    scheduler = MetaLRScheduler(optimizer, meta_source=source, lr_max=1e3, max_lr_change=2.0)

    def loss():
        return 50 * (weight**2).sum()

    return weight, optimizer, scheduler, loss


def test_a_harmful_step_is_taken_back_along_the_stream():
    # The curvature is 100, so that a step with 0.0199 is stable and one with 1.0 multiplies the weights by -99.
    weight, optimizer, scheduler, loss = quadratic("stream", 1e-3)
    for rate in (1e-3, 1.0):
        scheduler.learning_rates[:] = rate
        optimizer.param_groups[0]["lr"] = rate
        before = weight.detach().clone()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.guard.refused == 1
    assert loss().item() <= scheduler.guard.limit
    assert float(scheduler.learning_rates) == 1.0 / 4**3
    torch.testing.assert_close(weight.detach(), before - before * 100 / 4**3)


def test_a_harmful_step_is_taken_back_by_the_next_batch():
    weight, optimizer, scheduler, loss = quadratic("next_batch", 1e-3)
    norms = []
    for step in range(6):
        if step == 2:
            scheduler.learning_rates[:] = 1.0
            optimizer.param_groups[0]["lr"] = 1.0
        optimizer.zero_grad()
        value = loss()
        value.backward()
        scheduler.note_gradients(loss=value.detach())
        optimizer.step()
        scheduler.step()
        norms.append(weight.norm().item())
    assert scheduler.guard.refused == 1
    assert norms[2] > 50 * norms[1]
    assert 0.1 < float(scheduler.learning_rates) < 0.26


def test_another_look_ahead_says_nothing_of_the_step_that_did_harm():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    scheduler = MetaLRScheduler(optimizer, meta_source="stream", lookahead="sgd", lr_max=1e3, max_lr_change=2.0)
    for rate in (1e-3, 1e-3, 30.0):
        scheduler.learning_rates[:] = rate
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (weight**2).sum().backward()
        optimizer.step()
        scheduler.step(lambda: (weight**2).sum())
    assert scheduler.guard.refused == 1


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_no_step_is_taken_back_for_an_odd_batch(source):
    _, optimizer, scheduler, loss = quadratic(source, 1e-3)
    for step in range(6):
        # An image with a wrong label, say, whose loss is large whatever the step before did.
        odd = 1e6 if step == 3 else 0.0
        optimizer.zero_grad()
        value = loss() + odd
        value.backward()
        if source == "next_batch":
            scheduler.note_gradients(loss=value.detach())
        optimizer.step()
        scheduler.step(*[lambda odd=odd: loss() + odd] * (source == "stream"))
    assert scheduler.guard.refused == 0
    assert scheduler.guard.limit < 1e4
    assert float(scheduler.learning_rates) > 1e-3


def test_nothing_is_refused_when_nothing_is_tuned():
    weight, optimizer, _, loss = quadratic("stream", 1.0)
    scheduler = MetaLRScheduler(optimizer, hyper_lr=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        scheduler.step(loss)
    assert scheduler.guard.refused == 0
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, -2.0]) * (-99.0) ** 3)


def test_a_loss_below_zero_is_judged_by_its_size():
    guard = TuningGuard()
    assert not any(guard.harmful(loss) for loss in (-0.5, -0.7, -0.9, -0.2, 0.4))
    assert guard.harmful(2.0)


def test_a_loss_that_crosses_zero_is_not_refused_for_being_near_it():
    guard = TuningGuard()
    assert not any(guard.harmful(loss) for loss in (0.01, -0.3, -0.2, -0.4, 0.2, -0.9))
    assert guard.harmful(2.5)


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_a_loss_that_falls_below_zero_is_tuned_without_a_step_taken_back(source):
    # The first loss is just below zero.
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    inputs, targets = torch.randn(96, 8), torch.randn(96, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = MetaLRScheduler(optimizer, meta_source=source)

    def loss(rows):
        return -torch.nn.functional.cosine_similarity(model(inputs[rows]), targets[rows]).mean()

    for _ in range(40):
        batch, meta_batch = torch.randperm(96).split(48)
        value = loss(batch)
        value.backward()
        scheduler.note_gradients(loss=value.detach())
        optimizer.step()
        scheduler.step(lambda rows=meta_batch: loss(rows))
        optimizer.zero_grad()
    assert loss(slice(None)).item() < -0.5
    assert scheduler.guard.refused == 0
    assert float(scheduler.learning_rates) > 1e-3


def test_a_layer_that_is_held_keeps_its_rate_when_a_step_is_taken_back():
    weights = [torch.nn.Parameter(torch.tensor([1.0])) for _ in range(2)]
    groups = [{"params": weights[:1], "layer": "stem"}, {"params": weights[1:], "layer": "head"}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    scheduler = MetaLRScheduler(optimizer, hold_steps={"head": 3})
    # The run began where the loss was low.
    scheduler.guard.harmful(1.0)
    sum(50 * (weight**2).sum() for weight in weights).backward()
    optimizer.step()
    scheduler.step(lambda: sum(50 * (weight**2).sum() for weight in weights))
    assert scheduler.guard.refused == 1
    assert scheduler.learning_rates.tolist() == [1 / 64, 1.0]
    # The step itself did harm in both.
    torch.testing.assert_close(torch.stack([w.detach() for w in weights]), torch.full((2, 1), 1.0 - 100 / 64))


def test_steps_taken_back_are_counted_and_the_first_is_warned_of(caplog):
    guard = TuningGuard()
    guard.count_refused()
    guard.count_refused()
    assert guard.refused == 2
    assert len(caplog.messages) == 1
    guard.harmful(1.0)
    guard.restart()
    assert guard.refused == 2
    assert math.isnan(guard.mean_loss)
