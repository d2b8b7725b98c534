"""What `metalr-hf compare` shows while it runs: how far it is, which run is where, and the best so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from ..compare.results import DONE
from ..compare.runs import Run


class RunsProgress:
    """A progress bar over all runs with the time left, under it a line for each run at work and one for the best.

    Args:
        console (`rich.console.Console`): Where to show it.
        metric (`str`, *optional*): The score that says which run is the best; by default the task's own.
    """

    def __init__(self, console: Console, metric: str | None = None):
        self.metric = metric
        columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}"))
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("", total=None, left="")
        self.live = Live(self.bar, console=console)

    def __enter__(self) -> RunsProgress:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def ended(self, done: int, total: int, seconds_left: float) -> None:
        """Moves the bar on; for `progress` of [`~metalr_hf.compare.runs.compare`]."""
        left = f"{timedelta(seconds=round(seconds_left))} left"
        self.bar.update(self.task, completed=done, total=total, left=left)

    def watch(self, running: Mapping[str, Run], rows: Sequence[dict[str, Any]]) -> None:
        """Shows which run is where; for `watch` of [`~metalr_hf.compare.runs.compare`]."""
        lines = [f"  {place}: {_described(run)}" for place, run in sorted(running.items())]
        if best := best_so_far(rows, self.metric):
            lines.append(f"  {best}")
        self.live.update(Group(self.bar, *map(Text, lines)))


def best_so_far(rows: Sequence[dict[str, Any]], metric: str | None = None) -> str:
    """The best run of the cell in which a run ended last.

    Args:
        rows (`Sequence[dict]`): Results.
        metric (`str`, *optional*): The score that says which run is the best; by default the task's own.

    Returns:
        `str`: a line to show; empty if no run has ended yet.

    Example:

    ```python
    >>> from metalr_hf.cli.progress import best_so_far
    >>> row = {"cell": "ViT → digits", "learning_rate": 1e-3, "seed": 0, "fold": None, "status": "done"}
    >>> row |= {"metric": "accuracy", "strategy": "cosine"}
    >>> best_so_far([{**row, "accuracy": 0.8}, {**row, "strategy": "metalr", "learning_rate": None, "accuracy": 0.9}])
    'best so far: accuracy 0.900, ViT → digits, metalr, seed 0'

    ```
    """
    ended = [row for row in rows if row["status"] == DONE]
    if not ended:
        return ""
    metric = metric or ended[-1].get("metric", "accuracy")
    # Earlier runs may have other scores, and a score may be undefined.
    same = [row for row in ended if row["cell"] == ended[-1]["cell"] and row.get(metric) is not None]
    if not same:
        return ""
    best = max(same, key=lambda row: row[metric])
    run = Run(*(best[name] for name in ("cell", "strategy", "learning_rate", "seed", "fold")))
    return f"best so far: {metric.replace('_', ' ')} {best[metric]:.3f}, {_described(run)}"


def _described(run: Run) -> str:
    parts = [run.cell, run.strategy, "" if run.learning_rate is None else f"{run.learning_rate:g}", f"seed {run.seed}"]
    return ", ".join(part for part in [*parts, "" if run.fold is None else f"fold {run.fold}"] if part)
