import multiprocessing
import os
import random
import resource
import signal
import time

import pytest
import torch
from test_trainer import images, resnet, same_weights, trainer, vit
from transformers import TrainerCallback

from metalr_hf.checkpoints import checkpoints, is_complete, usable_checkpoint

STEPS = 12
SAVING = {"logging_strategy": "no", "save_strategy": "steps", "save_steps": 3, "max_steps": STEPS, "calibrate": True}


def streamed(rows):
    return rows.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=8)


WAYS = {
    "next_batch": {"meta_source": "next_batch"},
    "stream": {"meta_source": "stream"},
    "accumulation": {"meta_source": "stream", "gradient_accumulation_steps": 2},
    "accumulation-next_batch": {"meta_source": "next_batch", "gradient_accumulation_steps": 2},
    "workers": {"meta_source": "stream", "dataloader_num_workers": 2},
    "own-meta-set": {"meta_source": "stream", "meta_dataset": images(10, seed=1)},
    "streamed-meta-set": {"meta_source": "stream", "meta_dataset": streamed(images(20, seed=1))},
    "streamed-training-set": {"meta_source": "next_batch", "train_dataset": streamed(images())},
    "streamed-training-set-stream": {"meta_source": "stream", "train_dataset": streamed(images())},
    "tuned-to-the-end": {"meta_source": "next_batch", "tuning_steps": 0, "meta_every": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make_model", [vit, resnet])
def test_a_run_resumed_from_any_checkpoint_ends_bitwise_as_if_never_interrupted(tmp_path, make_model, way):
    whole = trainer(tmp_path / "a", make_model(), **WAYS[way], **SAVING)
    whole.train()
    for step in range(3, STEPS, 3):
        again = trainer(tmp_path / "b", make_model(), **WAYS[way], **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same_weights(whole.model, again.model), step
        assert (whole.lr_history.learning_rates == again.lr_history.learning_rates).all()
        assert whole.lr_history.steps.tolist() == again.lr_history.steps.tolist() == list(range(STEPS))


def train(folder, file_size=None):
    """A run that saves at each step and goes on where it was cut off; meant for a process of its own."""
    run = trainer(folder, resnet(), **{**SAVING, "save_steps": 1})
    if file_size is not None:
        run.add_callback(DiskFull(file_size))
    run.train(resume_from_checkpoint=usable_checkpoint(folder) is not None)
    torch.save(run.model.state_dict(), folder / "done.partial")
    os.replace(folder / "done.partial", folder / "done.pt")


class DiskFull(TrainerCallback):
    """From step 4 on no file may grow beyond a size, which fails a write as a full disk does."""

    def __init__(self, file_size):
        self.file_size = file_size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))


def in_a_process(*args):
    process = multiprocessing.get_context("fork").Process(target=train, args=args)
    process.start()
    return process


def test_every_kill_is_followed_by_a_resume_from_the_last_whole_checkpoint(tmp_path):
    reference = tmp_path / "reference"
    process = in_a_process(reference)
    process.join()
    assert process.exitcode == 0
    written = sorted(path.stat().st_mtime for path in checkpoints(reference))
    a_step = (written[-1] - written[0]) / (STEPS - 1)
    whole = torch.load(reference / "done.pt", weights_only=True)
    draw, kills, torn, folders = random.Random(0), 0, 0, 0
    while kills < 50:
        folder = tmp_path / f"run-{folders}"
        folders += 1
        while not (folder / "done.pt").exists():
            before = len(checkpoints(folder))
            process = in_a_process(folder)
            while process.is_alive() and len(checkpoints(folder)) == before:
                time.sleep(0.001)
            process.join(draw.uniform(0, 2 * a_step))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                process.join()
                torn += any(not is_complete(path) for path in checkpoints(folder))
            else:
                assert process.exitcode == 0
        done = torch.load(folder / "done.pt", weights_only=True)
        assert all(torch.equal(done[name], whole[name]) for name in whole)
    assert torn > 10, "the kills did not hit the writing of checkpoints"


def test_a_full_disk_is_said_so_and_leaves_the_checkpoint_before(tmp_path, capfd):
    process = in_a_process(tmp_path, 10_000)
    process.join()
    assert process.exitcode == 1
    assert "File too large" in capfd.readouterr().err
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    process = in_a_process(tmp_path)
    process.join()
    assert process.exitcode == 0


def test_a_checkpoint_cut_off_does_not_count_in_the_trainer_either(tmp_path):
    run = trainer(tmp_path, resnet(), **SAVING)
    run.train()
    os.remove(tmp_path / "checkpoint-12" / "trainer_state.json")
    again = trainer(tmp_path, resnet(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same_weights(run.model, again.model)
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir="):
        trainer(tmp_path / "new", resnet(), **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_loads_without_pickle(tmp_path):
    run = trainer(tmp_path, resnet(), **SAVING)
    run.train()
    for file in ("optimizer.pt", "scheduler.pt"):
        assert torch.load(tmp_path / "checkpoint-3" / file, weights_only=True)
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()


@pytest.mark.parametrize("other", [{"optim": "sgd"}, {"optim": "rmsprop"}])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, other):
    trainer(tmp_path, resnet(), **SAVING).train()
    with pytest.raises(ValueError, match="The checkpoint's optimizer is Ada"):
        trainer(tmp_path, resnet(), **SAVING, **other).train(resume_from_checkpoint=True)
