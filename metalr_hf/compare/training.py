"""One run of a comparison: its rows, its trainer, what came of it."""

from __future__ import annotations

import hashlib
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, set_seed

from ..data.columns import IMAGE, LABEL
from ..data.splits import flip_labels, fold_rows, stratified_subset
from ..data.splits.held_out import hold_out_rows
from ..models.bare import wrap_bare_module
from ..models.timm import is_timm_model, wrap_timm_model
from .results import DIVERGED, DONE, FAILED
from .strategies import HeldOut, Job, Strategy

if TYPE_CHECKING:
    from .runs import Cell, Comparison, RowTransform, Run

# Of the training rows, what a strategy that searches is given to search on.
SEARCH_SHARE = 0.2


@dataclass
class Outcome:
    """What came of a run, wherever it ran.

    Args:
        row (`dict`): Its line in the results.
        seconds (`float`): How long it took.
        history (`str`, *optional*): Its learning rates, as a CSV file has them; only strategies that tune have any.
    """

    row: dict[str, Any]
    seconds: float
    history: str | None = None


@dataclass
class Work:
    """Everything that a process needs to do any run of a comparison.

    Args:
        cells (`Mapping[str, Cell]`): Name to model and data set.
        comparison (`Comparison`): The budget.
        strategies (`Mapping[str, Strategy]`):
            Name to strategy. They travel along, since a process of its own knows none that a script registered.
    """

    cells: Mapping[str, Cell]
    comparison: Comparison
    strategies: Mapping[str, Strategy]

    def __call__(self, run: Run) -> Outcome:
        """Does a run; one that an error ended is a row with its reason.

        Args:
            run (`Run`): Which.

        Returns:
            [`Outcome`]
        """
        started = time.monotonic()
        history = None
        try:
            outcome, history = _train_and_test(
                self.cells[run.cell], run, self.comparison, self.strategies[run.strategy]
            )
        except Exception as error:
            outcome = failed(f"{type(error).__name__}: {error}")
        return Outcome({**asdict(run), **outcome}, time.monotonic() - started, history)


def failed(reason: str) -> dict[str, Any]:
    """What the line of a run says that an error ended.

    Args:
        reason (`str`): The error.

    Returns:
        `dict`

    Example:

    ```python
    >>> from metalr_hf.compare.training import failed
    >>> failed("OutOfMemoryError: too big")
    {'status': 'failed', 'reason': 'OutOfMemoryError: too big'}

    ```
    """
    return {"status": FAILED, "reason": reason[:500]}


def _train_and_test(
    cell: Cell, run: Run, comparison: Comparison, strategy: Strategy
) -> tuple[dict[str, Any], str | None]:
    train, test = cell.train, cell.test
    if run.fold is not None:
        train_rows, test_rows = fold_rows(train, comparison.folds, run.seed, comparison.group_column)[run.fold]
        train, test = train.select(train_rows), train.select(test_rows)
    assert test is not None
    train = stratified_subset(train, comparison.train_size or len(train), run.seed)
    if comparison.noise:
        train = flip_labels(train, comparison.noise, run.seed)
    set_seed(run.seed)
    model = cell.make_model(cell.classes)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _make_trainer(strategy, model, train, cell, run, comparison, scratch)
        watch = _Watch(trainer)
        output = trainer.train()
        prediction = cell.task.measure(trainer, _prepared(test, cell.test_transform))
        rates, history = getattr(trainer, "lr_history", None), None
        if rates is not None:
            # As text: the folder of the comparison may be on another machine.
            file = Path(scratch) / "lr_history.csv"
            rates.save(file)
            history = file.read_text(encoding="utf-8")
    scores = {"metric": cell.task.metric, **cell.task.score(prediction, cell.classes)}
    if not np.isfinite(output.training_loss):
        return {"status": DIVERGED, "reason": f"training loss {output.training_loss}", **scores}, history
    if scores[cell.task.metric] is None:
        return {"status": DIVERGED, "reason": "test outputs that are not finite", **scores}, history
    done = {
        "status": DONE,
        **scores,
        "train_loss": round(float(output.training_loss), 6),
        "steps": int(output.global_step),
        "cost": round(watch.cost(), 4),
        "images": watch.digest.hexdigest(),
    }
    return done, history


def _make_trainer(
    strategy: Strategy,
    model: nn.Module,
    train: datasets.Dataset,
    cell: Cell,
    run: Run,
    comparison: Comparison,
    scratch: str,
) -> Trainer:
    arguments = {
        "output_dir": scratch,
        "max_steps": comparison.steps,
        "per_device_train_batch_size": comparison.batch_size,
        "per_device_eval_batch_size": 4 * comparison.batch_size,
        "weight_decay": comparison.weight_decay,
        "seed": run.seed,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # A run whose loss is not finite has diverged, and must say so.
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        **cell.task.training_arguments,
    }
    model = _with_loss(model, cell.classes)
    job = Job(
        model=model,
        learning_rate=run.learning_rate or 5e-5,  # Trainer's default for a strategy that does not look at it.
        arguments=arguments,
        trainer_arguments={
            "train_dataset": _prepared(train, cell.train_transform),
            **cell.task.trainer_arguments(cell.classes, cell.task.data_arguments.default_metrics),
            **cell.fit(model, train),
        },
        tuning_arguments=comparison.tuning,
        learning_rates=comparison.learning_rates,
        hold_out=partial(_hold_out, train, cell, run, comparison),
    )
    trainer = strategy.make_trainer(job)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _hold_out(train: datasets.Dataset, cell: Cell, run: Run, comparison: Comparison) -> HeldOut:
    size = round(SEARCH_SHARE * len(train))
    rest, held = hold_out_rows(train, "strategies", size, run.seed, group_column=comparison.group_column)

    def score(trainer: Trainer) -> tuple[float, float]:
        scores = cell.task.score(cell.task.measure(trainer, _prepared(held, cell.test_transform)), cell.classes)
        found = scores[cell.task.metric], scores["test_loss"]
        return (math.nan, math.nan) if None in found else found

    return HeldOut(_prepared(rest, cell.train_transform), score)


class _Watch:
    """Notes the images of every training step, and counts the passes."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.steps = 0
        self.digest = hashlib.blake2b(digest_size=8)
        step = trainer.training_step

        def watched(model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            self.steps += 1
            # Images before labels, as the digests of earlier comparisons have them.
            for key in sorted(inputs, reverse=True):
                self.digest.update(inputs[key].detach().cpu().contiguous().numpy().tobytes())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = watched  # type: ignore[method-assign]

    def cost(self) -> float:
        """Forward and backward passes over those of a plain run; a forward alone counts for a third."""
        extra = getattr(self.trainer.lr_scheduler, "extra_passes", 0.0)
        extra += getattr(self.trainer, "statistics_passes", 0.0)
        extra += getattr(self.trainer, "extra_passes", 0.0)
        return (self.steps + extra) / max(1, self.steps)


def _prepared(data: datasets.Dataset, transform: RowTransform) -> datasets.Dataset:
    return data.select_columns([IMAGE, LABEL]).with_transform(transform)


def _with_loss(model: nn.Module, classes: Sequence[str]) -> nn.Module:
    if is_timm_model(model):
        return wrap_timm_model(model, dict(enumerate(classes)))
    return wrap_bare_module(model, None)[0]
