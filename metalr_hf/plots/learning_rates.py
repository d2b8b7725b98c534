"""Learning rates as curves and as a heat map."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import LogNorm

from ..settings import check_choice
from ..tuning.history import LRHistory
from .drawing import bare, color_key, figure_of, label_lines, new_axes, ordered_colors, widen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = ("curves", "heatmap")
MOST_LABELS, MOST_ROW_LABELS = 9, 24
# Where a schedule ends at zero, the last steps would take most of a logarithmic axis. What is below a tenth of the
# run's level and within its last 15 % runs out of the picture; anything earlier or higher is part of the story.
FAINT, END = 0.1, 0.15


def plot_learning_rates(
    history: LRHistory, kind: str = "curves", ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws the learning rate of every layer over the optimizer steps of a run.

    Args:
        history ([`LRHistory`]):
            The history of a run.
        kind (`str`, *optional*, defaults to `"curves"`):
            `"curves"`: a line per layer on a logarithmic axis, coloured from the input (blue) to the head (yellow),
            some of them named. `"heatmap"`: layers by steps. The end of a schedule that goes to zero runs out at the
            bottom of either scale.
        ax (`matplotlib.axes.Axes`, *optional*):
            Axes to draw on; a new figure by default. Text, grid and background follow matplotlib's style.
        title (`str`, *optional*):
            A title.

    Returns:
        `matplotlib.figure.Figure`: to be shown by a notebook, or saved with `savefig`.

    Raises:
        TypeError: if it is no history.
        ValueError: if the history is empty or the kind unknown.

    Example:

    ```python
    >>> from metalr_hf import LRHistory, plot_learning_rates
    >>> history = LRHistory(["stem", "head"])
    >>> history.append(0, [1e-4, 1e-4])
    >>> history.append(1, [1e-4, 2e-4])
    >>> plot_learning_rates(history).axes[0].get_yscale()
    'log'

    ```
    """
    check_choice("kind", kind, KINDS)
    if not isinstance(history, LRHistory):
        raise TypeError(
            f"history is a {type(history).__name__}: give an LRHistory, such as trainer.lr_history or "
            "LRHistory.load('lr_history.csv')."
        )
    if not len(history):
        raise ValueError("The history is empty: there is no learning rate to draw. Train first.")
    if ax is None:
        ax = new_axes(8, 4.2 if kind == "curves" else min(6.0, max(2.4, 0.9 + 0.17 * len(history.layers))))
    ax.set_xlabel("optimizer step")
    if title is not None:
        ax.set_title(title)
    (_curves if kind == "curves" else _heatmap)(history, ax)
    return figure_of(ax)


def _curves(history: LRHistory, ax: Axes) -> None:
    steps, rates, count = history.steps, _drawn(history), len(history.layers)
    colors = ordered_colors(count, ax)
    thickness = 1.5 if count <= 40 else 0.8
    for i, color in enumerate(colors):
        is_head = i == count - 1
        marker = "o" if len(steps) == 1 else None
        ax.plot(
            steps, rates[:, i], color=color, linewidth=2.6 if is_head else thickness, marker=marker, zorder=2 + is_head
        )
    ax.set_yscale("log")
    ax.set_ylabel("learning rate")
    ax.margins(x=0)
    bare(ax, grid="y")
    seen = _seen(rates)
    if np.isfinite(rates).any():
        low, high = np.nanmin(rates[:seen]), np.nanmax(rates)
        margin = max((high / low) ** 0.04, 1.1)
        widen(ax, low / margin, high * margin)
    points = [_last_point(steps[:seen], rates[:seen, i]) for i in range(count)]
    heights = [y for _, y in points]
    first = [0, count - 1]
    if np.isfinite(heights).any():
        first += [int(np.nanargmax(heights)), int(np.nanargmin(heights))]
    label_lines(ax, history.layers, points, colors, MOST_LABELS, first=first, bold=[count - 1])
    if count > 2:
        color_key(ax, colors, "input", "head")


def _heatmap(history: LRHistory, ax: Axes) -> None:
    rates, steps, count = _drawn(history), history.steps, len(history.layers)
    if not np.isfinite(rates).any():
        raise ValueError("Every learning rate in the history is zero: there is nothing to draw.")
    low, high = np.nanmin(rates[: _seen(rates)]), np.nanmax(rates)
    edges = np.append(steps, steps[-1] + 1)
    norm = LogNorm(low, high if high > low else low * 1.01)
    # Other colours than those of the curves, which stand for layers.
    mesh = ax.pcolormesh(edges, np.arange(count + 1) - 0.5, rates.T, norm=norm, cmap="cividis", rasterized=True)
    # The head is always named, and as many before it as there is room for.
    every = -(-count // MOST_ROW_LABELS)
    rows = range((count - 1) % every, count, every)
    ax.set_yticks(rows, [history.layers[i] for i in rows], fontsize="small", parse_math=False)
    ax.invert_yaxis()
    faint = np.nanmin(rates) < low
    figure_of(ax).colorbar(mesh, ax=ax, label="learning rate", pad=0.02, extend="min" if faint else "neither")


def _drawn(history: LRHistory) -> np.ndarray:
    """The rates to draw; zeros (start of a warm-up, end of a schedule) are left out of a logarithmic scale."""
    return np.where(history.learning_rates > 0, history.learning_rates, np.nan)


def _seen(rates: np.ndarray) -> int:
    """Number of steps that determine the scale: all except the end of a schedule that goes to zero."""
    levels = np.array([np.exp(np.log(row[row > 0]).mean()) if (row > 0).any() else 0.0 for row in rates])
    clear = np.flatnonzero(levels >= FAINT * levels.max())
    return max(math.ceil((1 - END) * len(rates)), int(clear[-1]) + 1)


def _last_point(steps: np.ndarray, rates: np.ndarray) -> tuple[float, float]:
    finite = np.flatnonzero(np.isfinite(rates))
    return (float(steps[finite[-1]]), float(rates[finite[-1]])) if len(finite) else (math.nan, math.nan)
