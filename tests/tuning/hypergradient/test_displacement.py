import copy
import io

import pytest
import torch
from small_runs import arguments, images, vit
from torch import nn

from metalr_hf import MetaLRScheduler, MetaLRTrainer
from metalr_hf.tuning.hypergradient import LookAhead
from metalr_hf.tuning.hypergradient.displacement import StepFromState, bias_corrections, step_options

TOLD = {
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "adamw_fused": (torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "adam_with_l2": (torch.optim.Adam, {"weight_decay": 0.1, "betas": (0.8, 0.9)}),
    "amsgrad": (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
}
COPIED = {
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "plain_sgd": (torch.optim.SGD, {}),
    "rate_is_a_tensor": (torch.optim.AdamW, {"lr": torch.tensor(0.1)}),
    "rmsprop": (torch.optim.RMSprop, {}),
}


def parameters(dtype=torch.float64):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 4, dtype=dtype)), nn.Parameter(torch.randn(5, dtype=dtype))]


def step(optimizer, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    look_ahead = LookAhead(optimizer)
    look_ahead.before_step([[weights[0]], [weights[1]]])
    start = [p.detach().clone() for p in weights]
    optimizer.step()
    look_ahead.after_step()
    return look_ahead, start


@pytest.mark.parametrize("name", TOLD)
def test_the_state_tells_the_step_that_was_taken(name):
    kind, options = TOLD[name]
    weights = parameters()
    optimizer = kind([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.02}], **options)
    for seed in range(4):
        look_ahead, start = step(optimizer, weights, seed)
        assert not look_ahead._displacement
        stepped = [p.detach().clone() for p in weights]
        expected = [((a - b) * p.grad).sum() for a, b, p in zip(stepped, start, weights, strict=True)]
        torch.testing.assert_close(look_ahead.inner_products(), torch.stack(expected), rtol=1e-11, atol=1e-13)
        with look_ahead.moved_to([0.0, 0.5]):
            torch.testing.assert_close(weights[0].data, start[0], rtol=0, atol=1e-14)
            torch.testing.assert_close(weights[1].data, (start[1] + stepped[1]) / 2, rtol=0, atol=1e-14)
        assert all(torch.equal(p, q) for p, q in zip(weights, stepped, strict=True))
        # Once as long, kept open, and back to the start from there.
        look_ahead.rescale([2.0, 1.0], keep=True)
        torch.testing.assert_close(weights[0].data, 2 * stepped[0] - start[0], rtol=0, atol=1e-14)
        look_ahead.rescale([0.0, 0.0])
        for p, q in zip(weights, start, strict=True):
            torch.testing.assert_close(p.data, q, rtol=0, atol=1e-13)


def step_to(kind, groups, state, weights, gradients, rates):
    """Where the optimizer itself ends from a state with other rates."""
    twins = [nn.Parameter(p.clone()) for p in weights]
    optimizer = kind([{**group, "params": [twin]} for group, twin in zip(groups, twins, strict=True)])
    optimizer.load_state_dict(state)
    for twin, gradient, group, rate in zip(twins, gradients, optimizer.param_groups, rates, strict=True):
        twin.grad, group["lr"] = gradient, rate
    optimizer.step()
    return [twin.detach() for twin in twins]


# Which of the two parameters has a gradient, step by step: the first is left out for two, the second comes late.
GRADIENTS = [(True, False), (True, True), (False, True), (False, True), (True, True), (True, False), (True, True)]


@pytest.mark.parametrize("name", TOLD)
def test_parameters_that_have_no_gradient_for_some_steps(name):
    kind, options = TOLD[name]
    weights = parameters()
    groups = [{"params": [p], "lr": rate, **options} for p, rate in zip(weights, (0.1, 0.02), strict=True)]
    optimizer = kind(groups)
    look_ahead = LookAhead(optimizer)
    counts = set()
    for seed, present in enumerate(GRADIENTS):
        generator = torch.Generator().manual_seed(seed)
        gradients = [
            torch.randn(p.shape, generator=generator, dtype=p.dtype) if there else None
            for p, there in zip(weights, present, strict=True)
        ]
        state, start = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in weights]
        for p, gradient in zip(weights, gradients, strict=True):
            p.grad = gradient
        look_ahead.before_step([[p] for p in weights])
        optimizer.step()
        look_ahead.after_step()
        assert not look_ahead._displacement
        assert look_ahead.sizes == [int(there) for there in present]
        stepped = [p.detach().clone() for p in weights]
        moved = [(b - a).mul(g).sum() for a, b, g in zip(start, stepped, gradients, strict=True) if g is not None]
        torch.testing.assert_close(look_ahead.inner_products(), torch.stack(moved), rtol=1e-11, atol=1e-13)
        expected = step_to(kind, groups, state, start, gradients, (0.05, 0.06))
        with look_ahead.moved_to([0.5, 3.0]):
            torch.testing.assert_close([p.data for p in weights], expected, rtol=0, atol=1e-13)
        look_ahead.rescale([0.5, 3.0])
        torch.testing.assert_close([p.data for p in weights], expected, rtol=0, atol=1e-13)
        for p, before, gradient in zip(weights, start, gradients, strict=True):
            assert gradient is not None or torch.equal(p, before)
        counts.add(tuple(int(optimizer.state[p].get("step", 0)) for p in weights))
    if kind is not torch.optim.SGD:
        assert (5, 5) in counts
        assert (2, 1) in counts


@pytest.mark.parametrize("name", [*COPIED, "bfloat16"])
def test_where_it_does_not_the_parameters_are_copied(name):
    kind, options = COPIED.get(name, (torch.optim.AdamW, {}))
    weights = parameters(torch.bfloat16 if name == "bfloat16" else torch.float64)
    look_ahead, start = step(kind(weights, **{"lr": 0.1, **options}), weights, 0)
    for displacement, p, before in zip(look_ahead._displacement, weights, start, strict=True):
        assert torch.equal(displacement, before - p.detach())


def test_a_subclass_may_step_otherwise_and_is_not_taken_for_its_parent():
    class Other(torch.optim.AdamW):
        pass

    weights = parameters()
    assert step_options(Other(weights), weights) is None
    assert step_options(torch.optim.AdamW(weights), weights) is not None
    assert step_options(None, weights) is None


def test_steps_counted_on_an_accelerator_give_the_same():
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    look_ahead, _ = step(optimizer, weights, 0)
    expected = look_ahead.inner_products()
    told = StepFromState(optimizer, weights, step_options(optimizer, weights))
    counts = torch.stack([optimizer.state[p]["step"] for p in weights]).double()
    told._corrections = bias_corrections(counts, [own["betas"] for own in told.options])
    look_ahead._from_state = told
    torch.testing.assert_close(look_ahead.inner_products(), expected, rtol=1e-12, atol=0)


def test_gradients_are_consumed_and_what_was_worked_out_is_used_once():
    weights = parameters()
    optimizer = torch.optim.AdamW(weights, lr=0.1)
    look_ahead, start = step(optimizer, weights, 0)
    stepped = [p.detach().clone() for p in weights]
    expected = look_ahead.inner_products()
    assert torch.equal(look_ahead.inner_products(consume=True), expected)
    assert all(p.grad is None for p in weights)
    optimizer.state.clear()  # Not needed any more.
    look_ahead.rescale([1.0, 0.5])
    assert torch.equal(weights[0], stepped[0])
    torch.testing.assert_close(weights[1].data, (start[1] + stepped[1]) / 2, rtol=0, atol=1e-14)
    assert not look_ahead._worked_out


def test_a_step_held_open_is_saved_without_tensors_and_goes_on_bitwise():
    def run(resume):
        weights = parameters(torch.float32)
        groups = [{"params": weights[:1], "layer": "a"}, {"params": weights[1:], "layer": "b"}]
        optimizer = torch.optim.AdamW(groups, lr=0.1)
        scheduler = MetaLRScheduler(optimizer, meta_source="next_batch")
        for seed in range(6):
            if seed == 3 and resume:
                file = io.BytesIO()
                torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
                assert not any("displacement" in key for key in scheduler.state_dict()["look_ahead"])
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                optimizer = torch.optim.AdamW(groups, lr=0.1)
                scheduler = MetaLRScheduler(optimizer, meta_source="next_batch")
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            generator = torch.Generator().manual_seed(seed)
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            scheduler.step()
        return weights, scheduler

    (weights, through), (again, resumed) = run(False), run(True)
    assert torch.equal(through.learning_rates, resumed.learning_rates)
    assert len(set(through.learning_rates.tolist())) == 2
    assert all(torch.equal(p, q) for p, q in zip(weights, again, strict=True))


def test_a_displacement_in_an_older_checkpoint_is_taken():
    weights = parameters()
    look_ahead, start = step(torch.optim.AdamW(weights, lr=0.1), weights, 0)
    layers = [[weights[0]], [weights[1]]]
    copies = [[q - p.detach()] for p, q in zip(weights, start, strict=True)]
    old = LookAhead(torch.optim.AdamW(weights, lr=0.1))
    old.load_state_dict({"displacement": copies}, layers)
    torch.testing.assert_close(old.inner_products(), look_ahead.inner_products(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("optim", "copied"), [("adamw_torch_fused", False), ("sgd", True)])
def test_the_default_optimizer_of_the_trainer_needs_no_copy(tmp_path, optim, copied):
    trainer = MetaLRTrainer(vit(), arguments(tmp_path, optim=optim, max_steps=2), train_dataset=images())
    trainer.train()
    assert trainer.lr_scheduler._look_ahead.taken
    assert bool(trainer.lr_scheduler._look_ahead._displacement) is copied
