"""Broken images and connections in the middle of a run."""

import pytest
import torch
from test_trainer import LABELS, images, trainer, vit
from torch.utils.data import Dataset, IterableDataset

from metalr_hf import meta_stream
from metalr_hf.meta_stream import MetaStream


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
    with pytest.raises(RuntimeError, match=r"Row 7 .*image file is truncated"):
        run.train()


class Flaky(IterableDataset):
    """A stream whose connection breaks now and then."""

    def __init__(self, breaks):
        self.breaks = breaks

    def __iter__(self):
        for i, row in enumerate(images()):
            if i == 5 and self.breaks:
                self.breaks -= 1
                raise ConnectionResetError("connection reset by peer")
            yield row


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(meta_stream, "RETRY_AFTER", (0, 0, 0))


def test_a_broken_connection_is_tried_again(no_waiting, tmp_path):
    def labels(breaks):
        stream = MetaStream(Flaky(breaks), 4, lambda rows: [int(row["labels"]) for row in rows])
        return [next(stream) for _ in range(5)]

    assert labels(3) == labels(0)
    with pytest.raises(RuntimeError, match=r"Row 5 of epoch 0 of the meta set .*connection reset by peer"):
        labels(4)


def test_validation_batches_of_a_single_class_tune(tmp_path):
    single = images().select([i for i, label in enumerate(LABELS) if label == 1])
    run = trainer(tmp_path, vit(), meta_dataset=single, calibrate=True, max_steps=8)
    run.train()
    assert (run.lr_history.learning_rates[-1] != run.lr_history.learning_rates[0]).any()
