"""`metalr-hf predict`: what a trained model says of images, as a table."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoConfig

from ..models.loading import ModelArguments, naming_the_model
from ..tasks import TASKS, get_task
from ..tasks.prediction import PredictionTable, fingerprint, masks_folder, names_of, predict
from ..tasks.registry import task_of
from . import INTERRUPTED, say

BATCH_SIZE = 32
NOTHING_READ = 1


def main(argv: list[str]) -> int:
    """`metalr-hf predict`: writes a table with a row an image, and masks beside it.

    Args:
        argv (`list[str]`): The arguments.

    Returns:
        `int`: the exit code.
    """
    given = _parser().parse_args(argv)
    for name in ("batch_size", "num_workers"):
        value, least = getattr(given, name), int(name == "batch_size")
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be {least} or more.")
    output = Path(given.output)
    if output.suffix != ".csv":
        raise ValueError(f"output={given.output!r} is the table to write: give it a name that ends in .csv.")
    with naming_the_model(given.run, "model", argument="run"):
        config = AutoConfig.from_pretrained(given.run, trust_remote_code=given.trust_remote_code)
    task = get_task(given.task) if given.task else task_of(config)
    masks = str(masks_folder(output))
    images = task.list_images(given.images, config, given.split, given.image_column_name, leave_out=masks)
    model, processor = task.load_trained(ModelArguments(given.run, given.trust_remote_code))
    if torch.accelerator.is_available() and not given.use_cpu:
        network: Any = model
        network.to(torch.accelerator.current_accelerator())
    # The folder's name alone: the path to it is nobody else's business.
    shown = f"{Path(given.run).absolute().name}@{fingerprint(model)}"
    table = PredictionTable(output, task.answer_columns(names_of(model)), shown, given.overwrite)
    # Where a task is evaluated with batches of a size of its own, that is what its inputs can be stacked to.
    batch_size = given.batch_size or task.training_arguments.get("per_device_eval_batch_size", BATCH_SIZE)
    options = {"batch_size": batch_size, "num_workers": given.num_workers}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    try:
        with Progress(*columns, console=console) as bar:
            images_bar = bar.add_task("images", total=len(images.names))
            report = partial(bar.advance, images_bar)
            numbers = table.to_do(images, report)
            if kept := len(images.names) - len(numbers):
                console.print(f"{kept} of the {len(images.names)} images were in the table already.", soft_wrap=True)
            if table.replaced:
                console.print(f"Rows replaced, as their images have changed since: {table.replaced}.", soft_wrap=True)
            broken, doubtful = predict(task, model, processor, images, numbers, table, **options, report=report)
    except KeyboardInterrupt:
        say(f"Interrupted. What is done is in {output}; the same command does the rest.")
        return INTERRUPTED
    if doubtful:
        say(f"The answers to {doubtful} of the images may mislead: the column 'warning' says why.")
    if broken:
        say(f"{broken} of the images could not be read: the column 'error' says why. A second run tries them again.")
        if broken == len(images.names):
            return NOTHING_READ
    console.print(f"The predictions are in {output}", soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metalr-hf predict",
        description="Writes a table of what a trained model says of images: probabilities, numbers in their units, or "
        "masks. Masks are files in the folder <name of the table>_masks: those of NIfTI files .nii.gz in the geometry "
        "of their source, all others PNG. Their values are the class numbers, and the table has the share of every "
        "class, or of volumes its voxels and its volume in ml. Files that end in _0000, _0001 ... are channels of one "
        "volume where the model takes as many. Started again with the same table, it goes on where it stopped; the "
        "column content tells whether an image is still the same, and the row of one that is not is replaced. The "
        "column warning names images that are unlike those of the training: with 8 bits where these had more, or all "
        "of one colour.",
        allow_abbrev=False,
    )
    parser.add_argument("run", help="output folder of a run, or Hub id of a model")
    parser.add_argument(
        "images",
        nargs="+",
        help="image files and folders (DICOM, NIfTI and volumes too), or one data set: a Hub id or parquet files",
    )
    parser.add_argument("--output", required=True, help="the table, a CSV file")
    parser.add_argument("--overwrite", action="store_true", help="start again, whatever the table holds")
    parser.add_argument("--batch_size", type=int, help=f"images at a time (default: {BATCH_SIZE}, volumes: 1)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that read the files (default: none)")
    parser.add_argument("--split", help="split of the data set (default: all)")
    parser.add_argument("--image_column_name", help="column of the images (default: the only one)")
    parser.add_argument("--task", help=f"what the model was trained for, if it does not tell: {', '.join(TASKS)}")
    parser.add_argument("--use_cpu", action="store_true", help="do not use an accelerator")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that the model brings along")
    return parser
