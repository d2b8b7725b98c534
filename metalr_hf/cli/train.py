"""`metalr-hf train`: one run, from its arguments to the files that it leaves."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_NAME

from ..data.loading import DataArguments
from ..data.splits import hold_out
from ..data.transforms import model_input
from ..hub.card import tested_on
from ..hub.publish import BESIDE_THE_MODEL, RESULTS
from ..models.volume_processor import VolumeImageProcessor
from ..trainer.batches import UnusableRowError
from ..trainer.checkpoints import checkpoints, is_complete, step_of, usable_checkpoint
from ..trainer.metalr import MetaLRTrainer
from . import INTERRUPTED, say
from .arguments import TrainArguments, parse_train_arguments
from .broken_images import name_broken_image
from .checks import check_best_metric, check_training_arguments, refuse_empty_epochs, trainer_arguments
from .resuming import RECORD, check_same_splits, splits_of, write_splits

VALIDATION_SHARE = 0.2
# Whether a loss still falls shows on few images, and those held back are missed until the run has converged.
IMAGES_TO_STOP_BY, SMALLEST_SHARE_TO_STOP_BY = 50, 0.1
RUN_FILES = (SAFE_WEIGHTS_NAME, CONFIG_NAME, IMAGE_PROCESSOR_NAME, *BESIDE_THE_MODEL, TRAINER_STATE_NAME, RECORD)


def main(argv: list[str]) -> int:
    """`metalr-hf train`: fine-tunes, measures the test split and leaves the run's files in `output_dir`.

    Args:
        argv (`list[str]`): The arguments, or a JSON or YAML file with them, which further arguments override.

    Returns:
        `int`: the exit code.
    """
    arguments = parse_train_arguments(argv)
    check_training_arguments(arguments.training)
    checkpoint = check_output_dir(arguments)
    folder = str(arguments.training.output_dir)
    # With --overwrite_output_dir that of the earlier run is there until this one begins to train.
    earlier = None if checkpoint else _last_checkpoint(folder)
    try:
        run_training(arguments, checkpoint)
    except KeyboardInterrupt:
        last = _last_checkpoint(folder)
        if last is None or last == earlier:
            say("Interrupted before the first checkpoint; --save_strategy and --save_steps say when there is one.")
        else:
            command = shlex.join(["metalr-hf", "train", *_to_resume(argv), "--resume_from_checkpoint", "true"])
            say(f"Interrupted. The last checkpoint is {last[0]}. Resume with:\n{command}")
        return INTERRUPTED
    return 0


def check_output_dir(arguments: TrainArguments) -> str | None:
    """Makes sure that a run may have its folder, or finds the checkpoint that it goes on from.

    Args:
        arguments ([`TrainArguments`]): The run's arguments.

    Returns:
        `str`, *optional*: the checkpoint to resume from.

    Raises:
        FileExistsError: if the folder holds another run, which may not be deleted.
        FileNotFoundError: if there is no checkpoint to resume from.
        ValueError: if a run is given in place of a checkpoint.
    """
    folder, resume = str(arguments.training.output_dir), arguments.training.resume_from_checkpoint
    wanted = str(resume).lower() if resume is not None else "false"
    if wanted == "true":
        checkpoint = usable_checkpoint(folder)
        if checkpoint is None:
            raise FileNotFoundError(
                f"resume_from_checkpoint: there is no complete checkpoint in output_dir={folder!r}. Leave out "
                "--resume_from_checkpoint to start from the beginning."
            )
        return checkpoint
    if wanted != "false":
        last = usable_checkpoint(str(resume))
        if last is not None or (Path(str(resume)) / RESULTS).is_file():
            there = "it holds no checkpoint" if last is None else f"its last checkpoint is {last}"
            raise ValueError(f"resume_from_checkpoint={resume!r} is the folder of a run, not a checkpoint: {there}.")
        if not is_complete(Path(str(resume))):
            raise FileNotFoundError(f"resume_from_checkpoint={resume!r} is not the folder of a complete checkpoint.")
        return str(resume)
    left = _left_by_a_run(Path(folder))
    if left and not arguments.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir={folder!r} holds another run ({', '.join(path.name for path in left[:3])}). Give another "
            "folder with --output_dir, go on with that run with --resume_from_checkpoint true, or delete its files "
            "with --overwrite_output_dir."
        )
    return None


def _left_by_a_run(folder: Path) -> list[Path]:
    files = [folder / name for name in (*RUN_FILES, TRAINING_ARGS_NAME)]
    left = [path for path in files if path.exists()] + checkpoints(folder)
    # That is written first. A run that was interrupted before its first checkpoint has left nothing to go on from.
    return [] if left == [folder / RECORD] else left


def _delete_earlier_run(arguments: TrainArguments) -> None:
    with arguments.training.main_process_first(desc="deleting an earlier run"):
        for path in _left_by_a_run(Path(str(arguments.training.output_dir))):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _last_checkpoint(folder: str) -> tuple[str, int] | None:
    last = usable_checkpoint(folder)
    # Another run's may have the same name.
    return None if last is None else (last, os.stat(last).st_mtime_ns)


def run_training(arguments: TrainArguments, checkpoint: str | None = None) -> dict[str, float]:
    """Trains, measures the test split once, writes the run's files and shows what came out.

    With `overwrite_output_dir`, an earlier run is deleted when this one begins to train.

    Args:
        arguments ([`TrainArguments`]): The run's arguments.
        checkpoint (`str`, *optional*): Checkpoint to resume from.

    Returns:
        `dict[str, float]`: what `all_results.json` holds: `test_accuracy` and so on.

    Raises:
        ValueError: if an image cannot be read. It names the split, the row and the file. Of a test image, the run's
            files are written before, without test results.
    """
    training, data, task = arguments.training, arguments.data, arguments.task
    evaluates = training.eval_strategy != IntervalStrategy.NO or training.stop_when_converged
    splits, record = _load_splits(arguments, evaluates)
    if checkpoint is not None:
        check_same_splits(checkpoint, record)
    set_seed(training.seed)
    model_arguments = task.model_arguments(arguments.model, splits)
    model = task.load_model(model_arguments, splits.id2label, data.image_size, data.num_channels)
    processor = task.load_processor(model_arguments, model, data.image_size)
    prepared = task.prepare(splits, processor, data.augment, seed=training.seed)
    for name, value in task.training_arguments.items():
        setattr(training, name, value)
    of_task = trainer_arguments(task, splits.class_names, data)
    check_best_metric(training, of_task, data)
    of_task |= task.fit(model, splits.train, processor, data)
    if training.label_smoothing_factor and "compute_loss_func" in of_task:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor}: the loss that class_weights or this task asks "
            "for does not smooth labels. Leave one of them out."
        )
    trainer = MetaLRTrainer(
        model=model,
        args=training,
        train_dataset=prepared.train,
        eval_dataset=prepared.validation if evaluates else None,
        meta_dataset=prepared.meta,
        held_back=prepared.held_back,
        processing_class=processor,
        **of_task,
    )
    refuse_empty_epochs(trainer.train_dataset, training)
    trainer.task = task
    trainer.test_split = _test_split(splits, data)
    trainer.preparation = _preparation(data, processor)
    trainer.dataset_name = task.demo_description if data.is_demo else data.hub_id
    if arguments.overwrite_output_dir and checkpoint is None:
        # Not earlier: a run that cannot begin costs no other.
        _delete_earlier_run(arguments)
    if trainer.is_world_process_zero():
        write_splits(str(training.output_dir), record)
    try:
        results = _train_and_test(trainer, prepared.test, checkpoint)
    except (OSError, UnusableRowError) as error:
        others = {name: rows for name in ("validation", "meta") if (rows := getattr(splits, name)) is not None}
        name_broken_image(error, {"training": splits.train, "test": splits.test, **others})
        raise
    if trainer.is_world_process_zero():
        _show(trainer, results)
    if training.push_to_hub:
        trainer.push_to_hub()
    return results


def _load_splits(arguments: TrainArguments, evaluates: bool) -> tuple[Any, dict[str, Any]]:
    """The images, with the shares that are held out of those to train on, and the record of how they were split."""
    training, data = arguments.training, arguments.data
    with training.main_process_first(desc="loading the images"):
        splits = arguments.task.load_splits(data, seed=training.seed)
    if evaluates and splits.validation is None:
        share = data.validation_share or _validation_share(splits.train, training.stop_when_converged)
        splits = hold_out(splits, "validation", "validation_share", share, training.seed, data.group_column)
        # A split of its own is never trained on.
        if training.stop_when_converged:
            splits = replace(splits, held_back=splits.validation)
    record = splits_of(arguments, splits, training.meta_split)
    if training.meta_split and data.group_column:
        splits = hold_out(splits, "meta", "meta_split", training.meta_split, training.seed, data.group_column)
        # They are held out now. The trainer, which knows no groups, need not do it.
        training.meta_split = 0.0
    return splits, record


def _train_and_test(trainer: MetaLRTrainer, test: Any, checkpoint: str | None) -> dict[str, float]:
    """Trains, measures the test split and writes the files of the run."""
    trained = trainer.train(resume_from_checkpoint=checkpoint)
    results = trained.metrics
    if checkpoint is not None and step_of(checkpoint) == trained.global_step:
        # It had ended: what training gave is known from then.
        file = Path(checkpoint).parent / RESULTS
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # It is pushed when it has been tested.
    trainer.save_model(_internal_call=True)
    try:
        results |= trainer.evaluate(test, metric_key_prefix="test")
    finally:
        # If the test fails, the files of the trained model are still written.
        trainer.save_metrics("all", results, combined=False)
        trainer.save_state()
        trainer.create_model_card()
    return results


def _validation_share(train: Any, stops_by_itself: bool) -> float:
    # Streams, which have no length, are refused where it is taken.
    if not (stops_by_itself and hasattr(train, "__len__")):
        return VALIDATION_SHARE
    return min(max(IMAGES_TO_STOP_BY / len(train), SMALLEST_SHARE_TO_STOP_BY), VALIDATION_SHARE)


def _preparation(data: DataArguments, processor: Any) -> dict[str, object]:
    """How images became inputs of the model, for its card."""
    facts: dict[str, object] = {}
    # Of volumes, patches are cut, and their voxels have a size.
    if not isinstance(processor, VolumeImageProcessor):
        height, width = model_input(processor).shape[-2:]
        facts["image size"] = f"{height} × {width} pixels"
    facts["augmentation"] = data.augment
    if data.group_column:
        facts["groups"] = f"images with the same {data.group_column!r} are in the same split"
    return facts


def _test_split(splits: Any, data: Any) -> str | None:
    """The split that is tested on; `None` for a share held out of the training split."""
    # Rows that `datasets` has read from files know their split.
    name = data.test_split or getattr(splits.test, "split", None)
    return None if data.test_split is None and str(name) == data.train_split else str(name or "test")


def _show(trainer: MetaLRTrainer, results: dict[str, float]) -> None:
    console = Console()
    table = Table(title=f"On {tested_on(trainer.test_split)}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if name.startswith("test_") and not name.endswith(("_runtime", "_per_second")):
            table.add_row(name.removeprefix("test_"), f"{value:.4f}")
    console.print(table)
    table = Table(title="Learning rates")
    for title in ("layer", "start", "final"):
        table.add_column(title, justify="left" if title == "layer" else "right")
    scheduler: Any = trainer.lr_scheduler
    rates = zip(
        scheduler.layers, scheduler.start_learning_rates.tolist(), scheduler.learning_rates.tolist(), strict=True
    )
    for layer, start, final in rates:
        table.add_row(layer, f"{start:.1e}", f"{final:.1e}")
    console.print(table)
    if scheduler.calibration is not None:
        console.print(
            "The start rates were calibrated along the first steps; learning_rate made no difference to them."
        )
    if scheduler.calibration is not None and scheduler.calibration.doubts:
        console.print(f"They are in doubt: {'; '.join(scheduler.calibration.doubts)}.")
    if trainer.fresh_head.images:
        console.print(f"After the third step the head was fitted to {trainer.fresh_head.images} training images.")
    schedule = SchedulerType(trainer.args.lr_scheduler_type).value
    if not trainer.args.warmup_steps:
        schedule = schedule.removesuffix("_with_warmup")
    if schedule != "constant":
        console.print(f"The {schedule} schedule multiplies these rates.")
    if trainer.average_weights is not None:
        console.print("The model holds an average of its weights over the last part of the run.")
    if last := trainer.last_features.images:
        console.print(f"A third of its head is a ridge regression on the features of the last {last} images.")
    if scheduler.guard.non_finite:
        console.print(
            f"Steps not tuned, because a validation loss or hypergradient was not finite: {scheduler.guard.non_finite}"
        )
    if scheduler.guard.refused:
        console.print(f"Harmful steps taken back: {scheduler.guard.refused}")
    if trainer.stopped_because is not None:
        console.print(trainer.stopped_because)
    console.print(f"The model, its learning rates and its results are in {trainer.args.output_dir}", soft_wrap=True)


def _to_resume(argv: Sequence[str]) -> list[str]:
    """The arguments that resume a run: without tokens, which must not be displayed, and without how the run started."""
    kept: list[str] = []
    dropping = False
    for part in argv:
        if part.startswith("--"):
            name = part.split("=")[0].replace("-", "_")
            dropping = name.endswith("_token") or name in ("__resume_from_checkpoint", "__overwrite_output_dir")
        if not dropping:
            kept.append(part)
    return kept
