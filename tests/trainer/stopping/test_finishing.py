"""A run that has converged goes on with the images that it was evaluated on: how far, with which, and resumed."""

import math
from pathlib import Path

import pytest
from small_runs import STOPPING, OwnLoader, ReadOnce, arguments, images, noisy, same_weights, streamed, vit
from torch.utils.data import WeightedRandomSampler
from transformers import TrainerCallback, set_seed

from metalr_hf import MetaLRTrainer
from metalr_hf.trainer.stopping.finishing import ALL_IMAGES_FROM

HELD_BACK = 12


@pytest.fixture(autouse=True, scope="module")
def short():
    """Runs that may stop after 24 steps already."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("metalr_hf.trainer.stopping.convergence.FIRST_STOP", 24)
        yield


class Noting(MetaLRTrainer):
    """Notes which images every step was taken with."""

    def train(self, *args, **kwargs):
        self.seen = {}
        return super().train(*args, **kwargs)

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.setdefault(self.state.global_step + 1, set()).update(names(inputs["pixel_values"]))
        return super().training_step(model, inputs, *args, **kwargs)


def names(pixels):
    return set(pixels[:, 0, 0, 0].tolist())


HELD = names(images(HELD_BACK, seed=1)[:]["pixel_values"])


def finishing(folder, kind=Noting, train=None, held_back=None, evaluated_on=None, callbacks=None, **kwargs):
    held_back = images(HELD_BACK, seed=1) if held_back is None else held_back
    return kind(
        vit(0.0),
        arguments(folder, **{**STOPPING, **kwargs}),
        train_dataset=images(24) if train is None else train,
        eval_dataset=images(HELD_BACK, seed=1) if evaluated_on is None else evaluated_on,
        held_back=held_back,
        callbacks=callbacks,
    )


def went_on_at(run):
    (step,) = (row[ALL_IMAGES_FROM] for row in run.state.log_history if ALL_IMAGES_FROM in row)
    return step


def evaluated_at(run):
    return [row["step"] for row in run.state.log_history if "eval_loss" in row]


@pytest.fixture(scope="module")
def finished(short, tmp_path_factory):
    """A run that has ended; its folder is that of its arguments."""
    run = finishing(tmp_path_factory.mktemp("finished"))
    run.train()
    return run


def test_it_goes_on_for_a_third_with_all_images(finished):
    run, folder = finished, Path(finished.args.output_dir)
    step, end = went_on_at(run), run.state.global_step
    assert end == math.ceil(step * 4 / 3)
    assert run.stopped_because.startswith(f"Converged at step {step}, and trained on to step {end} with the images too")
    assert not HELD & set.union(*(run.seen[i] for i in range(1, step + 1)))
    assert set.union(*(run.seen[i] for i in range(step + 1, end + 1))) == HELD | names(images(24)[:]["pixel_values"])
    assert evaluated_at(run)[-1] == step
    assert len(run.lr_history) == end
    # The model is the average at the end, and so is the only checkpoint that is left.
    (checkpoint,) = folder.glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{end}"
    assert same_weights(run.model, type(run.model).from_pretrained(checkpoint))
    assert (run.state.best_global_step, run.state.best_metric) == (end, None)


@pytest.mark.parametrize("more", [{"eval_strategy": "steps", "eval_steps": 5}, {"eval_strategy": "epoch"}], ids=str)
def test_it_is_not_evaluated_on_what_it_is_trained_on(tmp_path, more):
    run = finishing(tmp_path, **more)
    run.train()
    assert evaluated_at(run)[-1] <= went_on_at(run) < run.state.global_step
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{run.state.global_step}"]


def test_a_run_that_overfits_goes_back_and_never_sees_them(tmp_path):
    # On enough images to tell.
    run = finishing(tmp_path, train=noisy(), evaluated_on=images(48, seed=1), learning_rate=1e-2)
    run.train()
    assert not any(ALL_IMAGES_FROM in row for row in run.state.log_history)
    assert run.state.best_global_step < run.state.global_step
    assert not HELD & set.union(*run.seen.values())
    assert "converged. The model is that of step" in run.stopped_because


@pytest.mark.parametrize(
    ("save", "accumulated"),
    [({}, 1), pytest.param({"save_steps": 5}, 2, marks=pytest.mark.slow)],
    ids=["best", "steps"],
)
def test_a_resumed_run_ends_with_the_same_weights(tmp_path, save, accumulated):
    options = {**save, "save_total_limit": 50, "gradient_accumulation_steps": accumulated}
    options["per_device_train_batch_size"] = 5
    whole = finishing(tmp_path, **options)
    whole.train()
    step, end = went_on_at(whole), whole.state.global_step
    checkpoints = {int(path.name.rsplit("-", 1)[1]): path for path in tmp_path.glob("checkpoint-*")}
    assert {step, end} <= checkpoints.keys() or save
    assert any(step < saved < end for saved in checkpoints) or not save
    for saved, checkpoint in checkpoints.items():
        if saved < step - 5:
            continue
        again = finishing(tmp_path / "again" / str(saved), **options)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert again.state.global_step == end
        assert went_on_at(again) == step
        assert same_weights(whole.model, again.model), saved
        assert again.seen == {i: rows for i, rows in whole.seen.items() if i > saved}


def test_a_second_run_is_the_first_one_again(tmp_path):
    run = finishing(tmp_path)
    set_seed(0)
    run.train()
    first = went_on_at(run), run.state.global_step, run.seen
    run.model.load_state_dict(vit(0.0).state_dict())
    set_seed(0)
    run.train()
    assert (went_on_at(run), run.state.global_step, run.seen) == first


@pytest.mark.parametrize(
    ("limit", "went_on"),
    # Epochs of two steps.
    [({"max_steps": 16}, 12), ({"max_steps": 15}, 12), ({"num_train_epochs": 3}, 4), ({"max_steps": 3}, 2)],
    ids=str,
)
def test_the_last_quarter_before_a_limit_has_all_images(tmp_path, limit, went_on):
    run = finishing(tmp_path, save_total_limit=50, **limit)
    run.train()
    end = limit.get("max_steps", 6)
    assert run.state.global_step == end
    assert went_on_at(run) == evaluated_at(run)[-1] == went_on
    assert not HELD & set.union(*(run.seen[i] for i in range(1, went_on + 1)))
    assert HELD & set.union(*(run.seen[i] for i in range(went_on + 1, end + 1)))
    assert run.stopped_because.startswith(f"Not yet converged at step {went_on}, and trained on to step {end} with")
    again = finishing(tmp_path / "again", **limit)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{went_on}"))
    assert again.seen == {i: rows for i, rows in run.seen.items() if i > went_on}
    assert same_weights(run.model, again.model)


@pytest.mark.parametrize("steps", [20, 28, 40, 56, 68])
def test_the_last_quarter_does_not_begin_an_epoch_late_by_rounding(tmp_path, steps):
    # Epochs of three steps; three quarters of 20 are five of them.
    run = finishing(tmp_path, max_steps=steps)
    run.state.max_steps, run._steps_per_epoch = steps, 3
    assert run._step_near_limit == 3 * (steps // 4)


def test_within_a_single_epoch_a_limit_ends_the_run(tmp_path):
    run = finishing(tmp_path, max_steps=2)
    run.train()
    assert run.state.global_step == 2
    assert "the limit that was given" in run.stopped_because


def test_the_last_quarter_of_the_minutes_has_all_images(tmp_path, monkeypatch):
    run = finishing(tmp_path, max_minutes=1)
    # Every step takes three seconds: 15 are three quarters of a minute.
    monkeypatch.setattr("metalr_hf.trainer.stopping.evaluating.time.monotonic", lambda: 3.0 * run.state.global_step)
    run.train()
    assert went_on_at(run) == 15
    assert run.state.global_step == 20
    assert run.stopped_because.startswith("Not yet converged at step 15, and trained on to step 20 with the images")


def test_one_that_overfits_is_watched_to_its_limit(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 2}
    run = finishing(tmp_path, train=noisy(), evaluated_on=images(48, seed=1), learning_rate=1e-2, max_steps=20, **often)
    run.train()
    assert not any(ALL_IMAGES_FROM in row for row in run.state.log_history)
    assert run.state.global_step == 20
    assert "the limit that was given" in run.stopped_because


def test_stopped_by_another_callback_it_keeps_what_it_has_become(tmp_path):
    class StopEarly(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if any(ALL_IMAGES_FROM in row for row in state.log_history):
                control.should_training_stop = True

    run = finishing(tmp_path, callbacks=[StopEarly()])
    run.train()
    step = went_on_at(run)
    assert run.state.global_step == run.state.best_global_step == step + 1
    assert f"trained on to step {step + 1}" in run.stopped_because


def test_the_card_counts_them_and_shows_no_figure_of_them(finished):
    run = finished
    run.evaluate()
    assert run.evaluation is None or run.evaluation.step <= went_on_at(run)
    run.create_model_card()
    assert f"with {24 + HELD_BACK} training images" in " ".join(
        (Path(run.args.output_dir) / "README.md").read_text().split()
    )


def test_a_run_that_was_trained_on_them_is_not_resumed_without(tmp_path, finished):
    checkpoint = str(Path(finished.args.output_dir) / f"checkpoint-{finished.state.global_step}")
    args = arguments(tmp_path / "again", **STOPPING)
    other = MetaLRTrainer(vit(0.0), args, train_dataset=images(24), eval_dataset=images(HELD_BACK, seed=1))
    with pytest.raises(ValueError, match=r"is of a run that was trained on its held_back images from some step on"):
        other.train(resume_from_checkpoint=checkpoint)


class OwnSampler(MetaLRTrainer):
    def _get_train_sampler(self, *args):
        return WeightedRandomSampler([1.0] * 24, 24)


class WithLoader(OwnLoader, MetaLRTrainer):
    pass


def test_what_cannot_be_held_back_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"held_back is for runs that stop by themselves\. Set stop_when_converged"):
        finishing(tmp_path, stop_when_converged=False, max_steps=3)
    for rows in (streamed(images()), ReadOnce(images())):
        with pytest.raises(ValueError, match=rf"rows have numbers, and held_back is a {type(rows).__name__}\."):
            finishing(tmp_path, held_back=rows)
    for kind, name in ((OwnSampler, "_get_train_sampler"), (WithLoader, "get_train_dataloader")):
        with pytest.raises(ValueError, match=rf"held_back: {name} of {kind.__name__} says which images are drawn"):
            finishing(tmp_path, kind)
    with pytest.raises(ValueError, match=r"held_back: train_sampling_strategy says which images are drawn"):
        finishing(tmp_path, train_sampling_strategy="sequential")
