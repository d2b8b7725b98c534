import copy
import random

import numpy as np
import torch
from torch import nn
from tuned_loop import loss_of, make

from metalr_hf.tuning.contexts import preserve_random_state, untouched


def test_untouched_puts_buffers_modes_and_random_numbers_back():
    model, *_ = make()
    model[3].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with untouched(model):
        # A module held in eval mode works as it does in the training step.
        assert model.training
        assert not model[3].training
        loss_of(model, slice(0, 32)).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model[3].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with untouched(model, "eval"):
        assert not model.training


class Counting(nn.Module):
    """Puts a new tensor in the place of a buffer, as running means written by hand often do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("seen", None)

    def forward(self, values):
        self.count, self.seen = self.count + 1, values
        return values


def test_buffers_that_a_forward_replaces_are_put_back():
    model = Counting()
    count = model.count
    with untouched(model):
        model(torch.ones(2))
    assert model.count is count
    assert model.count == 0
    assert model.seen is None


def test_random_numbers_drawn_inside_are_drawn_again_outside():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with preserve_random_state():
        inside = draw()
        random.seed(1)
    assert draw() == inside
    assert draw() != inside
