"""The report of a comparison: a table, a picture and what they were made from."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..hub.markdown import escape, table
from ..plots.drawing import ShownFigure, bare, figure_of, label_lines
from .evidence import differences_table
from .results import DIVERGED, DONE, FAILED, SETTINGS, TIMINGS, read_lines, read_results

PANEL_WIDTH, PANEL_HEIGHT = 5.0, 3.6
# The palette of Okabe and Ito, made for the colour-blind; all are seen on white and on black.
STRONG = ("#D55E00", "#E69F00", "#CC79A7")
MUTED = ("#0072B2", "#009E73", "#56B4E9", "#888888")
# So that strategies that share a colour, or all of them in black and white, are told apart.
MARKERS = "s^vDPX"
MOST_COLUMNS = 2


def write_report(folder: str | os.PathLike[str], metric: str | None = None) -> Path:
    """Writes `report.md` and `report.png` from the results in a folder.

    Args:
        folder (`str` or `os.PathLike`): The output folder of a comparison.
        metric (`str`, *optional*): The score to compare by, such as `balanced_accuracy`; by default the task's own.

    Returns:
        `pathlib.Path`: the report.

    Raises:
        ValueError: if there are no results yet, or none has this score.

    Example:

    ```python
    from metalr_hf.compare.report import write_report

    write_report("runs/comparison")
    ```
    """
    folder = Path(folder)
    results = pd.DataFrame(read_results(folder))
    if results.empty:
        raise ValueError(f"{folder} holds no results to report: run a comparison with it as output_dir first.")
    if metric is not None:
        if metric not in results:
            raise ValueError(f"metric={metric!r} is not a score of the results in {folder}: leave it out.")
        results["metric"] = metric
    plot_comparison(results).savefig(folder / "report.png", dpi=150)
    timings = pd.DataFrame(read_lines(folder / TIMINGS))
    parts = ["# Fine-tuning strategies side by side", "![Test results over the start learning rate](report.png)"]
    for cell, rows in results.groupby("cell", sort=False):
        parts += [f"## {cell}", _results_table(rows, expected=_runs_expected(results))]
        if rows["fold"].notna().any() and f"class_{metric_of(rows)}" in rows:
            parts += [
                f"{_shown(rows).capitalize()} of each class, over all folds, at each strategy's best learning rate:",
                _class_table(rows),
            ]
    parts += [*_over_all_cells(results), _notes(folder, results, timings)]
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and its standard error over seeds and folds, for every strategy and start learning rate of a cell.

    Args:
        rows (`pandas.DataFrame`): Results of one cell.

    Returns:
        `pandas.DataFrame`: indexed by strategy and learning rate (NaN for a strategy without one), in the order of the
            runs; columns `mean`, `std`, `error`, `loss`, `cost`, `runs` (how many), `diverged` and `failed`. A run that
            diverged counts as zero, or as the lowest of the cell where that is below zero, as R² may be; one that an
            error ended counts not at all.

    Example:

    ```python
    >>> import pandas as pd
    >>> from metalr_hf.compare.report import summarise
    >>> same = {"strategy": "cosine", "learning_rate": 1e-3, "status": "done"}
    >>> summarise(pd.DataFrame([{**same, "accuracy": 0.8}, {**same, "accuracy": 0.9}]))["mean"].round(3).tolist()
    [0.85]

    ```
    """
    result = pd.to_numeric(rows.get(metric_of(rows), pd.Series(np.nan, rows.index)))
    done = rows["status"] == DONE
    lowest = min([0.0, *result[done].dropna()])
    rows = rows.assign(
        result=result.where(done, lowest).where(rows["status"] != FAILED),
        test_loss=pd.to_numeric(rows.get("test_loss", np.nan)),
        cost=pd.to_numeric(rows.get("cost", np.nan)),
        diverged=rows["status"] == DIVERGED,
        failed=rows["status"] == FAILED,
    )
    groups = rows.groupby(["strategy", "learning_rate"], sort=False, dropna=False)
    return pd.DataFrame(
        {
            "mean": groups["result"].mean(),
            "std": groups["result"].std(ddof=1),
            "error": groups["result"].sem(ddof=1),
            "loss": groups["test_loss"].mean(),
            "cost": groups["cost"].mean(),
            "runs": groups["result"].count(),
            "diverged": groups["diverged"].sum(),
            "failed": groups["failed"].sum(),
        }
    )


def metric_of(rows: pd.DataFrame) -> str:
    """The column that says how good a run is: `accuracy`, unless the task has another metric.

    Args:
        rows (`pandas.DataFrame`): Results of one cell.

    Returns:
        `str`

    Example:

    ```python
    >>> import pandas as pd
    >>> from metalr_hf.compare.report import metric_of
    >>> metric_of(pd.DataFrame([{"metric": "dice", "dice": 0.9}]))
    'dice'

    ```
    """
    named = rows["metric"].dropna() if "metric" in rows else rows.iloc[:0]
    return "accuracy" if named.empty else str(named.iloc[0])


def plot_comparison(results: pd.DataFrame, ax: Axes | None = None) -> Figure:
    """Draws the test results over the start learning rate, a panel per cell and a line per strategy.

    Args:
        results (`pandas.DataFrame`):
            What [`~metalr_hf.compare.results.read_results`] gave.
        ax (`matplotlib.axes.Axes`, *optional*):
            Axes to draw the results of one cell on; a new figure by default.

    Returns:
        `matplotlib.figure.Figure`: bands are a standard deviation over seeds and folds; a strategy without a learning
            rate is a level line.

    Raises:
        ValueError: if there are no results, or those of several cells and one `ax`.

    Example:

    ```python
    >>> import pandas as pd
    >>> from metalr_hf.compare.report import plot_comparison
    >>> same = {"cell": "ViT", "seed": 0, "status": "done"}
    >>> rows = [{**same, "strategy": "cosine", "learning_rate": rate, "accuracy": 900 * rate} for rate in (1e-4, 1e-3)]
    >>> figure = plot_comparison(pd.DataFrame(rows))
    >>> figure.axes[0].get_xlabel()
    'start learning rate'

    ```
    """
    if results.empty:
        raise ValueError("There are no results to draw: run a comparison first.")
    cells, strategies = list(dict.fromkeys(results["cell"])), list(dict.fromkeys(results["strategy"]))
    if ax is not None:
        if len(cells) > 1:
            raise ValueError(
                f"ax holds one cell, but the results are of {len(cells)}: {', '.join(map(str, cells))}. Choose one, as "
                'in results[results["cell"] == name], or leave out ax.'
            )
        panels = [ax]
    else:
        columns = min(MOST_COLUMNS, len(cells))
        lines = -(-len(cells) // columns)
        figure = ShownFigure(figsize=(max(8.0, PANEL_WIDTH * columns), PANEL_HEIGHT * lines), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
        for panel in grid[len(cells) :]:
            panel.set_visible(False)
        panels = list(grid[: len(cells)])
    for panel, cell in zip(panels, cells, strict=True):
        panel.set_title(cell, fontsize="medium")
        _draw_cell(panel, summarise(results[results["cell"] == cell]).dropna(subset="mean"), strategies)
    panels[0].set_ylabel(f"test {_shown(results)}")
    # Shared axes have their limits only when all have been drawn.
    for panel in panels:
        _label_strategies(panel)
    return figure_of(panels[0])


def _draw_cell(ax: Axes, summary: pd.DataFrame, strategies: Sequence[str]) -> None:
    rates = summary.index.get_level_values("learning_rate").astype(float)
    known = rates[np.isfinite(rates)]
    span = [known.min(), known.max()] if len(known) else [1e-4, 1e-2]
    styles = _styles(strategies)
    for name, points in summary.groupby(level="strategy", sort=False):
        x = points.index.get_level_values("learning_rate").to_numpy(float)
        mean, std = points["mean"].to_numpy(), points["std"].fillna(0.0).to_numpy()
        if np.isnan(x).all():
            x, mean, std = np.array(span), np.repeat(mean, 2), np.repeat(std, 2)
        order = np.argsort(x)
        style = styles[str(name)]
        ax.plot(x[order], mean[order], label=str(name), **style)
        faint = 0.2 if _is_tuned(str(name)) else 0.1
        ax.fill_between(x[order], (mean - std)[order], (mean + std)[order], color=style["color"], alpha=faint, lw=0)
    ax.set_xscale("log")
    ax.set_xlabel("start learning rate")
    bare(ax, grid="both")


def _label_strategies(ax: Axes) -> None:
    lines = list(ax.lines)
    names = [str(line.get_label()) for line in lines]
    ends = [(float(line.get_xdata()[-1]), float(line.get_ydata()[-1])) for line in lines]  # type: ignore[index, arg-type]
    tuned = [i for i, name in enumerate(names) if _is_tuned(name)]
    label_lines(ax, names, ends, [line.get_color() for line in lines], len(names), bold=tuned)


def _styles(strategies: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Strategy to how its line looks: ours strong and solid, the others thin and dashed."""
    tuned = [name for name in strategies if _is_tuned(name)]
    others = [name for name in strategies if not _is_tuned(name)]
    strong = {"linewidth": 2.4, "marker": "o", "linestyle": "-", "zorder": 3}
    thin = {"linewidth": 1.4, "markersize": 5, "linestyle": "--", "zorder": 2}
    return {
        **{name: {**strong, "color": color} for name, color in zip(tuned, cycle(STRONG), strict=False)},
        **{
            name: {**thin, "color": color, "marker": marker}
            for name, color, marker in zip(others, cycle(MUTED), cycle(MARKERS), strict=False)
        },
    }


def _shown(rows: pd.DataFrame) -> str:
    return metric_of(rows).replace("_", " ")


def _is_tuned(strategy: str) -> bool:
    return strategy.startswith("metalr")


def _runs_expected(results: pd.DataFrame) -> int:
    return len(results[["seed", "fold"]].drop_duplicates())


def _results_table(rows: pd.DataFrame, expected: int) -> str:
    summary = summarise(rows)
    rates = sorted({float(rate) for rate in summary.index.get_level_values("learning_rate") if not pd.isna(rate)})
    best = summary["mean"].max()
    header = ["strategy", *[f"{rate:g}" for rate in rates], "worst", "mean", "best", "test loss at best", "cost"]
    lines: list[list[object]] = []
    for name, points in summary.groupby(level="strategy", sort=False):
        rates_of_points = points.index.get_level_values("learning_rate").astype(float)
        by_rate = {rate: points.iloc[i] for i, rate in enumerate(rates_of_points)}
        level = next((point for rate, point in by_rate.items() if np.isnan(rate)), None)
        entries = [_entry(level if level is not None else by_rate.get(rate), best, expected) for rate in rates]
        # Where all runs failed there is no mean, which would be taken for the largest.
        top = points.iloc[int(points["mean"].fillna(-np.inf).to_numpy().argmax())]
        lines.append(
            [
                escape(name),
                *entries,
                _figure(points["mean"].min()),
                _figure(points["mean"].mean()),
                _entry(top, best, expected),
                _figure(top["loss"]),
                _figure(points["cost"].mean(), "{:.2f}x"),
            ]
        )
    return table(header, lines, align="l" + "r" * (len(header) - 1), escaped=True)


def _over_all_cells(results: pd.DataFrame) -> list[str]:
    best = {
        cell: summarise(rows)["mean"].groupby(level="strategy", sort=False).max()
        for cell, rows in results.groupby("cell", sort=False)
    }
    order = list(dict.fromkeys(results["strategy"]))
    shown = differences_table(pd.DataFrame(best).T.reindex(columns=order))
    return ["## Over all cells", shown] if shown else []


def _entry(point: Any, best: float, expected: int) -> str:
    if point is None:
        return ""
    text = _figure(point["mean"]) + _figure(point["error"], " ± {:.3f}")
    said = [f"n={int(point['runs'])}"] if point["runs"] < expected else []
    said += [f"{int(point[kind])} {kind}" for kind in (DIVERGED, FAILED) if point[kind]]
    if said:
        text = f"{text} ({', '.join(said)})".strip()
    return f"**{text}**" if point["mean"] == best else text


def _figure(value: float, form: str = "{:.3f}") -> str:
    return "" if np.isnan(value) else form.format(value)


def _class_table(rows: pd.DataFrame) -> str:
    metric = metric_of(rows)
    scored = [found for found in rows.get(f"class_{metric}", []) if isinstance(found, dict) and found]
    if not scored:
        return "No run was scored."
    classes = list(scored[0])
    lines: list[list[object]] = []
    summary = summarise(rows)
    for name in dict.fromkeys(rows["strategy"]):
        rate = summary.loc[[name], "mean"].fillna(-np.inf).idxmax()[1]
        same = rows["learning_rate"].isna() if pd.isna(rate) else rows["learning_rate"] == rate
        chosen = rows[(rows["strategy"] == name) & same & (rows["status"] == DONE)]
        if chosen.empty:
            continue
        by_class = pd.DataFrame(list(chosen[f"class_{metric}"])).mean()
        lines.append(
            [
                name,
                "" if pd.isna(rate) else f"{rate:g}",
                *[f"{by_class[c]:.3f}" for c in classes],
                f"{chosen[metric].mean():.3f}",
                *([f"{chosen['macro_f1'].mean():.3f}"] if "macro_f1" in chosen else []),
            ]
        )
    header = ["strategy", "learning rate", *classes, "total", *(["macro F1"] if "macro_f1" in rows else [])]
    return table(header, lines, align="l" + "r" * (len(header) - 1))


def _notes(folder: Path, results: pd.DataFrame, timings: pd.DataFrame) -> str:
    numbers, has_folds = sorted(set(results["seed"])), bool(results["fold"].notna().any())
    seeds = f"seed{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    over = f"mean ± standard error over {seeds}{' and folds' * has_folds}, or over *n* runs where it says so"
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    notes = [
        f"Columns are start learning rates; entries are test {_shown(results)}, "
        f"{over if has_folds or len(numbers) > 1 else f'of {seeds}'}. The best entry is bold. "
        "*worst*, *mean* and *best* are over the start learning rates. *cost* is forward and backward passes over "
        "those of a plain run of equal steps, validation included. The test split was used once a run, after training, "
        "with the weights that the run ended with.",
        f"Settings of all runs: `{json.dumps(settings, ensure_ascii=False)}`",
    ]
    for status, meaning in {
        DIVERGED: "Runs that diverged, counted as zero, or as the lowest of their cell where that is below zero:",
        FAILED: "Runs that an error ended, left out of the means; started again, the comparison tries them again:",
    }.items():
        such = results[results["status"] == status]
        if not such.empty:
            reasons = Counter(such["cell"] + ", " + such["strategy"] + ": " + such["reason"])
            notes += [meaning, "\n".join(f"- {count} × {reason}" for reason, count in reasons.items())]
    if not timings.empty:
        medians = timings.groupby(["cell", "strategy"], sort=False)["seconds"].median()
        notes.append("Median seconds a run:")
        notes += [
            f"- {cell}: " + ", ".join(f"{name} {value:.0f}" for name, value in group.droplevel("cell").items()) + "."
            for cell, group in medians.groupby(level="cell", sort=False)
        ]
    return "\n\n".join(notes)
