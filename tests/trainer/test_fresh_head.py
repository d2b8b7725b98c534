"""A run whose fresh head is fitted after the third step: which heads are, and what else that changes."""

import contextlib

import datasets
import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from small_runs import OwnLoader, arguments, images, losses, resnet, same_weights, streamed, trainer, vit
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    TrainerCallback,
    TrainingArguments,
)

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.hub.facts import run_facts
from metalr_hf.models.target_losses import ClassLoss, LabelSetLoss
from metalr_hf.trainer.fresh_head import FreshHead, _batches
from metalr_hf.tuning import untouched
from metalr_hf.tuning.ridge import LOGIT_STD

ON = {"calibrate": True}


class NotingHead(FreshHead):
    """Notes which weights the fit changes, after how many steps, and what the model answers then."""

    changed = ()

    def fit(self, trainer):
        model, rows = trainer.model, images()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        forwards = super().fit(trainer)
        after = model.state_dict()
        self.changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        self.fitted_at = trainer.state.global_step
        with untouched(model, "eval"), torch.no_grad():
            self.logits = model(pixel_values=rows["pixel_values"][:]).logits
        self.accuracy = (self.logits.argmax(1) == rows["labels"][:]).float().mean().item()
        return forwards


class Watched(MetaLRTrainer):
    def create_scheduler(self, *args, **kwargs):
        scheduler = super().create_scheduler(*args, **kwargs)
        if not isinstance(self.fresh_head, NotingHead):
            self.fresh_head = NotingHead()
        return scheduler


def begun(folder, model, compute_loss_func=None, **options):
    args = arguments(folder, **{**ON, "max_steps": 30, **options})
    run = Watched(model, args, train_dataset=images(), compute_loss_func=compute_loss_func)
    run.train()
    return run


def test_the_head_alone_is_fitted_and_knows_the_images(tmp_path):
    run = begun(tmp_path, vit())
    assert run.fresh_head.changed == ["classifier.weight", "classifier.bias"]
    assert run.fresh_head.accuracy > 0.9
    assert run.fresh_head.images == 48
    assert run.fresh_head.fitted_at == 3
    assert (run.fresh_head.logits - run.fresh_head.logits.mean(1, keepdim=True)).std() < 2 * LOGIT_STD
    without = begun(tmp_path, vit(), fit_head=False)
    # Six batches of eight.
    assert run.lr_scheduler.calibration_forwards == without.lr_scheduler.calibration_forwards + 6
    # Until then nothing is changed, and the step before it is not tuned by.
    rates, others = run.lr_history.learning_rates, without.lr_history.learning_rates
    assert (rates[:3] == others[:3]).all()
    assert (rates[3] == rates[2]).all()
    assert len(run.lr_history) == 30
    assert "to 48 training images" in str(run_facts(run).settings["head"])
    assert "head" not in run_facts(without).settings


SMALL = {"image_size": 16, "num_labels": 3}
FITTED = {
    "ResNet": resnet,
    "timm ViT": lambda: timm.create_model("test_vit", num_classes=3, img_size=16, patch_size=8),
    "ConvNeXt": lambda: ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], **SMALL)
    ),
    "Swin": lambda: SwinForImageClassification(
        SwinConfig(patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, **SMALL)
    ),
    "LoRA": lambda: get_peft_model(vit(), LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["classifier"])),
    "a head of two layers": lambda: with_head(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 3))),
}


def with_head(head):
    model = vit()
    model.classifier = head
    return model


class TwoHeads(nn.Module):
    """As networks have them that were distilled."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(16, 3), nn.Linear(16, 3)

    def forward(self, features):
        return (self.one(features) + self.other(features)) / 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", FITTED)
def test_heads_of_all_kinds_of_networks_are_fitted(tmp_path, name):
    torch.manual_seed(0)
    # So low that after three steps nothing is learned yet.
    run = begun(tmp_path, FITTED[name](), lr_max=1e-4)
    assert run.fresh_head.images == 48
    assert run.fresh_head.accuracy > 0.5
    assert len(run.fresh_head.changed) == 2
    assert run.fresh_head.changed[0].endswith(".weight")
    assert run.fresh_head.changed[1].endswith(".bias")


class OwnLoss(MetaLRTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


LEFT_ALONE = {
    "switched off": (vit, {"fit_head": False}),
    "rates as given": (vit, {"calibrate": False}),
    "a preset": (vit, {"preset": "paper", "calibrate": None, "meta_split": 0.25}),
    "two heads": (lambda: with_head(TwoHeads()), {}),
    "no bias": (lambda: with_head(nn.Linear(16, 3, bias=False)), {}),
    "something after it": (lambda: with_head(nn.Sequential(nn.Linear(16, 3), nn.Tanh())), {}),
    "a loss of the user's own": (
        vit,
        {"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: outputs.logits.square().mean()},
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_other_heads_are_left_alone(tmp_path, name):
    make, options = LEFT_ALONE[name]
    torch.manual_seed(0)
    run = begun(tmp_path, make(), **options)
    assert run.fresh_head.images == 0
    assert run.fresh_head.changed in ((), [])


def test_a_loss_and_a_loader_of_a_subclass_are_left_alone(tmp_path):
    class Own(OwnLoader, MetaLRTrainer):
        pass

    for kind in (OwnLoss, Own):
        args = MetaLRTrainingArguments(str(tmp_path), max_steps=30, report_to="none", use_cpu=True, save_strategy="no")
        run = kind(vit(), args, train_dataset=images())
        run.train()
        assert run.fresh_head.images == 0


class OneAgainstAll(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = vit(dropout=0.0)

    def forward(self, pixel_values, labels=None):
        logits = self.network(pixel_values=pixel_values).logits
        targets = nn.functional.one_hot(labels, 3).float()
        return {"loss": nn.functional.binary_cross_entropy_with_logits(logits, targets), "logits": logits}


class Distances(OneAgainstAll):
    def forward(self, pixel_values, labels=None):
        logits = self.network(pixel_values=pixel_values).logits
        return nn.functional.cross_entropy(-logits, labels), logits


class Classes(OneAgainstAll):
    def forward(self, pixel_values, labels=None):
        logits = self.network(pixel_values=pixel_values).logits
        return nn.functional.cross_entropy(logits, labels), logits


@pytest.mark.parametrize(("kind", "fitted_to"), [(OneAgainstAll, 0), (Distances, 0), (Classes, 48)])
def test_a_loss_that_a_module_computes_is_left_alone_unless_it_is_cross_entropy(tmp_path, kind, fitted_to):
    run = trainer(tmp_path, kind(), **ON, max_steps=30)
    run.train()
    assert run.fresh_head.images == fitted_to


def test_several_labels_an_image_are_left_alone(tmp_path):
    rows = images()
    sets = [[float(label == k) for k in range(3)] for label in rows["labels"]]
    rows = rows.remove_columns("labels").with_format(None).add_column("labels", sets).with_format("torch")
    run = trainer(tmp_path, vit(), train_dataset=rows, compute_loss_func=LabelSetLoss(), **ON)
    run.train()
    assert run.fresh_head.images == 0


def test_a_head_that_does_better_is_kept(tmp_path):
    model = vit(dropout=0.0)
    first = trainer(tmp_path, model, **ON, max_steps=60)
    first.train()
    assert first.fresh_head.images == 48
    again = begun(tmp_path, model)
    assert again.fresh_head.images == 0
    assert again.fresh_head.changed in ((), [])


def test_features_that_say_nothing_of_the_classes_leave_it_alone(tmp_path):
    rows = images().with_format(None)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = rows.remove_columns("labels").add_column("labels", [rows["labels"][i] for i in order])
    run = trainer(tmp_path, vit(), train_dataset=mixed.with_format("torch"), **ON, max_steps=30)
    run.train()
    assert run.fresh_head.images == 0


class NoLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = vit(dropout=0.0)

    def forward(self, pixel_values):
        return {"logits": self.network(pixel_values=pixel_values).logits}


def test_a_module_that_takes_no_labels_is_fitted_where_the_loss_is_given(tmp_path):
    options = {"max_steps": 30, "remove_unused_columns": False, "label_names": ["labels"]}
    run = trainer(tmp_path, NoLabels(), compute_loss_func=ClassLoss(), **ON, **options)
    run.train()
    assert run.fresh_head.images == 48


def test_class_weights_count(tmp_path):
    even = begun(tmp_path, vit(), compute_loss_func=ClassLoss([1.0, 1.0, 1.0]))
    weighted = begun(tmp_path, vit(), compute_loss_func=ClassLoss([0.01, 0.01, 2.98]))
    assert even.fresh_head.images == 48
    assert (weighted.fresh_head.logits.argmax(1) == 2).float().mean() > 0.4


def test_the_images_of_every_step_and_their_random_numbers_stay_the_same(tmp_path):
    class Seen(TrainerCallback):
        def __init__(self):
            self.drawn = []

        def on_step_end(self, args, state, control, **kwargs):
            self.drawn.append(torch.get_rng_state())

    class Watching(MetaLRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.images = [*getattr(self, "images", []), inputs["pixel_values"]]
            return super().training_step(model, inputs, *args, **kwargs)

    runs, states = [], []
    for fit_head in (True, False):
        args = MetaLRTrainingArguments(
            str(tmp_path), max_steps=30, fit_head=fit_head, report_to="none", use_cpu=True, save_strategy="no"
        )
        run = Watching(vit(), args, train_dataset=images(), callbacks=[seen := Seen()])
        run.train()
        runs.append(run)
        states.append(seen.drawn)
    assert [run.fresh_head.images for run in runs] == [48, 0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].images, runs[1].images, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_streams_that_begin_anew_are_fitted_to_and_others_lose_no_row(tmp_path):
    run = trainer(tmp_path, vit(), train_dataset=streamed(images()), **ON, max_steps=40)
    run.train()
    # It says nothing of its length; more would be more than a fifth of the images that the run sees.
    assert run.fresh_head.images == 64

    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            rows = images()
            return iter([rows[i] for i in range(len(rows))])

    run = trainer(tmp_path, vit(), train_dataset=Once(), **ON)
    run.train()
    assert run.fresh_head.images == 0


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_fitted_once_and_goes_on_bit_for_bit(tmp_path, step):
    options = {**ON, "average_weights": "polynomial", "save_strategy": "steps", "save_steps": 2, "max_steps": 30}
    whole = trainer(tmp_path / "whole", vit(), **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", vit(), **options)
    resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert same_weights(whole.model, resumed.model)
    assert losses(whole)[-20:] == losses(resumed)[-20:]
    assert resumed.fresh_head.images == 48
    assert resumed.lr_scheduler.calibration_forwards == whole.lr_scheduler.calibration_forwards


def test_plain_training_arguments_fit_it_too(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=30, report_to="none", use_cpu=True, save_strategy="no")
    run = MetaLRTrainer(vit(), args, train_dataset=images())
    run.train()
    assert run.fresh_head.images == 48


def test_images_without_a_class_do_not_count(tmp_path):
    rows = images().with_format(None)
    labels = [-100 if i < 6 else label for i, label in enumerate(rows["labels"])]
    rows = rows.remove_columns("labels").add_column("labels", labels, feature=datasets.Value("int64"))
    run = trainer(tmp_path, vit(), train_dataset=rows.with_format("torch"), **ON, max_steps=30)
    run.train()
    assert run.fresh_head.images == 42


def test_features_keep_nothing_else_of_the_backbone(tmp_path):
    run = begun(tmp_path, vit(), max_steps=1)
    with contextlib.closing(_batches(run, run.model.classifier, 8)) as batches:
        features, _, _ = next(batches)
    # The first token of all.
    assert features.untyped_storage().nbytes() == features.numel() * features.element_size()
