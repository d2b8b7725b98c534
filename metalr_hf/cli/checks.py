"""What of a run's arguments can be refused before it trains, where a library would fail later or with a traceback."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.training_args import OptimizerNames

from ..data.loading import DataArguments
from ..messages import did_you_mean, first_line
from ..settings import check_count
from ..tasks import Task, metrics
from ..trainer.arguments import MetaLRTrainingArguments
from ..trainer.stopping import REFINED_LOSS

# What the model card says of each class, whichever metrics are asked for.
IN_THE_CARD = ("precision", "recall", "sensitivity", "f1")
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")


def check_training_arguments(training: MetaLRTrainingArguments) -> None:
    """Raises if a run cannot have its batches, its folder, its optimizer or its trackers.

    Args:
        training ([`MetaLRTrainingArguments`]): How to train.

    Raises:
        ValueError: if a count is below 1, or there is no such tracker.
        OSError: if the output folder cannot be made.
        ImportError: if the package of the optimizer or of a tracker is not installed.
    """
    for name in COUNTS:
        check_count(name, getattr(training, name))
    if training.max_steps == 0 or (training.max_steps < 0 and training.num_train_epochs == 0):
        name = "max_steps" if training.max_steps == 0 else "num_train_epochs"
        raise ValueError(f"{name}={getattr(training, name)!r} trains nothing. Give at least one step, or leave it out.")
    if training.learning_rate is not None and not training.learning_rate >= 0:
        raise ValueError(
            f"learning_rate={training.learning_rate!r} must be 0 or more. It has no effect while the start rates are "
            "calibrated: leave it out."
        )
    folder = Path(str(training.output_dir)).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise NotADirectoryError(f"output_dir={str(training.output_dir)!r} cannot be made: {there} is no folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"output_dir={str(training.output_dir)!r} cannot be written: no permission in {there}.")
    try:
        Trainer.get_optimizer_cls_and_kwargs(training)
    except (ImportError, ValueError) as error:
        # Others are made for the parameters of a model, and there is none yet.
        if "install" in str(error):
            name = OptimizerNames(training.optim).value
            raise ImportError(f"optim={name!r} needs a package more: {first_line(error)}") from error
    for name in training.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            hint = did_you_mean(name, INTEGRATION_TO_CALLBACK, f"There are: {', '.join(INTEGRATION_TO_CALLBACK)}.")
            raise ValueError(f"report_to={name!r} is no tracker that transformers knows.{hint}")
        # Of Flyte transformers finds out when it is used.
        if name not in (*get_available_reporting_integrations(), "flyte"):
            raise ImportError(f"report_to={name!r}: its package is not installed. Install it, or leave report_to out.")


def trainer_arguments(task: Task, class_names: Sequence[str], data: DataArguments) -> dict[str, Any]:
    """What the Trainer needs for a task.

    Args:
        task ([`~metalr_hf.tasks.base.Task`]): What the model is to learn.
        class_names (`Sequence[str]`): Name of class 0, 1, ...
        data ([`DataArguments`]): Which metrics.

    Returns:
        `dict[str, Any]`: as [`~metalr_hf.tasks.base.Task.trainer_arguments`].

    Raises:
        ValueError: if a metric cannot be loaded.
    """
    try:
        return task.trainer_arguments(class_names, data.metrics)
    except (OSError, ImportError) as error:
        name = next((name for name in data.metrics if name not in metrics.METRICS), None)
        if name is None:
            raise
        hint = did_you_mean(name, task.scores, f"Those that come along: {', '.join(task.scores)}.")
        if name in IN_THE_CARD:
            hint += " The model card of the run has precision, recall (sensitivity) and F1 of each class."
        raise ValueError(f"metrics={name!r} could not be loaded ({first_line(error)}).{hint}") from error


def check_best_metric(training: MetaLRTrainingArguments, of_task: dict[str, Any], data: DataArguments) -> None:
    """Raises `ValueError` if the best weights are to be told by a figure that evaluations will not have.

    Args:
        training ([`MetaLRTrainingArguments`]): How to train.
        of_task (`dict[str, Any]`): What [`trainer_arguments`] gave.
        data ([`DataArguments`]): Which metrics.
    """
    wanted = training.metric_for_best_model
    measured = getattr(of_task.get("compute_metrics"), "__module__", "").startswith(f"{metrics.__name__}.")
    # What a metric of another package calls its figures shows when it has measured.
    if wanted is None or not measured or not {*data.metrics} <= {*metrics.METRICS, *data.default_metrics}:
        return
    name = wanted.removeprefix("eval_")
    known = ["loss", *data.metrics, *([REFINED_LOSS] if training.stop_when_converged else [])]
    # Behind a metric's name there may be that of a class.
    if name not in known and not name.startswith(tuple(f"{metric}_" for metric in data.metrics)):
        hint = did_you_mean(name, known, f"There are: {', '.join(known)}.")
        raise ValueError(f"metric_for_best_model={wanted!r} is not measured; --metrics says what is.{hint}")


def refuse_empty_epochs(rows: Any, training: MetaLRTrainingArguments) -> None:
    """Raises `ValueError` if no batch is left where the last, incomplete one of an epoch is dropped.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): What is trained on.
        training ([`MetaLRTrainingArguments`]): How to train.
    """
    size = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and hasattr(rows, "__len__") and len(rows) < size:
        raise ValueError(
            f"dataloader_drop_last=True leaves nothing to train on: {len(rows)} training images make no batch of "
            f"{size}. Lower per_device_train_batch_size, or leave dataloader_drop_last out."
        )
