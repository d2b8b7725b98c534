import math
import random

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from small_runs import arguments, images, resnet, vit
from torch import nn

from metalr_hf import MetaLRScheduler, MetaLRTrainer
from metalr_hf.tuning.calibration import search
from metalr_hf.tuning.calibration.ladder import LADDER
from metalr_hf.tuning.calibration.search import (
    BACKBONE_DOUBT,
    LATER_LOOKS,
    LOOKS,
    PROBE_LR,
    Calibration,
    Calibrator,
    calibrate,
    warn_of_doubts,
)
from metalr_hf.tuning.contexts import untouched
from metalr_hf.tuning.hypergradient import LookAhead
from metalr_hf.tuning.optimizers import momentum_growth

DIGITS = load_digits()
PIXELS = torch.tensor(DIGITS.images, dtype=torch.float32)[:, None] / 16
LABELS = torch.tensor(DIGITS.target)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(288, 10)
    ).to(dtype)


@pytest.fixture
def unlimited(monkeypatch):
    """The small network is untrained: it has nothing to forget, and learns little by short steps."""
    monkeypatch.setattr(search, "largest_backbone_lr", lambda *args: 1.0)


def loss_of(model, rows):
    return nn.functional.cross_entropy(model(PIXELS[rows].to(model[0].weight.dtype)).float(), LABELS[rows])


def groups(model, lr):
    backbone = [*model[0].parameters(), *model[1].parameters()]
    return [
        {"params": backbone, "layer": "backbone", "lr": lr},
        {"params": model[5].parameters(), "layer": "head", "lr": lr},
    ]


def a_step_taken(model, optimizer):
    look_ahead = LookAhead()
    torch.manual_seed(1)
    loss_of(model, slice(0, 64)).backward()
    look_ahead.before_step([group["params"] for group in optimizer.param_groups])
    optimizer.step()
    look_ahead.after_step()
    return look_ahead


def train(lr, source="next_batch", steps=5, optimizer_class=torch.optim.AdamW, **kwargs):
    model = network()
    optimizer = optimizer_class(groups(model, lr))
    scheduler = MetaLRScheduler(
        optimizer, meta_source=source, calibrate=True, meta_context=lambda: untouched(model), **kwargs
    )
    torch.manual_seed(1)
    for step in range(steps):
        loss_of(model, slice(64 * step, 64 * step + 64)).backward()
        optimizer.step()
        scheduler.step(lambda: loss_of(model, slice(1000, 1064)))
        optimizer.zero_grad()
    return model, scheduler


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_is_left_as_it_was(optimizer_class, dtype):
    model = network(dtype)
    optimizer = optimizer_class(groups(model, PROBE_LR))
    look_ahead = a_step_taken(model, optimizer)

    def everything():
        moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*model.state_dict().values(), *moments, torch.get_rng_state(), *look_ahead._displacement]

    before = [value.clone() for value in everything()]
    random_states = random.getstate(), np.random.get_state()[1].tolist()
    with untouched(model):
        found = calibrate(look_ahead, [PROBE_LR] * 2, lambda: loss_of(model, slice(64, 128)))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == random_states
    assert found.forwards == 1 + len(found.head_losses) + len(found.backbone_losses) <= 1 + 2 * len(LADDER)


def test_the_losses_are_those_of_the_steps_themselves():
    model = network()
    optimizer = torch.optim.AdamW(groups(model, PROBE_LR))
    look_ahead = a_step_taken(model, optimizer)
    with untouched(model, "eval"):
        found = calibrate(look_ahead, [PROBE_LR] * 2, lambda: loss_of(model.eval(), slice(64, 128)))
    for rate, loss in found.backbone_losses.items():
        again = network()
        torch.manual_seed(1)
        loss_of(again, slice(0, 64)).backward()
        steps = torch.optim.AdamW(groups(again, rate))
        steps.param_groups[1]["lr"] = 0.0
        steps.step()
        # Batch-norm statistics of the one forward in train mode.
        assert loss_of(again.eval(), slice(64, 128)).item() == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_the_learning_rate_given_makes_no_difference_bit_for_bit(source, optimizer_class):
    models, schedulers = zip(
        *(train(lr, source, optimizer_class=optimizer_class) for lr in (1e-6, 1e-3, 1e-1)), strict=True
    )
    for model, scheduler in zip(models[1:], schedulers[1:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))
        assert torch.equal(scheduler.learning_rates, schedulers[0].learning_rates)


def test_the_first_step_is_the_one_with_the_rates_found():
    model, scheduler = train(1e-5, steps=1)
    rates = scheduler.calibration.learning_rates(2)
    again = network()
    torch.manual_seed(1)
    loss_of(again, slice(0, 64)).backward()
    optimizer = torch.optim.AdamW(groups(again, rates[0]))
    optimizer.param_groups[1]["lr"] = rates[1]
    optimizer.step()
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        # What the probing step was rounded to.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert scheduler.history.learning_rates[0].tolist() == rates


def test_a_flat_ladder_and_an_odd_batch_are_warned_of():
    model = network()
    look_ahead = a_step_taken(model, torch.optim.AdamW(groups(model, PROBE_LR)))
    flat = calibrate(look_ahead, [PROBE_LR] * 2, lambda: torch.tensor(1.0))
    with pytest.warns(UserWarning, match="does not tell the learning rates of the head apart"):
        warn_of_doubts(flat)
    assert (flat.backbone_lr, flat.head_lr) == (1e-4, 3e-4)
    odd = calibrate(look_ahead, [PROBE_LR] * 2, lambda: torch.tensor(math.nan), lr_min=1e-2)
    with pytest.warns(UserWarning, match=r"starts at 1\.0e-02 \(backbone\)"):
        warn_of_doubts(odd)


def test_the_warning_names_the_rates_that_are_used():
    model = network()
    look_ahead = a_step_taken(model, torch.optim.AdamW(groups(model, PROBE_LR)))
    calibrator = Calibrator(active=True)
    calibrator.load_state_dict({**calibrator.state_dict(), "steps": [LATER_LOOKS[-1]]})
    calibrator.found = Calibration(2e-4, 5e-4, 1.0, {}, {}, largest_lr=1e-2, changes=[], doubts=[BACKBONE_DOUBT])
    with pytest.warns(UserWarning, match=r"starts at 2\.0e-04 \(backbone\) and 5\.0e-04 \(head\)"):
        rates = calibrator.learning_rates(look_ahead, [3e-4, 6e-4], 1.0, lambda: torch.tensor(1.0))
    # Tuned since.
    assert rates == [3e-4, 6e-4]


def test_a_later_look_leaves_all_layers_of_the_head_where_the_step_has_brought_them():
    def by_layer(model, rates):
        backbone, head = groups(model, PROBE_LR)
        head = [{"params": [parameter], "layer": name} for name, parameter in model[5].named_parameters()]
        return [group | {"lr": rate} for group, rate in zip([backbone, *head], rates, strict=True)]

    model, rates = network(), [1e-3, 4e-3, 2e-2]
    look_ahead = a_step_taken(model, torch.optim.AdamW(by_layer(model, rates)))
    earlier = Calibration(1e-3, 1e-3, 2.3, {}, {}, largest_lr=1e-2, changes=[], doubts=[])
    found = calibrate(look_ahead, rates, lambda: loss_of(model.eval(), slice(64, 128)), earlier=earlier, head_layers=2)
    again = network()
    torch.manual_seed(1)
    loss_of(again, slice(0, 64)).backward()
    torch.optim.AdamW(by_layer(again, [0.0, *rates[1:]])).step()
    assert found.start_loss == pytest.approx(loss_of(again.eval(), slice(64, 128)).item(), rel=1e-5)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD])
def test_no_step_of_the_backbone_is_longer_than_a_hundredth_of_it(optimizer_class):
    model, start = network(), network()
    look_ahead = a_step_taken(model, optimizer_class(groups(model, PROBE_LR)))
    found = calibrate(look_ahead, [PROBE_LR] * 2, lambda: loss_of(model, slice(1000, 1064)))
    before, after = ([p.detach() for p in module[:2].parameters()] for module in (start, model))
    moved = sum((p - q).square().sum() for p, q in zip(after, before, strict=True)).sqrt() / PROBE_LR
    norm = sum(p.square().sum() for p in before).sqrt()
    assert found.largest_lr == pytest.approx(float(0.01 * norm / moved), rel=1e-3)
    assert max(found.backbone_losses) == found.largest_lr
    assert found.backbone_lr <= found.largest_lr


def test_a_step_that_momentum_makes_ten_times_longer_starts_at_a_tenth():
    def rates(momentum):
        torch.manual_seed(0)
        model = network()
        look_ahead = a_step_taken(model, torch.optim.SGD(groups(model, 1e-2), momentum=momentum))
        growth = momentum_growth(torch.optim.SGD(model.parameters(), momentum=momentum))
        with untouched(model):
            return calibrate(look_ahead, [1e-2, 1e-2], lambda: loss_of(model, slice(64, 128)), momentum_growth=growth)

    # The first step is the same, so that the looks are too.
    plain, heavy = rates(0.0), rates(0.9)
    assert heavy.backbone_losses == plain.backbone_losses
    assert heavy.backbone_lr == pytest.approx(plain.backbone_lr / 10)
    assert heavy.head_lr == plain.head_lr


@pytest.mark.usefixtures("unlimited")
def test_the_backbone_starts_at_a_tenth_of_the_head_unless_that_does_harm():
    model, start = network(), network()
    optimizer = torch.optim.AdamW(groups(model, PROBE_LR), weight_decay=0.0)
    look_ahead = a_step_taken(model, optimizer)

    def moved(layer):
        return (model[layer].weight - start[layer].weight).abs().max()

    # Adam's first step moves each weight by the learning rate: the loss falls with the head's up to 0.1, and with the
    # backbone's up to a rung that depends. The head gets a tenth.
    def found(best):
        return calibrate(
            look_ahead,
            [PROBE_LR] * 2,
            lambda: 5 + (moved(5) - 0.1).abs() - 0.1 * (moved(0) > best / 2) + (moved(0) > best * 2),
        )

    assert found(1e-2).head_lr == pytest.approx(1e-2)
    assert found(1e-2).backbone_lr == pytest.approx(1e-2)
    assert min(found(1e-2).backbone_losses) == pytest.approx(1e-3)
    # Rates below are tried where a tenth of the head's rate does harm, down to the first that is not better.
    assert found(2.5e-4).backbone_lr == pytest.approx(1e-3 / 10**0.5)
    assert not found(2.5e-4).backbone_in_doubt
    walked = [rate for rate, loss in found(2.5e-4).backbone_losses.items() if math.isfinite(loss)]
    assert walked == pytest.approx([1e-4, 1e-3 / 10**0.5, 1e-3])
    # Below a hundredth nothing is tried, and what does harm there goes no higher than a tenth.
    assert min(found(1e-5).backbone_losses) == pytest.approx(1e-4)
    assert found(1e-5).backbone_lr == pytest.approx(1e-3)
    assert found(1e-5).backbone_in_doubt
    # Where no step of the backbone makes a difference there is nothing to go by.
    odd = calibrate(look_ahead, [PROBE_LR] * 2, lambda: 5 + (moved(5) - 0.1).abs())
    assert odd.backbone_in_doubt
    assert odd.backbone_lr == pytest.approx(1e-2 / 3)


def test_it_needs_a_validation_batch():
    model = network()
    optimizer = torch.optim.AdamW(groups(model, 1e-3))
    scheduler = MetaLRScheduler(optimizer, meta_source="next_batch", calibrate=True)
    loss_of(model, slice(0, 64)).backward()
    optimizer.step()
    with pytest.raises(ValueError, match="at the first 2 or 3 steps and, where they leave"):
        scheduler.step()


def test_a_step_that_waits_for_the_next_batch_is_not_passed_over():
    model = network()
    optimizer = torch.optim.AdamW(groups(model, 1e-3))
    scheduler = MetaLRScheduler(optimizer, meta_source="next_batch", calibrate=True)
    scheduler.calibrates_later = True

    def step(start):
        loss_of(model, slice(start, start + 64)).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    step(0)
    assert len(scheduler.history) == 0
    with pytest.raises(ValueError, match=r"Optimizer step 0 waits for a batch.*scheduler.calibrate\(loss\)"):
        step(64)
    optimizer.zero_grad()
    scheduler.calibrate(lambda: loss_of(model, slice(64, 128)))
    assert len(scheduler.history) == 1
    step(64)
    scheduler.calibrate(lambda: loss_of(model, slice(128, 192)))
    assert scheduler.history.steps.tolist() == [0, 1]
    assert scheduler.history.learning_rates[1][0] == scheduler.calibration.backbone_lr


def test_a_restart_records_the_step_that_waits():
    model = network()
    optimizer = torch.optim.AdamW(groups(model, 1e-3))
    scheduler = MetaLRScheduler(optimizer, meta_source="next_batch", calibrate=True)
    scheduler.calibrates_later = True
    loss_of(model, slice(0, 64)).backward()
    optimizer.step()
    scheduler.step()
    scheduler.restart(0.1)
    assert scheduler.history.steps.tolist() == [0]
    assert not scheduler.calibration_is_late


@pytest.mark.usefixtures("unlimited")
def test_it_waits_for_the_end_of_a_warm_up_from_zero():
    _, scheduler = train(1e-4, "stream", steps=3, shape=lambda step: min(1.0, step / 2))
    rates = scheduler.history.learning_rates
    assert rates[0].tolist() == [0.0, 0.0]
    assert rates[1].tolist() == [rate / 2 for rate in scheduler.calibration.learning_rates(2)]


@pytest.mark.usefixtures("unlimited")
def test_it_is_saved_and_not_done_again():
    _, scheduler = train(1e-4)
    optimizer = torch.optim.AdamW(groups(network(), 1e-4))
    other = MetaLRScheduler(optimizer, meta_source="next_batch", calibrate=True)
    other.load_state_dict(scheduler.state_dict())
    assert not other.will_calibrate
    assert isinstance(other.calibration, Calibration)
    assert other.calibration == scheduler.calibration


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize(
    ("doubtful", "looks", "later_looks"),
    [(0, 2, 2), (1, 3, 3), (5, 3, 1)],
    ids=["two-that-agree", "three-that-do-not", "three-and-a-later-one"],
)
def test_looks_along_further_steps(doubtful, looks, later_looks):
    def run(steps, resume_after=None):
        model = network()
        scheduler = MetaLRScheduler(torch.optim.AdamW(groups(model, 1e-4)), meta_source="next_batch", calibrate=True)
        for step in range(steps):
            if step == resume_after:
                saved = scheduler.optimizer.state_dict(), scheduler.state_dict()
                optimizer = torch.optim.AdamW(groups(model, 1e-4))
                scheduler = MetaLRScheduler(optimizer, meta_source="next_batch", calibrate=True)
                optimizer.load_state_dict(saved[0])
                scheduler.load_state_dict(saved[1])
            torch.manual_seed(step)
            loss_of(model, slice(64 * step, 64 * step + 64)).backward()
            start = [p.detach().clone() for p in model[0].parameters()]
            scheduler.optimizer.step()

            def loss(weight=10 if step < doubtful else -0.1, start=start):
                moved = sum((p - q).abs().sum() for p, q in zip(model[0].parameters(), start, strict=True))
                # With a weight above zero no step of the backbone is any good, with one below most are.
                return loss_of(model, slice(1000, 1064)).detach() + weight * moved

            scheduler.step(loss)
            scheduler.optimizer.zero_grad()
        return scheduler

    first, early, late = run(1), run(4), run(8)
    assert first.will_calibrate
    assert first.guard.first_loss == late.guard.first_loss == first.calibration.start_loss
    assert not early.will_calibrate
    assert len(early.calibration.changes) == looks
    assert early.calibration.head_losses == {}
    assert early.calibration.backbone_in_doubt == (doubtful >= len(LOOKS))
    assert not late.calibration.backbone_in_doubt
    assert len(late.calibration.changes) == later_looks
    # Along a later step one rung below the one found, which is a rung itself.
    assert min(abs(late.calibration.backbone_lr / rung - 1) for rung in LADDER) < 1e-9
    for resumed in (run(8, resume_after=1), run(8, resume_after=2)):
        assert torch.equal(late.learning_rates, resumed.learning_rates)
        assert late.calibration == resumed.calibration
        assert late.extra_passes == resumed.extra_passes
        assert late.guard.first_loss == resumed.guard.first_loss


def test_a_later_look_may_find_the_highest_rate(monkeypatch):
    monkeypatch.setattr(search, "largest_backbone_lr", lambda *args: 1e-3)
    model = network()
    scheduler = MetaLRScheduler(torch.optim.AdamW(groups(model, 1e-4)), meta_source="next_batch", calibrate=True)
    for step in range(8):
        loss_of(model, slice(64 * step, 64 * step + 64)).backward()
        start = model[0].weight.detach().clone()
        scheduler.optimizer.step()

        def loss(sign=1 if step < 5 else -1, start=start):
            return loss_of(model, slice(1000, 1064)).detach() + sign * (model[0].weight - start).abs().sum()

        scheduler.step(loss)
        scheduler.optimizer.zero_grad()
    assert not scheduler.calibration.backbone_in_doubt
    assert scheduler.calibration.backbone_lr == scheduler.calibration.largest_lr == 1e-3


@pytest.mark.usefixtures("unlimited")
def test_tuning_ends_after_its_steps():
    _, scheduler = train(1e-3, "stream", steps=9, tuning_steps=6)
    rates = scheduler.history.learning_rates
    assert len(np.unique(rates[2:6], axis=0)) == 4
    assert len(np.unique(rates[5:], axis=0)) == 1
    # The first of the six are calibrated.
    looks = len(scheduler.calibration.changes)
    assert scheduler.extra_passes == pytest.approx(6 - looks + scheduler.calibration_forwards / 3)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_in_the_trainer_the_start_makes_no_difference_and_statistics_stay(tmp_path, source, accumulation):
    runs = []
    for lr in (1e-6, 1e-1):
        args = arguments(
            tmp_path, calibrate=None, learning_rate=lr, meta_source=source, gradient_accumulation_steps=accumulation
        )
        run = MetaLRTrainer(resnet(), args, train_dataset=images())
        run.train()
        runs.append(run)
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert runs[0].lr_scheduler.calibration is not None
    counts = [value for name, value in first.items() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {6 * accumulation}


def test_hyper_lr_zero_does_not_calibrate_unless_asked(tmp_path):
    for calibrate_, expected in ((None, False), (True, True)):
        args = arguments(tmp_path, calibrate=calibrate_, hyper_lr=0.0, max_steps=1)
        run = MetaLRTrainer(vit(), args, train_dataset=images())
        run.create_optimizer()
        assert run.create_scheduler(1).will_calibrate is expected


@pytest.mark.usefixtures("unlimited")
def test_a_loss_below_zero_calibrates():
    model = network()
    optimizer = torch.optim.AdamW(groups(model, PROBE_LR))
    look_ahead = a_step_taken(model, optimizer)
    found = calibrate(look_ahead, [PROBE_LR, PROBE_LR], lambda: loss_of(model, slice(1000, 1064)) - 5.0)
    assert not found.doubts
    assert found.start_loss < -2
    # The walk does not end at the first rung.
    assert len(found.head_losses) > 3
    assert min(found.head_losses.values()) < found.start_loss
