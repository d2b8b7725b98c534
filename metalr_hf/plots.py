"""Learning rates as curves and as a heat map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from .settings import check_choice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .history import LRHistory

KINDS = ("curves", "heatmap")
# Perceptually uniform, and told apart by the colour-blind; its lightest end would vanish on white.
COLORS = colormaps["viridis"]
LIGHTEST = 0.88
MOST_LABELS = 7


def plot_learning_rates(
    history: LRHistory, kind: str = "curves", ax: Axes | None = None, title: str | None = None
) -> Figure:
    """Draws what every layer's learning rate was.

    Args:
        history ([`LRHistory`]):
            The history of a run.
        kind (`str`, *optional*, defaults to `"curves"`):
            `"curves"`: a line a layer on a logarithmic axis, coloured from the input (dark) to the head (light), some
            of them named at their ends. `"heatmap"`: layers by steps.
        ax (`matplotlib.axes.Axes`, *optional*):
            Axes to draw on; a new figure by default.
        title (`str`, *optional*):
            A title.

    Returns:
        `matplotlib.figure.Figure`: to be shown by a notebook, or saved with `savefig`.

    Raises:
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
    if not len(history):
        raise ValueError("The history is empty: there is no learning rate to draw. Train first.")
    if ax is None:
        height = 4.2 if kind == "curves" else max(2.4, 0.6 + 0.16 * len(history.layers))
        ax = Figure(figsize=(8, height), layout="constrained").add_subplot()
    (_curves if kind == "curves" else _heatmap)(history, ax)
    ax.set_xlabel("optimizer step")
    if title is not None:
        ax.set_title(title)
    figure = ax.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _curves(history: LRHistory, ax: Axes) -> None:
    # A rate of zero (warm-up, the end of a schedule) has no place on a logarithmic axis.
    rates = np.where(history.learning_rates > 0, history.learning_rates, np.nan)
    steps, count = history.steps, len(history.layers)
    for i in range(count):
        is_head = i == count - 1
        color = _color(i, count)
        ax.plot(steps, rates[:, i], color=color, linewidth=2.4 if is_head else 1.5, solid_capstyle="round")
        if len(steps) == 1:
            ax.plot(steps, rates[:, i], "o", color=color)
    ax.set_yscale("log")
    ax.set_ylabel("learning rate")
    ax.grid(axis="y", color="0.85", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.margins(x=0.01)
    _label_ends(history.layers, rates, ax)


def _label_ends(layers: list[str], rates: np.ndarray, ax: Axes) -> None:
    """Names some layers at the right: the first and the last, the extremes, and others with room between them."""
    last = [column[np.isfinite(column)][-1] if np.isfinite(column).any() else np.nan for column in rates.T]
    heights = np.log10(np.array(last))
    shown = [i for i in range(len(layers)) if np.isfinite(heights[i])]
    if not shown:
        return
    bottom, top = (np.log10(limit) for limit in ax.get_ylim())
    needed = (top - bottom) / 16
    extremes = [shown[0], shown[-1], max(shown, key=heights.__getitem__), min(shown, key=heights.__getitem__)]
    places: dict[int, float] = {}
    for i in [*extremes, *shown[:: max(1, len(shown) // MOST_LABELS)]]:
        if i not in places and len(places) < MOST_LABELS:
            place = _free_place(heights[i], list(places.values()), needed, must=i in extremes[:2])
            if place is not None:
                places[i] = place
    for i, place in places.items():
        ax.annotate(
            layers[i],
            xy=(1.0, 10 ** heights[i]),
            xytext=(1.02, 10**place),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            color=_color(i, len(layers)),
            va="center",
            fontsize="small",
            fontweight="bold" if i == len(layers) - 1 else "normal",
            annotation_clip=False,
            parse_math=False,
        )


def _free_place(height: float, taken: list[float], needed: float, must: bool) -> float | None:
    """The nearest height with room for a label; none if there is none close by and the label may be left out."""
    for offset in range(16 if must else 1):
        for place in (height + offset * needed / 2, height - offset * needed / 2):
            if all(abs(place - other) >= needed for other in taken):
                return place
    return None


def _heatmap(history: LRHistory, ax: Axes) -> None:
    rates = np.where(history.learning_rates > 0, history.learning_rates, np.nan)
    if not np.isfinite(rates).any():
        raise ValueError("Every learning rate in the history is zero: there is nothing to draw.")
    low, high = np.nanmin(rates), np.nanmax(rates)
    steps = history.steps
    edges = np.append(steps, steps[-1] + 1)
    rows = np.arange(len(history.layers) + 1) - 0.5
    norm = LogNorm(low, high if high > low else low * 1.01)
    mesh = ax.pcolormesh(edges, rows, rates.T, norm=norm, cmap="cividis", rasterized=True)
    ax.set_yticks(range(len(history.layers)), history.layers, fontsize="small", parse_math=False)
    ax.invert_yaxis()
    figure = ax.get_figure()
    assert figure is not None
    figure.colorbar(mesh, ax=ax, label="learning rate", pad=0.02)


def _color(layer: int, count: int) -> tuple[float, float, float, float]:
    return COLORS(LIGHTEST * layer / max(1, count - 1))
