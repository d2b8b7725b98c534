import math

import torch

from metalr_hf import MetaLRScheduler
from metalr_hf.guard import TuningGuard


def test_noise_is_not_harm_and_harm_is_called_once():
    guard = TuningGuard()
    assert not any(guard.harmful(loss) for loss in (2.3, 2.0, 0.5, 0.1, 0.9, 2.4, math.nan, math.inf))
    assert guard.harmful(20.0)
    # The loss needs some steps to come down again.
    assert not any(guard.harmful(20.0) for _ in range(4))
    assert guard.harmful(20.0)
    assert not TuningGuard(active=False).harmful(1e9)


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
    assert float(scheduler.learning_rates) < 0.07


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
