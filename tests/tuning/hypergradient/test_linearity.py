import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from metalr_hf.tuning.hypergradient.linearity import REFUSED_OPTIMIZERS, check_linear, check_optimizer_name


def parameters():
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))]


class SquaredRate(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] ** 2)


class VelocityHoldsTheRate(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                p.sub_(p.grad, alpha=group["lr"])
                velocity.mul_(0.9).add_(p.grad, alpha=group["lr"])


class Idle(torch.optim.SGD):
    def step(self, closure=None):
        pass


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (SquaredRate, "its update is not linear in the learning rate"),
        (VelocityHoldsTheRate, "its state depends on the learning rate"),
        (Idle, "its step did not move the parameters"),
    ],
)
def test_what_does_not_hold_is_said(optimizer, reason):
    with pytest.raises(ValueError, match=f"{optimizer.__name__} cannot be tuned: {reason}"):
        check_linear(optimizer(parameters(), lr=0.1))


def test_the_optimizer_and_random_numbers_are_left_as_they_are():
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    for p in weights:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in weights]
    state = torch.get_rng_state()
    check_linear(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert all(int(optimizer.state[p]["step"]) == 1 for p in weights)


def test_names_of_transformers_that_are_refused_exist_and_say_why():
    known = {name.value for name in OptimizerNames}
    assert set(REFUSED_OPTIMIZERS) <= known
    for name in REFUSED_OPTIMIZERS:
        with pytest.raises(ValueError, match=f"optim='{name}' cannot be tuned: .*Use adamw_torch"):
            check_optimizer_name(OptimizerNames(name))
    check_optimizer_name("adamw_torch")
