import gc
import io
import math
import weakref

import pytest
import torch
from torch import nn
from tuned_loop import loss_of, make

from metalr_hf import MetaLRScheduler
from metalr_hf.tuning.contexts import untouched
from metalr_hf.tuning.rules import Proportional, Rule


def train(model, optimizer, scheduler, steps, first=0, meta=True):
    for step in range(first, first + steps):
        rows = torch.randperm(96, generator=torch.Generator().manual_seed(step))
        loss_of(model, rows[:32]).backward()
        optimizer.step()
        if meta:
            scheduler.step(lambda rows=rows: loss_of(model, rows[32:64]))
        else:
            scheduler.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_a_step_that_computes_its_gradients_itself_is_refused(source):
    model, optimizer, _scheduler = make(meta_source=source)
    with pytest.raises(ValueError, match=r"Call the closure first: closure\(\); optimizer.step\(\)"):
        optimizer.step(lambda: loss_of(model, torch.arange(32)))


def test_groups_of_a_layer_share_one_learning_rate_and_groups_without_a_layer_stand_alone():
    model, optimizer, scheduler = make()
    assert scheduler.layers == ["stem", "head"]
    train(model, optimizer, scheduler, 3)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates[0] == rates[1] != rates[2]
    assert (
        scheduler.get_last_lr()
        == rates
        == [*[float(scheduler.learning_rates[0])] * 2, float(scheduler.learning_rates[1])]
    )
    alone = torch.optim.SGD(
        [{"params": [nn.Parameter(torch.ones(1))]}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1
    )
    assert MetaLRScheduler(alone).layers == ["group_0", "group_1"]


def test_groups_of_a_layer_that_start_apart_stay_apart():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    groups = [
        {"params": weights[:1], "layer": "a", "lr": 0.3},
        {"params": weights[1:2], "layer": "a", "lr": 0.1},
        {"params": weights[2:], "layer": "b", "lr": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.2)
    scheduler = MetaLRScheduler(optimizer, hyper_lr=0.5, max_lr_change=4.0, lr_min=0.0)
    assert scheduler.learning_rates.tolist() == [0.3, 0.0]
    # Nothing has moved: to the last digit what was given.
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1, 0.0]
    before = [weight.item() for weight in weights]

    def loss():
        return sum((weight**2).sum() for weight in weights)

    loss().backward()
    optimizer.step()
    steps = [after.item() - value for after, value in zip(weights, before, strict=True)]
    scheduler.step(loss)
    # h = <gradient at the look-ahead, step> / rate, summed over the groups of a layer.
    gradients = [2 * (value + step) for value, step in zip(before, steps, strict=True)]
    h = sum(gradient * step for gradient, step in zip(gradients[:2], steps[:2], strict=True)) / 0.3
    rate = 0.3 * (1 - 0.5 * h)
    assert scheduler.learning_rates.tolist() == pytest.approx([rate, 0.0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([rate, rate / 3, 0.0])
    # The step taken has been rescaled with the layer's rate.
    moved = [value + step * rate / 0.3 for value, step in zip(before, steps, strict=True)]
    assert [weight.item() for weight in weights] == pytest.approx(moved)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"hyper_lr": -0.1}, ValueError, "hyper_lr=-0.1"),
        ({"hyper_lr": math.nan}, ValueError, "hyper_lr=nan"),
        ({"hyper_lr": "fast"}, TypeError, "hyper_lr='fast' must be a number, not str"),
        ({"lr_min": 1e-2, "lr_max": 1e-3}, ValueError, "lr_min=0.01 and lr_max=0.001"),
        ({"lr_max": 1e-3}, ValueError, "learning rate 0.01 of layer 'stem' is outside the bounds"),
        ({"max_lr_change": 1.0}, ValueError, "max_lr_change=1.0 must be above 1"),
        ({"rule": "proportionate"}, ValueError, "Did you mean 'proportional'"),
        ({"meta_source": "eval"}, ValueError, "meta_source='eval' must be one of 'stream', 'next_batch'"),
        ({"meta_every": 0}, ValueError, "meta_every=0 must be 1 or more"),
        ({"lookahead": "adam"}, ValueError, "lookahead='adam' must be one of"),
        ({"lookahead": "sgd", "meta_source": "next_batch"}, ValueError, 'lookahead="sgd" needs meta_source="stream"'),
        ({"hold_steps": {"neck": 3}}, ValueError, r"hold_steps names layers that are not there: \['neck'\]"),
    ],
)
def test_bad_settings_are_refused_by_name(setting, error, message):
    with pytest.raises(error, match=message):
        make(**setting)


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_hyper_lr_zero_is_bitwise_the_optimizer_alone(source):
    model, optimizer, scheduler = make(hyper_lr=0.0, meta_source=source)
    scheduler.meta_context = lambda: untouched(model)
    plain, plain_optimizer, _ = make(hyper_lr=0.0)
    torch.manual_seed(3)
    train(model, optimizer, scheduler, 6, meta=source == "stream")
    torch.manual_seed(3)
    for step in range(6):
        rows = torch.randperm(96, generator=torch.Generator().manual_seed(step))
        loss_of(plain, rows[:32]).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert scheduler.history.learning_rates.shape == (6, 2)
    assert scheduler.extra_passes == 0
    assert not scheduler._look_ahead.parameters
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))


def test_meta_every_calls_the_validation_loss_at_each_kth_step_only():
    model, optimizer, scheduler = make(meta_every=3)
    called = []
    for step in range(7):
        rows = torch.arange(32)
        loss_of(model, rows).backward()
        optimizer.step()
        assert scheduler._look_ahead.taken == (step % 3 == 0)
        scheduler.step(lambda step=step, rows=rows: called.append(step) or loss_of(model, rows))
        optimizer.zero_grad()
    assert called == [0, 3, 6]
    assert [bool(x) for x in ~torch.tensor(scheduler.history.hypergradients[:, 0]).isnan()] == [
        step % 3 == 0 for step in range(7)
    ]


def test_the_attribute_meta_loss_is_used_and_nothing_is_tuned_without_any():
    model, optimizer, scheduler = make()
    with pytest.warns(UserWarning, match="was called without a validation loss") as warned:
        train(model, optimizer, scheduler, 2, meta=False)
    assert len(warned) == 1
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2]
    scheduler.meta_loss = lambda: loss_of(model, slice(32, 64))
    train(model, optimizer, scheduler, 1, meta=False)
    assert 1e-2 not in scheduler.learning_rates.tolist()


def test_shape_multiplies_the_tuned_rates_and_the_history_holds_the_rates_used():
    shape = [0.0, 0.5, 1.0, 0.7, 0.3, 0.0]
    model, optimizer, scheduler = make(shape=lambda step: shape[step], hyper_lr=0.0)
    train(model, optimizer, scheduler, 5)
    assert scheduler.history.learning_rates[:, 1].tolist() == [1e-2 * s for s in shape[:5]]
    model, optimizer, scheduler = make(shape=lambda step: shape[step])
    train(model, optimizer, scheduler, 1)
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2], "a step of length zero tells nothing"
    train(model, optimizer, scheduler, 1, first=1)
    assert optimizer.param_groups[2]["lr"] == float(scheduler.learning_rates[1]) * shape[2]


def test_held_layers_keep_their_rate_for_their_steps():
    model, optimizer, scheduler = make(hold_steps={"head": 3})
    train(model, optimizer, scheduler, 3)
    assert scheduler.learning_rates[1] == 1e-2
    assert scheduler.learning_rates[0] != 1e-2
    train(model, optimizer, scheduler, 1, first=3)
    assert scheduler.learning_rates[1] != 1e-2


def test_bounds_and_trust_region_hold():
    model, optimizer, scheduler = make(hyper_lr=1e3, lr_min=8e-3, lr_max=1.2e-2)
    train(model, optimizer, scheduler, 5)
    rates = scheduler.history.learning_rates
    assert rates.min() >= 8e-3
    assert rates.max() <= 1.2e-2
    model, optimizer, scheduler = make(hyper_lr=1e3, max_lr_change=1.1)
    train(model, optimizer, scheduler, 5)
    ratios = scheduler.history.learning_rates[1:] / scheduler.history.learning_rates[:-1]
    assert ratios.max() <= 1.1 * (1 + 1e-12)
    assert ratios.min() >= 1 / 1.1 * (1 - 1e-12)


def test_a_non_finite_validation_loss_changes_nothing_is_counted_and_warned_of_once():
    model, optimizer, scheduler = make()

    def bad_steps():
        for _ in range(25):
            loss_of(model, slice(0, 32)).backward()
            optimizer.step()
            stepped = [p.detach().clone() for p in model.parameters()]
            scheduler.step(lambda: loss_of(model, slice(0, 32)) * math.nan)
            assert all(torch.equal(a, b) for a, b in zip(stepped, model.parameters(), strict=True))
            optimizer.zero_grad()

    with pytest.warns(UserWarning, match="not finite 20 times in a row") as caught:
        bad_steps()
    assert len(caught) == 1
    assert scheduler.guard.non_finite == 25
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2]
    train(model, optimizer, scheduler, 1)
    assert scheduler.guard.non_finite_in_a_row == 0


def test_a_non_finite_gradient_of_the_next_batch_changes_nothing():
    model, optimizer, scheduler = make(meta_source="next_batch", optimizer_class=torch.optim.SGD)
    train(model, optimizer, scheduler, 1, meta=False)
    loss_of(model, slice(0, 32)).backward()
    model[4].weight.grad[0, 0] = math.inf
    optimizer.step()
    assert scheduler.guard.non_finite == 1
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2]


def test_a_validation_loss_without_a_graph_is_refused():
    model, optimizer, scheduler = make()
    loss_of(model, slice(0, 32)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match=r"not loss\.item\(\) or loss\.detach\(\)"):
        scheduler.step(lambda: loss_of(model, slice(0, 32)).detach())


@pytest.mark.parametrize("rule", ["proportional", "adam"])
@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_state_survives_a_weights_only_file_bitwise(rule, source):
    setting = {"rule": rule, "meta_source": source, "shape": lambda step: 1 / (1 + step)}
    meta = source == "stream"
    model, optimizer, scheduler = make(**setting)
    train(model, optimizer, scheduler, 4, meta=meta)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict(), torch.get_rng_state()], file)
    train(model, optimizer, scheduler, 4, first=4, meta=meta)

    file.seek(0)
    weights, optimizer_state, scheduler_state, rng = torch.load(file, weights_only=True)
    again, again_optimizer, again_scheduler = make(seed=5, lr=3e-4, **setting)
    again.load_state_dict(weights)
    again_optimizer.load_state_dict(optimizer_state)
    again_scheduler.load_state_dict(scheduler_state)
    torch.set_rng_state(rng)
    train(again, again_optimizer, again_scheduler, 4, first=4, meta=meta)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert torch.equal(scheduler.learning_rates, again_scheduler.learning_rates)
    assert (scheduler.history.learning_rates == again_scheduler.history.learning_rates).all()


def test_a_state_of_other_layers_is_refused_with_the_difference():
    _, _, scheduler = make()
    other = MetaLRScheduler(torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "layer": "neck"}], lr=0.1))
    with pytest.raises(ValueError, match=r"only there \['neck'\], only here \['stem', 'head'\]"):
        scheduler.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="not the state of a MetaLRScheduler"):
        scheduler.load_state_dict({"last_epoch": 3})


def test_learning_rates_given_as_tensors_are_filled_in_place():
    model, optimizer, scheduler = make(lr=torch.tensor(1e-2))
    tensors = [group["lr"] for group in optimizer.param_groups]
    train(model, optimizer, scheduler, 2)
    assert all(group["lr"] is tensor for group, tensor in zip(optimizer.param_groups, tensors, strict=True))
    assert float(tensors[2]) == pytest.approx(float(scheduler.learning_rates[1]))


def test_groups_that_share_a_tensor_get_one_each():
    model, optimizer, _ = make(lr=torch.tensor(1e-2))
    shared = torch.tensor(1e-2)
    for group in optimizer.param_groups:
        group["lr"] = shared
    scheduler = MetaLRScheduler(optimizer)
    train(model, optimizer, scheduler, 3)
    rates = scheduler.learning_rates
    assert rates[0] != rates[1]
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx(rates[[0, 0, 1]].tolist())


@pytest.mark.parametrize("wrong", [nn.Linear(2, 2), nn.Linear(2, 2).parameters()])
def test_what_is_no_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match=r"optimizer is a \w+: give an optimizer, such as"):
        MetaLRScheduler(wrong)


def test_a_second_scheduler_takes_the_place_of_the_first():
    model, optimizer, scheduler = make()
    second = MetaLRScheduler(optimizer)
    train(model, optimizer, second, 2)
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2]
    assert 1e-2 not in second.learning_rates.tolist()


def test_a_scheduler_that_is_gone_listens_no_more():
    model, optimizer, scheduler = make()
    gone = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None
    loss_of(model, torch.arange(32)).backward()
    optimizer.step()


def test_a_frozen_layer_and_one_unfrozen_in_the_middle():
    model, optimizer, scheduler = make()
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    train(model, optimizer, scheduler, 2)
    assert scheduler.learning_rates[0] == 1e-2
    model.requires_grad_(True)
    train(model, optimizer, scheduler, 2, first=2)
    assert scheduler.learning_rates[0] != 1e-2


def test_a_rate_at_zero_stays_a_number_without_a_trust_region():
    model, optimizer, scheduler = make(rule="additive", lr=0.0, lr_min=0.0, max_lr_change=math.inf)
    train(model, optimizer, scheduler, 3)
    assert scheduler.history.learning_rates.tolist() == [[0.0, 0.0]] * 3
    assert scheduler.guard.non_finite == 0


class Broken(Rule):
    def __call__(self, lr, hypergradient):
        return lr * math.nan


def test_a_rule_that_gives_no_number_changes_nothing_and_is_counted():
    model, optimizer, scheduler = make(rule=Broken())
    train(model, optimizer, scheduler, 3)
    assert scheduler.learning_rates.tolist() == [1e-2, 1e-2]
    assert scheduler.guard.non_finite == 3


def test_a_rule_of_ones_own_brings_its_hyper_lr():
    assert make(rule=Proportional(0.5))[2].rule.hyper_lr == 0.5
    with pytest.raises(ValueError, match=r"hyper_lr=0.2 is given beside a rule that is built"):
        make(rule=Proportional(0.5), hyper_lr=0.2)
    with pytest.raises(ValueError, match="hyper_lr=-0.5"):
        make(rule=Proportional(-0.5))


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_after_a_restart_the_rates_are_tuned_as_in_a_new_run(source):
    setting = {"rule": "adam", "meta_source": source, "hold_steps": {"head": 2}, "optimizer_class": torch.optim.SGD}
    meta = source == "stream"
    fresh_model, fresh_optimizer, fresh = make(**setting)
    start = {name: value.clone() for name, value in fresh_model.state_dict().items()}
    torch.manual_seed(3)
    train(fresh_model, fresh_optimizer, fresh, 4, meta=meta)

    model, optimizer, scheduler = make(**setting)
    train(model, optimizer, scheduler, 5, first=50, meta=meta)
    scheduler.guard.count(False)
    model.load_state_dict(start)
    scheduler.restart(1.0)
    torch.manual_seed(3)
    train(model, optimizer, scheduler, 4, meta=meta)
    assert scheduler.history.learning_rates[5:].tolist() == fresh.history.learning_rates.tolist()
    assert len(set(fresh.history.learning_rates[:, 1])) > 1
    assert scheduler.guard.non_finite == 1
