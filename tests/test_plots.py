import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure

from metalr_hf import LRHistory, plot_learning_rates
from metalr_hf.plots import KINDS


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


@pytest.mark.parametrize("layers", [1, 2, 18, 60])
def test_first_layer_and_head_are_named_and_labels_keep_their_distance(layers):
    (ax,) = plot_learning_rates(history(layers)).axes
    names = [text.get_text() for text in ax.texts]
    assert names[0] == ("blocks.0" if layers > 1 else "head")
    assert "head" in names
    heights = sorted(np.log10(text.get_position()[1]) for text in ax.texts)
    low, high = np.log10(ax.get_ylim())
    assert all(b - a > (high - low) / 17 for a, b in itertools.pairwise(heights))
    assert len(names) <= 7


def test_a_heat_map_shows_layers_by_steps_with_the_input_on_top():
    recorded = history()
    ax, _ = plot_learning_rates(recorded, kind="heatmap").axes
    assert [label.get_text() for label in ax.get_yticklabels()] == recorded.layers
    assert ax.yaxis_inverted()
    assert ax.collections[0].get_array().shape == (5, 20)


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


def test_an_empty_history_and_an_unknown_kind_are_refused():
    with pytest.raises(ValueError, match="The history is empty"):
        plot_learning_rates(LRHistory(["a"]))
    with pytest.raises(ValueError, match="kind='bars' must be one of 'curves', 'heatmap'"):
        plot_learning_rates(history(), kind="bars")


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_in_anyones_history_are_text(kind, tmp_path):
    pulled = LRHistory(["$\\nonsense{$", "head"])
    pulled.append(0, [1e-3, 1e-2])
    plot_learning_rates(pulled, kind=kind).savefig(tmp_path / "rates.png")
