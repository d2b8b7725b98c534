import itertools

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from metalr_hf import LRHistory, plot_learning_rates
from metalr_hf.plots.learning_rates import KINDS


def history(layers=5, steps=20, zeros=False):
    generator = np.random.default_rng(0)
    recorded = LRHistory([f"blocks.{i}" for i in range(layers - 1)] + ["head"])
    rates = 1e-4 * np.exp(np.cumsum(generator.normal(0, 0.2, (steps, layers)), axis=0))
    for step, row in enumerate(rates):
        recorded.append(step * 3, [0.0] * layers if zeros and step == 0 else row.tolist())
    return recorded


def test_curves_draw_every_layer_with_its_values_on_a_log_axis():
    recorded = history()
    (ax,) = plot_learning_rates(recorded).axes
    assert ax.get_yscale() == "log"
    assert len(ax.lines) == 5
    for i, line in enumerate(ax.lines):
        assert line.get_xdata().tolist() == recorded.steps.tolist()
        assert line.get_ydata().tolist() == recorded.learning_rates[:, i].tolist()
    assert len({line.get_color() for line in ax.lines}) == 5


def labels(ax):
    low, high = np.log10(ax.get_ylim())
    return {text.get_text(): (np.log10(text.get_position()[1]) - low) / (high - low) for text in ax.texts}


@pytest.mark.parametrize("layers", [1, 2, 18, 60, 160])
def test_first_layer_and_head_are_named_and_labels_keep_their_distance(layers):
    figure = plot_learning_rates(history(layers))
    (ax,) = figure.axes
    names = labels(ax)
    assert {"blocks.0" if layers > 1 else "head", "head"} <= set(names)
    assert len(names) <= 9
    inches = ax.get_window_extent().height / figure.dpi
    heights = sorted(names.values())
    assert all((b - a) * inches > 0.15 for a, b in itertools.pairwise(heights))
    assert {text.get_fontweight() for text in ax.texts if text.get_text() == "head"} == {"bold"}


def test_small_axes_have_as_many_labels_as_there_is_room_for_and_none_outside():
    for height in (0.6, 1.2, 3):
        ax = Figure(figsize=(4, height)).add_subplot()
        recorded = LRHistory([f"blocks.{i}" for i in range(30)])
        recorded.append(0, [1e-3 * 1.01**-i for i in range(29)] + [1e-6])
        recorded.append(1, [1e-3 * 1.01**-i for i in range(29)] + [1e-6])
        plot_learning_rates(recorded, ax=ax)
        heights = sorted(labels(ax).values())
        assert 2 <= len(heights) <= 9
        assert heights[0] > -0.01
        assert heights[-1] < 1.01
        assert np.diff(heights).min() * 0.77 * height > 0.15


def test_labels_stand_in_the_order_of_the_curves_and_their_leaders_have_the_curves_colors():
    recorded = history(4)
    (ax,) = plot_learning_rates(recorded).axes
    last = dict(zip(recorded.layers, recorded.learning_rates[-1], strict=True))
    assert sorted(labels(ax), key=labels(ax).get) == sorted(last, key=last.get)
    colors = {line.get_color() for line in ax.lines}
    assert len(colors) == 4
    assert {tuple(color) for color in ax.collections[0].get_colors()} == colors


def fading(shape, steps=100):
    """Two layers, a decade apart and constant, under a schedule."""
    recorded = LRHistory(["stem", "head"])
    for step in range(steps):
        recorded.append(step, [1e-4 * shape(step / steps), 1e-3 * shape(step / steps)])
    return recorded


@pytest.mark.parametrize("kind", ["curves", "heatmap"])
def test_a_schedule_that_ends_at_zero_does_not_squash_the_picture(kind):
    for shape in (lambda t: 1 - t, lambda t: (1 + np.cos(np.pi * t)) / 2, lambda t: max(1 - t, 1e-6) ** 3):
        ax = plot_learning_rates(fading(shape), kind).axes[0]
        low = ax.get_ylim()[0] if kind == "curves" else ax.collections[0].norm.vmin
        assert 2e-7 < low < 2e-5, "about a decade of the decay is seen, and no more than its first 85 %"


def test_rates_that_really_fall_are_seen_whole():
    for shape in (lambda t: 10 ** (-5 * t), lambda t: 1 if t < 0.5 else 1e-4, lambda t: 1e-4 ** (1 - t)):
        recorded = fading(shape)
        low = plot_learning_rates(recorded).axes[0].get_ylim()[0]
        assert low < recorded.learning_rates[:86].min()


def test_dark_backgrounds_turn_text_and_colors_light(tmp_path):
    def luminance(color):
        return np.dot(to_rgb(color), (0.299, 0.587, 0.114))

    for style, background in (("default", 1.0), ("dark_background", 0.0)):
        with plt.style.context(style):
            figure = plot_learning_rates(history(6))
            (ax,) = figure.axes
            used = [line.get_color() for line in ax.lines] + [text.get_color() for text in ax.texts]
            assert all(abs(luminance(color) - background) > 0.2 for color in used)
            assert luminance(figure.get_facecolor()) == pytest.approx(background)


def test_a_heat_map_shows_layers_by_steps_with_the_input_on_top():
    recorded = history()
    ax, _ = plot_learning_rates(recorded, kind="heatmap").axes
    assert [label.get_text() for label in ax.get_yticklabels()] == recorded.layers
    assert ax.yaxis_inverted()
    assert ax.collections[0].get_array().shape == (5, 20)


def test_a_heat_map_of_many_layers_names_the_head_and_some_others():
    figure = plot_learning_rates(history(160), kind="heatmap")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert "head" in names
    assert 12 <= len(names) <= 24
    assert figure.get_size_inches()[1] <= 6


@pytest.mark.parametrize("kind", ["curves", "heatmap"])
def test_rates_of_zero_and_single_steps_are_drawn_without_a_warning(tmp_path, kind):
    for recorded in (history(zeros=True), history(steps=1)):
        plot_learning_rates(recorded, kind).savefig(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").stat().st_size > 5000


def test_given_axes_and_a_title_are_used():
    figure = Figure()
    ax = figure.add_subplot()
    assert plot_learning_rates(history(), ax=ax, title="Digits") is figure
    assert ax.get_title() == "Digits"
    part = figure.subfigures()
    for kind in ("curves", "heatmap"):
        assert plot_learning_rates(history(), kind, ax=part.add_subplot()) is figure


def test_axes_that_share_their_limits_show_all_curves():
    figure = Figure()
    axes = figure.subplots(1, 2, sharey=True)
    high, low = fading(lambda t: 1), fading(lambda t: 1e-3)
    for ax, recorded in zip(axes, (high, low), strict=True):
        plot_learning_rates(recorded, ax=ax)
    bottom, top = axes[0].get_ylim()
    assert bottom < 1e-7
    assert top > 1e-3
    assert [text.get_position()[1] for text in axes[0].texts] == pytest.approx([1e-4, 1e-3], rel=0.2)


def test_a_notebook_shows_the_figure_without_pyplot():
    assert plot_learning_rates(history())._repr_png_().startswith(b"\x89PNG")


def test_an_empty_history_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="The history is empty"):
        plot_learning_rates(LRHistory(["a"]))
    with pytest.raises(TypeError, match=r"history is a str: give an LRHistory, such as trainer\.lr_history"):
        plot_learning_rates("lr_history.csv")
    with pytest.raises(ValueError, match="kind='bars' must be one of 'curves', 'heatmap'"):
        plot_learning_rates(history(), kind="bars")


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_in_anyones_history_are_text(kind, tmp_path):
    pulled = LRHistory(["$\\nonsense{$", "head"])
    pulled.append(0, [1e-3, 1e-2])
    plot_learning_rates(pulled, kind=kind).savefig(tmp_path / "rates.png")
