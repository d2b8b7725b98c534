import copy
import dataclasses
import inspect
import math
import pickle
import re

import pytest
from small_runs import images, trainer
from transformers import HfArgumentParser, TrainingArguments

from metalr_hf import MetaLRTrainingArguments
from metalr_hf.trainer.defaults import lr_change_of, meta_every_of, meta_source_of
from metalr_hf.trainer.schedules import schedule_shape

STOCK = {f.name for f in dataclasses.fields(TrainingArguments)}
ADDED = [f for f in dataclasses.fields(MetaLRTrainingArguments) if f.name not in STOCK]


def same_text(text):
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("argument", ADDED, ids=lambda argument: argument.name)
def test_help_and_docstring_say_the_same(argument):
    document = inspect.getdoc(MetaLRTrainingArguments)
    described = re.search(rf"^    {argument.name} \([^\n]*\):\n((?:        [^\n]*\n)+)", document, re.MULTILINE)
    assert described, f"{argument.name} is not in the docstring"
    assert same_text(described[1]) == same_text(argument.metadata["help"])
    default = re.search(rf"^    {argument.name} \(.*defaults to `?([^`)]*)`?\)", document, re.MULTILINE)
    written = default[1].strip('"') if default else "None"
    assert (float(written) if isinstance(argument.default, float) else written) in (
        argument.default,
        str(argument.default),
    )


def test_the_command_line_parses_what_tuning_adds(tmp_path):
    parser = HfArgumentParser(MetaLRTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--hyper_lr", "0.2", "--max_lr_change", "inf", "--meta_split", "0.1"]
    )
    assert (args.hyper_lr, args.max_lr_change, args.meta_split) == (0.2, float("inf"), 0.1)


def test_the_trust_region_follows_from_the_calibration(tmp_path):
    def max_lr_change(**kwargs):
        return lr_change_of(MetaLRTrainingArguments(str(tmp_path), **kwargs))

    assert max_lr_change() == 1.1
    assert max_lr_change(calibrate=False) == 2.0
    assert max_lr_change(max_lr_change=1.5) == 1.5
    assert max_lr_change(preset="paper") == math.inf


def test_how_often_to_tune_follows_from_the_source(tmp_path):
    def meta_every(source, **kwargs):
        return meta_every_of(MetaLRTrainingArguments(str(tmp_path), **kwargs), source)

    assert (meta_every("next_batch"), meta_every("stream")) == (1, 2)
    assert meta_every("stream", preset="paper") == meta_every("stream", meta_every=1) == 1
    assert meta_every("next_batch", meta_every=5) == 5


def test_the_source_follows_from_what_is_there(tmp_path):
    def source(has_meta_dataset=False, **kwargs):
        return meta_source_of(MetaLRTrainingArguments(str(tmp_path), **kwargs), has_meta_dataset)

    assert source() == "next_batch"
    assert source(has_meta_dataset=True) == source(meta_split=0.1) == source(meta_source="stream") == "stream"
    assert source(lookahead="sgd") == source(preset="paper") == "stream"
    with pytest.raises(ValueError, match="would leave meta_dataset unused"):
        source(has_meta_dataset=True, meta_source="next_batch")


@pytest.mark.parametrize("name", ["calibrate", "fit_head", "stop_when_converged"])
def test_a_text_is_neither_true_nor_false(tmp_path, name):
    with pytest.raises(TypeError, match=f"{name}='no' must be True, False or None, not str"):
        MetaLRTrainingArguments(str(tmp_path), **{name: "no"})


@pytest.mark.parametrize("options", [{}, {"stop_when_converged": True}])
def test_the_best_of_errors_is_the_lowest(tmp_path, options):
    for name, highest in (("eval_mae", False), ("rmse_age", False), ("hausdorff95", False), ("r2", True)):
        args = MetaLRTrainingArguments(str(tmp_path), metric_for_best_model=name, **options)
        assert args.greater_is_better is highest
    assert MetaLRTrainingArguments(str(tmp_path), metric_for_best_model="mae", greater_is_better=True).greater_is_better


def test_a_schedule_chosen_afterwards_takes_the_place_of_the_average(tmp_path):
    def average(**kwargs):
        args = MetaLRTrainingArguments(str(tmp_path), **kwargs).set_lr_scheduler("cosine", num_epochs=5)
        assert (args.lr_scheduler_type.value, args.num_train_epochs) == ("cosine", 5)
        return args.average_weights

    assert average() is None
    args = MetaLRTrainingArguments(str(tmp_path))
    args.lr_scheduler_type = "cosine"
    assert args.average_weights is None
    assert average(average_weights="polynomial") == average(stop_when_converged=True) == "polynomial"


def test_a_warmup_chosen_afterwards_takes_place(tmp_path):
    def shape(args):
        return [schedule_shape(args, 100)(step) for step in (0, 5, 10, 100)]

    for given in ({}, {"average_weights": "0.9"}, {"stop_when_converged": True}):
        args = MetaLRTrainingArguments(str(tmp_path), **given)
        assert shape(args) == [1.0, 1.0, 1.0, 1.0]
        # As a search sets it, from trial to trial.
        args.warmup_steps = 10
        assert shape(args) == shape(MetaLRTrainingArguments(str(tmp_path), warmup_steps=10, **given))
        assert shape(args) == [0.0, 0.5, 1.0, 1.0]
        assert args.average_weights == given.get("average_weights", "polynomial")
        args.warmup_steps = 0
        assert shape(args) == [1.0, 1.0, 1.0, 1.0]
        assert shape(dataclasses.replace(args, warmup_steps=10)) == [0.0, 0.5, 1.0, 1.0]
    # One that was chosen is left as it is, which has no warm-up in the stock Trainer either.
    args = MetaLRTrainingArguments(str(tmp_path), lr_scheduler_type="constant")
    args.warmup_steps = 10
    assert shape(args) == [1.0, 1.0, 1.0, 1.0]


def test_a_copy_has_what_was_chosen_and_the_defaults_that_follow_from_it(tmp_path):
    def chosen(args):
        return args.lr_scheduler_type.value, args.average_weights

    def handed_on(args):
        # As a worker process gets them.
        return pickle.loads(pickle.dumps(args))

    def replaced(given=None, **changes):
        args = MetaLRTrainingArguments(str(tmp_path), **given or {})
        assert chosen(dataclasses.replace(args)) == chosen(MetaLRTrainingArguments(**args.to_dict())) == chosen(args)
        # A copy of a copy too.
        return chosen(dataclasses.replace(dataclasses.replace(handed_on(copy.deepcopy(args)), seed=1), **changes))

    for changes in (
        {"lr_scheduler_type": "cosine"},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine", "average_weights": "polynomial"},
        {"lr_scheduler_kwargs": {"decay_type": "cosine"}},
        {"average_weights": "0.9"},
        {"preset": "paper"},
        {"warmup_steps": 10},
    ):
        assert replaced(**changes) == chosen(MetaLRTrainingArguments(str(tmp_path), **changes)), changes
    for given in ("polynomial", "0.9"):
        assert replaced({"average_weights": given}, lr_scheduler_type="cosine") == ("cosine", given)
    assert replaced({"stop_when_converged": True}, lr_scheduler_type="inverse_sqrt") == ("inverse_sqrt", "polynomial")
    args = dataclasses.replace(MetaLRTrainingArguments(str(tmp_path)), seed=1)
    args.lr_scheduler_type = "cosine"
    assert args.average_weights is None


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (48, {"per_device_train_batch_size": 32, "dataloader_drop_last": True}),
        (48, {"per_device_train_batch_size": 32}),
        (40, {"gradient_accumulation_steps": 2, "dataloader_drop_last": True}),
        (44, {"gradient_accumulation_steps": 2, "dataloader_drop_last": True}),
        (44, {"gradient_accumulation_steps": 2}),
    ],
)
def test_the_head_is_held_for_as_many_steps_as_its_epochs_have(tmp_path, rows, options):
    two_epochs = {"head_hold_epochs": 2.0, "num_train_epochs": 2, "max_steps": -1}
    run = trainer(tmp_path, train_dataset=images(rows), **two_epochs, **options)
    run.train()
    assert run.lr_scheduler.hold_steps == {"head": run.state.global_step}
