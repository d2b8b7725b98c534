import math

import pytest
import torch
from small_cells import Network, cell, comparison
from watched import prepared, run

from metalr_hf.compare import compare
from metalr_hf.compare.strategies import HeldOut, get_strategy
from metalr_hf.models.bare import Classifier


def test_the_rate_is_that_of_the_best_trial_on_rows_that_no_trial_trained_on_and_the_run_is_that_of_cosine(tmp_path):
    rates = [1e-6, 1e-1, 1e-5]
    runs = comparison(strategies=["grid_search", "cosine"], learning_rates=rates, steps=12)
    rows = compare([cell(train=90, test=60)], runs, tmp_path)
    searched = [row for row in rows if row["strategy"] == "grid_search"]
    cosine = {row["learning_rate"]: row for row in rows if row["strategy"] == "cosine"}
    assert len(searched) == 1
    assert searched[0]["cost"] == 4.0
    same = ("accuracy", "test_loss", "train_loss", "images")
    assert {name: searched[0][name] for name in same} == {name: cosine[1e-1][name] for name in same}
    assert searched[0]["test_loss"] < min(cosine[1e-6]["test_loss"], cosine[1e-5]["test_loss"])


def test_trials_begin_with_the_head_of_the_run_on_the_held_out_fifths_and_leave_the_model_alone(tmp_path):
    seen = []

    def score(trainer):
        parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        seen.append((trainer.args.learning_rate, trainer.state.global_step, len(trainer.train_dataset), parameters))
        # The middle one diverged; of the others, which score alike, the loss decides.
        return {1e-3: (0.5, 1.0), 1e-2: (math.nan, math.nan), 1e-1: (0.5, 0.9)}[trainer.args.learning_rate]

    held_out = HeldOut(prepared(12, 0), score)
    rates = (1e-3, 1e-2, 1e-1)
    watch, _, moved = run(tmp_path, "grid_search", learning_rates=rates, hold_out=lambda: held_out)
    assert [one[:3] for one in seen] == [(1e-3, 6, 12), (1e-2, 6, 12), (1e-1, 6, 12)]
    assert watch.rates[0][0] == pytest.approx(1e-1)
    assert watch.trainer.extra_passes == 18
    assert all(moved.values())
    # The model of the run is still as it was made, and the trials are not.
    torch.manual_seed(0)
    made = dict(Classifier(Network(3)).named_parameters())
    assert all(torch.equal(made[name], p) for name, p in watch.weights[0].items())
    assert all(not torch.equal(made[name], p) for one in seen for name, p in one[3].items())


def test_a_search_with_nothing_to_search_or_nothing_found_says_so(tmp_path):
    with pytest.raises(ValueError, match="searches the learning_rates of a comparison: give some"):
        run(tmp_path, "grid_search", learning_rates=())

    diverged = HeldOut(prepared(12, 0), lambda trainer: (math.nan, math.nan))
    with pytest.raises(ValueError, match=r"learning_rates=\[0.001\] diverged"):
        run(tmp_path, "grid_search", learning_rates=(1e-3,), hold_out=lambda: diverged)
    assert get_strategy("grid_search+average").uses_learning_rate is False
