import io
import math

import numpy as np
import pytest
import torch

from metalr_hf import LRHistory


def recorded(steps=3):
    history = LRHistory(["stem", "blocks.0", "head"])
    for step in range(steps):
        history.append(step * 2, [1e-4 / 3, 0.1 + step, math.pi * 10.0**-step], 2.5 - step, [1.0, -2.0, step])
    return history


def test_arrays_hold_what_was_appended_and_nan_where_nothing_was_tuned():
    history = recorded()
    history.append(7, [1.0, 2.0, 3.0])
    assert history.steps.tolist() == [0, 2, 4, 7]
    assert history.learning_rates[1].tolist() == [1e-4 / 3, 1.1, math.pi * 0.1]
    assert history.hypergradients[2].tolist() == [1.0, -2.0, 2.0]
    assert history.meta_losses[:3].tolist() == [2.5, 1.5, 0.5]
    assert np.isnan(history.meta_losses[3])
    assert np.isnan(history.hypergradients[3]).all()
    assert len(history) == 4


def test_an_empty_history_has_empty_tables():
    history = LRHistory(["a", "b"])
    assert history.learning_rates.shape == (0, 2)
    assert history.to_pandas().shape == (0, 2)


def test_csv_keeps_every_digit(tmp_path):
    history = recorded()
    history.save(tmp_path / "lr.csv")
    lines = (tmp_path / "lr.csv").read_text().splitlines()
    assert lines[0] == "step,stem,blocks.0,head"
    assert len(lines) == 4
    again = LRHistory.load(tmp_path / "lr.csv")
    assert again.layers == history.layers
    assert (again.steps == history.steps).all()
    assert (again.learning_rates == history.learning_rates).all()
    assert np.isnan(again.meta_losses).all()


def test_layer_names_with_commas_and_quotes_survive(tmp_path):
    history = LRHistory(['a,"b"', "c\nd"])
    history.append(0, [1.0, 2.0])
    history.save(tmp_path / "lr.csv")
    assert LRHistory.load(tmp_path / "lr.csv").layers == history.layers


@pytest.mark.parametrize("text", ["", "epoch,a\n0,1\n", "step\n0\n", "step,a\n0,fast\n", "step,a\nx,1.0\n"])
def test_another_file_is_refused_by_name(tmp_path, text):
    (tmp_path / "other.csv").write_text(text)
    with pytest.raises(ValueError, match=r"other\.csv is not a learning-rate history"):
        LRHistory.load(tmp_path / "other.csv")


def test_state_survives_a_weights_only_file():
    history, file = recorded(), io.BytesIO()
    torch.save(history.state_dict(), file)
    file.seek(0)
    again = LRHistory(history.layers)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert (again.learning_rates == history.learning_rates).all()
    assert (again.hypergradients == history.hypergradients).all()
    again.append(9, [1.0, 2.0, 3.0])
    assert len(again) == 4


def test_a_state_of_other_layers_is_refused():
    with pytest.raises(ValueError, match="history of other layers"):
        LRHistory(["stem"]).load_state_dict(recorded().state_dict())
