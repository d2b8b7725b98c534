"""What a run says of itself before its first step."""

import pytest
from small_runs import images, streamed, trainer, vit
from transformers.utils import logging

TOO_SHORT, ALL_AT_ONCE = "too short to measure its start learning rates", "Every step takes all 48 training images"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_steps": 2}, [TOO_SHORT]),
        ({"max_steps": 3}, []),
        ({"max_steps": 2, "calibrate": False}, []),
        ({"max_steps": 3, "per_device_train_batch_size": 48}, [ALL_AT_ONCE]),
        ({"max_steps": 3, "per_device_train_batch_size": 24, "gradient_accumulation_steps": 2}, [ALL_AT_ONCE]),
        ({"max_steps": 3, "per_device_train_batch_size": 64}, [ALL_AT_ONCE]),
        ({"max_steps": 3, "per_device_train_batch_size": 24}, []),
        ({"max_steps": 3, "per_device_train_batch_size": 48, "meta_split": 0.25}, []),
        ({"max_steps": 3, "per_device_train_batch_size": 48, "hyper_lr": 0.0}, []),
    ],
    ids=str,
)
def test_runs_that_are_too_short_or_too_small_are_told(tmp_path, caplog, options, said):
    logging.enable_propagation()
    run = trainer(tmp_path, vit(), images(48), **{"calibrate": True, **options})
    run.create_optimizer()
    run.create_scheduler(run.args.max_steps)
    logging.disable_propagation()
    told = " ".join(record.message for record in caplog.records)
    assert [text for text in (TOO_SHORT, ALL_AT_ONCE) if text in told] == said


def test_of_a_stream_nothing_is_known(tmp_path, caplog):
    logging.enable_propagation()
    run = trainer(tmp_path, vit(), streamed(images(8)), max_steps=3, per_device_train_batch_size=8)
    run.create_optimizer()
    run.create_scheduler(3)
    logging.disable_propagation()
    assert "to train on" not in caplog.text
