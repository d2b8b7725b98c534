"""A grid of learning rates searched as one would without a test set: by a share of the training images."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from transformers import PrinterCallback, Trainer

from .baselines import cosine
from .registry import Job, register_strategy


@register_strategy("grid_search", uses_learning_rate=False, cost="1, and 1 for each of the learning rates")
def grid_search(job: Job) -> Trainer:
    """Cosine decay at the rate of the grid that does best on a fifth of the training images, then on all of them.

    Every trial takes as many steps as the run, on the other four fifths. The trials are counted in the cost. Of rates
    that score alike, the one with the lowest loss is taken.

    Raises:
        ValueError: if the comparison has no learning rates, or no trial gave outputs that are finite.
    """
    if not job.learning_rates or job.hold_out is None:
        raise ValueError("strategies='grid_search' searches the learning_rates of a comparison: give some.")
    held_out = job.hold_out()
    found: dict[float, tuple[float, float]] = {}
    for rate in job.learning_rates:
        options = {**job.trainer_arguments, "train_dataset": held_out.train}
        # All begin with the same head, as the run itself does.
        trial = cosine(replace(job, model=copy.deepcopy(job.model), learning_rate=rate, trainer_arguments=options))
        trial.remove_callback(PrinterCallback)
        trial.train()
        score, loss = held_out.score(trial)
        if math.isfinite(score):
            found[rate] = (score, -loss)
    if not found:
        raise ValueError(f"grid_search: training with each of learning_rates={[*job.learning_rates]} diverged.")
    trainer: Any = cosine(replace(job, learning_rate=max(found, key=found.__getitem__)))
    trainer.extra_passes = float(len(job.learning_rates) * job.arguments["max_steps"])
    return trainer
