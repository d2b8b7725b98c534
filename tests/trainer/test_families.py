"""Tuned steps of one small real model of each family: every layer's rate moves, running statistics do not."""

import pytest
import torch
from families import DETECTORS, IMAGE_CLASSIFIERS, SEGMENTERS, boxes_for, images_for, keep_labels_apart
from torch import nn
from transformers import TrainerCallback

from metalr_hf import MetaLRTrainer, MetaLRTrainingArguments

MODELS = [(name, False) for name in IMAGE_CLASSIFIERS] + [(name, True) for name in SEGMENTERS]


class BuffersOfValidation(TrainerCallback):
    """Keeps the model's buffers from right before the validation pass and from right after it."""

    def on_optimizer_step(self, args, state, control, model, **kwargs):
        self.before = {name: value.clone() for name, value in model.named_buffers()}

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after = {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("name", DETECTORS)
def test_a_tuned_step_of_a_detector_moves_every_rate_and_no_running_statistics(name, tmp_path):
    torch.manual_seed(0)
    check_tuned_step(DETECTORS[name](), boxes_for(8), tmp_path, data_collator=keep_labels_apart)


@pytest.mark.parametrize(("name", "segmentation"), MODELS, ids=[f"{n}{' (masks)' * s}" for n, s in MODELS])
def test_a_tuned_step_moves_every_rate_and_no_running_statistics(name, segmentation, tmp_path):
    torch.manual_seed(0)
    model = (SEGMENTERS if segmentation else IMAGE_CLASSIFIERS)[name]()
    check_tuned_step(model, images_for(name, 8, segmentation), tmp_path)


def check_tuned_step(model, images, folder, **options):
    args = MetaLRTrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        calibrate=False,
        meta_source="stream",
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
    )
    buffers = BuffersOfValidation()
    trainer = MetaLRTrainer(model, args, train_dataset=images, callbacks=[buffers], **options)
    start = {name: value.clone() for name, value in model.named_buffers()}
    trainer.train()
    scheduler = trainer.lr_scheduler
    rates = zip(scheduler.layers, scheduler.start_learning_rates, scheduler.learning_rates, strict=True)
    stuck = {layer for layer, old, new in rates if old == new}
    # A part that the output does not depend on has no gradient, and no state in the optimizer.
    state = trainer.optimizer.state
    unused = {g["layer"] for g in trainer.optimizer.param_groups if not any(p in state for p in g["params"])}
    assert len(scheduler.layers) >= 4
    assert scheduler.layers[-1] == "head"
    assert stuck <= unused
    assert len(unused) <= 1
    assert scheduler.learning_rates.isfinite().all()
    for buffer, value in buffers.before.items():
        assert torch.equal(value, buffers.after[buffer]), buffer
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        # The training pass does move them.
        assert any(not torch.equal(start[buffer], value) for buffer, value in buffers.before.items())
