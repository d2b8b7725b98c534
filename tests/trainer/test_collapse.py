import gc
import os
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_runs import Kill, arguments, images, resnet, same_weights, vit
from torch import nn

from metalr_hf import MetaLRTrainer
from metalr_hf.models.bare import outputs_and_logits
from metalr_hf.models.target_losses import LabelSetLoss, QuantityLoss
from metalr_hf.trainer.collapse import CollapseGuard

LABELS = torch.arange(30) % 3


def begun(model):
    """A guard that has looked once, and so has the first weights."""
    guard = CollapseGuard(model)
    assert not guard.collapsed(lambda: torch.randn(4, 2))
    return guard


def guarded(loss, spread, start_spread=0.5):
    guard = CollapseGuard(nn.Linear(4, 3), every=3)
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    guard.note(torch.tensor(loss), LABELS)
    assert not guard.collapsed(lambda: start_spread * noise)
    guard.note(torch.tensor(loss), LABELS)
    assert not guard.collapsed(lambda: pytest.fail("nothing is computed between"))
    guard.note(torch.tensor(loss), LABELS)
    return guard.collapsed(lambda: spread * noise)


def test_it_takes_both_signs():
    assert guarded(loss=1.1, spread=0.0)
    assert not guarded(loss=1.1, spread=0.1), "a slow run answers differently from image to image"
    assert not guarded(loss=0.9, spread=0.0), "an easy set may be learned by a constant"
    assert not guarded(loss=1.1, spread=0.01, start_spread=0.02), "a network that never told images apart"


def test_a_class_that_is_rare_is_no_collapse():
    # The best constant answer to labels of which 9 in 10 are the same has a loss of 0.33.
    guard = CollapseGuard(nn.Linear(4, 2), every=1)
    guard.start_spread = 1.0
    guard.note(torch.tensor(0.3), (torch.arange(100) % 10 == 0).long())
    assert not guard.collapsed(lambda: torch.zeros(100, 2))


def test_images_of_one_class_may_get_one_answer():
    guard = begun(nn.Linear(4, 2))
    guard.every = 1
    guard.note(torch.tensor(0.7), torch.tensor([0, 0, 0, 0]))
    assert not guard.collapsed(lambda: torch.zeros(4, 2)), "no image has told what a constant answer costs"
    guard.note(torch.tensor(0.7), torch.tensor([0, 1, 0, 0]))
    assert not guard.collapsed(lambda: None)
    guard.note(torch.tensor(0.7), torch.tensor([0, 1, 0, 0]))
    assert guard.collapsed(lambda: torch.zeros(4, 2))


def test_labels_of_no_class_are_not_counted():
    guard = CollapseGuard(nn.Linear(4, 2), every=1)
    guard.start_spread = 1.0
    guard.note(torch.tensor(0.7), torch.tensor([0, 1, -100, -100]))
    assert guard.collapsed(lambda: torch.zeros(4, 2))


def test_going_back_restores_weights_and_buffers():
    model = resnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    guard = begun(model)
    model(torch.randn(4, 3, 16, 16))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    guard.go_back(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_forked_process_killed_while_it_reads_leaves_the_first_weights_alone(monkeypatch):
    model, errors = resnet(), []
    guard = begun(model)
    guard.go_back(model)
    child = os.fork()
    if not child:
        monkeypatch.setattr(torch, "load", lambda *args, **kwargs: os._exit(0))
        guard.go_back(model)
    os.waitpid(child, 0)
    monkeypatch.setattr(sys, "unraisablehook", errors.append)
    guard.stop()
    gc.collect()
    assert not errors


@pytest.mark.parametrize("source", ["stream", "next_batch"])
def test_a_collapse_made_on_purpose_is_noticed_and_undone(tmp_path, source):
    args = arguments(tmp_path, max_steps=30, meta_source=source, learning_rate=1e-2)
    run = MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=2)])
    messages = []
    transformers.utils.logging.get_logger("metalr_hf.trainer.collapse").addFilter(
        lambda record: messages.append(record.getMessage()) or True
    )
    run.train()
    assert run.lr_scheduler.restarted_at in (10, 20)
    assert any("first weights are back" in message for message in messages)
    rates = run.lr_history.learning_rates
    # A stream tunes the first step anew already.
    at_most = 2e-3 if source == "stream" else 1e-3 * (1 + 1e-9)
    assert 1e-3 * (1 - 1e-9) <= rates[run.lr_scheduler.restarted_at].max() <= at_most
    last = [row["loss"] for row in run.state.log_history if "loss" in row][-5:]
    assert sum(last) / 5 < 1.0, last
    start = vit(0.0).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("setting", [{"warmup_steps": 2}, {"meta_every": 2}], ids=str)
def test_steps_that_are_not_tuned_do_not_end_the_watch(tmp_path, setting):
    args = arguments(tmp_path, max_steps=14, learning_rate=1e-2, lr_scheduler_type="constant_with_warmup", **setting)
    run = MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=2)])
    run.train()
    assert run.lr_scheduler.restarted_at > 0


def test_a_run_resumed_before_a_collapse_goes_back_to_its_first_weights_too(tmp_path):
    def collapsing():
        args = arguments(tmp_path, max_steps=14, learning_rate=1e-2, save_strategy="steps", save_steps=2)
        return MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=2)])

    whole = collapsing()
    whole.train()
    assert whole.lr_scheduler.restarted_at == 10
    for step in (4, 10, 12):
        again = collapsing()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.lr_scheduler.restarted_at == 10
        assert same_weights(whole.model, again.model)


def test_the_first_weights_are_kept_outside_of_memory_or_in_it_if_the_disk_is_full(monkeypatch):
    model = nn.Linear(4, 2)
    start = model.weight.detach().clone()
    on_disk = begun(model)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as disk:
        # In the middle of writing: what was written is given back.
        disk.setattr(torch, "save", full)
        given_back = begun(model)
    assert given_back._start._file.closed
    monkeypatch.setattr("metalr_hf.trainer.collapse.tempfile.TemporaryFile", full)
    in_memory = begun(model)
    assert on_disk._start.in_memory is None
    assert given_back._start.in_memory
    assert in_memory._start.in_memory
    for guard in (on_disk, given_back, in_memory):
        nn.init.zeros_(model.weight)
        guard.go_back(model)
        assert torch.equal(model.weight, start)


def test_a_model_without_logits_is_not_watched_and_asked_once():
    guard, asked = CollapseGuard(nn.Linear(4, 2)), []
    assert not guard.collapsed(lambda: asked.append(1))
    assert not guard.active
    assert asked == [1]


def test_labels_that_are_no_classes_end_the_watch_and_its_weights_are_in_no_checkpoint(tmp_path):
    def one_hot(rows):
        rows["labels"] = torch.nn.functional.one_hot(torch.as_tensor(rows["labels"]), 3).float()
        return rows

    rows = images().with_transform(one_hot)
    run = MetaLRTrainer(
        vit(), arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=2), train_dataset=rows
    )
    run.train()
    saved = torch.load(tmp_path / "checkpoint-2" / "scheduler.pt", weights_only=True)["stateful"]["collapse_guard"]
    assert (saved["active"], saved["start"]) == (False, {})


@pytest.mark.parametrize("loss", [LabelSetLoss(), QuantityLoss([1.0, 1.0])], ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("is_bare", [True, False], ids=["module", "transformers"])
def test_the_watch_has_a_model_compute_no_loss_of_another_kind(tmp_path, loss, is_bare):
    rows = [
        {"pixel_values": row["pixel_values"], "labels": torch.tensor([1.0, i % 2])} for i, row in enumerate(images())
    ]
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 8), nn.Linear(8, 2)) if is_bare else vit()
    if not is_bare:
        model.classifier, model.num_labels = nn.Linear(16, 2), 2
    run = MetaLRTrainer(model, arguments(tmp_path, max_steps=3), train_dataset=rows, compute_loss_func=loss)
    run.train()
    assert run.collapse_guard.start_spread > 0
    # Transformers models guess it from the labels that they see.
    assert is_bare or model.config.problem_type is None


def test_the_watch_ends_with_tuning(tmp_path):
    run = MetaLRTrainer(vit(), arguments(tmp_path, max_steps=6, tuning_steps=3), train_dataset=images())
    run.train()
    assert not run.collapse_guard.active


class Fitting(transformers.TrainerCallback):
    """Notes to how many images the head has been fitted, step by step."""

    def __init__(self):
        self.images = []

    def on_step_end(self, args, state, control, **kwargs):
        self.images.append(self.trainer.fresh_head.images)


def test_the_head_is_fitted_again_after_the_first_weights_are_back(tmp_path):
    args = arguments(tmp_path, max_steps=30, calibrate=True, meta_source="next_batch")
    run = MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=6), fitting := Fitting()])
    fitting.trainer = run
    run.train()
    restart = run.lr_scheduler.restarted_at
    assert restart > 6
    assert (fitting.images[4], fitting.images[restart]) == (48, 48)
    start, head = vit(0.0).state_dict(), run.model.classifier.weight
    # That of the first weights would have moved by a few of its small steps only.
    assert (head - start["classifier.weight"]).abs().max() > 0.01


def test_a_fitted_head_of_a_small_scale_is_no_collapse():
    guard = CollapseGuard(nn.Linear(4, 3), every=1)
    noise = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    assert not guard.collapsed(lambda: noise)
    guard.note(torch.tensor(1.1), LABELS)
    # Its answers differ by little, and its loss is still that of a constant answer.
    guard.measure_anew()
    assert not guard.collapsed(lambda: 0.01 * noise)
    guard.note(torch.tensor(1.1), LABELS)
    assert not guard.collapsed(lambda: 0.01 * noise)
    guard.note(torch.tensor(1.1), LABELS)
    assert guard.collapsed(lambda: 0.0001 * noise)


@pytest.mark.parametrize("setting", [{}, {"gradient_accumulation_steps": 8}], ids=str)
def test_steps_of_single_images_are_watched_too(tmp_path, setting):
    options = {"max_steps": 60, "learning_rate": 1e-2, "per_device_train_batch_size": 1, "fit_head": False}
    args = arguments(tmp_path, **options, **setting)
    run = MetaLRTrainer(vit(0.0), args, train_dataset=images(), callbacks=[Kill(at=2)])
    run.train()
    assert run.lr_scheduler.restarted_at > 0


def test_all_processes_look_at_as_many_batches(tmp_path, monkeypatch):
    looked_at = []

    class Looking(MetaLRTrainer):
        def _mean_over_processes(self, values):
            # In another process the first batch is of one class.
            return values / 2

    def logits(model, inputs, has_own_loss):
        looked_at.append(len(inputs["labels"]))
        return outputs_and_logits(model, inputs, has_own_loss)

    monkeypatch.setattr("metalr_hf.trainer.collapse.outputs_and_logits", logits)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    Looking(vit(0.0), args, train_dataset=images()).train()
    assert len(looked_at) > 1


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_what_is_frozen_is_not_kept():
    model = get_peft_model(vit(), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    guard = begun(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert set(guard.state_dict()["start"]) == trained | {name for name, _ in model.named_buffers()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in trained:
                p.fill_(1.0)
    guard.go_back(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
