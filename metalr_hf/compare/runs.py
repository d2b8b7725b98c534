"""Fine-tuning strategies side by side: equal budgets, several seeds or folds, every run a line in a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
from torch import nn

from ..data.columns import LABEL
from ..settings import check_count, check_number, check_seed
from ..tasks import Task, get_task
from .results import FAILED, RESULTS, TIMINGS, append_line, keep_settings, mend_lines, only_process, sort_lines
from .strategies import get_strategy
from .training import Outcome, Work, failed
from .workers import LOCAL, Lost, check_backend, find_workers, run_on_workers

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
        source (`str`, *optional*): Where model and data come from; kept with every run, so that a folder does not mix
            cells of one name.
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
    source: str | None = None

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
        for seed in self.seeds:
            check_seed("seeds", seed)
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
    *,
    workers: int | None = None,
    backend: str = LOCAL,
    scheduler: str | None = None,
    watch: Callable[[Mapping[str, Run], Sequence[dict[str, Any]]], None] = lambda running, rows: None,
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
        workers (`int`, *optional*):
            Runs at a time, each in a process of its own with its share of the threads, and of the GPUs. By default one
            a GPU, or one; on a cluster as many as it has workers.
        backend (`str`, *optional*, defaults to `"local"`): `"local"`, `"dask"` or `"ray"`.
        scheduler (`str`, *optional*): Address of Dask's scheduler, or of the Ray cluster.
        watch (`Callable[[Mapping[str, Run], Sequence[dict]], None]`, *optional*):
            Called whenever a run starts or ends, with the run of each worker that has one, and the results so far.

    Returns:
        `list[dict]`: the results of all runs.

    Raises:
        ValueError: if the folder holds a comparison with other settings, or of another cell of the same name, if two
            cells share a name, or if one has fewer rows than folds.
        ImportError: if a package that a strategy or the backend needs is not installed.
        BlockingIOError: if another process is at work in the folder.
        ConnectionError: if no cluster answers.
    """
    folder = Path(output_dir)
    check_backend(workers, backend, scheduler)
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        _check_cell(cell, comparison)
    by_name = {cell.name: cell for cell in cells}
    if len(by_name) < len(cells):
        raise ValueError(f"cells: {len(cells)} have {len(by_name)} names, which tell their results apart.")
    with only_process(folder):
        keep_settings(folder, comparison.same_runs())
        wanted = {_key(asdict(run)): run for run in _runs(cells, comparison)}
        rows = mend_lines(folder / RESULTS, lambda row: row["status"] != FAILED or _key(row) not in wanted)
        mend_lines(folder / TIMINGS)
        _refuse_other_sources(folder, rows, by_name)
        done = {_key(row) for row in rows}
        missing = [run for key, run in wanted.items() if key not in done]
        strategies = {name: get_strategy(name) for name in {run.strategy: None for run in missing}}
        for strategy in strategies.values():
            strategy.check_packages()
        if not missing:
            return rows
        work = Work(by_name, comparison, strategies)
        started, total, ended = time.monotonic(), len(missing) + len(rows), 0
        running: dict[str, Run] = {}

        def on_start(run: Run, worker: str) -> None:
            running[worker] = run
            watch(dict(running), rows)

        def on_end(run: Run, outcome: Outcome | Lost) -> None:
            nonlocal ended
            ended += 1
            if isinstance(outcome, Lost):
                outcome = Outcome({**asdict(run), **failed(outcome.reason)}, 0.0)
            if (source := by_name[run.cell].source) is not None:
                outcome.row["source"] = source
            _keep(folder, run, outcome)
            rows.append(outcome.row)
            del running[next(worker for worker, other in running.items() if other == run)]
            left = (time.monotonic() - started) / ended * (len(missing) - ended)
            progress(total - len(missing) + ended, total, left)
            watch(dict(running), rows)

        run_on_workers(find_workers(work, workers, backend, scheduler), missing, on_start, on_end)
        # The order in which runs of several workers end is chance; in this one the same runs give the same file.
        order = {key: i for i, key in enumerate(wanted)}
        return sort_lines(folder / RESULTS, lambda row: order.get(_key(row), -1))


def _keep(folder: Path, run: Run, outcome: Outcome) -> None:
    """Writes what came of a run, its line last: what has a line is complete."""
    if outcome.history is not None:
        (folder / "lr_history").mkdir(exist_ok=True)
        (folder / "lr_history" / f"{run.label}.csv").write_text(outcome.history, encoding="utf-8")
    if outcome.row["status"] != FAILED:
        append_line(folder / TIMINGS, {**asdict(run), "seconds": round(outcome.seconds, 2)})
    append_line(folder / RESULTS, outcome.row)


def _runs(cells: Sequence[Cell], comparison: Comparison) -> Iterator[Run]:
    folds: list[int | None] = list(range(comparison.folds)) if comparison.folds else [None]
    for cell in cells:
        for seed in comparison.seeds:
            for fold in folds:
                for name in comparison.strategies:
                    rates: list[Any] = comparison.learning_rates if get_strategy(name).uses_learning_rate else [None]
                    yield from (Run(cell.name, name, rate, seed, fold) for rate in rates)


def _refuse_other_sources(folder: Path, rows: Sequence[dict[str, Any]], cells: Mapping[str, Cell]) -> None:
    for row in rows:
        cell = cells.get(row["cell"])
        there = row.get("source")
        if cell is not None and cell.source is not None and there not in (None, cell.source):
            raise ValueError(
                f"output_dir={str(folder)!r} holds runs of another {cell.name!r}: they are of {there}, not of "
                f"{cell.source}. Use another folder."
            )


def _check_cell(cell: Cell, comparison: Comparison) -> None:
    if not comparison.folds and cell.test is None:
        raise ValueError(f"The data set of {cell.name!r} has no test split. Name one, or use folds.")
    if comparison.folds > len(cell.train):
        raise ValueError(f"folds={comparison.folds} is more than the {len(cell.train)} rows of {cell.name!r}.")
    if comparison.train_size is not None and comparison.train_size > len(cell.train):
        raise ValueError(
            f"train_size={comparison.train_size} is more than the {len(cell.train)} rows of {cell.name!r}. Leave it "
            "out to train on all."
        )
    feature = cell.train.features[LABEL]
    if comparison.noise and not isinstance(feature, datasets.ClassLabel):
        raise ValueError(
            f"noise={comparison.noise!r} flips class labels, one an image, and those of {cell.name!r} are {feature}. "
            "Leave it at 0."
        )
    if (column := comparison.group_column) is not None and column not in cell.train.column_names:
        raise ValueError(f"group_column={column!r} is not a column of {cell.name!r}: {cell.train.column_names}.")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("cell", "strategy", "learning_rate", "seed", "fold"))
