"""Scripts as people write them, run through the stock Trainer and through ours: what works there works here."""

import copy
import logging
from dataclasses import dataclass

import pytest
import timm
import torch
from small_runs import LABELS, OwnLoader, ReadOnce, images, same_weights, vit
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainingArguments, get_constant_schedule

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.models import Classifier
from metalr_hf.trainer.schedules import schedule_shape

STEPS = 8


def stock_arguments(folder, kind=TrainingArguments, **kwargs):
    defaults = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    return kind(str(folder), **{**defaults, **quiet, **kwargs})


class WeightedSampler:
    """Every image of the first class, and none of the others."""

    def _get_train_sampler(self, *args, **kwargs):
        generator = torch.Generator().manual_seed(0)
        return WeightedRandomSampler([float(label == 0) for label in LABELS], 48, generator=generator)


class TupleBatches:
    """Batches that are tuples, with a loss that takes them apart."""

    def get_train_dataloader(self):
        rows = images()
        return DataLoader(list(zip(rows["pixel_values"], rows["labels"], strict=True)), batch_size=8)

    def compute_loss(self, model, inputs, *args, **kwargs):
        pixels, labels = inputs
        return model(pixel_values=pixels, labels=labels).loss


class OwnStep:
    """A training step written by hand, which calls no other."""

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class OwnLoss:
    """A loss written by hand, which calls no other and takes the batch apart in place."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs["pixel_values"].mul_(0.5)
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = functional.cross_entropy(outputs.logits, inputs.pop("labels"))
        return (loss, outputs) if return_outputs else loss


class OwnStepAndLoss(OwnLoss, OwnStep):
    """Neither of which calls ours."""


class StepWithoutLoss:
    """A training step that asks the model for its loss itself."""

    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class OwnBatches:
    """Batches that are fetched by hand."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return [next(epoch_iterator) for _ in range(num_batches)], None


class HeldInEval:
    """A model that no one can put into training mode."""

    def __init__(self, model, *args, **kwargs):
        model.__class__ = type("Held", (type(model),), {"train": lambda self, mode=True: nn.Module.train(self, False)})
        super().__init__(model.eval(), *args, **kwargs)


class OwnOptimizer:
    """An optimizer made by hand: biases learn at twice the rate."""

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            named = list(self.model.named_parameters())
            biases = [p for name, p in named if name.endswith("bias")]
            others = [p for name, p in named if not name.endswith("bias")]
            groups = [{"params": others}, {"params": biases, "lr": 2 * self.args.learning_rate}]
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


class FrozenInOptimizer:
    """A frozen part of the model, and an optimizer made by hand that holds it all the same."""

    def __init__(self, model, *args, **kwargs):
        model.vit.embeddings.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        super().__init__(model, *args, **kwargs, optimizers=(optimizer, None))


class OwnCollator:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs, data_collator=self.collate)

    def collate(self, rows):
        pixels = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
        return {"pixel_values": pixels.flip(-1), "labels": torch.tensor([int(row["labels"]) for row in rows])}


SCRIPTS = [
    OwnLoader,
    WeightedSampler,
    TupleBatches,
    OwnStep,
    OwnLoss,
    OwnStepAndLoss,
    StepWithoutLoss,
    OwnBatches,
    HeldInEval,
    OwnOptimizer,
    FrozenInOptimizer,
    OwnCollator,
]
WITHOUT_DATASET = (OwnLoader, TupleBatches)


def run(script, trainer_class, folder, model=None, **kwargs):
    kind = type(script.__name__, (script, trainer_class), {})
    data = {} if script in WITHOUT_DATASET else {"train_dataset": images()}
    data |= {"eval_dataset": images(24, seed=1)} if "eval_strategy" in kwargs else {}
    trained = kind(model=vit() if model is None else model, args=stock_arguments(folder, **kwargs), **data)
    trained.train()
    return trained


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_tuning_it_is_the_stock_trainer_bit_for_bit(tmp_path, script):
    model = vit()
    stock = run(script, Trainer, tmp_path / "stock", copy.deepcopy(model))
    kind = type(script.__name__, (script, MetaLRTrainer), {})
    args = stock_arguments(tmp_path / "ours")
    args.hyper_lr = 0.0
    data = {} if script in WITHOUT_DATASET else {"train_dataset": images()}
    ours = kind(model=copy.deepcopy(model), args=args, **data)
    ours.train()
    assert same_weights(stock.model, ours.model)
    assert not same_weights(stock.model, model)
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (stock, ours)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_by_default_it_is_calibrated_and_tuned(tmp_path, script):
    # Trainer evaluates no tuples.
    evaluated = {} if script is TupleBatches else {"eval_strategy": "steps", "eval_steps": 1}
    trained = run(script, MetaLRTrainer, tmp_path, gradient_accumulation_steps=2, **evaluated)
    # Forwards of the ladder at three steps at most, and none at every step.
    assert trained.lr_scheduler.calibration_forwards < 3 * 28
    assert trained.lr_history.steps.tolist() == list(range(STEPS))
    assert trained.lr_scheduler.calibration is not None
    # The step before the head is fitted does not tune.
    measured = torch.tensor(trained.lr_history.hypergradients).isfinite().all(1).tolist()
    unmeasured = [step for step in range(1, STEPS) if not measured[step]]
    assert unmeasured in ([[3], [4]] if trained.fresh_head.images else [[]])


def test_batches_and_steps_that_both_do_without_ours_are_told_what_to_do(tmp_path):
    class OwnBatchesAndStep(OwnBatches, StepWithoutLoss):
        pass

    with pytest.raises(ValueError, match=r"Call the one of super in one of them, or set calibrate=False"):
        run(OwnBatchesAndStep, MetaLRTrainer, tmp_path)
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, calibrate=False)
    kind = type("Uncalibrated", (OwnBatchesAndStep, MetaLRTrainer), {})
    kind(model=vit(), args=args, train_dataset=images()).train()


@pytest.mark.parametrize("script", [OwnLoss, OwnStepAndLoss, StepWithoutLoss])
def test_a_stream_tunes_it_too(tmp_path, script):
    kind = type(script.__name__, (script, MetaLRTrainer), {})
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, meta_split=0.25)
    trained = kind(model=vit(), args=args, train_dataset=images())
    trained.train()
    assert trained.lr_scheduler.calibration is not None
    # The first steps are calibrated; of the others every second one is tuned.
    looks = len(trained.lr_scheduler.calibration.changes)
    measured = torch.tensor(trained.lr_history.hypergradients).isfinite().all(1)
    assert measured.tolist() == [step >= looks and step % 2 == 0 for step in range(STEPS)]
    assert trained._meta_stream.position == STEPS // 2 + 1


def test_every_rung_of_a_stream_sees_the_same_batch(tmp_path):
    seen = []

    class Watching(OwnLoss, MetaLRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if not torch.is_grad_enabled():
                seen.append(float(inputs["pixel_values"].abs().sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = stock_arguments(tmp_path, MetaLRTrainingArguments, meta_split=0.25, max_steps=1)
    Watching(model=vit(), args=args, train_dataset=images()).train()
    assert len(seen) > 2
    assert len(set(seen)) == 1


def test_the_calibration_changes_nothing_of_the_batch_that_is_trained_on(tmp_path):
    scales = []

    class Watching(OwnLoss, MetaLRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            before = inputs["pixel_values"].clone()
            loss = super().training_step(model, inputs, *args, **kwargs)
            scales.append(float((inputs["pixel_values"] / before).mean()))
            return loss

    Watching(model=vit(), args=stock_arguments(tmp_path), train_dataset=images()).train()
    assert scales == pytest.approx([0.5] * STEPS)


def test_what_is_changed_of_an_optimizer_before_the_training_holds(tmp_path):
    found = []
    for trainer_class in (Trainer, MetaLRTrainer):
        trained = trainer_class(model=vit(), args=stock_arguments(tmp_path), train_dataset=images())
        trained.create_optimizer_and_scheduler(num_training_steps=STEPS)
        for group in trained.optimizer.param_groups:
            group["weight_decay"] = 0.3
        trained.train()
        found.append({group["weight_decay"] for group in trained.optimizer.param_groups})
    assert found == [{0.3}, {0.3}]


def test_the_callbacks_are_those_of_the_stock_trainer(tmp_path):
    kinds = []
    for trainer_class in (Trainer, MetaLRTrainer):
        trained = run(OwnCollator, trainer_class, tmp_path, max_steps=2)
        kinds.append([type(callback) for callback in trained.callback_handler.callbacks])
    assert kinds[0] == kinds[1]


def test_the_calibration_looks_at_the_images_that_the_sampler_draws(tmp_path):
    seen = []

    class Watching(WeightedSampler, MetaLRTrainer):
        def compute_meta_loss(self, inputs):
            seen.append(inputs["labels"])
            return super().compute_meta_loss(inputs)

    Watching(model=vit(), args=stock_arguments(tmp_path), train_dataset=images()).train()
    assert seen
    assert set(torch.cat(seen).tolist()) == {0}


@pytest.mark.parametrize(
    "options",
    [{}, {"meta_split": 0.25, "meta_batch_size": 16}, {"head_hold_epochs": 1.0}],
    ids=lambda options: "-".join(options) or "default",
)
def test_a_batch_size_that_is_found_holds_for_validation_too(tmp_path, options):
    class SmallMemory(MetaLRTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["labels"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = stock_arguments(
        tmp_path, MetaLRTrainingArguments, auto_find_batch_size=True, per_device_train_batch_size=16, **options
    )
    trained = SmallMemory(model=vit(), args=args, train_dataset=images())
    trained.train()
    assert trained._train_batch_size == 4
    assert len(trained.lr_history) == STEPS
    # 48 images are 12 steps of 4.
    assert trained.lr_scheduler.hold_steps == {"head": 12 if "head_hold_epochs" in options else 0}


@pytest.mark.parametrize("script", [OwnLoader, WeightedSampler])
def test_a_stream_that_would_pass_the_users_data_by_is_refused(tmp_path, script):
    kind = type(script.__name__, (script, MetaLRTrainer), {})
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, meta_source="stream")
    with pytest.raises(ValueError, match="Pass the images to tune on as meta_dataset"):
        kind(model=vit(), args=args, train_dataset=images()).train()


def test_a_stream_does_not_draw_from_rows_that_can_be_read_once(tmp_path):
    rows = ReadOnce([images()[i] for i in range(48)])
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, meta_source="stream")
    with pytest.raises(ValueError, match=r"ReadOnce.*read only once.*Pass the images to tune on as meta_dataset"):
        MetaLRTrainer(model=vit(), args=args, train_dataset=rows).train()
    assert len(list(rows)) == 48
    rows = ReadOnce([images()[i % 48] for i in range(STEPS * 8)])
    trained = MetaLRTrainer(model=vit(), args=args, train_dataset=rows, meta_dataset=images(16, seed=1))
    trained.train()
    assert trained.state.global_step == STEPS
    assert not list(rows)


@dataclass
class TemperatureArguments(TrainingArguments):
    temperature: float = 2.0

    def softened(self, logits):
        return logits / self.temperature


def test_the_arguments_stay_the_object_that_was_given(tmp_path):
    args = stock_arguments(tmp_path, TemperatureArguments)

    class Distilling(MetaLRTrainer):
        def compute_loss(self, model, inputs, *rest, **kwargs):
            return functional.cross_entropy(self.args.softened(model(inputs["pixel_values"]).logits), inputs["labels"])

    run = Distilling(model=vit(), args=args, train_dataset=images())
    assert run.args is args
    assert (args.temperature, args.hyper_lr, args.tuning_steps) == (2.0, 0.1, 40)
    args.max_steps = 3
    run.train()
    assert run.state.global_step == 3
    assert not hasattr(TrainingArguments(str(tmp_path)), "hyper_lr")


def test_a_scheduler_that_would_overwrite_the_rates_is_refused_before_the_first_step(tmp_path):
    class OwnSchedule(MetaLRTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = get_constant_schedule(self.optimizer if optimizer is None else optimizer)
            return self.lr_scheduler

    run = OwnSchedule(model=vit(), args=stock_arguments(tmp_path), train_dataset=images())
    with pytest.raises(ValueError, match=r"create_scheduler gave a LambdaLR.*args.lr_scheduler_type"):
        run.train()
    assert run.state.global_step == 0


def test_an_own_optimizer_resumes_from_its_own_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole = run(OwnOptimizer, MetaLRTrainer, tmp_path, **saving)
    kind = type("OwnOptimizer", (OwnOptimizer, MetaLRTrainer), {})
    resumed = kind(model=vit(), args=stock_arguments(tmp_path, **saving), train_dataset=images())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same_weights(whole.model, resumed.model)
    groups = whole.lr_scheduler.optimizer.param_groups
    assert groups[0]["layer"] == groups[1]["layer"]
    assert groups[1]["lr"] == pytest.approx(2 * groups[0]["lr"])


def test_a_layer_thawed_between_two_runs_with_an_optimizer_that_does_not_hold_it_is_noticed(tmp_path):
    trained = run(FrozenInOptimizer, MetaLRTrainer, tmp_path)
    assert not any("embeddings" in name for names in trained._layer_groups(trained.model).values() for name in names)
    trained.model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"vit.embeddings.cls_token and \d more parameters were frozen"):
        trained.train()


@pytest.mark.parametrize("script", [OwnCollator, OwnStep, StepWithoutLoss])
def test_a_checkpoint_before_the_calibration_resumes_bitwise(tmp_path, script):
    # The step waits for the next batch when checkpoint 1 is written.
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    kind = type(script.__name__, (script, MetaLRTrainer), {})

    def trainer():
        data = {"train_dataset": images(), "eval_dataset": images(24, seed=1)}
        return kind(model=vit(), args=stock_arguments(tmp_path, **saving), **data)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same_weights(whole.model, resumed.model)
    assert whole.lr_history.learning_rates.tolist() == resumed.lr_history.learning_rates.tolist()


class TwoTargets(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x, u=None, v=None):
        answers = self.head(self.stem(x).relu())
        loss = None if u is None else ((answers[:, 0] - u) ** 2 + (answers[:, 1] - v) ** 2).mean()
        return {"loss": loss, "logits": answers}


def test_targets_are_those_that_label_names_names(tmp_path):
    rows = [{"x": torch.randn(6), "u": torch.randn(()), "v": torch.randn(())} for _ in range(16)]
    args = stock_arguments(tmp_path, label_names=["u", "v"])
    trained = MetaLRTrainer(model=TwoTargets(), args=args, train_dataset=rows)
    assert type(trained.model) is TwoTargets
    trained.train()
    assert trained.lr_scheduler.calibration is not None


class OneTarget(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, target=None):
        logits = self.head(self.stem(x).relu())
        return {"loss": None if target is None else functional.cross_entropy(logits, target), "logits": logits}


@pytest.mark.parametrize("held_out", [False, True])
def test_rows_without_column_names_are_split_by_the_target_that_label_names_names(tmp_path, held_out):
    rows = [{"x": torch.randn(6), "target": i % 3} for i in range(32)]
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, label_names=["target"], meta_split=0.25 * held_out)
    trained = MetaLRTrainer(OneTarget(), args, train_dataset=rows, meta_dataset=None if held_out else rows[:16])
    trained.train()
    assert trained.lr_scheduler.meta_source == "stream"


def network(outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs))


class OnLogits:
    """A loss written by hand of what a network that is no model of transformers returns."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        logits = model(inputs["pixel_values"])
        loss = functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def on_logits(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs, labels)


@pytest.mark.parametrize(
    ("script", "column", "more"),
    [(OnLogits, "pixel_values", {}), (object, "x", {"compute_loss_func": on_logits})],
    ids=["compute_loss", "compute_loss_func"],
)
def test_a_timm_model_returns_logits_to_a_loss_that_takes_them(tmp_path, script, column, more):
    runs = []
    for trainer_class in (Trainer, MetaLRTrainer):
        kind = type(script.__name__, (trainer_class,) if script is object else (script, trainer_class), {})
        args = stock_arguments(
            tmp_path,
            remove_unused_columns=False,
            label_names=["labels"],
            eval_strategy="epoch" if script is OnLogits else "no",
        )
        args.hyper_lr = 0.0
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=3)
        rows = images() if column == "pixel_values" else images().rename_column("pixel_values", column)
        runs.append(kind(model, args, train_dataset=rows, eval_dataset=rows if script is OnLogits else None, **more))
        runs[-1].train()
    assert type(runs[1].model) is type(runs[0].model)
    assert same_weights(runs[0].model, runs[1].model)
    runs[1].args.hyper_lr = 0.1
    runs[1].train()
    assert runs[1].lr_scheduler.calibration is not None


def weighted(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))


def labelled(make):
    rows = images()
    return [{"pixel_values": rows[i]["pixel_values"], "labels": make(i)} for i in range(len(rows))]


def smoothed(outputs, labels, num_items_in_batch=None):
    return functional.cross_entropy(outputs.logits, labels, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("outputs", "labels", "options", "loss_func"),
    [
        (3, lambda i: LABELS[i], {}, weighted),
        (3, lambda i: LABELS[i], {}, smoothed),
        (3, lambda i: torch.tensor([0.2, 0.3, 0.5]).roll(i), {}, None),
        (1, lambda i: float(LABELS[i]), {}, None),
        (1, lambda i: torch.tensor([float(LABELS[i])]), {}, None),
    ],
    ids=["class weights", "label smoothing", "mixup", "a number", "a number in a list"],
)
def test_a_module_from_images_to_logits_trains_on_every_form_of_labels(tmp_path, outputs, labels, options, loss_func):
    losses = {"compute_loss_func": loss_func} if loss_func else {}
    args = stock_arguments(tmp_path, remove_unused_columns=False, **options)
    trained = MetaLRTrainer(model=network(outputs), args=args, train_dataset=labelled(labels), **losses)
    assert type(trained.model) is Classifier
    trained.train()
    assert len(trained.lr_history) == STEPS
    # The same through the stock Trainer, which has to be given the wrapped module.
    args = stock_arguments(tmp_path, remove_unused_columns=False, **options)
    args.hyper_lr = 0.0
    ours = MetaLRTrainer(model=network(outputs), args=args, train_dataset=labelled(labels), **losses)
    ours.train()
    stock_args = stock_arguments(tmp_path, remove_unused_columns=False, **options)
    stock = Trainer(Classifier(network(outputs)), stock_args, train_dataset=labelled(labels), **losses)
    stock.train()
    assert same_weights(ours.model, stock.model)


def test_smoothing_the_labels_of_such_a_module_says_how(tmp_path):
    args = stock_arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor=0.1.*cross_entropy\(outputs.logits, labels"):
        MetaLRTrainer(model=network(), args=args, train_dataset=labelled(lambda i: LABELS[i]))


def test_several_labels_on_such_a_module_are_refused_with_what_to_do(tmp_path):
    rows = labelled(lambda i: torch.tensor([1.0, 1.0, float(i % 2)]))
    args = stock_arguments(tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match=r"compute_loss_func=lambda outputs, labels.*binary_cross_entropy"):
        MetaLRTrainer(model=network(), args=args, train_dataset=rows).train()


SCHEDULES = [
    ("constant", {}, {}),
    ("constant_with_warmup", {"warmup_steps": 2}, {}),
    ("linear", {"warmup_steps": 2}, {}),
    ("cosine", {}, {}),
    ("cosine_with_restarts", {}, {"num_cycles": 2}),
    ("cosine_with_min_lr", {}, {"min_lr": 1e-4}),
    ("cosine_with_min_lr", {}, {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"warmup_steps": 2}, {"min_lr": 1e-4, "warmup_lr_rate": 0.2}),
    ("polynomial", {}, {}),
    ("polynomial", {}, {"lr_end": 1e-4, "power": 2.0}),
    ("inverse_sqrt", {"warmup_steps": 2}, {}),
    ("warmup_stable_decay", {}, {"num_decay_steps": 4}),
    ("warmup_stable_decay", {"warmup_steps": 2}, {"num_decay_steps": 4, "min_lr_ratio": 0.1}),
]


@pytest.mark.parametrize("handed_in", [False, True])
@pytest.mark.parametrize(("name", "options", "details"), SCHEDULES)
def test_without_tuning_every_schedule_is_that_of_the_stock_trainer(tmp_path, name, options, details, handed_in):
    def rates(trainer_class, **changes):
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        args = stock_arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=details, **options)
        for key, value in changes.items():
            setattr(args, key, value)
        rows = [{"pixel_values": torch.randn(4), "labels": i % 2} for i in range(16)]
        optimizers = (torch.optim.SGD(model.parameters(), lr=0.02), None) if handed_in else (None, None)
        run = trainer_class(Classifier(model), args, train_dataset=rows, optimizers=optimizers)
        run.train()
        return [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]

    stock = rates(Trainer)
    assert rates(MetaLRTrainer, hyper_lr=0.0) == pytest.approx(stock, rel=1e-12, abs=0)
    assert len(set(stock)) > 1 or name == "constant"


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_without_tuning_every_optimizer_is_that_of_the_stock_trainer(tmp_path, optim):
    def trained(trainer_class, **changes):
        args = stock_arguments(tmp_path, optim=optim, weight_decay=0.1, warmup_steps=2, max_grad_norm=0)
        for key, value in changes.items():
            setattr(args, key, value)
        run = trainer_class(vit(), args, train_dataset=images())
        run.train()
        return run.model

    assert same_weights(trained(Trainer), trained(MetaLRTrainer, hyper_lr=0.0))


@pytest.mark.parametrize("rate", [0.0, 1e-9, 2.0])
def test_without_tuning_any_learning_rate_goes(tmp_path, rate):
    args = stock_arguments(tmp_path, learning_rate=rate)
    args.hyper_lr = 0.0
    ours = MetaLRTrainer(vit(), args, train_dataset=images())
    ours.train()
    stock = Trainer(vit(), stock_arguments(tmp_path, learning_rate=rate), train_dataset=images())
    stock.train()
    assert same_weights(ours.model, stock.model)


@pytest.mark.parametrize(
    ("name", "details", "instead"),
    [("cosine_with_min_lr", {"min_lr": 1e-3}, "min_lr_rate"), ("polynomial", {"lr_end": 1e-4}, "cosine_with_min_lr")],
)
def test_a_floor_in_absolute_units_is_refused_while_rates_are_found(tmp_path, name, details, instead):
    args = stock_arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=details)
    with pytest.raises(ValueError, match=f"a floor in absolute units would be none.*{instead}"):
        MetaLRTrainer(vit(), args, train_dataset=images()).train()


@pytest.mark.parametrize(("name", "floor"), [("cosine_with_min_lr", "min_lr"), ("polynomial", "lr_end")])
def test_a_floor_of_zero_is_one_in_any_units(tmp_path, name, floor):
    args = stock_arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs={floor: 0.0}, learning_rate=1e-2)
    shape = schedule_shape(args, 10)
    known = schedule_shape(args, 10, fixed_lr=1e-2)
    assert [shape(i) for i in range(11)] == pytest.approx([known(i) for i in range(11)])
    assert shape(10) == pytest.approx(0.0, abs=1e-12)


def test_the_default_end_of_a_polynomial_does_not_depend_on_the_learning_rate(tmp_path):
    shapes = [
        schedule_shape(stock_arguments(tmp_path, lr_scheduler_type="polynomial", learning_rate=rate), 10)(9)
        for rate in (1e-7, 1e-1)
    ]
    assert shapes[0] == shapes[1]


def test_where_validation_gradients_come_from_may_be_changed_by_a_search(tmp_path):
    args = stock_arguments(tmp_path, MetaLRTrainingArguments, max_steps=2)
    run = MetaLRTrainer(vit(), args, train_dataset=images())
    args.meta_source = "stream"
    run.train()
    assert run.lr_scheduler.meta_source == "stream"
    drawn = run._meta_stream.position
    args.meta_source, args.tuning_steps = "next_batch", 0
    run.train()
    # Nothing is left of the run before.
    assert (drawn > 0, run._meta_stream, run.collapse_guard) == (True, None, None)
    args.meta_source, args.meta_split = "stream", 0.25
    with pytest.raises(ValueError, match=r"meta_split=0.25 was set after the trainer was made"):
        run.train()


def test_sparse_gradients_are_refused_before_training(tmp_path):
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, codes, labels=None):
            logits = self.head(self.table(codes))
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"codes": i % 5, "labels": i % 2} for i in range(16)]
    for hyper_lr in (0.1, 0.0):
        args = MetaLRTrainingArguments(str(tmp_path), optim="sgd", hyper_lr=hyper_lr, calibrate=True, report_to="none")
        run = MetaLRTrainer(Embedded(), args, train_dataset=rows)
        with pytest.raises(ValueError, match=r"table has sparse gradients.*hyper_lr=0 and calibrate=False"):
            run.train()


def test_sparse_gradients_train_without_tuning(tmp_path):
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.table, self.head = nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, codes, labels=None):
            logits = self.head(self.table(codes))
            return {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    rows = [{"codes": i % 5, "labels": i % 2} for i in range(16)]
    models = []
    for trainer_class in (Trainer, MetaLRTrainer):
        args = stock_arguments(tmp_path, optim="sgd", max_grad_norm=0)
        args.hyper_lr = 0.0
        run = trainer_class(Embedded(), args, train_dataset=rows)
        run.train()
        models.append(run.model)
    assert same_weights(*models)


def test_a_batch_that_spoils_the_run_is_named_at_once(tmp_path):
    rows = labelled(lambda i: LABELS[i])
    rows = [{**row, "pixel_values": row["pixel_values"].clone()} for row in rows[:16]]
    rows[5]["pixel_values"][0, 0, 0] = float("nan")
    args = stock_arguments(tmp_path, per_device_train_batch_size=16, max_steps=12, remove_unused_columns=False)
    run = MetaLRTrainer(network(), args, train_dataset=rows)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("metalr_hf.trainer.metalr")
    logger.addHandler(handler)
    try:
        with pytest.warns(UserWarning, match="finite|doubt"):
            run.train()
    finally:
        logger.removeHandler(handler)
    said = [message for message in messages if "not finite" in message and "training loss" in message]
    assert len(said) == 1
    assert "The training loss of step 1 is not finite: pixel_values of its rows [" in said[0]
