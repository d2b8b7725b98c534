"""`metalr-hf compare`: one comparison, from its arguments to the report that it leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..compare.report import write_report
from ..compare.results import FAILED, read_results
from ..compare.runs import Cell, Comparison, compare
from ..compare.workers import check_backend
from ..data.files.layout import folder_of
from ..data.loading import DataArguments
from ..models.loading import ModelArguments
from ..tasks import get_task
from ..trainer.arguments import MetaLRTrainingArguments
from . import INTERRUPTED, say
from .arguments import CommandParser, named_task
from .progress import RunsProgress

DEMO = "demo"


def main(argv: list[str]) -> int:
    """`metalr-hf compare`: runs strategies side by side and leaves results, report and picture in `output_dir`.

    Args:
        argv (`list[str]`): The arguments, or a YAML or JSON file with them, which further arguments override.

    Returns:
        `int`: the exit code, 1 if an error ended every run.
    """
    arguments, *given = parse_compare_arguments(argv)
    try:
        run_comparison(arguments, *given)
    except KeyboardInterrupt:
        say(f"Interrupted. What has run is in {arguments.output_dir}; the same command runs the rest.")
        return INTERRUPTED
    return 1 if all(row["status"] == FAILED for row in read_results(arguments.output_dir)) else 0


@dataclass
class CompareArguments:
    """Arguments of `metalr-hf compare`.

    Args:
        output_dir (`str`): Folder of the comparison. Started again with the same folder, only what is missing runs.
        task (`str`, *optional*, defaults to `"classification"`): What the models are to learn.
        model (`list[str]`, *optional*): Hub ids, local folders or `timm/...`; `demo` is EfficientNet-Lite0.
        dataset (`list[str]`, *optional*): Hub ids or local folders; `demo` are the images that come along.
        strategies (`list[str]`, *optional*): Names of strategies.
        learning_rates (`list[float]`, *optional*): Start learning rates.
        seeds (`list[int]`, *optional*): Seeds.
        steps (`int`, *optional*, defaults to 60): Optimizer steps of a run.
        batch_size (`int`, *optional*, defaults to 32): Images a step.
        train_size (`int`, *optional*): Size of a stratified training subset.
        noise (`float`, *optional*, defaults to 0.0): Share of training labels to flip.
        folds (`int`, *optional*, defaults to 0): Stratified cross-validation over the training split.
        group_column (`str`, *optional*): Rows that share a value of it stay in one fold.
        weight_decay (`float`, *optional*, defaults to 0.01): Of every strategy.
        image_size (`int`, *optional*): Height and width of the model's input in pixels.
        augment (`str`, *optional*, defaults to `"none"`): Augmentation of the training images.
        intensity_window (`list[str]`, *optional*): What becomes black and white in images of more than 8 bits.
        num_channels (`int`, *optional*): How many channels the images and the models' inputs have.
        image_column_name (`str`, *optional*): Column of the images.
        label_column_name (`str`, *optional*): Column of the classes.
        test_split (`str`, *optional*): Split to test on.
        workers (`int`, *optional*): Runs at a time.
        backend (`str`, *optional*, defaults to `"local"`): `local`, `dask` or `ray`.
        scheduler (`str`, *optional*): Address of the cluster.
    """

    output_dir: str = field(
        metadata={"help": "Folder of the comparison. Started again with the same folder, only what is missing runs."}
    )
    task: str = field(
        default="classification",
        metadata={"help": "What the models are to learn. `--task segmentation --help` lists its further arguments."},
    )
    model: list[str] = field(
        default_factory=lambda: [DEMO],
        metadata={"help": "Hub ids, local folders or `timm/...`; `demo` is EfficientNet-Lite0."},
    )
    dataset: list[str] = field(
        default_factory=lambda: [DEMO],
        metadata={
            "help": "Hub ids or local folders; `demo` are the images that come along. Each model meets each data set."
        },
    )
    strategies: list[str] = field(
        default_factory=lambda: ["cosine", "constant", "layer_decay", "metalr"],
        metadata={"help": "Names of strategies."},
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [1e-5, 1e-4, 1e-3, 1e-2], metadata={"help": "Start learning rates."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    train_size: int | None = field(default=None, metadata={"help": "Size of a stratified training subset."})
    noise: float = field(default=0.0, metadata={"help": "Share of training labels to flip."})
    folds: int = field(default=0, metadata={"help": "Stratified cross-validation over the training split."})
    group_column: str | None = field(default=None, metadata={"help": "Rows that share a value of it stay in one fold."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of every strategy."})
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width of the model's input in pixels; by default the model's own."}
    )
    augment: str = field(default="none", metadata={"help": "`none`, `flip`, `crop` or `crop_flip`."})
    intensity_window: list[str] | None = field(
        default=None,
        metadata={
            "help": "The two intensities that become black and white in images of more than 8 bits, or `voi`; by "
            "default the 0.5th and the 99.5th percentile of the training images."
        },
    )
    num_channels: int | None = field(
        default=None, metadata={"help": "How many channels the images and the models' inputs have; by default three."}
    )
    image_column_name: str | None = field(default=None, metadata={"help": "Column of the images."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the classes."})
    test_split: str | None = field(default=None, metadata={"help": "Split to test on."})
    metric: str | None = field(
        default=None,
        metadata={
            "help": "Score of the test images to compare by, such as `balanced_accuracy`; by default the task's own. "
            "Results keep all scores: the same command with another metric writes its report anew."
        },
    )
    workers: int | None = field(
        default=None,
        metadata={
            "help": "Runs at a time, each in a process of its own with its share of the threads. By default one a GPU, "
            "or one; on a cluster as many as it has workers."
        },
    )
    backend: str = field(
        default="local",
        metadata={"help": "Where the runs run: `local` (this machine), or on the workers of `dask` or `ray`."},
    )
    scheduler: str | None = field(
        default=None, metadata={"help": "Address of Dask's scheduler (`tcp://host:8786`), or of a Ray cluster."}
    )


def _unless_given(name: str, fields: Sequence[dataclasses.Field[Any]]) -> type:
    """Arguments of other dataclasses, each left out unless given."""
    return dataclasses.make_dataclass(
        name, [(f.name, f.type, field(default=None, metadata=f.metadata)) for f in fields]
    )


# All runs of a comparison have the same number of steps: none stops by itself.
_LEFT_OUT = {f.name for f in dataclasses.fields(TrainingArguments)} | {"stop_when_converged", "max_minutes"}
# Every other argument that tuning adds.
TuningArguments = _unless_given(
    "TuningArguments", [f for f in dataclasses.fields(MetaLRTrainingArguments) if f.name not in _LEFT_OUT]
)


def parse_compare_arguments(argv: Sequence[str]) -> tuple[CompareArguments, dict[str, Any], dict[str, Any]]:
    """Reads the arguments of `metalr-hf compare`.

    Args:
        argv (`Sequence[str]`): Arguments, or a YAML or JSON file with them, which further arguments override.

    Returns:
        `tuple`: the [`CompareArguments`], the tuning arguments and those of the task alone that were given.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if an argument is unknown, its value is none it can have, or the file holds something else.
    """
    common = {f.name for f in dataclasses.fields(DataArguments)}
    task = named_task(argv)
    of_task = [f for f in dataclasses.fields(task.data_arguments) if f.name not in common]
    kinds: Any = (CompareArguments, TuningArguments, _unless_given("RowArguments", of_task))
    parser = CommandParser(
        kinds,
        prog="metalr-hf compare",
        usage="%(prog)s [FILE] --output_dir FOLDER [--ARGUMENT VALUE ...]",
        description="Runs fine-tuning strategies side by side on equal budgets. Instead of arguments, or before them, "
        "a YAML or JSON file may be given.",
        allow_abbrev=False,
    )
    known = parser.names()
    parser.set_defaults(**{name: value for name, value in task.default_arguments.items() if name in known})
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        file, *argv = argv
        argv = _as_argv(parser.read_file(file)) + argv
    arguments, *others = parser.parse(argv)
    tuning, rows = ({name: value for name, value in vars(one).items() if value is not None} for one in others)
    return arguments, tuning, rows


def run_comparison(arguments: CompareArguments, tuning: dict[str, Any], rows: dict[str, Any]) -> None:
    """Runs what is missing of a comparison, writes its report and shows it.

    Args:
        arguments ([`CompareArguments`]): What to compare.
        tuning (`dict`): Arguments of `MetaLRTrainingArguments` for the strategies that tune.
        rows (`dict`): Arguments of the data set that only this task has.

    Raises:
        FileExistsError: if the folder holds a run of `metalr-hf train`.
    """
    optional = ("intensity_window", "num_channels", "image_column_name", "label_column_name", "test_split")
    given = {name: value for name in optional if (value := getattr(arguments, name)) is not None}
    comparison = Comparison(
        **{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Comparison) if hasattr(arguments, f.name)},
        tuning=tuning,
        preparation={"image_size": arguments.image_size, "augment": arguments.augment, **given, **rows},
    )
    if (Path(arguments.output_dir) / TRAINER_STATE_NAME).is_file():
        raise FileExistsError(
            f"output_dir={arguments.output_dir!r} holds a model that `metalr-hf train` has trained. Give the "
            "comparison a folder of its own."
        )
    if tuning:
        # Refuses a bad one now rather than in each run.
        MetaLRTrainingArguments(arguments.output_dir, **tuning)
    # Before the data sets are read, which may take long.
    if arguments.metric is not None:
        get_task(arguments.task).check_metric(arguments.metric)
    check_backend(arguments.workers, arguments.backend, arguments.scheduler)
    cells = [
        make_cell(model, dataset, arguments, rows)
        for model in dict.fromkeys(arguments.model)
        for dataset in dict.fromkeys(arguments.dataset)
    ]
    console = Console()
    with RunsProgress(console, arguments.metric) as shown:
        try:
            compare(
                cells,
                comparison,
                arguments.output_dir,
                shown.ended,
                workers=arguments.workers,
                backend=arguments.backend,
                scheduler=arguments.scheduler,
                watch=shown.watch,
            )
        except KeyboardInterrupt:
            if read_results(arguments.output_dir):
                write_report(arguments.output_dir, arguments.metric)
            raise
    report = write_report(arguments.output_dir, arguments.metric)
    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"The report is {report}", soft_wrap=True)


def make_cell(model_name: str, dataset_name: str, arguments: CompareArguments, rows: Mapping[str, Any]) -> Cell:
    """A cell of a comparison, from names.

    Args:
        model_name (`str`): Hub id, local folder, `timm/...` or `demo`.
        dataset_name (`str`): Hub id, local folder or `demo`.
        arguments ([`CompareArguments`]): Task, columns, image size and augmentation.
        rows (`Mapping[str, Any]`): Arguments of the data set that only this task has.

    Returns:
        [`~metalr_hf.compare.runs.Cell`]
    """
    task = get_task(arguments.task).for_data(folder_of(dataset_name))
    data = task.data_arguments(
        dataset_name=None if dataset_name == DEMO else dataset_name,
        image_column_name=arguments.image_column_name,
        label_column_name=arguments.label_column_name,
        test_split=arguments.test_split,
        image_size=arguments.image_size,
        augment=arguments.augment,
        group_column=arguments.group_column,
        intensity_window=arguments.intensity_window,
        num_channels=arguments.num_channels,
        **rows,
    )
    if arguments.folds:
        # Every row is tested on in its turn, so that none is held out where there is no test split.
        data.test_share = 0.0
    splits = task.load_splits(data)
    model_arguments = task.model_arguments(ModelArguments(None if model_name == DEMO else model_name), splits)

    def make_model(classes: Sequence[str]) -> PreTrainedModel:
        return task.load_model(model_arguments, dict(enumerate(classes)), arguments.image_size, arguments.num_channels)

    processor = task.load_processor(model_arguments, make_model(splits.class_names), arguments.image_size)
    train_transform, test_transform = task.transforms(splits, processor, arguments.augment)
    model_shown = task.demo_model_name if model_name == DEMO else short_name(model_name, arguments.model)
    data_shown = task.demo_name if dataset_name == DEMO else short_name(dataset_name, arguments.dataset)
    return Cell(
        name=f"{model_shown} → {data_shown}",
        make_model=make_model,
        train=splits.train,
        test=splits.test,
        train_transform=train_transform,
        test_transform=test_transform,
        task=task,
        fit=lambda model, train: task.fit(model, train, processor, data),
        class_names=splits.class_names,
        source=f"{model_name} and {dataset_name}",
    )


def short_name(name: str, names: Sequence[str]) -> str:
    """The last part of a path or Hub id, or all of it where another ends alike.

    Args:
        name (`str`): The path or id.
        names (`Sequence[str]`): All that are compared.

    Returns:
        `str`

    Example:

    ```python
    >>> from metalr_hf.cli.compare import short_name
    >>> short_name("data/cells", ["data/cells", "data/lungs"]), short_name("a/scans", ["a/scans", "b/scans"])
    ('cells', 'a/scans')

    ```
    """
    alike = {other for other in names if Path(other).name == Path(name).name}
    return name if len(alike) > 1 else Path(name).name


def _as_argv(values: Mapping[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv
