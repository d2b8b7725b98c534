"""Start rates are measured on more images than a small batch has, and nothing else of the run changes."""

import pytest
import torch
from small_runs import OwnLoader, arguments, images, losses, resnet, same_weights, streamed, trainer, vit
from transformers import TrainerCallback

from metalr_hf import MetaLRTrainer

ON = {"calibrate": True, "meta_source": "next_batch", "fit_head": False, "hyper_lr": 0.0, "max_steps": 120}


class EndEarly(TrainerCallback):
    """The length of a run says how much it can afford to look at. The looks themselves come first."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 15


def looked_at(run):
    """The images of every look of a run, look by look."""
    looks, compute = [], run.compute_meta_loss

    def watched(inputs):
        if not looks or looks[-1][0] != run.state.global_step:
            looks.append((run.state.global_step, inputs["pixel_values"]))
        return compute(inputs)

    run.compute_meta_loss = watched
    run.add_callback(EndEarly())
    run.train()
    return [pixels for _, pixels in looks]


def test_every_look_is_at_images_of_its_own(tmp_path):
    looks = looked_at(trainer(tmp_path, vit(), **ON, per_device_train_batch_size=4))
    assert [len(pixels) for pixels in looks] == [16] * len(looks)
    assert len(looks) > 1
    assert not torch.equal(looks[0], looks[1])


@pytest.mark.parametrize(
    ("batch_size", "steps", "size"), [(8, 120, 32), (8, 60, 16), (8, 12, 8), (16, 120, 32), (40, 120, 40)]
)
def test_as_many_as_a_run_can_afford(tmp_path, batch_size, steps, size):
    looks = looked_at(trainer(tmp_path, vit(), **{**ON, "max_steps": steps}, per_device_train_batch_size=batch_size))
    assert {len(pixels) for pixels in looks} == {size}


def test_no_more_than_there_are(tmp_path):
    looks = looked_at(trainer(tmp_path, vit(), train_dataset=images(12), **ON, per_device_train_batch_size=4))
    assert {len(pixels) for pixels in looks} == {12}


def test_the_few_images_at_the_end_of_an_epoch_are_not_enough(tmp_path):
    looks = looked_at(trainer(tmp_path, vit(), train_dataset=images(41), **ON, per_device_train_batch_size=36))
    assert {len(pixels) for pixels in looks} == {36}


def test_they_count_as_what_they_cost(tmp_path):
    run = trainer(tmp_path, vit(), **ON, per_device_train_batch_size=8)
    forwards, looking, compute = [], [], run.compute_meta_loss
    # Within the backbone, which does not run where only the head is moved.
    patches = next(module for module in run.model.modules() if isinstance(module, torch.nn.Conv2d))
    patches.register_forward_hook(lambda module, given, output: forwards.append(len(output) / 8 * len(looking)))

    def look(inputs):
        looking.append(True)
        loss = compute(inputs)
        looking.clear()
        return loss

    run.compute_meta_loss = look
    run.train()
    assert run.lr_scheduler.calibration_forwards == sum(forwards)


def test_the_images_of_every_step_stay_the_same(tmp_path):
    class Watching(MetaLRTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            self.seen = [*getattr(self, "seen", []), inputs["pixel_values"]]
            return super().training_step(model, inputs, *args, **kwargs)

    runs = []
    for calibrate in (True, False):
        args = arguments(tmp_path, **{**ON, "calibrate": calibrate, "max_steps": 60})
        runs.append(Watching(vit(), args, train_dataset=images()))
        runs[-1].train()
    assert all(torch.equal(a, b) for a, b in zip(*(run.seen for run in runs), strict=True))


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_resumed_between_two_looks_goes_on_bit_for_bit(tmp_path, step):
    options = {
        **ON,
        "hyper_lr": 0.1,
        "max_steps": 60,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 60,
    }
    whole = trainer(tmp_path / "whole", resnet(), callbacks=[EndEarly()], **options)
    whole.train()
    resumed = trainer(tmp_path / "resumed", resnet(), callbacks=[EndEarly()], **options)
    resumed.train(str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert same_weights(whole.model, resumed.model)
    assert losses(whole)[-10:] == losses(resumed)[-10:]


def test_streams_that_begin_anew_give_more_and_others_lose_no_row(tmp_path):
    assert {len(pixels) for pixels in looked_at(trainer(tmp_path, vit(), train_dataset=streamed(images()), **ON))} == {
        32
    }

    class Once(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([images()[i % 48] for i in range(8 * 12)])

    run = trainer(tmp_path, vit(), train_dataset=Once(), **{**ON, "max_steps": 12})
    assert {len(pixels) for pixels in looked_at(run)} == {8}


def test_a_loader_of_ones_own_is_the_only_one(tmp_path):
    class LoadsItself(OwnLoader, MetaLRTrainer):
        pass

    run = LoadsItself(vit(), arguments(tmp_path, **ON))
    assert {len(pixels) for pixels in looked_at(run)} == {8}


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"per_device_train_batch_size": 8}, 0.005),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4}, 0.01),
        ({"per_device_train_batch_size": 48}, 0.01),
    ],
    ids=str,
)
def test_small_batches_move_the_backbone_less(tmp_path, options, share):
    run = trainer(tmp_path, vit(), **{**ON, "max_steps": 4}, **options)
    run.train()
    assert run.lr_scheduler.largest_step == pytest.approx(share)


def test_accumulation_gives_the_rates_of_one_large_batch(tmp_path):
    found = []
    for options in (
        {"per_device_train_batch_size": 16},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    ):
        run = trainer(tmp_path, vit(0.0), **{**ON, "max_steps": 12}, **options)
        run.train()
        found.append(run.lr_scheduler.calibration.learning_rates(2))
    assert found[0] == pytest.approx(found[1], rel=1e-3)
