"""Broken images and connections in the middle of a run."""

import http.client
import importlib
import multiprocessing

import pytest
import torch
from huggingface_hub.errors import HTTPError
from small_runs import LABELS, images, trainer, vit
from torch.utils.data import Dataset, IterableDataset

from metalr_hf.trainer.batches import MetaStream

# The HTTP library that the installed huggingface_hub uses, which has changed over time.
HTTP = importlib.import_module(HTTPError.__module__.split(".")[0])


class Rows(Dataset):
    """Images of which some are not finite, or cannot be read."""

    def __init__(self, spoiled=(), broken=()):
        self.rows, self.spoiled, self.broken = images(), spoiled, broken

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError("image file is truncated")
        row = dict(self.rows[i])
        if i in self.spoiled:
            row["pixel_values"] = row["pixel_values"] * float("inf" if i % 2 else "nan")
        return row


def test_validation_batches_that_are_not_finite_tune_nothing_and_are_counted(tmp_path):
    run = trainer(tmp_path, vit(), meta_dataset=Rows(spoiled=(3, 20)), max_steps=30, meta_batch_size=4)
    run.train()
    history = run.lr_history
    spoiled = ~torch.tensor(history.meta_losses).isfinite()
    assert 0 < spoiled.sum() < 15
    assert run.lr_scheduler.guard.non_finite == spoiled.sum()
    for step in range(1, 30):
        same = (history.learning_rates[step] == history.learning_rates[step - 1]).all()
        assert same == bool(spoiled[step])
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())
    assert run.state.log_history[-2]["meta_non_finite"] == spoiled.sum()


def test_a_spoiled_batch_at_the_calibration_is_in_doubt_and_the_run_goes_on(tmp_path):
    run = trainer(tmp_path, vit(), meta_dataset=Rows(spoiled=range(48)), max_steps=12, calibrate=True)
    with pytest.warns(UserWarning, match="in doubt"):
        run.train()
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(tmp_path, num_workers):
    run = trainer(
        tmp_path, vit(), meta_dataset=Rows(broken=[7]), max_steps=30, dataloader_num_workers=num_workers, save_steps=1
    )
    with pytest.raises(RuntimeError, match=r"^Row 7 .*image file is truncated"):
        run.train()


class Flaky(IterableDataset):
    """A stream whose connection breaks now and then."""

    def __init__(self, breaks, error=None):
        # Shared with the workers.
        self.breaks = multiprocessing.Value("i", breaks)
        self.error = ConnectionResetError("connection reset by peer") if error is None else error

    def __iter__(self):
        for i, row in enumerate(images()):
            if i == 5 and self.breaks.value:
                self.breaks.value -= 1
                raise self.error
            yield row


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr("metalr_hf.trainer.batches.stream.RETRY_AFTER", (0, 0, 0))


def labels(dataset, num_workers=0):
    stream = MetaStream(dataset, 4, lambda rows: [int(row["labels"]) for row in rows], num_workers=num_workers)
    return [next(stream) for _ in range(5)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_connection_is_tried_again(no_waiting, num_workers):
    assert labels(Flaky(3), num_workers) == labels(Flaky(0))
    with pytest.raises(RuntimeError, match=r"^Row 5 of epoch 0 of the meta set .*connection reset by peer"):
        labels(Flaky(4), num_workers)


@pytest.mark.parametrize("error", [TimeoutError(), HTTP.ReadError("reset"), http.client.IncompleteRead(b"")])
def test_interruptions_have_many_names(no_waiting, error):
    assert labels(Flaky(1, error)) == labels(Flaky(0))


def test_an_image_that_cannot_be_read_is_not_tried_again(no_waiting):
    with pytest.raises(RuntimeError, match="Repair the row or leave it out"):
        labels(Flaky(1, OSError("image file is truncated")))


def test_rows_of_a_stream_that_cannot_be_collated_are_named():
    def refuse(rows):
        raise TypeError("sizes differ")

    with pytest.raises(RuntimeError, match=r"^Rows \[0, 1\] of epoch 0 of the meta set .*sizes differ"):
        next(MetaStream(Flaky(0), 2, refuse))


def test_validation_batches_of_a_single_class_tune(tmp_path):
    single = images().select([i for i, label in enumerate(LABELS) if label == 1])
    run = trainer(tmp_path, vit(), meta_dataset=single, calibrate=True, max_steps=8)
    run.train()
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).any()


def whole_rows_only(rows):
    kept = [row for row in rows if row["pixel_values"].isfinite().all()]
    pixels = torch.stack([row["pixel_values"] for row in kept]) if kept else torch.zeros(0, 3, 16, 16)
    return {"pixel_values": pixels, "labels": torch.tensor([int(row["labels"]) for row in kept], dtype=torch.int64)}


def test_validation_batches_that_a_collator_leaves_empty_tune_nothing_and_are_counted(tmp_path):
    run = trainer(tmp_path, vit(), meta_dataset=Rows(spoiled=range(0, 48, 10)), max_steps=30, meta_batch_size=1)
    run.data_collator = whole_rows_only
    run.train()
    empty = ~torch.tensor(run.lr_history.meta_losses).isfinite()
    assert 0 < empty.sum() < 10
    assert run.lr_scheduler.guard.non_finite == empty.sum()
    assert all(bool(torch.isfinite(p).all()) for p in run.model.parameters())


def test_a_training_batch_that_is_not_finite_tunes_nothing(tmp_path):
    # It spoils the weights, in the stock Trainer too. The learning rates stay, and the run says what to look for.
    run = trainer(tmp_path, vit(), Rows(spoiled=[3]), meta_source="next_batch", max_steps=30)
    with pytest.warns(UserWarning, match="not finite 20 times in a row.*broken images"):
        run.train()
    assert torch.tensor(run.lr_history.learning_rates).isfinite().all()
    assert (run.lr_history.learning_rates[-1] == run.lr_history.learning_rates[-20]).all()
    assert run.state.log_history[-2]["meta_non_finite"] > 20
