import pytest
from transformers import TrainingArguments

from metalr_hf import MetaLRTrainingArguments
from metalr_hf.trainer.schedules import schedule_shape

DECAY = {"lr_scheduler_type": "warmup_stable_decay"}


def test_by_default_the_rates_stay_up_after_the_warmup(tmp_path):
    assert [schedule_shape(MetaLRTrainingArguments(str(tmp_path)), 100)(step) for step in (0, 50, 100)] == [1.0] * 3
    shape = schedule_shape(MetaLRTrainingArguments(str(tmp_path), warmup_steps=50), 100)
    assert [shape(step) for step in (0, 25, 50, 100)] == [0.0, 0.5, 1.0, 1.0]


def test_the_decay_is_over_the_last_seventy_percent(tmp_path):
    shape = schedule_shape(MetaLRTrainingArguments(str(tmp_path), **DECAY), 100)
    assert [shape(step) for step in (0, 15, 30)] == [1.0, 1.0, 1.0]
    # A straight line: half a cosine, transformers' own, would meet it in the middle only.
    assert [shape(step) for step in (47.5, 65, 82.5)] == pytest.approx([0.75, 0.5, 0.25])
    assert shape(100) == 0.0


def test_the_decay_can_be_given(tmp_path):
    args = MetaLRTrainingArguments(str(tmp_path), lr_scheduler_kwargs={"num_decay_steps": 50}, warmup_steps=10)
    shape = schedule_shape(args, 100)
    assert shape(0) == 0.0
    assert shape(49) == 1.0
    assert shape(75) == pytest.approx(0.5)
    args.lr_scheduler_kwargs |= {"decay_type": "cosine"}
    assert schedule_shape(args, 100)(62.5) == pytest.approx(0.853553, abs=1e-6)


def test_after_a_long_warmup_the_decay_begins_at_its_end(tmp_path):
    shape = schedule_shape(MetaLRTrainingArguments(str(tmp_path), warmup_steps=50, **DECAY), 100)
    assert [shape(step) for step in (25, 50, 75, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])


def test_trainers_own_schedules_keep_their_shape(tmp_path):
    shape = schedule_shape(TrainingArguments(str(tmp_path), lr_scheduler_type="linear"), 10)
    assert [shape(step) for step in range(0, 11, 5)] == [1.0, 0.5, 0.0]
