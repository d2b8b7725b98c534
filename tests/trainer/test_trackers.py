import math

import numpy as np
import pytest
from small_runs import trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def run_and_events(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "logs"))
        options = {"max_steps": 6, "logging_steps": 2, "tuning_steps": 4, "head_lr_multiplier": 3.0}
        run = trainer(folder, report_to="tensorboard", meta_source="stream", **options)
    run.train()
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return run, events


def scalars(events, tag):
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_has_every_layer_in_groups_at_the_logging_steps(run_and_events):
    run, events = run_and_events
    history = run.lr_history
    tags = set(events.Tags()["scalars"])
    for i, layer in enumerate(history.layers):
        logged = scalars(events, f"train/lr/{layer}")
        assert list(logged) == [2, 4, 6]
        # Trainer counts from 1, and the row is that of the step just taken.
        np.testing.assert_allclose(list(logged.values()), history.learning_rates[[1, 3, 5], i], rtol=1e-6)
        # Tuning ends with step 4.
        tuned = scalars(events, f"train/hypergradient/{layer}")
        np.testing.assert_allclose(list(tuned.values()), history.hypergradients[[1, 3], i], rtol=1e-6)
        assert list(tuned) == [2, 4]
    assert list(scalars(events, "train/meta_loss")) == [2, 4]
    own = {tag for tag in tags if tag.startswith(("train/lr/", "train/hypergradient/"))}
    assert len(own) == 2 * len(history.layers)


def test_the_one_learning_rate_is_the_geometric_mean_of_the_layers(run_and_events):
    run, events = run_and_events
    logged = scalars(events, "train/learning_rate")
    expected = np.exp(np.log(run.lr_history.learning_rates).mean(axis=1))[[1, 3, 5]]
    np.testing.assert_allclose(list(logged.values()), expected, rtol=1e-6)
    low, high = (scalars(events, f"train/learning_rate_{end}") for end in ("min", "max"))
    assert all(low[step] < logged[step] < high[step] for step in logged)


def test_the_log_is_plain_figures(run_and_events):
    run, _ = run_and_events
    rows = [row for row in run.state.log_history if "learning_rate" in row]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for row in rows for value in row.values())


def test_without_a_tracker_the_log_stays_short(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.train()
    assert not [name for name in run.state.log_history[0] if "/" in name]
