"""The cases of the benchmark, and time and peak memory of each, measured beside a plain step in another process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from ..data.loading import DataArguments, load_images
from ..data.transforms import ImageTransform, load_image_processor
from ..layers.groups import layer_groups
from ..models.loading import ModelArguments, load_config, naming_the_model
from ..models.timm import architecture_of, wrap_timm_model
from ..settings import check_choice, check_count
from ..tasks import get_task
from ..trainer.arguments import MetaLRTrainingArguments
from ..trainer.metalr import MetaLRTrainer
from .second_order import SecondOrderTrainer
from .turns import StopWatch, peak_memory, run_in_turn

DEMO = "demo"
DTYPES = ("float32", "bfloat16", "float16")
# Number of batches that are kept in memory, half of them for validation, and used again and again.
BATCHES, FEWEST_IMAGES = 8, 64
FEWEST_STEPS = 4
PLAIN, DEFAULT, SETTLED = "plain", "next_batch", "settled"
# A second-order step costs as much as several plain ones.
SECOND_ORDER_SHARE = 1 / 3


@dataclass
class BenchmarkArguments:
    """What is measured, and how often.

    Args:
        output_dir (`str`): Folder for `benchmark.json` and `benchmark.png`.
        model (`str`, *optional*, defaults to `"demo"`):
            `demo` (EfficientNet-Lite0 with its weights), a Hub id, a local folder, or the name of a timm architecture,
            with or without `timm/` before it, which is made with random weights.
        batch_size (`int`, *optional*, defaults to 32): Images a step.
        image_size (`int`, *optional*, defaults to 64): Height and width of the images in pixels.
        meta_batch_size (`int`, *optional*): Validation images a tuned step; as many as `batch_size` by default.
        dtype (`str`, *optional*, defaults to `"float32"`): `float32`, or mixed precision with `bfloat16` or `float16`.
        device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, or `auto` for the accelerator that there
            is.
        optim (`str`, *optional*, defaults to `"adamw_torch_fused"`): As in `TrainingArguments`.
        meta_every (`list[int]`, *optional*, defaults to `[1, 2, 5, 10]`): The streams tune at every k-th step.
        steps (`int`, *optional*, defaults to 10): Measured steps of a case at a time.
        repeats (`int`, *optional*, defaults to 3): How often all cases are measured.
        run_steps (`int`, *optional*, defaults to 500): Length of the run whose cost is computed from that of its steps.
        only (`list[str]`, *optional*): Leave out all other cases but the plain step.
    """

    output_dir: str = field(metadata={"help": "Folder for benchmark.json and benchmark.png."})
    model: str = field(
        default=DEMO,
        metadata={
            "help": "`demo` (EfficientNet-Lite0 with its weights), a Hub id, a local folder, or the name of a timm "
            "architecture, with or without `timm/` before it, which is made with random weights."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Images a step."})
    image_size: int = field(default=64, metadata={"help": "Height and width of the images in pixels."})
    meta_batch_size: int | None = field(
        default=None, metadata={"help": "Validation images a tuned step; as many as batch_size by default."}
    )
    dtype: str = field(
        default="float32", metadata={"help": "`float32`, or mixed precision with `bfloat16` or `float16`."}
    )
    device: str = field(
        default="auto", metadata={"help": "`cpu`, `cuda`, or `auto` for the accelerator that there is."}
    )
    optim: str = field(default="adamw_torch_fused", metadata={"help": "As in TrainingArguments."})
    meta_every: list[int] = field(
        default_factory=lambda: [1, 2, 5, 10], metadata={"help": "The streams tune at every k-th step."}
    )
    steps: int = field(default=10, metadata={"help": "Measured steps of a case at a time."})
    repeats: int = field(default=3, metadata={"help": "How often all cases are gone through."})
    run_steps: int = field(
        default=500, metadata={"help": "Length of the run whose cost is put together from the steps."}
    )
    only: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Leave out all other cases but the plain step. The cases: `plain`, `next_batch`, `tensors`, "
            "`settled`, `stream_K` for each K of meta_every, `second_order`."
        },
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda': torch finds no such device. Leave it at auto, or set it to cpu.")
        for name in ("batch_size", "image_size", "repeats", "run_steps"):
            check_count(name, getattr(self, name))
        if self.steps < FEWEST_STEPS:
            raise ValueError(f"steps={self.steps} must be {FEWEST_STEPS} or more: the first ones are not counted.")
        for k in self.meta_every:
            check_count("meta_every", k)
            if k > self.steps:
                raise ValueError(
                    f"meta_every={k} needs as many steps, but steps={self.steps}: none of those measured would tune. "
                    "Raise steps, or leave that meta_every out."
                )
        if self.meta_batch_size is not None:
            check_count("meta_batch_size", self.meta_batch_size)
        known = [case.key for case in all_cases(self)]
        for name in self.only:
            check_choice("only", name, tuple(known))


@dataclass(frozen=True)
class Case:
    """A way to train.

    Args:
        key (`str`): Its name in `benchmark.json`.
        title (`str`): Its name in the table.
        kind (`type`): Its trainer.
        tuning (`dict`, *optional*): What it adds to the arguments.
        streams (`bool`, *optional*): Whether it gets validation images.
        granularity (`str`, *optional*, defaults to `"block"`): Of its layers.
        validated (`float`, *optional*, defaults to 0.0): The share of its steps that have a pass more.
        steps (`float`, *optional*, defaults to 1.0): The share of `steps` that is measured.
    """

    key: str
    title: str
    kind: type[Trainer]
    tuning: dict[str, Any] = field(default_factory=dict)
    streams: bool = False
    granularity: str = "block"
    validated: float = 0.0
    steps: float = 1.0


def all_cases(arguments: BenchmarkArguments) -> list[Case]:
    """The cases in the order of the table, the plain step first.

    Args:
        arguments ([`BenchmarkArguments`]): With the streams' `meta_every`.

    Returns:
        `list[Case]`
    """
    uncalibrated: dict[str, Any] = {"calibrate": False, "tuning_steps": 0}
    streams = [
        Case(
            key=f"stream_{k}",
            title=f"stream, every {k}",
            kind=MetaLRTrainer,
            tuning=uncalibrated | {"meta_every": k, "meta_batch_size": arguments.meta_batch_size},
            streams=True,
            validated=1 / k,
        )
        for k in arguments.meta_every
    ]
    return [
        Case(PLAIN, "plain Trainer", Trainer),
        Case(DEFAULT, "next_batch", MetaLRTrainer),
        Case("tensors", "next_batch by tensor", MetaLRTrainer, uncalibrated, granularity="tensor"),
        Case(SETTLED, "after tuning", MetaLRTrainer, {"calibrate": False, "tuning_steps": 1}),
        *streams,
        Case("second_order", "the paper's way", SecondOrderTrainer, streams=True, steps=SECOND_ORDER_SHARE),
    ]


def chosen_cases(arguments: BenchmarkArguments) -> list[Case]:
    """The cases that are measured.

    Args:
        arguments ([`BenchmarkArguments`]): With what is left out.

    Returns:
        `list[Case]`
    """
    return [case for case in all_cases(arguments) if case.key in (PLAIN, *(arguments.only or [case.key]))]


def benchmark(
    arguments: BenchmarkArguments, progress: Callable[[int, int, str], None] = lambda done, total, case: None
) -> list[dict[str, Any]]:
    """Measures every case `repeats` times, alternating its steps with those of a plain case.

    Other load on the machine and changes of its clock then affect both alike. Plain steps are measured beside plain
    ones too: how far their ratio is from 1 tells how exact the others are. Every second repeat has the reverse order.

    Args:
        arguments ([`BenchmarkArguments`]): What to measure.
        progress (`Callable[[int, int, str], None]`, *optional*): Called before each measurement with how many are
            done, how many there are, and the case.

    Returns:
        `list[dict]`: what [`measure`] gave, with the number of the repeat and what it gave of the steps `beside`, in
            the order of the measurements.

    Raises:
        FileNotFoundError: if there is no such model.
    """
    cases = chosen_cases(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.pt"
        torch.save(prepare_images(arguments), images)
        for repeat in range(arguments.repeats):
            for case in cases if repeat % 2 == 0 else reversed(cases):
                progress(len(rows), arguments.repeats * len(cases), case.title)
                # The first step is not measured.
                steps = 1 + max(1, round(case.steps * arguments.steps))
                calls = [(arguments, key, str(images), steps) for key in (case.key, PLAIN)]
                row, beside = run_in_turn(measure, calls)
                rows.append({"case": case.key, "repeat": repeat, **row, "beside": beside})
    return rows


def prepare_images(arguments: BenchmarkArguments) -> dict[str, Tensor]:
    """scikit-learn's handwritten digits as the model takes them.

    Args:
        arguments ([`BenchmarkArguments`]): With the model and the size of the images.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values`, float32 `(images, 3, height, width)`, and `labels`, int64
            `(images,)`.
    """
    splits = load_images(DataArguments(max_train_samples=max(FEWEST_IMAGES, BATCHES * arguments.batch_size)))
    model, name = make_model(arguments, splits.id2label), arguments.model
    processor = load_image_processor(model, None if name == DEMO else name, arguments.image_size)
    rows = ImageTransform(processor)(splits.train[:])
    return {"pixel_values": torch.stack(rows["pixel_values"]), "labels": torch.tensor(rows["labels"])}


def make_model(arguments: BenchmarkArguments, id2label: Mapping[int, str]) -> PreTrainedModel:
    """The model by its name.

    Args:
        arguments ([`BenchmarkArguments`]): With the model and the size of the images.
        id2label (`Mapping[int, str]`): Class number to class name.

    Returns:
        `transformers.PreTrainedModel`: an image classifier.

    Raises:
        FileNotFoundError, ValueError: if there is none of that name.
    """
    name, size = arguments.model, arguments.image_size
    if (architecture := architecture_of(name)) is not None:
        name = architecture
    elif name == DEMO:
        return get_task("classification").load_model(ModelArguments(), id2label)
    elif not timm.is_model(name):
        with naming_the_model(name, "model", argument="--model"):
            load_config(name)
        return get_task("classification").load_model(ModelArguments(name), id2label)
    options: dict[str, Any] = {"num_classes": len(id2label)}
    try:
        # Of a transformer, the positions depend on it.
        network = timm.create_model(name, img_size=size, **options)
    except TypeError:
        network = timm.create_model(name, **options)
    return wrap_timm_model(network, id2label)


class _Images(Dataset[dict[str, Any]]):
    """Prepared images, so that a step is not made longer by reading them, over and over, so that no epoch ends."""

    def __init__(self, images: dict[str, Tensor], rows: slice):
        self.pixel_values, self.labels = images["pixel_values"][rows], images["labels"][rows].tolist()

    def __len__(self) -> int:
        return 1000 * len(self.labels)

    def __getitem__(self, row: int) -> dict[str, Any]:
        row %= len(self.labels)
        return {"pixel_values": self.pixel_values[row], "labels": self.labels[row]}


def measure(arguments: BenchmarkArguments, key: str, images: str, steps: int) -> dict[str, Any]:
    """Trains a case for some steps in this process, one of those of [`~metalr_hf.benchmark.turns.run_in_turn`].

    Args:
        arguments ([`BenchmarkArguments`]): The settings.
        key (`str`): The case.
        images (`str`): File of prepared images.
        steps (`int`): How many.

    Returns:
        `dict`: `steps`, a row per step, the first of them with all that comes before it: `wall` and `cpu` seconds,
            those of the `tuning` in it, and the `passes` that it had more; `peak`, bytes of memory that
            were in use at most, of the accelerator or of the process; `layers`; `device`; and `calibration`, if there
            was one.
    """
    case = next(case for case in all_cases(arguments) if case.key == key)
    data = torch.load(images, weights_only=True)
    set_seed(0)
    model = make_model(arguments, dict(enumerate(map(str, range(int(data["labels"].max()) + 1)))))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = _make_trainer(case, model, data, arguments, scratch, steps)
        trainer.remove_callback(PrinterCallback)
        device = trainer.args.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        watch = StopWatch(device)
        trainer.add_callback(watch)
        trainer.train()
    scheduler: Any = trainer.lr_scheduler
    calibration = getattr(scheduler, "calibration", None)
    groups = trainer.optimizer.param_groups if trainer.optimizer else []
    return {
        "steps": watch.steps,
        "peak": peak_memory(device),
        "layers": len({group["layer"] for group in groups if "layer" in group}),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "calibration": None
        if calibration is None
        else calibration.state_dict() | {"forwards": scheduler.calibration_forwards},
    }


def _make_trainer(
    case: Case, model: nn.Module, images: dict[str, Tensor], arguments: BenchmarkArguments, scratch: str, steps: int
) -> Trainer:
    settings: dict[str, Any] = {
        "output_dir": scratch,
        "max_steps": steps,
        "per_device_train_batch_size": arguments.batch_size,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "optim": arguments.optim,
        "bf16": arguments.dtype == "bfloat16",
        "fp16": arguments.dtype == "float16",
        "use_cpu": arguments.device == "cpu",
        "remove_unused_columns": False,
        "dataloader_pin_memory": arguments.device != "cpu" and torch.accelerator.is_available(),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    half = len(images["labels"]) // 2
    given: dict[str, Any] = {"train_dataset": _Images(images, slice(0, half)), "data_collator": default_data_collator}
    if case.streams:
        given["meta_dataset"] = _Images(images, slice(half, None))
    if case.granularity != "block":
        given["layer_groups"] = layer_groups(model, case.granularity)
    kind = MetaLRTrainingArguments if case.kind is MetaLRTrainer else TrainingArguments
    args = kind(**settings, **case.tuning)
    if args.n_gpu > 1:
        # One device is measured, where Trainer would put a batch on each. There is no public setting.
        args._n_gpu = 1
    return case.kind(model=model, args=args, **given)
