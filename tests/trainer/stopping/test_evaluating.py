"""A run that stops by itself: when, at which cost, with which weights, and the same after an interruption."""

import pytest
import torch
from families import DETECTORS, boxes_for, keep_labels_apart
from networks import Network
from small_runs import STOPPING, arguments, images, noisy, resnet, same_weights, trainer, vit
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import SaveStrategy, SchedulerType

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.trainer.stopping.convergence import EVALUATION_SHARE, earliest_stop, has_converged
from metalr_hf.trainer.stopping.evaluating import _of_classes


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Runs that may stop after 40 steps already."""
    monkeypatch.setattr("metalr_hf.trainer.stopping.convergence.FIRST_STOP", 40)


def overfitting(folder, **kwargs):
    return trainer(folder, vit(0.0), noisy(), eval_dataset=images(48, seed=1), **{**STOPPING, **kwargs})


def evaluations(run, metric="eval_refined_loss"):
    return [(row["step"], row[metric]) for row in run.state.log_history if metric in row]


def test_a_run_that_overfits_stops_and_goes_back_to_its_best(tmp_path):
    run = overfitting(tmp_path)
    run.train()
    seen = evaluations(run)
    assert run.has_converged()
    assert not any(has_converged(run.evaluations()[:i], False) for i in range(len(seen)))
    lowest_at, lowest = min(seen, key=lambda row: row[1])
    error = dict(evaluations(run, "eval_refined_loss_error"))[lowest_at]
    # The last that cannot be told from the best.
    best_step = max(step for step, loss in seen if loss <= lowest + error)
    loss_of_best = dict(evaluations(run, "eval_loss"))[best_step]
    assert run.state.global_step == seen[-1][0] > best_step
    assert run.state.best_global_step == best_step
    # The weights that were evaluated, an average, are back.
    assert run.evaluate()["eval_loss"] == pytest.approx(loss_of_best, rel=1e-5)
    assert f"Stopped at step {run.state.global_step}, converged." in run.stopped_because
    assert f"that of step {best_step}" in run.stopped_because
    # Nothing but the best is left on disk.
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best_step}"]


def test_evaluations_cost_a_twentieth_at_most(tmp_path):
    # The second estimates the statistics of batch norm for each: it takes 66 steps to earn one evaluation.
    for name, model, limit in (("vit", vit(), -1), ("resnet", resnet(), 132)):
        options = {**STOPPING, "max_steps": limit}
        run = trainer(tmp_path / name, model, images(24), eval_dataset=images(30, seed=1), **options)
        run.train()
        looked = 30 * len(evaluations(run)) / 3 / 16 + run.statistics_passes
        assert 0 < looked <= EVALUATION_SHARE * run.state.global_step + 1e-9
        assert run.statistics_passes > 0 or name == "vit"


@pytest.mark.parametrize("save", [{}, pytest.param({"save_steps": 7}, marks=pytest.mark.slow)], ids=["best", "steps"])
def test_a_resumed_run_stops_at_the_same_step_with_the_same_weights(tmp_path, save):
    whole = overfitting(tmp_path / "a", save_total_limit=50, **save)
    whole.train()
    saved = sorted(tmp_path.glob("a/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert whole.state.best_model_checkpoint in map(str, saved)
    for checkpoint in {saved[0], saved[len(saved) // 2], saved[-1]}:
        again = overfitting(tmp_path / "b", save_total_limit=50, **save)
        again.train(resume_from_checkpoint=str(checkpoint))
        assert again.state.global_step == whole.state.global_step
        assert evaluations(again) == evaluations(whole)
        assert again.state.best_global_step == whole.state.best_global_step
        assert same_weights(again.model, whole.model)


def test_limits_are_kept_and_the_last_weights_evaluated(tmp_path):
    for name, limit, last in (("a", {"max_steps": 13}, 13), ("b", {"num_train_epochs": 3}, 6)):
        run = overfitting(tmp_path / name, **limit)
        run.train()
        assert run.state.global_step == run.state.max_steps == last
        assert [step for step, _ in evaluations(run)] == [last]
        assert f"Stopped at step {last}, the limit that was given, before it had converged." in run.stopped_because
    run = overfitting(tmp_path / "c", max_minutes=1e-6)
    run.train()
    assert run.state.global_step == 1
    assert [step for step, _ in evaluations(run)] == [1]
    assert "Stopped at step 1, by max_minutes=1e-06." in run.stopped_because


def test_what_is_left_out_is_filled_in(tmp_path):
    args = MetaLRTrainingArguments(str(tmp_path), stop_when_converged=True)
    assert args.average_weights == "polynomial"
    assert args.lr_scheduler_type == SchedulerType.CONSTANT_WITH_WARMUP
    assert (args.save_strategy, args.save_total_limit) == (SaveStrategy.BEST, 1)
    assert (args.load_best_model_at_end, args.metric_for_best_model, args.greater_is_better) == (
        True,
        "refined_loss",
        False,
    )
    args = MetaLRTrainingArguments(
        str(tmp_path),
        stop_when_converged=True,
        average_weights="0.9",
        lr_scheduler_type="inverse_sqrt",
        metric_for_best_model="accuracy",
        save_strategy="epoch",
    )
    assert (args.average_weights, args.lr_scheduler_type) == ("0.9", SchedulerType.INVERSE_SQRT)
    assert (args.save_strategy, args.save_total_limit, args.greater_is_better) == (SaveStrategy.EPOCH, None, True)
    warm = MetaLRTrainingArguments(str(tmp_path), stop_when_converged=True, warmup_steps=10)
    assert (warm.lr_scheduler_type, warm.warmup_steps) == (SchedulerType.CONSTANT_WITH_WARMUP, 10)
    off = MetaLRTrainingArguments(str(tmp_path))
    assert (off.num_train_epochs, off.save_total_limit, off.load_best_model_at_end) == (3.0, None, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr_scheduler_type": "cosine"}, r"lr_scheduler_type='cosine' needs the length of the run.* or set max_steps"),
        ({"save_strategy": "no"}, r"save_strategy='no' would leave no best weights.*Leave save_strategy out"),
        ({"warmup_steps": 0.1}, r"warmup_steps=0.1 is a share of the run.*Give a number of steps"),
        ({"logging_steps": 0.1}, r"logging_steps=0.1 is a share of the run"),
        ({"max_minutes": 0}, r"max_minutes=0 must be above 0"),
        ({"max_minutes": 5, "stop_when_converged": False}, r"max_minutes=5 is a limit of runs that stop by themselves"),
    ],
    ids=str,
)
def test_contradictions_are_refused_in_one_line(tmp_path, given, message):
    with pytest.raises(ValueError, match=message) as error:
        MetaLRTrainingArguments(str(tmp_path), **{"stop_when_converged": True, **given})
    assert "\n" not in str(error.value)
    # A limit tells the length of the run.
    if "lr_scheduler_type" in given or "warmup_steps" in given:
        MetaLRTrainingArguments(str(tmp_path), stop_when_converged=True, max_steps=100, **given)


def test_without_images_to_evaluate_on_it_says_what_to_give(tmp_path):
    with pytest.raises(ValueError, match=r"stop_when_converged=True needs eval_dataset: .*Pass eval_dataset"):
        trainer(tmp_path, **STOPPING)
    with pytest.raises(ValueError, match=r"needs an eval_dataset with a length.*IterableDataset has none"):
        trainer(tmp_path, eval_dataset=images(16).to_iterable_dataset(), **STOPPING)


def test_set_too_late_it_is_refused(tmp_path):
    args = arguments(tmp_path, max_steps=-1)
    args.stop_when_converged = True
    with pytest.raises(ValueError, match=r"stop_when_converged=True was set after .* Give it to MetaLRTrainingArg"):
        MetaLRTrainer(model=vit(), args=args, train_dataset=images(), eval_dataset=images(16))


@pytest.mark.parametrize("with_metrics", [True, False])
def test_it_goes_by_the_loss_that_no_temperature_makes_lower(tmp_path, with_metrics):
    run = overfitting(tmp_path, max_steps=60)
    kept = []
    if with_metrics:
        run.compute_metrics = lambda prediction: kept.append(prediction.predictions) or {"accuracy": 0.5}
    run.train()
    refined, losses = evaluations(run), evaluations(run, "eval_loss")
    assert all(0 < a < b for (_, a), (_, b) in zip(refined, losses, strict=True))
    # The answers of the model that is left, at any temperature.
    prediction = run.predict(run.eval_dataset)
    logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
    at = [torch.nn.functional.cross_entropy(logits / t, labels).item() for t in torch.logspace(-2, 2, 400)]
    assert dict(refined)[run.state.best_global_step] == pytest.approx(min(at), abs=1e-3)
    assert len(kept) == (len(losses) + 1) * with_metrics


def test_a_task_without_classes_goes_by_its_loss(tmp_path):
    pixels = images(24)
    targets = [[float(label), 1.0] for label in pixels["labels"]]
    rows = pixels.remove_columns("labels").add_column("labels", targets)
    model = Network(2)
    own = {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: (outputs.logits - labels).abs().mean()}
    run = trainer(tmp_path, model, rows, eval_dataset=rows, **{**STOPPING, "max_steps": 60}, **own)
    run.train()
    assert evaluations(run) == evaluations(run, "eval_loss") != []


def test_a_detector_goes_by_its_loss(tmp_path):
    torch.manual_seed(0)
    args = arguments(tmp_path, **{**STOPPING, "max_steps": 12})
    rows = {"train_dataset": boxes_for(24), "eval_dataset": boxes_for(10)}
    run = MetaLRTrainer(DETECTORS["YOLOS"](), args, data_collator=keep_labels_apart, **rows)
    run.train()
    assert evaluations(run) == evaluations(run, "eval_loss") != []


def test_several_evaluation_sets(tmp_path):
    sets = {"near": images(8, seed=1), "far": images(8, seed=2)}
    options = {**STOPPING, "metric_for_best_model": "eval_near_loss", "greater_is_better": False}
    run = trainer(tmp_path, vit(0.0), noisy(), eval_dataset=sets, **options)
    run.train()
    assert run.has_converged()
    assert len(evaluations(run, "eval_far_loss")) == len(evaluations(run, "eval_near_loss"))
    with pytest.raises(ValueError, match=r"of none of them.*metric_for_best_model='near_refined_loss' or 'far_"):
        trainer(tmp_path, vit(0.0), noisy(), eval_dataset=sets, **STOPPING)


def test_the_best_of_a_metric_that_rises_is_the_highest(tmp_path):
    accuracies = iter([0.9, 0.5, 0.8, *[0.1] * 100])
    options = {**STOPPING, "metric_for_best_model": "accuracy", "greater_is_better": True}
    run = overfitting(tmp_path, **options)
    run.compute_metrics = lambda predictions: {"accuracy": next(accuracies), "accuracy_error": 0.05}
    run.train()
    assert run.state.best_metric == 0.9
    assert run.state.best_global_step == evaluations(run, "eval_accuracy")[0][0]


def test_the_progress_bar_ends_where_the_run_may(tmp_path):
    ends = []

    class Bar(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            bars = [each.training_bar for each in run.callback_handler.callbacks if isinstance(each, ProgressCallback)]
            ends.extend(bar.total for bar in bars if isinstance(bar, tqdm))

    run = overfitting(tmp_path, disable_tqdm=False, logging_steps=1)
    run.add_callback(Bar())
    run.train()
    assert ends[0] == earliest_stop(0)
    assert sorted(ends) == ends
    assert ends[-1] < 2 * run.state.global_step


def test_without_it_a_run_is_that_of_transformers_default_length(tmp_path):
    args = arguments(tmp_path, max_steps=-1)
    run = MetaLRTrainer(model=vit(), args=args, train_dataset=images())
    run.train()
    assert run.state.global_step == 3 * 48 / 8
    assert run.stopped_because is None


def test_no_answers_are_kept_but_those_of_classes():
    masks = torch.zeros(4, 8, 8)
    assert _of_classes(torch.zeros(4, 3, 8, 8), masks).shape == (4,)
    assert _of_classes((torch.zeros(4, 3), masks), torch.zeros(4)).shape == (4, 3)


class LossOnly(torch.nn.Linear):
    def forward(self, pixel_values, labels=None):
        return torch.nn.functional.cross_entropy(super().forward(pixel_values.flatten(1)), labels)


def test_a_module_that_gives_nothing_but_its_loss_stops_too(tmp_path):
    run = trainer(tmp_path, LossOnly(768, 3), eval_dataset=images(24, seed=1), **{**STOPPING, "max_steps": 6})
    run.train()
    assert run.state.best_global_step
