"""Losses of labels that may be unknown: parts of an accumulated batch, and what a constant answer costs."""

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from metalr_hf.models.target_losses import LabelSetLoss, QuantityLoss
from metalr_hf.trainer.collapse import CollapseGuard, guard_for

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(12, 3, generator=GENERATOR)
LABELS = (torch.rand(12, 3, generator=GENERATOR) > 0.7).float()
UNKNOWN = torch.rand(12, 3, generator=GENERATOR) > 0.8
SOME_UNKNOWN = LABELS.masked_fill(UNKNOWN, -100.0)


def test_it_is_binary_cross_entropy_of_what_is_known():
    expected = binary_cross_entropy_with_logits(LOGITS[~UNKNOWN], LABELS[~UNKNOWN])
    torch.testing.assert_close(LabelSetLoss()({"logits": LOGITS}, SOME_UNKNOWN), expected)
    assert LabelSetLoss()(LOGITS, torch.full((12, 3), -100.0)) == 0


@pytest.mark.parametrize("loss", [LabelSetLoss(), LabelSetLoss(pos_weight=[1.0, 2.0, 5.0])])
def test_the_parts_of_an_accumulated_batch_add_up(loss):
    count = (~UNKNOWN).sum()
    parts = zip(LOGITS.split(3), SOME_UNKNOWN.split(3), strict=True)
    total = sum(loss(logits, labels, num_items_in_batch=count) for logits, labels in parts)
    torch.testing.assert_close(total, loss(LOGITS, SOME_UNKNOWN))


@pytest.mark.parametrize("loss", [LabelSetLoss(), LabelSetLoss(pos_weight=[1.0, 2.0, 5.0])])
def test_no_constant_answer_costs_less_than_it_says(loss):
    best = loss.constant_loss(SOME_UNKNOWN)
    answer = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([answer], max_iter=50)

    def closure():
        optimizer.zero_grad()
        value = loss(answer.expand(12, 3), SOME_UNKNOWN)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(loss(answer.expand(12, 3), SOME_UNKNOWN), best)


def watched(logits, value):
    loss = LabelSetLoss()
    guard = CollapseGuard(torch.nn.Linear(4, 3), every=1, loss=loss)
    assert loss.reads(SOME_UNKNOWN)
    assert not loss.reads(torch.tensor([0, 1]))
    assert not guard.collapsed(lambda: LOGITS)
    guard.note(torch.tensor(value), SOME_UNKNOWN)
    return guard.collapsed(lambda: logits)


def test_a_constant_answer_to_several_labels_is_a_collapse_and_a_slow_start_is_none():
    constant = LabelSetLoss().constant_loss(SOME_UNKNOWN).item()
    assert watched(torch.zeros(12, 3), constant)
    assert not watched(LOGITS, constant), "answers differ from image to image"
    assert not watched(torch.zeros(12, 3), 0.5 * constant), "an easy set may be learned by a constant"
    assert logsigmoid(LOGITS).std() > 0.1


@pytest.mark.parametrize(("spread", "loss", "expected"), [(0.0, 1.0, True), (1.0, 1.0, False), (0.0, 0.5, False)])
def test_the_mean_of_all_numbers_for_every_image_is_a_collapse(spread, loss, expected):
    scale = torch.tensor([10.0, 0.1])
    truth, noise = torch.tensor([40.0, 3.0]) + scale * LOGITS[:, :2], LOGITS[:, 1:]
    watch = guard_for(torch.nn.Linear(4, 2), loss=QuantityLoss(scale.tolist()))
    watch.every = 1
    assert not watch.collapsed(lambda: scale * noise)
    watch.note(loss * watch.loss.constant_loss(truth), truth)
    assert watch.collapsed(lambda: truth.mean(0) + spread * scale * noise) == expected


def test_a_loss_that_cannot_say_so_is_not_watched():
    assert guard_for(torch.nn.Linear(4, 3), loss=lambda outputs, labels, num_items_in_batch=None: 0) is None
    assert guard_for(torch.nn.Linear(4, 3), loss=LabelSetLoss()) is not None
