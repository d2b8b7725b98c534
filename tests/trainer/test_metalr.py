import copy
import math

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import arguments, images, losses, resnet, same_weights, trainer, vit
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from metalr_hf import MetaLRScheduler, MetaLRTrainer, layer_groups
from metalr_hf.tuning.hypergradient.linearity import REFUSED_OPTIMIZERS


class StockWithLayers(Trainer):
    """The stock Trainer with the same param groups, and nothing else."""

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer()
        names = {name: layer for layer, members in layer_groups(self.model).items() for name in members}
        layer_of = {id(p): names[name] for name, p in self.model.named_parameters()}
        groups = []
        for group in list(optimizer.param_groups):
            for layer in dict.fromkeys(names.values()):
                members = [p for p in group["params"] if layer_of[id(p)] == layer]
                groups += [{**group, "params": members}] if members else []
        optimizer.param_groups.clear()
        for group in groups:
            optimizer.add_param_group(group)
        return optimizer


@pytest.mark.usefixtures("keep")
@pytest.mark.parametrize("make_model", [vit, resnet])
@pytest.mark.parametrize(
    "setting",
    [
        {"hyper_lr": 0.0, "meta_source": "stream"},
        {"hyper_lr": 0.0, "meta_source": "next_batch"},
        {"hyper_lr": 0.0, "meta_source": "stream", "meta_mode": "eval"},
        {"lr_rule": "keep", "meta_source": "stream"},
        {"lr_rule": "keep", "meta_source": "next_batch"},
        {"lr_rule": "keep", "meta_source": "stream", "meta_mode": "eval"},
    ],
    ids=lambda setting: "-".join(map(str, setting.values())),
)
def test_rates_that_stay_as_they_are_give_bitwise_the_stock_trainer(tmp_path, make_model, setting):
    tuned = trainer(tmp_path / "a", make_model(), gradient_accumulation_steps=2, weight_decay=0.1, **setting)
    tuned.train()
    stock = StockWithLayers(
        model=make_model(),
        args=arguments(tmp_path / "b", gradient_accumulation_steps=2, weight_decay=0.1),
        train_dataset=images(),
    )
    stock.train()
    assert losses(tuned) == losses(stock)
    assert same_weights(tuned.model, stock.model)
    hypergradients = tuned.lr_history.hypergradients[1:]
    if tuned.args.hyper_lr == 0:
        assert np.isnan(hypergradients).all()
        assert tuned.lr_scheduler.extra_passes == 0
    else:
        # Not because nothing was measured.
        assert np.isfinite(hypergradients).all()
        assert (hypergradients != 0).all()


def test_plain_training_arguments_and_positional_arguments_of_trainer_work(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=2, report_to="none", save_strategy="no", use_cpu=True)
    plain = MetaLRTrainer(vit(), args, None, images())
    plain.train()
    assert plain.args.hyper_lr == 0.1
    assert plain.args.max_steps == 2
    assert plain.meta_source == "next_batch"


def test_there_is_no_history_before_training(tmp_path):
    run = trainer(tmp_path)
    assert not hasattr(run, "lr_history")
    with pytest.raises(AttributeError, match=r"no learning-rate history yet: call train\(\) first"):
        run.lr_history  # noqa: B018


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_one_tuning_an_optimizer_step_under_accumulation(tmp_path, source):
    run = trainer(tmp_path, gradient_accumulation_steps=3, max_steps=4, meta_source=source)
    run.train()
    assert len(run.lr_history) == 4
    assert run.lr_history.steps.tolist() == [0, 1, 2, 3]
    pulled = run._meta_stream.state_dict()["position"] if source == "stream" else 0
    assert pulled == (4 if source == "stream" else 0)


def test_meta_every_pulls_a_batch_at_each_kth_step_only(tmp_path):
    run = trainer(tmp_path, meta_source="stream", meta_every=4, max_steps=6)
    run.train()
    assert run._meta_stream.state_dict()["position"] == 2
    assert [not math.isnan(loss) for loss in run.lr_history.meta_losses] == [step % 4 == 0 for step in range(6)]


def test_a_step_of_length_zero_pulls_no_batch(tmp_path):
    warmup = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3}
    run = trainer(tmp_path, meta_source="stream", calibrate=True, max_steps=6, **warmup)
    run.train()
    assert run._meta_stream.state_dict()["position"] == 5


def reference_first_step(model, loss_of, train_batch, meta_batch, args):
    """h of every parameter at the first AdamW step, by hand: <grad of the meta loss after the step, step> / lr."""
    model = copy.deepcopy(model).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    decay = set(Trainer.get_decay_parameter_names(None, model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decay], "weight_decay": args.weight_decay},
        {"params": [p for n, p in model.named_parameters() if n not in decay], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    loss_of(model, train_batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.step()
    model.zero_grad()
    loss = loss_of(model, meta_batch)
    loss.backward()
    by_name = {
        name: float((p.grad.double() * (p.detach() - before[name]).double()).sum()) / args.learning_rate
        for name, p in model.named_parameters()
    }
    return float(loss.detach()), by_name


class Recording(MetaLRTrainer):
    batches = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches = [*(self.batches or []), {key: value.clone() for key, value in inputs.items()}]
        return super().compute_loss(model, inputs, *args, **kwargs)


class WeightedLoss(Recording):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        self.batches = [*(self.batches or []), {key: value.clone() for key, value in inputs.items()}]
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = weighted(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def weighted(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))


def smoothed(outputs, labels):
    return nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)


@pytest.mark.parametrize("way", ["plain", "smoothing", "compute_loss", "compute_loss_func"])
def test_clipping_decay_groups_smoothing_and_own_losses_count_in_the_validation_pass(tmp_path, way):
    setting = {"weight_decay": 0.5, "max_grad_norm": 0.01, "meta_source": "stream", "max_steps": 1}
    if way == "smoothing":
        setting["label_smoothing_factor"] = 0.2
    start = vit(dropout=0.0)
    run = (WeightedLoss if way == "compute_loss" else Recording)(
        model=copy.deepcopy(start),
        args=arguments(tmp_path, **setting),
        train_dataset=images(),
        compute_loss_func=weighted if way == "compute_loss_func" else None,
    )
    run.train()

    def loss_of(model, batch):
        if way == "plain":
            return model(**batch).loss
        outputs = model(pixel_values=batch["pixel_values"])
        return (smoothed if way == "smoothing" else weighted)(outputs, batch["labels"])

    train_batch, meta_batch = run.batches
    loss, expected = reference_first_step(start, loss_of, train_batch, meta_batch, run.args)
    assert run.lr_history.meta_losses[0] == pytest.approx(loss, rel=1e-5)
    for layer, measured in zip(run.lr_history.layers, run.lr_history.hypergradients[0], strict=True):
        assert measured == pytest.approx(sum(expected[name] for name in layer_groups(start)[layer]), rel=1e-3, abs=1e-6)


class OwnFeed(MetaLRTrainer):
    """Feeds the module itself, as users do whose batches hold more than the module takes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["pixel_values"])
        return nn.functional.cross_entropy(logits, inputs["labels"])


def test_a_module_that_only_the_users_own_loss_can_feed_is_trained(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 8), nn.ReLU(), nn.Linear(8, 3))
    args = arguments(tmp_path, max_steps=12, meta_source=None, remove_unused_columns=False)
    run = OwnFeed(model=network, args=args, train_dataset=images())
    run.train()
    assert len(run.lr_history) == 12


def test_clipping_does_not_shrink_the_hypergradient_of_the_next_batch(tmp_path):
    start = vit(dropout=0.0)
    run = Recording(
        model=copy.deepcopy(start),
        args=arguments(tmp_path, max_grad_norm=0.01, max_steps=2, meta_source="next_batch"),
        train_dataset=images(),
    )
    run.train()
    first, second = run.batches
    _, expected = reference_first_step(start, lambda model, batch: model(**batch).loss, first, second, run.args)
    for layer, measured in zip(run.lr_history.layers, run.lr_history.hypergradients[1], strict=True):
        assert measured == pytest.approx(sum(expected[name] for name in layer_groups(start)[layer]), rel=1e-3, abs=1e-6)


def test_schedule_and_warm_up_multiply_the_tuned_rates_and_the_log_holds_the_rates_used(tmp_path):
    run = trainer(tmp_path, max_steps=8, lr_scheduler_type="cosine", warmup_steps=2, hyper_lr=0.0)
    run.train()
    shape = [0, 0.5, *[0.5 * (1 + math.cos(math.pi * (step - 2) / 6)) for step in range(2, 8)]]
    used = [1e-3 * s for s in shape]
    assert run.lr_history.learning_rates[:, 0] == pytest.approx(used)
    rows = [row for row in run.state.log_history if "loss" in row]
    assert [row["learning_rate"] for row in rows] == pytest.approx(used)

    tuned = trainer(tmp_path, max_steps=8, lr_scheduler_type="cosine", warmup_steps=2, meta_source="stream")
    tuned.train()
    rows = [row for row in tuned.state.log_history if "loss" in row]
    assert [row["learning_rate_max"] for row in rows] == pytest.approx(tuned.lr_history.learning_rates.max(1))
    assert [row["learning_rate_min"] for row in rows] == pytest.approx(tuned.lr_history.learning_rates.min(1))
    assert rows[-1]["meta_loss"] == pytest.approx(tuned.lr_history.meta_losses[-1])


def test_rates_that_are_still_being_calibrated_are_in_no_log(tmp_path):
    run = trainer(tmp_path, max_steps=8, calibrate=True, meta_source="next_batch")
    run.train()
    rows = [row for row in run.state.log_history if "loss" in row]
    highest = run.lr_history.learning_rates.max(1)
    logged = {row["step"]: row["learning_rate_max"] for row in rows if "learning_rate" in row}
    assert 1 not in logged
    assert 8 in logged
    assert logged == {step: pytest.approx(highest[step - 1]) for step in logged}


def test_trackers_get_every_layer(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.args.report_to = ["tracker"]
    run.train()
    row = [row for row in run.state.log_history if "loss" in row][-1]
    assert {f"lr/{layer}" for layer in run.lr_history.layers} <= set(row)


def test_meta_split_is_never_trained_on_and_eval_dataset_never_tunes(tmp_path):
    data = images()
    run = Recording(
        model=vit(),
        args=arguments(tmp_path, meta_split=0.25, num_train_epochs=2, max_steps=-1, per_device_train_batch_size=6),
        train_dataset=data,
        eval_dataset=images(12, seed=9),
    )
    run.train()
    assert len(run.train_dataset) == 36
    assert len(run.meta_dataset) == 12
    held_out = {tuple(row["pixel_values"].flatten()[:4].tolist()) for row in run.meta_dataset}
    evaluated = {tuple(row["pixel_values"].flatten()[:4].tolist()) for row in run.eval_dataset}
    rows = [[tuple(image.flatten()[:4].tolist()) for image in batch["pixel_values"]] for batch in run.batches]
    train_rows = {row for batch in rows[0::2] for row in batch}
    meta_rows = {row for batch in rows[1::2] for row in batch}
    assert len(train_rows) == 36
    assert not train_rows & held_out
    assert meta_rows <= held_out
    assert not evaluated & (train_rows | meta_rows)


def test_the_stream_over_the_training_set_is_shuffled_apart_from_it(tmp_path):
    run = Recording(
        model=vit(), args=arguments(tmp_path, meta_source="stream", meta_batch_size=8), train_dataset=images()
    )
    run.train()
    rows = [{tuple(image.flatten()[:4].tolist()) for image in batch["pixel_values"]} for batch in run.batches]
    assert all(rows[i] != rows[i + 1] for i in range(0, len(rows), 2))
    assert len(set.union(*rows[1::2])) == 48


@pytest.mark.parametrize("source", ["stream", "next_batch"])
@pytest.mark.parametrize("make_model", [vit, resnet])
def test_a_checkpoint_continues_bitwise(tmp_path, make_model, source):
    setting = {"max_steps": 6, "meta_source": source, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "a", make_model(), **setting)
    whole.train()
    again = trainer(tmp_path / "b", make_model(), **setting)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same_weights(whole.model, again.model)
    assert (whole.lr_history.learning_rates == again.lr_history.learning_rates).all()
    state = torch.load(tmp_path / "a" / "checkpoint-3" / "scheduler.pt", weights_only=True)
    assert state["layers"] == whole.lr_history.layers


def test_training_twice_starts_clean(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    run.train()
    first = run.lr_scheduler
    run.train()
    assert run.lr_scheduler is not first
    assert len(run.lr_history) == 3
    assert run.lr_history.learning_rates[0].tolist() == [1e-3] * len(run.lr_history.layers)


def test_own_layers_own_optimizer_and_head_settings(tmp_path):
    model = vit()
    groups = {"backbone": [], "head": []}
    for name, _ in model.named_parameters():
        groups["head" if name.startswith("classifier") else "backbone"].append(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    run = trainer(
        tmp_path,
        model,
        layer_groups=groups,
        optimizers=(optimizer, None),
        head_lr_multiplier=5.0,
        head_hold_epochs=0.5,
        max_steps=5,
    )
    run.train()
    rates = run.lr_history.learning_rates
    assert run.lr_history.layers == ["backbone", "head"]
    assert rates[0].tolist() == [1e-2, 5e-2]
    assert rates[:3, 1].tolist() == [5e-2] * 3
    assert rates[3, 1] != 5e-2
    assert isinstance(run.lr_scheduler, MetaLRScheduler)


def test_the_paper_preset_fills_in_defaults_only(tmp_path):
    args = arguments(tmp_path, preset="paper", hyper_lr=0.3, lr_scheduler_type=None)
    assert (args.lookahead, args.lr_max, args.head_hold_epochs, args.hyper_lr) == ("sgd", 1e-2, 5.0, 0.3)
    assert (args.lr_scheduler_type, args.average_weights) == ("constant", None)
    run = trainer(tmp_path, preset="paper", max_steps=2)
    run.train()
    assert run.meta_source == "stream"
    assert run.lr_history.learning_rates[:, -1].tolist() == [1e-3, 1e-3]


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_every_optimizer_name_works_or_is_refused_before_training(tmp_path, optim):
    if optim in REFUSED_OPTIMIZERS:
        with pytest.raises(ValueError, match=f"optim='{optim}' cannot be tuned"):
            trainer(tmp_path, optim=optim)
        return
    run = trainer(tmp_path, optim=optim, optim_target_modules=["attention"], max_steps=2)
    try:
        Trainer.create_optimizer(run)
    except (ImportError, ValueError, RuntimeError, AssertionError) as error:
        # Not installed, or not for this machine: Trainer's own message.
        pytest.skip(f"{type(error).__name__}: {str(error)[:80]}")
    run.train()
    assert len(run.lr_history) == 2


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"hyper_lr": -1.0}, ValueError, "hyper_lr=-1.0"),
        ({"hyper_lr": "big"}, TypeError, "hyper_lr='big'"),
        ({"lr_min": 1.0, "lr_max": 0.1}, ValueError, "lr_min=1.0 and lr_max=0.1"),
        ({"lr_rule": "aditive"}, ValueError, "Did you mean 'additive'"),
        ({"meta_batch_size": 0}, ValueError, "meta_batch_size=0 must be 1 or more"),
        ({"meta_split": 1.0}, ValueError, r"meta_split=1.0 must be in \[0, 1\)"),
        ({"meta_split": -0.1}, ValueError, r"meta_split=-0.1 must be in \[0, 1\)"),
        ({"meta_mode": "test"}, ValueError, "meta_mode='test'"),
        ({"preset": "article"}, ValueError, "preset='article'"),
        ({"head_lr_multiplier": -1.0}, ValueError, "head_lr_multiplier=-1.0 must not be negative"),
        ({"head_lr_multiplier": 10.0, "calibrate": True}, ValueError, "head_lr_multiplier=10.0 would be ignored"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ValueError, "'reduce_lr_on_plateau' watches"),
        ({"lr_scheduler_type": "greedy"}, ValueError, "'greedy' watches a metric"),
        ({"meta_source": "next_batch", "meta_split": 0.2}, ValueError, "would leave meta_split=0.2 unused"),
    ],
)
def test_bad_arguments_are_refused_by_name(tmp_path, setting, error, message):
    with pytest.raises(error, match=message):
        trainer(tmp_path, **setting)


def test_bad_input_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="outside the bounds lr_min=1e-08 and lr_max=0.0001"):
        trainer(tmp_path, lr_max=1e-4).train()
    with pytest.raises(ValueError, match="meta_dataset and meta_split=0.2 are both given"):
        trainer(tmp_path, meta_dataset=images(12), meta_split=0.2)
    with pytest.raises(ValueError, match="meta_dataset"):
        trainer(tmp_path, meta_dataset=images(12).select([]))
    with pytest.raises(ValueError, match="meta_dataset"):
        trainer(tmp_path, meta_dataset=images(12).remove_columns("labels"))
    with pytest.raises(ValueError, match=r"meta_dataset: its first rows make no batch .* Prepare it like the training"):
        trainer(tmp_path, meta_dataset=[{"pixel_values": Image.new("L", (4, 4)), "labels": 0}])
    with pytest.raises(
        ValueError, match=r"meta_dataset: of its rows the model gets no images, but labels\. Prepare it"
    ):
        trainer(tmp_path, meta_dataset=images(12).rename_column("pixel_values", "image"))
    other_classes = images(12).cast_column("labels", datasets.ClassLabel(names=["a", "b", "c", "d"]))
    with pytest.raises(ValueError, match="meta_dataset has 4 classes .* but the model has 3"):
        trainer(tmp_path, meta_dataset=other_classes)
    frozen = vit()
    frozen.requires_grad_(False)
    run = trainer(tmp_path, frozen, eval_dataset=images(12))
    assert math.isfinite(run.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match="trainable parameter"):
        run.train()
    model = vit()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=names[-1]):
        trainer(tmp_path, model, layer_groups={"all": names[:-1]})
    with pytest.raises(ValueError, match=names[0]):
        trainer(tmp_path, model, layer_groups={"a": names, "b": names[:1]})
    with pytest.raises(ValueError, match="classifer"):
        trainer(tmp_path, model, layer_groups={"a": names, "b": ["classifer.weight"]})
    optimizer = torch.optim.Rprop(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="Rprop cannot be tuned: its update is not linear"):
        trainer(tmp_path, model, optimizers=(optimizer, None)).train()
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match="MetaLRTrainer's own scheduler"):
        trainer(tmp_path, model, optimizers=(sgd, torch.optim.lr_scheduler.ConstantLR(sgd)))


def test_deepspeed_is_refused(tmp_path):
    args = arguments(tmp_path)
    args.deepspeed = "zero2.json"
    with pytest.raises(ValueError, match=r"deepspeed='zero2.json'.*Use FSDP instead"):
        MetaLRTrainer(model=vit(), args=args, train_dataset=images())


def test_fsdp_1_is_refused(tmp_path):
    args = arguments(tmp_path, fsdp=True, fsdp_config={"version": 1})
    with pytest.raises(ValueError, match=r'FSDP 1 .*Use FSDP 2: fsdp_config=\{"version": 2\}'):
        MetaLRTrainer(model=vit(), args=args, train_dataset=images())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    setting = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "layers", **setting).train()
    other = vit()
    other.vit.embeddings.requires_grad_(False)
    with pytest.raises(ValueError, match="a run with other layers"):
        trainer(tmp_path, other, **setting).train(str(tmp_path / "layers" / "checkpoint-1"))
    Trainer(model=vit(), args=arguments(tmp_path / "stock", **setting), train_dataset=images()).train()
    with pytest.raises(ValueError, match="without layer-wise learning rates"):
        trainer(tmp_path / "stock", **setting).train(resume_from_checkpoint=True)
