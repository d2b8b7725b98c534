"""The arguments of a training run: from the command line, a JSON or YAML file, or both."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..data.files.layout import folder_of
from ..data.loading import DataArguments
from ..messages import did_you_mean
from ..models.loading import ModelArguments
from ..settings import check_seed
from ..tasks import TASKS, Task, get_task
from ..trainer.arguments import PRESETS, MetaLRTrainingArguments
from ..trainer.stopping import SETS_ITSELF


@dataclass
class TaskArguments:
    """What the model is to learn.

    Args:
        task (`str`, *optional*, defaults to `"classification"`):
            Name of a task; see [`~metalr_hf.tasks.registry.register_task`]. Some tasks have further arguments, which
            `metalr-hf train --task NAME --help` lists.
    """

    task: str = field(
        default="classification",
        metadata={
            "help": f"What the model is to learn: {', '.join(f'`{name}`' for name in TASKS)}, or a task of your own. "
            "`--task segmentation --help` lists the further arguments of that task."
        },
    )


@dataclass
class _TaskAndData(TaskArguments):
    """Where the data are, by the names that the commands have for it: on them a task may depend."""

    dataset_name: str | None = None
    data_dir: str | None = None
    dataset: list[str] = field(default_factory=list)


@dataclass
class OutputArguments:
    """What becomes of an earlier run.

    Args:
        overwrite_output_dir (`bool`, *optional*, defaults to `False`): Whether its files may be deleted.
    """

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the files of an earlier run in output_dir."}
    )


@dataclass(frozen=True)
class TrainArguments:
    """All arguments of `metalr-hf train`.

    Args:
        task ([`~metalr_hf.tasks.base.Task`]): What the model is to learn.
        model ([`~metalr_hf.models.loading.ModelArguments`]): Which model.
        data ([`~metalr_hf.data.loading.DataArguments`]): Which images.
        training ([`MetaLRTrainingArguments`]): How to train.
        overwrite_output_dir (`bool`): Whether the files of an earlier run may be deleted.
    """

    task: Task
    model: ModelArguments
    data: DataArguments
    training: MetaLRTrainingArguments
    overwrite_output_dir: bool = False


# Names of other commands and other libraries for the same.
SYNONYMS = {
    "lr": ("learning_rate", "learning_rates"),
    "learning_rate": ("learning_rates",),
    "batch_size": ("per_device_train_batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "epochs": ("num_train_epochs",),
    "num_epochs": ("num_train_epochs",),
    "steps": ("max_steps",),
    "max_steps": ("steps",),
    "model": ("model_name_or_path",),
    "model_name_or_path": ("model",),
    "dataset": ("dataset_name",),
    "dataset_name": ("dataset",),
    "data": ("data_dir", "dataset"),
    "data_dir": ("dataset",),
    "output": ("output_dir",),
    "seed": ("seeds",),
    "resume": ("resume_from_checkpoint",),
}


# What arguments of Trainer mean here, where that is not what its own help says.
MEANT_HERE = {
    "learning_rate": "The start learning rate of every layer where `calibrate` is off. While the start rates are "
    "calibrated, which is the default, it has no effect.",
    "warmup_steps": "Steps, or below 1 a share of them, over which all rates rise linearly from 0.",
    "resume_from_checkpoint": "`true` to go on from the last checkpoint in output_dir, or the folder of a checkpoint.",
}


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line: argparse would print its usage first, up to 200 arguments."""

    def __init__(self, dataclass_types: Any = (), **kwargs: Any):
        super().__init__(dataclass_types, **kwargs)
        # Trainer's hundred arguments come last in the help, and say what they mean here.
        inherited = {f.name for f in fields(TrainingArguments)}
        self._optionals._group_actions.sort(key=lambda action: action.dest in inherited)
        for action in self._optionals._group_actions:
            action.help = MEANT_HERE.get(action.dest, action.help) if action.dest in inherited else action.help

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (`{self.prog} --help` lists the arguments)")

    def names(self) -> list[str]:
        """All arguments of the dataclasses."""
        return [f.name for kind in self.dataclass_types for f in fields(kind) if f.init]

    def refuse(self, name: str, what: str = "argument") -> NoReturn:
        """Raises `ValueError` for something that is no argument.

        Args:
            name (`str`): What was given.
            what (`str`, *optional*, defaults to `"argument"`): What it ought to be.
        """
        name = name.lstrip("-").split("=")[0]
        known = self.names()
        if "task" in known and (owners := _tasks_with(name)):
            raise ValueError(f"{name!r} is no {what} of this task. It belongs to --task {' or '.join(owners)}.")
        meant = [other for other in SYNONYMS.get(name, ()) if other in known]
        otherwise = f"`{self.prog} --help` lists them all."
        hint = f" Did you mean {meant[0]!r}?" if meant else did_you_mean(name, known, otherwise)
        raise ValueError(f"{name!r} is no {what}.{hint}")

    def read_file(self, file: str) -> dict[str, Any]:
        """Reads a file of arguments, as [`read_arguments_file`], and raises `ValueError` if one is unknown.

        Args:
            file (`str`): A JSON or YAML file.

        Returns:
            `dict[str, Any]`: argument to value.
        """
        values, known = read_arguments_file(file), self.names()
        lists = {action.dest for action in self._actions if action.nargs == "+"}
        for name, value in values.items():
            if name not in known:
                self.refuse(name, f"argument in {file!r}")
            # On the command line, one value is a list of one.
            if name in lists and isinstance(value, (str, int, float)):
                values[name] = [value]
        return values

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Reads all dataclasses.

        Args:
            argv (`Sequence[str]`): The arguments.

        Returns:
            `tuple`: one of each dataclass.

        Raises:
            ValueError: if an argument is unknown or its value is none it can have.
        """
        *parsed, rest = self.parse_args_into_dataclasses(
            list(argv), look_for_args_file=False, return_remaining_strings=True
        )
        if rest:
            self.refuse(rest[0])
        return tuple(parsed)


def _tasks_with(argument: str) -> list[str]:
    """The tasks that have an argument of the data set which not all have."""
    common = {f.name for f in fields(DataArguments)}
    return [name for name, task in TASKS.items() if argument in {f.name for f in fields(task.data_arguments)} - common]


def parse_train_arguments(argv: list[str]) -> TrainArguments:
    """Reads the arguments of `metalr-hf train`.

    Args:
        argv (`list[str]`):
            Arguments, or a JSON or YAML file with them, possibly followed by arguments that override it.

    Returns:
        [`TrainArguments`]: with the demo's settings where neither a model nor a data set is named.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if an argument is unknown or its value is none it can have.

    Example:

    ```python
    >>> from metalr_hf.cli.arguments import parse_train_arguments
    >>> arguments = parse_train_arguments(["--output_dir", "runs/demo", "--hyper_lr", "0.05"])
    >>> arguments.training.hyper_lr
    0.05

    ```
    """
    task = named_task(argv)
    kinds: Any = (TaskArguments, ModelArguments, task.data_arguments, MetaLRTrainingArguments, OutputArguments)
    parser = CommandParser(
        kinds,
        prog="metalr-hf train",
        usage="%(prog)s [FILE] --output_dir FOLDER [--ARGUMENT VALUE ...]",
        description="Fine-tunes an image classifier or a segmentation network. Instead of arguments, or before them, a "
        "JSON or YAML file may be given: metalr-hf train run.yaml --seed 1",
        allow_abbrev=False,
    )
    from_file: dict[str, Any] = {}
    if argv and not argv[0].startswith("-"):
        file, *argv = argv
        from_file = parser.read_file(file)
    parser.set_defaults(**task.default_arguments)
    # Pinning memory without an accelerator only warns.
    parser.set_defaults(remove_unused_columns=False, dataloader_pin_memory=torch.accelerator.is_available())
    parser.set_defaults(**from_file)
    given, rest = parser.parse_known_args(argv)
    if rest:
        parser.refuse(rest[0])
    if given.output_dir is None:
        raise ValueError("output_dir is missing: name the folder for the model and its files with --output_dir.")
    if given.dataset_name is None and given.data_dir is None:
        parser.set_defaults(augment=task.demo_augment)
        if given.model_name_or_path is None:
            others = {*PRESETS.get(given.preset, {}), *(SETS_ITSELF if given.stop_when_converged else ())}
            parser.set_defaults(**{name: value for name, value in task.demo_arguments.items() if name not in others})
    elif given.model_name_or_path is None:
        # What EfficientNet-Lite0 was pretrained on; the digits need less.
        parser.set_defaults(image_size=task.default_image_size)
    parser.set_defaults(**from_file)
    try:
        _, model, data, training, output = parser.parse(argv)
    except (ValueError, TypeError) as error:
        raise ValueError(str(error)) from error
    check_seed("seed", training.seed)
    if data.streaming and training.max_steps <= 0:
        raise ValueError("A stream does not say how long it is: set how many steps to train with --max_steps.")
    # The columns of images are needed until they are prepared, which happens when they are read.
    training.remove_unused_columns = False
    return TrainArguments(task, model, data, training, output.overwrite_output_dir)


def named_task(argv: Sequence[str]) -> Task:
    """The task that arguments name, which has to be known before they can be read: it has arguments of its own.

    Args:
        argv (`Sequence[str]`): Arguments, or a JSON or YAML file with them and further arguments.

    Returns:
        [`~metalr_hf.tasks.base.Task`]

    Raises:
        ValueError: if there is no such task.
    """
    kind: Any = _TaskAndData
    parser = CommandParser(kind, add_help=False, allow_abbrev=False)
    if argv and not argv[0].startswith("-") and os.path.isfile(argv[0]):
        from_file = read_arguments_file(argv[0])
        parser.set_defaults(**{name: from_file[name] for name in parser.names() if name in from_file})
    given = parser.parse_known_args(list(argv))[0]
    names = [given.dataset_name, *([given.dataset] if isinstance(given.dataset, str) else given.dataset)]
    task = get_task(given.task)
    folders = [folder_of(name, given.data_dir) for name in names]
    return next((other for folder in folders if (other := task.for_data(folder)) is not task), task)


def read_arguments_file(file: str) -> dict[str, Any]:
    """Reads a file of arguments.

    Args:
        file (`str`): A JSON or YAML file with arguments and their values.

    Returns:
        `dict[str, Any]`: argument to value.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it holds something else.
    """
    if not os.path.isfile(file):
        raise FileNotFoundError(
            f"{file!r} does not exist. The first argument is a JSON or YAML file or an argument that starts with --."
        )
    text = Path(file).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if file.endswith(".json") else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file!r} is not valid JSON or YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file!r} must hold arguments and their values, not a {type(values).__name__}.")
    # YAML reads a bare `no` as false.
    return {str(k): "no" if str(k).endswith("_strategy") and v is False else v for k, v in values.items()}
