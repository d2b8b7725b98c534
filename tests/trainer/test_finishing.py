"""A run that has converged goes on with the images that it was evaluated on: how far, with which, and resumed."""

import json
import math

import numpy as np
import pytest
from small_runs import STOPPING, ReadOnce, arguments, images, noisy, same_weights, streamed, vit
from torch.utils.data import ConcatDataset
from transformers import set_seed

from metalr_hf import MetaLRTrainer
from metalr_hf.trainer.finishing import CONVERGED_AT, GOES_ON_FROM

HELD_BACK = 12


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Runs that may stop after 40 steps already."""
    monkeypatch.setattr("metalr_hf.trainer.convergence.FIRST_STOP", 40)


class Noting(MetaLRTrainer):
    """Notes which images every step was taken with."""

    def train(self, *args, **kwargs):
        self.seen = {}
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen[self.state.global_step + 1] = set(inputs["pixel_values"][:, 0, 0, 0].tolist())
        return super().training_step(model, inputs, *args, **kwargs)


def finishing(folder, held_back=None, eval_dataset=None, **kwargs):
    held_back = images(HELD_BACK, seed=1) if held_back is None else held_back
    eval_dataset = images(HELD_BACK, seed=1) if eval_dataset is None else eval_dataset
    args = arguments(folder, **{**STOPPING, **kwargs})
    return Noting(vit(0.0), args, train_dataset=noisy(), eval_dataset=eval_dataset, held_back=held_back)


def marks(run):
    return [(row[CONVERGED_AT], row[GOES_ON_FROM]) for row in run.state.log_history if CONVERGED_AT in row]


def test_it_goes_on_for_a_third_from_its_best_weights_with_all_images(tmp_path):
    run = finishing(tmp_path)
    result = run.train()
    ((converged_at, best),) = marks(run)
    assert best < converged_at
    assert result.global_step == run.state.global_step == math.ceil(best * 4 / 3)
    assert "went on from step" in run.stopped_because
    held = set(images(HELD_BACK, seed=1)[:]["pixel_values"][:, 0, 0, 0].tolist())
    end = run.state.global_step
    after = [run.seen[step] for step in range(best + 1, end + 1)]
    assert held <= set.union(*after)
    evaluated_at = [row["step"] for row in run.state.log_history if "eval_loss" in row]
    assert max(evaluated_at) <= best, "of what came after, the run has no record: it went back"
    assert len(run.lr_history) == end
    # As it was, for another run.
    assert not isinstance(run.train_dataset, ConcatDataset)
    assert (run.args.max_steps, run.args.load_best_model_at_end) == (-1, True)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{end}"]
    # What is evaluated now is what was saved: the average at the end.
    assert same_weights(run.model, type(run.model).from_pretrained(tmp_path / f"checkpoint-{end}"))


def test_the_best_weights_may_be_those_at_which_it_stopped(tmp_path):
    # Of so few images no evaluation can be told from the best, and the last one is taken.
    run = finishing(tmp_path, images(4, seed=1), eval_dataset=images(4, seed=1))
    run.train()
    ((converged_at, best),) = marks(run)
    assert best == converged_at
    assert run.state.global_step == math.ceil(best * 4 / 3)
    assert max(run.seen) == run.state.global_step


def test_until_then_it_is_the_run_that_holds_them_back(tmp_path):
    run = finishing(tmp_path / "a")
    run.train()
    plain = Noting(
        vit(0.0),
        arguments(tmp_path / "b", **STOPPING),
        train_dataset=noisy(),
        eval_dataset=images(HELD_BACK, seed=1),
    )
    plain.train()
    ((converged_at, best),) = marks(run)
    assert (plain.state.global_step, plain.state.best_global_step) == (converged_at, best)
    assert np.array_equal(plain.lr_history.learning_rates[:best], run.lr_history.learning_rates[:best])


@pytest.mark.parametrize("save", [{}, {"save_steps": 7, "save_total_limit": 50}], ids=["best", "steps"])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, save):
    whole = finishing(tmp_path, **save)
    whole.train()
    ((converged_at, best),) = marks(whole)
    for checkpoint in sorted(tmp_path.glob("checkpoint-*")):
        step = int(checkpoint.name.rsplit("-", 1)[1])
        again = finishing(tmp_path / "again" / str(step), **save)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert marks(again) == [(converged_at, best)]
        assert again.state.global_step == whole.state.global_step
        assert same_weights(whole.model, again.model), step
        steps_taken = len(again.seen)
        assert (steps_taken == 0) == (step == whole.state.global_step)


def test_a_second_run_is_the_first_one_again(tmp_path):
    run = finishing(tmp_path)
    set_seed(0)
    run.train()
    first = marks(run), run.state.global_step
    run.model.load_state_dict(vit(0.0).state_dict())
    set_seed(0)
    run.train()
    assert (marks(run), run.state.global_step) == first


def test_a_run_that_reaches_its_limit_before_holds_them_back_to_the_end(tmp_path):
    run = finishing(tmp_path, max_steps=30)
    run.train()
    assert marks(run) == []
    assert run.state.global_step == 30
    assert "before it had converged" in run.stopped_because


def test_the_limit_holds_for_the_last_part_too(tmp_path):
    run = finishing(tmp_path / "a")
    run.train()
    ((converged_at, best),) = marks(run)
    limited = finishing(tmp_path / "b", max_steps=converged_at)
    limited.train()
    assert limited.state.global_step == min(math.ceil(best * 4 / 3), converged_at)


def test_both_parts_count_in_what_the_run_took(tmp_path):
    run = finishing(tmp_path)
    metrics = run.train().metrics
    ((converged_at, best),) = marks(run)
    steps = converged_at + run.state.global_step - best
    assert metrics["train_steps_per_second"] * metrics["train_runtime"] == pytest.approx(steps, rel=0.05)
    json.dumps(metrics)


def test_what_cannot_be_held_back_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"held_back is for runs that stop by themselves\. Set stop_when_converged"):
        finishing(tmp_path, stop_when_converged=False, max_steps=3)
    with pytest.raises(ValueError, match=r"save_only_model=True leaves no checkpoint"):
        finishing(tmp_path, save_only_model=True)
    for rows in (streamed(images()), ReadOnce(images())):
        with pytest.raises(ValueError, match=rf"held_back is a {type(rows).__name__}, which has none"):
            finishing(tmp_path, held_back=rows)
