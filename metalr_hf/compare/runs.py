"""Fine-tuning strategies side by side: equal budgets, several seeds or folds, every run a line in a file."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, set_seed

from ..data.columns import IMAGE, LABEL
from ..data.folds import flip_labels, fold_rows, stratified_subset
from ..models.bare import wrap_bare_module
from ..models.timm import is_timm_model, wrap_timm_model
from ..settings import check_count, check_number
from ..tasks import Task, get_task
from .results import (
    DIVERGED,
    DONE,
    FAILED,
    RESULTS,
    TIMINGS,
    append_line,
    keep_settings,
    mend_lines,
    only_process,
)
from .strategies import Job, Strategy, get_strategy

RowTransform = Callable[[dict[str, list[Any]]], dict[str, list[Any]]]


@dataclass
class Cell:
    """A model and a data set to compare on.

    Args:
        name (`str`): What it is called in the report.
        make_model (`Callable[[Sequence[str]], torch.nn.Module]`):
            Class names to a pretrained model with a fresh head, which takes `pixel_values` and `labels` as models of
            transformers do. A timm network is wrapped, a module from images to logits given a cross-entropy loss.
        train (`datasets.Dataset`): Rows with `image` and `label`, in classification a `ClassLabel`.
        test (`datasets.Dataset`, *optional*): The same. Not needed with folds.
        train_transform (`Callable`):
            A batch of rows with `image` and `label` to `pixel_values` and `labels`, with augmentation, such as an
            [`~metalr_hf.data.transforms.ImageTransform`].
        test_transform (`Callable`): The same without augmentation.
        task ([`~metalr_hf.tasks.base.Task`], *optional*): What is learned; classification by default.
        class_names (`Sequence[str]`, *optional*): By default those of the `ClassLabel`.
        fit (`Callable`, *optional*):
            Takes the model and the rows that a run trains on, as [`~metalr_hf.tasks.base.Task.fit`], and returns
            further arguments of the Trainer.
    """

    name: str
    make_model: Callable[[Sequence[str]], nn.Module]
    train: datasets.Dataset
    test: datasets.Dataset | None
    train_transform: RowTransform
    test_transform: RowTransform
    task: Task = field(default_factory=lambda: get_task("classification"))
    class_names: Sequence[str] | None = None
    fit: Callable[[nn.Module, datasets.Dataset], dict[str, Any]] = lambda model, train: {}

    @property
    def classes(self) -> list[str]:
        """The class names."""
        return list(self.train.features[LABEL].names if self.class_names is None else self.class_names)


@dataclass
class Comparison:
    """What is compared on each cell.

    Args:
        strategies (`list[str]`): Names of registered strategies, with `+average` for the average of their weights.
        learning_rates (`list[float]`): Start learning rates. A strategy that uses none runs once per seed.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2]`): Each determines training subset, new head and order.
        steps (`int`, *optional*, defaults to 60): Optimizer steps of every run.
        batch_size (`int`, *optional*, defaults to 32): Images a step.
        train_size (`int`, *optional*): Size of a stratified subset of the training images; all by default.
        noise (`float`, *optional*, defaults to 0.0): Share of training labels flipped to another class.
        folds (`int`, *optional*, defaults to 0): Stratified cross-validation in place of the test split.
        group_column (`str`, *optional*): Rows that share a value of it (a patient, a video) stay in one fold.
        weight_decay (`float`, *optional*, defaults to 0.01): Of every strategy's optimizer.
        tuning (`dict`, *optional*): Arguments of `MetaLRTrainingArguments` for the strategies that tune.
        preparation (`dict`, *optional*): How the cells' images are prepared; kept in the folder's settings.

    Raises:
        ValueError, TypeError: if a value is out of range or a strategy unknown.

    Example:

    ```python
    >>> from metalr_hf.compare.runs import Comparison
    >>> Comparison(["cosine", "metalr"], learning_rates=[1e-4, 1e-3]).seeds
    [0, 1, 2]

    ```
    """

    strategies: list[str]
    learning_rates: list[float]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    steps: int = 60
    batch_size: int = 32
    train_size: int | None = None
    noise: float = 0.0
    folds: int = 0
    group_column: str | None = None
    weight_decay: float = 0.01
    tuning: dict[str, Any] = field(default_factory=dict)
    preparation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.strategies:
            get_strategy(name)
        for rate in self.learning_rates:
            check_number("learning_rates", rate)
            if not 0 < rate < float("inf"):
                raise ValueError(f"learning_rates={rate!r} is not a positive number.")
        check_count("steps", self.steps)
        check_count("batch_size", self.batch_size)
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise={self.noise!r} must be in [0, 1): the share of training labels to flip.")
        if self.folds == 1 or self.folds < 0:
            raise ValueError(f"folds={self.folds!r} must be 2 or more, or 0 to use the test split.")

    def same_runs(self) -> dict[str, Any]:
        """The settings that every run in a results folder shares; the others only say which runs there are."""
        free = ("strategies", "learning_rates", "seeds")
        return {name: value for name, value in asdict(self).items() if name not in free}


@dataclass(frozen=True)
class Run:
    """One run of a comparison: a line in the results file.

    Example:

    ```python
    >>> from metalr_hf.compare.runs import Run
    >>> Run("ViT → cells", "cosine", 1e-3, seed=0, fold=None).label
    'ViT---cells_cosine_lr0.001_seed0'

    ```
    """

    cell: str
    strategy: str
    learning_rate: float | None
    seed: int
    fold: int | None

    @property
    def label(self) -> str:
        """A name for the run's files."""
        parts = [
            self.cell,
            self.strategy,
            f"lr{self.learning_rate:g}" if self.learning_rate else "",
            f"seed{self.seed}",
        ]
        parts.append("" if self.fold is None else f"fold{self.fold}")
        return "_".join("".join(c if c.isalnum() or c in "-." else "-" for c in part) for part in parts if part)


def compare(
    cells: Sequence[Cell],
    comparison: Comparison,
    output_dir: str | os.PathLike[str],
    progress: Callable[[int, int, float], None] = lambda done, total, seconds_left: None,
) -> list[dict[str, Any]]:
    """Runs the missing runs of a comparison: those not started yet, and those that an error ended.

    Args:
        cells (`Sequence[Cell]`): Models and data sets.
        comparison (`Comparison`): Strategies, learning rates, seeds and budget.
        output_dir (`str` or `os.PathLike`):
            Gets `results.jsonl` (one line per run, appended when it ends, free of times, so that the same runs give the
            same file), `timings.jsonl`, `settings.json` and each run's `lr_history.csv`.
        progress (`Callable[[int, int, float], None]`, *optional*):
            Called after each run with the runs done, the runs in all and the seconds left.

    Returns:
        `list[dict]`: the results of all runs.

    Raises:
        ValueError: if the folder holds a comparison with other settings, or a cell has fewer rows than folds.
        ImportError: if a package that a strategy needs is not installed.
        BlockingIOError: if another process is at work in the folder.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {cell.name: cell for cell in cells}
    for cell in cells:
        _check_cell(cell, comparison)
    with only_process(folder):
        keep_settings(folder, comparison.same_runs())
        wanted = {_key(asdict(run)): run for run in _runs(cells, comparison)}
        rows = mend_lines(folder / RESULTS, lambda row: row["status"] != FAILED or _key(row) not in wanted)
        mend_lines(folder / TIMINGS)
        done = {_key(row) for row in rows}
        missing = [run for key, run in wanted.items() if key not in done]
        for name in {run.strategy: None for run in missing}:
            get_strategy(name).check_packages()
        started, total = time.monotonic(), len(missing) + len(rows)
        for count, run in enumerate(missing, start=1):
            row, seconds = _result(by_name[run.cell], run, comparison, folder)
            append_line(folder / RESULTS, row)
            if row["status"] != FAILED:
                append_line(folder / TIMINGS, {**asdict(run), "seconds": round(seconds, 2)})
            rows.append(row)
            left = (time.monotonic() - started) / count * (len(missing) - count)
            progress(total - len(missing) + count, total, left)
    return rows


def _runs(cells: Sequence[Cell], comparison: Comparison) -> Iterator[Run]:
    folds: list[int | None] = list(range(comparison.folds)) if comparison.folds else [None]
    for cell in cells:
        for seed in comparison.seeds:
            for fold in folds:
                for name in comparison.strategies:
                    rates: list[Any] = comparison.learning_rates if get_strategy(name).uses_learning_rate else [None]
                    yield from (Run(cell.name, name, rate, seed, fold) for rate in rates)


def _result(cell: Cell, run: Run, comparison: Comparison, folder: Path) -> tuple[dict[str, Any], float]:
    """The row of a run, and how long it took; one that an error ended is a row with its reason."""
    started = time.monotonic()
    try:
        outcome = _train_and_test(cell, run, comparison, folder)
    except (RuntimeError, ValueError, ArithmeticError, ImportError) as error:
        outcome = {"status": FAILED, "reason": f"{type(error).__name__}: {error}"[:500]}
    return {**asdict(run), **outcome}, time.monotonic() - started


def _train_and_test(cell: Cell, run: Run, comparison: Comparison, folder: Path) -> dict[str, Any]:
    strategy = get_strategy(run.strategy)
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
        prediction = trainer.predict(_prepared(test, cell.test_transform))
    history = getattr(trainer, "lr_history", None)
    if history is not None:
        (folder / "lr_history").mkdir(exist_ok=True)
        history.save(folder / "lr_history" / f"{run.label}.csv")
    scores = {"metric": cell.task.metric, **cell.task.score(prediction, cell.classes)}
    if not np.isfinite(output.training_loss):
        return {"status": DIVERGED, "reason": f"training loss {output.training_loss}", **scores}
    if scores[cell.task.metric] is None:
        return {"status": DIVERGED, "reason": "test outputs that are not finite", **scores}
    return {
        "status": DONE,
        **scores,
        "train_loss": round(float(output.training_loss), 6),
        "steps": int(output.global_step),
        "cost": round(watch.cost(), 4),
        "images": watch.digest.hexdigest(),
    }


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
    )
    trainer = strategy.make_trainer(job)
    trainer.remove_callback(PrinterCallback)
    return trainer


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
        return (self.steps + extra) / max(1, self.steps)


def _prepared(data: datasets.Dataset, transform: RowTransform) -> datasets.Dataset:
    return data.select_columns([IMAGE, LABEL]).with_transform(transform)


def _with_loss(model: nn.Module, classes: Sequence[str]) -> nn.Module:
    if is_timm_model(model):
        return wrap_timm_model(model, dict(enumerate(classes)))
    return wrap_bare_module(model, None)[0]


def _check_cell(cell: Cell, comparison: Comparison) -> None:
    if not comparison.folds and cell.test is None:
        raise ValueError(f"The data set of {cell.name!r} has no test split. Name one, or use folds.")
    if comparison.folds > len(cell.train):
        raise ValueError(f"folds={comparison.folds} is more than the {len(cell.train)} rows of {cell.name!r}.")
    if (column := comparison.group_column) is not None and column not in cell.train.column_names:
        raise ValueError(f"group_column={column!r} is not a column of {cell.name!r}: {cell.train.column_names}.")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("cell", "strategy", "learning_rate", "seed", "fold"))
