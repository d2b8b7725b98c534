"""What all figures share: display in notebooks, colours for light and dark backgrounds, labels beside lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from PIL import Image

# Perceptually uniform, ordered in grey too, and told apart by the colour-blind. The end nearest to the background
# would vanish on it.
COLORS = "plasma"
ON_LIGHT, ON_DARK = (0.0, 0.82), (0.32, 1.0)


class ShownFigure(Figure):
    """A figure that a notebook displays without pyplot, which would keep every figure in memory.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import ShownFigure
    >>> ShownFigure(figsize=(4, 3))._repr_png_()[1:4]
    b'PNG'

    ```
    """

    def _repr_png_(self) -> bytes:
        drawn, reduced = BytesIO(), BytesIO()
        self.savefig(drawn, format="png", bbox_inches="tight")
        picture: Image.Image = Image.open(drawn)
        if to_rgba(self.get_facecolor())[3] == 1:
            # A quarter of the size, with lines and text that look the same: notebooks are kept with their pictures.
            picture = picture.convert("RGB").quantize(256)
        picture.save(reduced, "PNG", optimize=True)
        return reduced.getvalue()


def new_axes(width: float, height: float) -> Axes:
    """Axes that fill a new figure.

    Args:
        width (`float`), height (`float`): Of the figure, in inches.

    Returns:
        `matplotlib.axes.Axes`

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import new_axes
    >>> new_axes(8, 4).figure.get_size_inches().tolist()
    [8.0, 4.0]

    ```
    """
    return ShownFigure(figsize=(width, height), layout="constrained").add_subplot()


def figure_of(ax: Axes) -> Figure:
    """The whole figure that axes belong to, also where they sit in a subfigure of it.

    Args:
        ax (`matplotlib.axes.Axes`): The axes.

    Returns:
        `matplotlib.figure.Figure`

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import ShownFigure, figure_of
    >>> figure = ShownFigure()
    >>> figure_of(figure.subfigures().add_subplot()) is figure
    True

    ```
    """
    figure: Any = ax.figure
    while not isinstance(figure, Figure):
        figure = figure.figure
    return figure


def is_dark(ax: Axes) -> bool:
    """Whether text on the axes' background should be light.

    Args:
        ax (`matplotlib.axes.Axes`): The axes. Where their own background is transparent the figure's counts, and where
            that is too, the colour of the text.

    Returns:
        `bool`

    Example:

    ```python
    >>> from matplotlib import pyplot as plt
    >>> from metalr_hf.plots.drawing import is_dark, new_axes
    >>> with plt.style.context("dark_background"):
    ...     is_dark(new_axes(4, 3))
    True

    ```
    """
    for patch in (ax.patch, figure_of(ax).patch):
        red, green, blue, alpha = to_rgba(patch.get_facecolor())
        if alpha > 0.5:
            return _luminance((red, green, blue)) < 0.5
    return _luminance(to_rgb(mpl.rcParams["text.color"])) > 0.5


def ordered_colors(count: int, ax: Axes) -> list[tuple[float, float, float, float]]:
    """Colours for things in an order, such as layers from the input to the head.

    Args:
        count (`int`): How many.
        ax (`matplotlib.axes.Axes`): Where they are drawn: none of them is near its background.

    Returns:
        `list[tuple[float, float, float, float]]`: RGBA, the first farthest from yellow.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import new_axes, ordered_colors
    >>> len(set(ordered_colors(12, new_axes(4, 3))))
    12

    ```
    """
    places = np.linspace(*(ON_DARK if is_dark(ax) else ON_LIGHT), max(2, count))[-count:]
    return [tuple(color) for color in mpl.colormaps[COLORS](places)]


def bare(ax: Axes, grid: str) -> None:
    """Removes the top and right frame lines and draws a faint grid behind the data.

    Args:
        ax (`matplotlib.axes.Axes`): The axes.
        grid (`str`): `"x"`, `"y"` or `"both"`: across which axes to draw it.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import bare, new_axes
    >>> ax = new_axes(4, 3)
    >>> bare(ax, grid="y")
    >>> ax.spines["top"].get_visible()
    False

    ```
    """
    ax.grid(axis=grid, color=mpl.rcParams["text.color"], alpha=0.15, linewidth=0.6)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def label_lines(
    ax: Axes,
    labels: Sequence[str],
    points: Sequence[tuple[float, float]],
    colors: Sequence[Any],
    most: int,
    first: Sequence[int] = (),
    bold: Sequence[int] = (),
) -> None:
    """Names lines at the right of the axes, each beside a point of it, where there is room.

    Args:
        ax (`matplotlib.axes.Axes`): The axes, with their final limits.
        labels (`Sequence[str]`): A name for every line.
        points (`Sequence[tuple[float, float]]`): A point of every line, NaN for lines without one.
        colors (`Sequence`): A colour a line, for the leader from the point to its label. The text has the colour of
            other text, which is legible on any background.
        most (`int`): How many labels there may be.
        first (`Sequence[int]`): Lines that are named before others.
        bold (`Sequence[int]`): Lines named in bold.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import label_lines, new_axes
    >>> ax = new_axes(4, 3)
    >>> lines = ax.plot([0, 1], [[0, 1], [0, 2]])
    >>> label_lines(ax, ["slow", "fast"], [(1, 1), (1, 2)], ["C0", "C1"], most=2)
    >>> [text.get_text() for text in ax.texts]
    ['slow', 'fast']

    ```
    """
    # In fractions of the axes, so that distances on logarithmic axes count like those on linear ones.
    inverse = ax.transAxes.inverted()
    spots = inverse.transform(ax.transData.transform(np.array(points, dtype=float).reshape(-1, 2)))
    seen = [i for i in range(len(labels)) if np.isfinite(spots[i]).all()]
    size = ax.get_window_extent().height / figure_of(ax).dpi
    room = 0.17 / size  # Inches from one line of small text to the next.
    most = max(1, min(most, int(1 / room)))
    chosen = _far_apart(spots[:, 1], list(dict.fromkeys(i for i in [*first, *seen[:1]] if i in seen)), seen, most)
    heights = _spread({i: float(spots[i, 1]) for i in chosen}, room)
    # Across in fractions of the axes, upwards in data: where axes share limits these may still change.
    across = ax.get_yaxis_transform()
    to_data = ax.transData.inverted()
    places = {i: float(to_data.transform(ax.transAxes.transform((1.0, height)))[1]) for i, height in heights.items()}
    leaders = [[(spots[i, 0], points[i][1]), (1.0, points[i][1]), (1.025, place)] for i, place in places.items()]
    shown = [colors[i] for i in places]
    ax.add_artist(LineCollection(leaders, colors=shown, linewidths=0.8, transform=across, clip_on=False))
    for i, place in places.items():
        weight = "bold" if i in bold else "normal"
        text = ax.text(1.03, place, labels[i], transform=across, va="center", fontsize="small", fontweight=weight)
        # Dollar signs in a name do not start a formula.
        text.set_parse_math(False)


def _far_apart(heights: np.ndarray, chosen: list[int], seen: list[int], most: int) -> list[int]:
    """Adds to the chosen lines, one by one, the one farthest from them in height and, less so, in order."""
    while len(chosen) < min(most, len(seen)):
        rest = [i for i in seen if i not in chosen]
        apart = np.abs(heights[rest, None] - heights[None, chosen])
        apart += 0.25 * np.abs(np.subtract.outer(rest, chosen)) / len(heights)
        chosen = [*chosen, rest[int(apart.min(axis=1).argmax())]]
    return chosen[:most]


def widen(ax: Axes, low: float, high: float) -> None:
    """Sets the limits of the y axis, and keeps those of other axes that share it and hold something.

    Args:
        ax (`matplotlib.axes.Axes`): The axes.
        low (`float`), high (`float`): What has to be seen.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import ShownFigure, widen
    >>> left, right = ShownFigure().subplots(1, 2, sharey=True)
    >>> _ = left.plot([0, 1])
    >>> left.set_ylim(0, 1)
    (0.0, 1.0)
    >>> widen(right, 0.5, 3)
    >>> bool(left.get_ylim()[1] == 3)
    True

    ```
    """
    sharing = [other for other in ax.get_shared_y_axes().get_siblings(ax) if other is not ax and other.lines]
    if sharing:
        before = sharing[0].get_ylim()
        low, high = min(low, *before), max(high, *before)
    ax.set_ylim(low, high)


def color_key(ax: Axes, colors: Sequence[Any], first: str, last: str) -> None:
    """Explains ordered colours by a strip of them above the axes, at the right.

    Args:
        ax (`matplotlib.axes.Axes`): The axes.
        colors (`Sequence`): The colours in their order.
        first (`str`), last (`str`): What its ends stand for.

    Example:

    ```python
    >>> from metalr_hf.plots.drawing import color_key, new_axes, ordered_colors
    >>> ax = new_axes(4, 3)
    >>> color_key(ax, ordered_colors(5, ax), "input", "head")
    >>> [text.get_text() for text in ax.child_axes[0].texts]
    ['input', 'head']

    ```
    """
    strip = ax.inset_axes((0.8, 1.035, 0.12, 0.025))
    strip.imshow(np.array([colors]), aspect="auto")
    strip.set_axis_off()
    for place, name, side in ((-0.05, first, "right"), (1.05, last, "left")):
        strip.text(place, 0.5, name, transform=strip.transAxes, ha=side, va="center", fontsize="small")


def _spread(wanted: Mapping[int, float], room: float) -> dict[int, float]:
    """Moves heights in [0, 1] apart until neighbours have room: those that would touch keep their middle."""
    pools: list[list[int]] = []
    middles: list[float] = []
    for i in sorted(wanted, key=wanted.__getitem__):
        pools.append([i])
        middles.append(wanted[i])
        while True:
            half = room * (len(pools[-1]) - 1) / 2
            middles[-1] = max(half, min(middles[-1], 1 - half))
            if len(pools) == 1 or middles[-1] - middles[-2] >= room * (len(pools[-1]) + len(pools[-2])) / 2:
                break
            last, middle = pools.pop(), middles.pop()
            middles[-1] = (middles[-1] * len(pools[-1]) + middle * len(last)) / (len(pools[-1]) + len(last))
            pools[-1] += last
    return {
        i: middle + room * (place - (len(pool) - 1) / 2)
        for pool, middle in zip(pools, middles, strict=True)
        for place, i in enumerate(pool)
    }


def _luminance(rgb: tuple[float, float, float]) -> float:
    """Perceived lightness in [0, 1], near enough to tell dark from light."""
    red, green, blue = rgb
    return 0.299 * red + 0.587 * green + 0.114 * blue
