import ctypes
import multiprocessing
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from small_runs import OwnLoader, arguments, images, resnet, same_weights, streamed, trainer, vit
from torch import nn
from tqdm.std import TqdmDefaultWriteLock
from transformers import TrainerCallback

from metalr_hf import MetaLRTrainer
from metalr_hf.trainer.checkpoints import checkpoints, is_complete, usable_checkpoint

STEPS = 12
SAVING = {"logging_strategy": "no", "save_strategy": "steps", "save_steps": 3, "max_steps": STEPS, "calibrate": True}


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
    "everything-streamed-by-workers": {
        "meta_dataset": streamed(images(20, seed=1)),
        "train_dataset": streamed(images()),
        "dataloader_num_workers": 2,
        "gradient_accumulation_steps": 2,
    },
    "tuned-to-the-end": {"meta_source": "next_batch", "tuning_steps": 0, "meta_every": 2},
}


QUICK = ("next_batch", "stream")
CASES = [*((vit, way) for way in WAYS), *((resnet, way) for way in ("next_batch", "accumulation"))]


@pytest.mark.parametrize(
    ("make_model", "way"),
    [pytest.param(*case, marks=() if case[1] in QUICK else pytest.mark.slow) for case in CASES],
)
def test_a_run_resumed_from_any_checkpoint_ends_bitwise_as_if_never_interrupted(tmp_path, make_model, way):
    whole = trainer(tmp_path / "a", make_model(), **WAYS[way], **SAVING)
    whole.train()
    for step in range(3, STEPS, 3):
        again = trainer(tmp_path / "b", make_model(), **WAYS[way], **SAVING)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same_weights(whole.model, again.model), step
        assert_same_histories(whole, again, STEPS)


def assert_same_histories(a, b, steps):
    a, b = a.lr_history, b.lr_history
    assert a.steps.tolist() == b.steps.tolist() == list(range(steps))
    for name in ("learning_rates", "meta_losses", "hypergradients"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["next_batch", "stream"])
def test_a_run_of_60_steps_resumes_before_at_and_after_the_end_of_tuning(tmp_path, source):
    # 40 steps are tuned, then the copy of the parameters is given back; the rates decay from step 18 on.
    setting = {**SAVING, "max_steps": 60, "save_steps": 10, "lr_scheduler_type": "warmup_stable_decay"}
    whole = trainer(tmp_path / "a", vit(), meta_source=source, **setting)
    whole.train()
    for step in (10, 40, 50):
        again = trainer(tmp_path / "b", vit(), meta_source=source, **setting)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert same_weights(whole.model, again.model), step
        assert_same_histories(whole, again, 60)


class Noisy(torch.utils.data.Dataset):
    """Images that are never the same twice."""

    def __len__(self):
        return 24

    def __getitem__(self, row):
        return {"pixel_values": torch.randn(3, 16, 16), "labels": row % 3}


@pytest.mark.parametrize("average", ["polynomial", "none"])
def test_a_run_that_had_ended_takes_no_further_step(tmp_path, average):
    setting = {**SAVING, "save_steps": 4, "average_weights": average, "train_dataset": Noisy()}
    whole = trainer(tmp_path, resnet(), **setting)
    whole.train()
    again = trainer(tmp_path, resnet(), **setting)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    assert len(checkpoints(tmp_path)) == 3
    # With the average, whose batch norm is estimated from images that draw random numbers.
    assert same_weights(whole.model, again.model)
    assert again.weight_average is None
    assert_same_histories(whole, again, STEPS)
    longer = trainer(tmp_path, resnet(), **{**setting, "max_steps": STEPS + 2})
    longer.train(resume_from_checkpoint=True)
    assert longer.lr_history.steps.tolist() == list(range(STEPS + 2))
    assert not same_weights(whole.model, longer.model)


@pytest.mark.parametrize("stops", [True, False])
def test_a_run_that_had_ended_goes_back_to_its_best_weights(tmp_path, stops):
    setting = {**SAVING, "eval_dataset": images(24, seed=1), "average_weights": "polynomial"}
    setting |= {"stop_when_converged": True} if stops else {"load_best_model_at_end": True, "eval_strategy": "steps"}
    setting |= {} if stops else {"eval_steps": 3}
    whole = trainer(tmp_path, resnet(), **setting)
    whole.train()
    again = trainer(tmp_path, resnet(), **setting)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == whole.state.global_step
    assert again.step_of_weights == whole.step_of_weights
    assert same_weights(whole.model, again.model)


def train(folder, file_size=None):
    """A run that saves at each step and goes on where it was cut off; meant for a process of its own."""
    # All processes that were forked share one lock of progress bars, and one that is killed would keep it for ever.
    TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *args, **kwargs: None
    run = trainer(folder, resnet(), **{**SAVING, "save_steps": 1})
    if file_size is not None:
        run.add_callback(DiskFull(file_size))
    run.train(resume_from_checkpoint=usable_checkpoint(folder) is not None)
    torch.save(run.model.state_dict(), folder / "done.partial")
    os.replace(folder / "done.partial", folder / "done.pt")


class Rows(torch.utils.data.IterableDataset):
    """Rows that say which were read; of no known length."""

    def __init__(self, read):
        self.read = read

    def __iter__(self):
        pixels = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
        for number in range(10_000):
            self.read.append(number)
            yield {"pixel_values": pixels, "labels": number % 3}


def test_a_longer_run_goes_on_in_a_stream_where_the_saved_one_stood(tmp_path):
    setting = {**SAVING, "save_steps": 6, "calibrate": False, "meta_source": "next_batch"}
    setting["per_device_train_batch_size"] = 4
    trainer(tmp_path, resnet(), train_dataset=Rows([]), **setting).train()
    batches = []
    run = trainer(tmp_path, resnet(), train_dataset=Rows(read := []), **{**setting, "max_steps": 2 * STEPS})
    step = run.training_step
    run.training_step = lambda *args, **kwargs: (batches.append(len(read)), step(*args, **kwargs))[1]
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    # The loader reads one batch ahead.
    assert batches[0] <= 4 * (6 + 2)


class LoadsItself(OwnLoader, MetaLRTrainer):
    """Has no training set, and epochs of a known length all the same."""


def test_a_loader_of_ones_own_goes_on_where_it_stood(tmp_path):
    def made():
        return LoadsItself(
            vit(), arguments(tmp_path, **{**SAVING, "num_train_epochs": 3, "max_steps": -1, "save_steps": 4})
        )

    whole = made()
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert again.state.global_step == 18
    assert same_weights(whole.model, again.model)


def vit_with_own_head():
    model = vit()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return model


def timm_with_own_head():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    model.fc = nn.Sequential(nn.Dropout(0.1), nn.Linear(model.fc.in_features, 3))
    return model


def test_weights_under_other_names_are_no_missing_keys(tmp_path, caplog):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    run = trainer(tmp_path, vit(), eval_dataset=images(8, seed=1), **{**SAVING, **best, "save_steps": 3})
    with caplog.at_level("WARNING", logger="transformers.trainer"):
        run.train()
    assert run.state.best_model_checkpoint
    assert "missing keys" not in caplog.text
    assert "unexpected keys" not in caplog.text


@pytest.mark.filterwarnings("ignore:.*tensors of this network are not those of")
@pytest.mark.parametrize("make_model", [vit_with_own_head, timm_with_own_head])
def test_a_head_of_ones_own_is_resumed_and_the_best_loaded(tmp_path, make_model):
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_dataset": images(24, seed=1),
    }
    whole = trainer(tmp_path, make_model(), **SAVING, **best)
    whole.train()
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric)
    again = trainer(tmp_path, make_model(), **SAVING, **best)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert same_weights(whole.model, again.model)


class DiskFull(TrainerCallback):
    """From step 4 on no file may grow beyond a size, which fails a write as a full disk does."""

    def __init__(self, file_size):
        self.file_size = file_size

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_size, self.file_size))


def train_on_a_small_disk(folder, size, report):
    """Trains in a folder that is a disk of its own, of so many kilobytes, in a process of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_namespace, new_user = 0x00020000, 0x10000000
    if libc.unshare(new_namespace | (0 if os.getuid() == 0 else new_user)) or libc.mount(
        b"tmpfs", os.fsencode(folder), b"tmpfs", 0, b"size=%dk" % size
    ):
        report.write_text("no disk")
        return
    try:
        train(folder)
    except OSError as error:
        report.write_text(f"{error}\n{usable_checkpoint(folder)}\n{sorted(path.name for path in folder.iterdir())}")


def in_a_process(*args, target=None):
    process = multiprocessing.get_context("fork").Process(target=target or train, args=args)
    process.start()
    return process


@pytest.mark.slow
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


def test_a_disk_that_is_full_is_said_so_whatever_file_did_not_fit(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    # A checkpoint has about 110 kB, with the optimizer's file in the middle.
    for size in (350, 380, 410):
        in_a_process(folder, size, tmp_path / "report", target=train_on_a_small_disk).join()
        said, last, there = (tmp_path / "report").read_text().splitlines() or [""] * 3
        if said == "no disk":
            pytest.skip("no right to mount a disk")
        assert "The disk is full" in said
        last_whole, cut_off = Path(last).name, f"checkpoint-{int(last.split('-')[-1]) + 1}"
        assert f"The last complete checkpoint is {last}" in said
        assert {last_whole, cut_off} <= set(there.replace("'", "").strip("[]").split(", "))


def test_a_checkpoint_cut_off_does_not_count_in_the_trainer_either(tmp_path):
    run = trainer(tmp_path, resnet(), **SAVING)
    run.train()
    os.remove(tmp_path / "checkpoint-12" / "trainer_state.json")
    again = trainer(tmp_path, resnet(), **SAVING)
    again.train(resume_from_checkpoint=True)
    assert same_weights(run.model, again.model)
    with pytest.raises(ValueError, match="no complete checkpoint in output_dir="):
        trainer(tmp_path / "new", resnet(), **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_loads_without_pickle(tmp_path, monkeypatch):
    run = trainer(tmp_path, resnet(), **SAVING)
    run.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    load, loaded = torch.load, []

    def load_weights_only(file, *args, **kwargs):
        assert kwargs["weights_only"] is True
        # The first weights, which the watch for a collapse keeps, are in a file without a name.
        loaded.extend([Path(file).name] if isinstance(file, (str, Path)) else [])
        return load(file, *args, **kwargs)

    monkeypatch.setattr(torch, "load", load_weights_only)
    trainer(tmp_path, resnet(), **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} == set(loaded)


@pytest.mark.parametrize("other", [{"optim": "sgd"}, {"optim": "rmsprop"}])
def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path, other):
    trainer(tmp_path, resnet(), **SAVING).train()
    with pytest.raises(ValueError, match="The checkpoint's optimizer is Ada"):
        trainer(tmp_path, resnet(), **SAVING, **other).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(("before", "after"), [("next_batch", "stream"), ("stream", "next_batch")])
def test_a_run_can_go_on_with_another_source_and_another_rule(tmp_path, before, after):
    # Two rules that are both held to a tenth a step may move a layer alike.
    setting = {**SAVING, "tuning_steps": 0, "fit_head": False, "max_lr_change": 2.0}
    whole = trainer(tmp_path, resnet(), meta_source=before, lr_rule="proportional", **setting)
    whole.train()
    again = trainer(tmp_path, resnet(), meta_source=after, lr_rule="adam", **setting)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.lr_history.steps.tolist() == list(range(STEPS))
    assert (again.lr_history.learning_rates[:6] == whole.lr_history.learning_rates[:6]).all()
    assert (again.lr_history.learning_rates[-1] != whole.lr_history.learning_rates[-1]).all()


def test_a_folder_that_is_no_checkpoint_is_refused_at_once(tmp_path, caplog):
    run = trainer(tmp_path, resnet(), **SAVING)
    run.train()
    with pytest.raises(FileNotFoundError, match="nothing': there is no such folder"):
        run.train(resume_from_checkpoint=str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match=r"is the folder of a run, not a checkpoint: its last one is .*checkpoint-12"):
        run.train(resume_from_checkpoint=str(tmp_path))
    assert "weights alone" not in caplog.text


def test_weights_without_learning_rates_are_resumed_with_a_warning(tmp_path, caplog):
    setting = {**SAVING, "save_only_model": True}
    trainer(tmp_path, resnet(), **setting).train()
    with caplog.at_level("WARNING"):
        trainer(tmp_path, resnet(), **setting).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert "holds weights alone" in caplog.text
