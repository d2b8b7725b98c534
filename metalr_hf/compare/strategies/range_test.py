"""The learning rate finder: a range test before the run, as fastai has it, then one rate with cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import Trainer

from ...trainer.batches import stream_of
from ...tuning.contexts import untouched
from .registry import Job, register_strategy

# Those of fastai's `Learner.lr_find` and of its smoothed loss.
START, END, STEPS, BETA, DIVERGED_AT = 1e-7, 10.0, 100, 0.98, 4.0
SKIP_LAST = 5


@register_strategy("lr_finder", uses_learning_rate=False, cost="1, and at most 100 steps of the range test")
def lr_finder(job: Job) -> Trainer:
    """One learning rate read off a range test by the valley rule, as fastai's `lr_find`, then cosine decay to zero.

    The passes of the range test are counted in the cost.
    """
    finder = job.trainer(lr_scheduler_type="constant")
    rates, losses = range_test(finder, stream_of(finder, finder.train_dataset, finder.args.train_batch_size))
    trainer: Any = job.trainer(lr_scheduler_type="cosine", learning_rate=valley(rates, losses))
    trainer.extra_passes = float(len(rates))
    return trainer


def range_test(trainer: Any, batches: Iterable[Any]) -> tuple[list[float], list[float]]:
    """Trains with a rate that grows from 1e-7 to 10 in 100 steps, until the smoothed loss is four times its smallest.

    Smith 2017, *Cyclical Learning Rates for Training Neural Networks*, section 3.3, in the form of fastai 2: the rate
    grows by the same factor at every step, the loss is an average with a memory of 0.98, and the weights are put back.

    Args:
        trainer (`transformers.Trainer`): Its model and optimizer are those of the run.
        batches (`Iterable`): Training batches, as many as it takes.

    Returns:
        `tuple[list[float], list[float]]`: the rates, and the smoothed loss after each.
    """
    model, optimizer = trainer.model, trainer.create_optimizer()
    before = [p.detach().clone() for p in model.parameters()]
    rates: list[float] = []
    losses: list[float] = []
    smoothed = 0.0
    with untouched(model):
        model.train()
        for step, batch in zip(range(STEPS), batches, strict=False):
            rate = START * (END / START) ** (step / STEPS)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            smoothed = BETA * smoothed + (1 - BETA) * loss.item()
            rates.append(rate)
            losses.append(smoothed / (1 - BETA ** (step + 1)))
            if losses[-1] > DIVERGED_AT * min(losses) or math.isnan(losses[-1]):
                break
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), before, strict=True):
            parameter.copy_(value)
    return rates, losses


def valley(rates: list[float], losses: list[float]) -> float:
    """The rate about half-way down the longest valley of a range test: fastai's default suggestion.

    The first ten of the hundred steps and the last five are left out, and so is all from the first loss that is not a
    number on. The longest valley is the longest falling subsequence of the losses, by where it ends and how many it
    has; the rate stands in the middle of its second third.

    Args:
        rates (`list[float]`): Of the range test.
        losses (`list[float]`): Of the range test.

    Returns:
        `float`

    Raises:
        ValueError: if the loss exploded before there was anything to read off.

    Example:

    ```python
    >>> from metalr_hf.compare.strategies.range_test import valley
    >>> rates = [10 ** (i / 10) for i in range(40)]
    >>> losses = [3.0] * 10 + [3 - i / 10 for i in range(20)] + [4.0] * 10
    >>> rates.index(valley(rates, losses))
    18

    ```
    """
    first, end = STEPS // 10, len(losses) - SKIP_LAST
    end = next((i for i in range(first, end) if math.isnan(losses[i])), end)
    rates, losses = rates[first:end], losses[first:end]
    if not losses:
        raise ValueError("The range test of lr_finder saw the loss explode at once: there is no rate to read off it.")
    lengths, start, last = [1] * len(losses), 0, 0
    for i in range(1, len(losses)):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if losses[i] < losses[j]), default=0)
        if lengths[i] > lengths[last]:
            last, start = i, i - lengths[i]
    third = (last - start) / 3
    # Before the first is the last to fastai, whose list wraps around; here it is the first.
    return rates[max(0, start + int(third) + int(third / 2))]
