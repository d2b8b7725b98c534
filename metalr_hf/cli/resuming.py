"""Whether a run that goes on from a checkpoint has the images, classes and tuning that the checkpoint's run had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .arguments import TrainArguments

RECORD = "data_splits.json"
# What decides which images are trained on, beside the images themselves.
DECIDING = (
    "train_split",
    "validation_split",
    "test_split",
    "meta_split_name",
    "validation_share",
    "test_share",
    "group_column",
    "label_column_name",
    "max_train_samples",
)
# What the model card says of the whole run.
TUNING = ("hyper_lr", "tuning_steps", "calibrate", "fit_head", "average_weights")


def splits_of(arguments: TrainArguments, splits: Any, meta_split: float) -> dict[str, Any]:
    """What a run that goes on from this one must have too, or its results and its card would not be what they seem.

    Args:
        arguments ([`TrainArguments`]): The run's arguments.
        splits ([`~metalr_hf.data.loading.Splits`]): Its images.
        meta_split (`float`): Share of the training images that is held out for validation gradients.

    Returns:
        `dict[str, Any]`: what JSON can hold.
    """
    sizes = {
        f"images to {name}": len(rows) if hasattr(rows, "__len__") else None
        for name, rows in (("train on", splits.train), ("validate on", splits.validation), ("test on", splits.test))
    }
    return {
        "classes": list(splits.class_names),
        "seed": arguments.training.seed,
        "meta_split": meta_split,
        **{name: getattr(arguments.data, name, None) for name in DECIDING},
        **{name: getattr(arguments.training, name) for name in TUNING},
        **sizes,
    }


def check_same_splits(checkpoint: str, splits: dict[str, Any]) -> None:
    """Raises `ValueError` if the run of a checkpoint had other images, shares, classes or tuning.

    Args:
        checkpoint (`str`): The checkpoint to go on from. One of another program has no record beside it, and passes.
        splits (`dict[str, Any]`): What [`splits_of`] gave.
    """
    file = Path(checkpoint).parent / RECORD
    if not file.is_file():
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in json.loads(json.dumps(splits)).items():
        if name in before and before[name] != value:
            harm = "be tested on images that it was trained on, or learn other classes"
            if name in TUNING:
                harm = "have a model card that is wrong of its first steps"
            raise ValueError(
                f"resume_from_checkpoint={checkpoint!r} is of a run with {_shown(name, before[name])}; here there are "
                f"{_shown(name, value)}. It would {harm}. Give what it had, or start a run of its own from the weights "
                "in that folder with --model_name_or_path."
            )


def write_splits(folder: str, splits: dict[str, Any]) -> None:
    """Writes the record that [`check_same_splits`] reads.

    Args:
        folder (`str`): The output folder of the run.
        splits (`dict[str, Any]`): What [`splits_of`] gave.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / RECORD).write_text(json.dumps(splits, indent=2) + "\n", encoding="utf-8")


def _shown(name: str, value: Any) -> str:
    if name == "classes":
        return f"the classes {', '.join(value)}"
    return f"{value} {name}" if name.startswith("images") else f"{name}={value!r}"
