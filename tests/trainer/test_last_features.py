"""The head that a run ends with: the mean of the trained one and one fitted to the features of the last steps."""

import pytest
import torch
from small_runs import arguments, images, resnet, same_weights, trainer, vit
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.nn import functional

from metalr_hf import MetaLRTrainer
from metalr_hf.hub.facts import run_facts
from metalr_hf.models.target_losses import ClassLoss
from metalr_hf.trainer.last_features import FITTED_WEIGHT, LastFeatures
from metalr_hf.tuning import fit_head

ON = {"calibrate": True, "average_weights": "polynomial", "max_steps": 20}


class Noting(MetaLRTrainer):
    """Notes what the head is given in training steps, and the head as it was trained."""

    def training_step(self, model, inputs, *args, **kwargs):
        seen = []
        handle = self.model.classifier.register_forward_hook(
            lambda _, given, __: seen.append(given[0].detach().clone())
        )
        loss = super().training_step(model, inputs, *args, **kwargs)
        handle.remove()
        self.given = [*getattr(self, "given", []), (seen[0], inputs["labels"].clone())]
        return loss

    def _refine_average(self):
        self.trained = [part.detach().clone() for part in (self.model.classifier.weight, self.model.classifier.bias)]
        super()._refine_average()


def begun(folder, model=None, kind=MetaLRTrainer, **options):
    run = kind(vit() if model is None else model, arguments(folder, **{**ON, **options}), train_dataset=images())
    run.train()
    return run


def spread(logits):
    return (logits - logits.mean(1, keepdim=True)).std()


@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_it_is_the_mean_of_the_trained_head_and_the_fitted_one(tmp_path, weights):
    loss = {} if weights is None else {"compute_loss_func": ClassLoss(weights)}
    rare = [row for row in images() if row["labels"] == 2][:4]
    rows = [row for row in images() if row["labels"] != 2][:28] + rare
    run = Noting(vit(), arguments(tmp_path, **ON), train_dataset=rows, **loss)
    run.train()
    # Those after the step at which the head was looked at.
    features, labels = (torch.cat(parts) for parts in zip(*run.given[-run.last_features.images // 8 :], strict=True))
    assert len(labels) == run.last_features.images
    assert 8 * (20 - 4) <= len(labels) <= 8 * (20 - 2)
    # Half-way to classes that count alike, unless weights of the loss say otherwise.
    expected = (len(labels) / (3 * labels.bincount())).sqrt() if weights is None else torch.tensor(weights)
    assert expected[2] > 1.4
    fitted = fit_head(features, labels, 3, expected)
    scale = spread(functional.linear(features, *run.trained)) / spread(
        functional.linear(features, fitted.weight, fitted.bias)
    )
    head = run.model.classifier
    for mean, trained, part in zip((head.weight, head.bias), run.trained, (fitted.weight, fitted.bias), strict=True):
        torch.testing.assert_close(mean.detach(), (1 - FITTED_WEIGHT) * trained + FITTED_WEIGHT * scale * part)
        assert not torch.equal(mean, trained)
    assert (
        run_facts(run).settings["final head"].startswith("the mean of the trained one and one fitted to the features")
    )


@pytest.mark.parametrize("make_model", [vit, resnet])
def test_nothing_else_changes_and_evaluations_see_it(tmp_path, monkeypatch, make_model):
    options = {"eval_strategy": "steps", "eval_steps": 6}
    runs = []
    for refined in (True, False):
        if not refined:
            monkeypatch.setattr(LastFeatures, "refine", lambda self, trainer: None)
        run = trainer(tmp_path, make_model(), eval_dataset=images(24, seed=1), **ON, **options)
        run.train()
        runs.append(run)
    parts = [dict(run.model.state_dict()) for run in runs]
    differ = [name for name, value in parts[0].items() if not torch.equal(value, parts[1][name])]
    assert differ
    assert all("classifier" in name for name in differ)
    losses = [[row["eval_loss"] for row in run.state.log_history if "eval_loss" in row] for run in runs]
    assert len(losses[0]) == 4
    assert losses[0] != losses[1]
    rates = [run.lr_history.learning_rates for run in runs]
    assert (rates[0] == rates[1]).all()


def test_it_is_told_of_the_weights_that_are_kept(tmp_path):
    class Rising(MetaLRTrainer):
        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            self.evaluated = [*getattr(self, "evaluated", []), self.last_features.images]
            return found

    options = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    run = Rising(
        vit(),
        arguments(tmp_path, **ON, **options, load_best_model_at_end=True, metric_for_best_model="rank"),
        train_dataset=images(),
        eval_dataset=images(24, seed=1),
        # The first evaluation is the best.
        compute_metrics=lambda _: {"rank": -run.state.global_step},
    )
    run.train()
    assert run.state.best_global_step == 4
    assert run.last_features.images == run.evaluated[0] < run.evaluated[-1]


@pytest.mark.parametrize("save_at", [2, 9])
def test_a_resumed_run_ends_bitwise_as_if_never_interrupted(tmp_path, save_at):
    options = {"save_strategy": "steps", "save_steps": save_at, "save_total_limit": 20}
    whole = begun(tmp_path / "a", **options)
    resumed = trainer(tmp_path / "b", vit(), **ON, **options)
    resumed.train(str(tmp_path / "a" / f"checkpoint-{save_at}"))
    assert resumed.last_features.images == whole.last_features.images > 0
    assert same_weights(whole.model, resumed.model)


def test_the_last_images_alone_count(tmp_path, monkeypatch):
    monkeypatch.setattr("metalr_hf.trainer.last_features.HEAD_IMAGES", 20)
    assert begun(tmp_path / "a").last_features.images == 24
    assert (
        begun(tmp_path / "b", gradient_accumulation_steps=2, per_device_train_batch_size=5).last_features.images == 23
    )


@pytest.mark.parametrize(
    "options",
    [{"fit_head": False}, {"average_weights": "none"}, {"torch_compile": True, "torch_compile_backend": "eager"}],
    ids=lambda options: next(iter(options)),
)
def test_where_it_is_not_done(tmp_path, options):
    assert begun(tmp_path, max_steps=6, **options).last_features.images == 0


def test_a_head_that_was_trained_before_is_left_alone(tmp_path):
    model = begun(tmp_path / "a", fit_head=False, max_steps=60, learning_rate=1e-2).model
    again = begun(tmp_path / "b", model)
    assert not again.fresh_head.is_fresh
    assert again.last_features.images == 0
    assert "final head" not in run_facts(again).settings


def test_a_head_that_is_not_fitted_at_the_start_is_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("metalr_hf.trainer.fresh_head.CLEARLY_BETTER", 0.0)
    run = begun(tmp_path)
    assert run.fresh_head.images == 0
    assert run.last_features.images > 0


@pytest.mark.parametrize(("rare", "is_refined"), [(1, False), (2, True)])
def test_it_waits_for_images_of_every_class(tmp_path, monkeypatch, rare, is_refined):
    run = begun(tmp_path)
    features, labels = (torch.cat(parts) for parts in zip(*run.last_features._batches, strict=True))
    few = torch.cat([(labels == k).nonzero()[: rare if k == 2 else None, 0] for k in range(3)])
    run.last_features._batches.clear()
    run.last_features._batches.append((features[few], labels[few]))
    run.state.global_step += 1
    before = run.model.classifier.weight.clone()
    run.last_features.refine(run)
    assert torch.equal(before, run.model.classifier.weight) != is_refined


def test_features_of_a_checkpoint_and_of_an_accelerator_go_together(tmp_path):
    run = begun(tmp_path)
    # As on a GPU: with nothing computed, but with every tensor's device checked.
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = LastFeatures()
        for device in ("cpu", "cuda"):
            found._batches.append((torch.zeros(8, 16, device=device), torch.zeros(8, device=device).long()))
        with pytest.raises(DynamicOutputShapeException):
            found.refine(run)
