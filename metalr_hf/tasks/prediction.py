"""A table of predictions: a row an image, written while it is made, and gone on with by a second run."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.listing import ImageList
from ..messages import first_line
from ..models.losses import first_logits
from .base import Task

# What every table has: which image, by which model, and what is wrong with the file.
FILE, MODEL, ERROR = "file", "model", "error"
# Colours of classes 0, 1, ... in saved masks, whose values are the class numbers.
NIFTI_ENDINGS = (".nii.gz", ".nii")
COLOURS = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"]
PALETTE = bytes.fromhex("".join(COLOURS).replace("#", ""))


class PredictionTable:
    """A CSV file of predictions.

    Args:
        file (`Path`): Where it is, or will be.
        columns (`Sequence[str]`): The columns of the answers.
        model_name (`str`): Which model answers.
        overwrite (`bool`, *optional*, defaults to `False`): Start again, whatever is there.

    Raises:
        FileExistsError: if there is another table.
    """

    def __init__(self, file: Path, columns: Sequence[str], model_name: str, overwrite: bool = False):
        self.file, self.model_name = file, model_name
        self.columns = [FILE, *columns, ERROR, MODEL]
        self.done: dict[str, dict[str, str]] = {} if overwrite else self._kept()
        file.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left half a row, and rows with an error are tried again.
        part = file.with_name(f"{file.name}.part")
        with open(part, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, self.columns)
            writer.writeheader()
            writer.writerows(self.done.values())
        os.replace(part, file)

    def _kept(self) -> dict[str, dict[str, str]]:
        if not self.file.is_file():
            return {}
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = csv.DictReader(io.StringIO(whole, newline=""))
        if rows.fieldnames is None:
            return {}
        found = list(rows)
        others = {row.get(MODEL) for row in found} - {self.model_name}
        if list(rows.fieldnames) != self.columns or others:
            raise FileExistsError(
                f"output={str(self.file)!r} is a table of another model or of something else. Give another file, or "
                "start again with --overwrite."
            )
        return {row[FILE]: row for row in found if not row[ERROR] and None not in row.values()}

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Appends rows, and makes sure that they are on disk.

        Args:
            rows (`Sequence[dict[str, Any]]`): Column to value; what is missing stays empty.
        """
        with open(self.file, "a", newline="", encoding="utf-8") as table:
            csv.DictWriter(table, self.columns, restval="").writerows({MODEL: self.model_name, **row} for row in rows)


class _Inputs(Dataset[Any]):
    """Model inputs by number, or why there is none."""

    def __init__(self, images: ImageList, numbers: Sequence[int], task: Task, processor: BaseImageProcessor):
        self.images, self.numbers, self.task, self.processor = images, numbers, task, processor

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[str, Any, Any, str]:
        number = self.numbers[index]
        name = self.images.names[number]
        entry = self.images.entry(number)
        if entry is None:
            return name, None, None, "there is no image"
        try:
            return name, *self.task.read(entry, self.processor), ""
        except ImportError:
            # True of every such file.
            raise
        except Exception as error:
            return name, None, None, _without_path(error, entry, name)


def _without_path(error: Exception, entry: Any, name: str) -> str:
    # Of a file in memory libraries tell its address.
    told = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", name, first_line(error))
    if not isinstance(entry, (list, tuple)):
        return told.replace(str(entry.get("path")), name) if entry.get("path") else told
    for path in [str(one["path"]) for one in entry if one and one.get("path")]:
        told = told.replace(path, os.path.basename(path))
    return told


def predict(
    task: Task,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: ImageList,
    table: PredictionTable,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes what a model says of images into a table, without those that it holds already.

    Args:
        task ([`~metalr_hf.tasks.base.Task`]): What the model was trained for.
        model (`transformers.PreTrainedModel`): The model, on the device that it is to run on.
        processor (`transformers.BaseImageProcessor`): The image processor that it was saved with.
        images ([`~metalr_hf.data.listing.ImageList`]): The images.
        table ([`PredictionTable`]): The table; masks go into a folder beside it.
        batch_size (`int`, *optional*, defaults to 32): Images at a time.
        num_workers (`int`, *optional*, defaults to 0): Processes that read files; 0 is this one.
        report (`Callable`, *optional*): Is told how many images are done each time.

    Returns:
        `int`: how many images could not be read.
    """
    names = names_of(model)
    numbers = [number for number, name in enumerate(images.names) if name not in table.done]
    report(len(images.names) - len(numbers))
    loader: DataLoader[Any] = DataLoader(
        _Inputs(images, numbers, task, processor), batch_size, num_workers=num_workers, collate_fn=list
    )
    device, broken = next(model.parameters()).device, 0
    model.eval()
    for batch in loader:
        rows = {name: {FILE: name, ERROR: error} for name, _, _, error in batch}
        with torch.inference_mode():
            for name, answer in _answers(task, model, batch, names, device):
                rows[name] |= {
                    column: _saved(value, table.file, name) if _is_mask(value) else value
                    for column, value in answer.items()
                }
        table.add(list(rows.values()))
        broken += sum(bool(row[ERROR]) for row in rows.values())
        report(len(batch))
    return broken


def _answers(
    task: Task, model: PreTrainedModel, batch: Sequence[Any], names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    read = [(name, pixels, source) for name, pixels, source, error in batch if not error]
    # Some processors give images of other sizes for images of other shapes.
    for _, same in groupby(read, key=lambda one: one[1].shape):
        files, pixels, sources = zip(*same, strict=True)
        inputs = torch.stack([torch.as_tensor(one) for one in pixels]).to(device)
        yield from zip(files, task.answers(first_logits(model(pixel_values=inputs)), names, sources), strict=True)


def masks_folder(table: Path) -> Path:
    """The folder of the masks of a table.

    Args:
        table (`Path`): The file of the table.

    Returns:
        `Path`: `<name of the table>_masks` beside it.
    """
    return table.parent / f"{table.stem}_masks"


def _is_mask(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "to_filename")


def _saved(mask: Any, table: Path, name: str) -> str:
    """Saves a mask of class numbers in a folder beside the table, and returns where, as seen from there."""
    is_nifti = not isinstance(mask, np.ndarray)
    if is_nifti:
        ending = next((ending for ending in NIFTI_ENDINGS if name.lower().endswith(ending)), "")
        name = name[: len(name) - len(ending)]
    target = masks_folder(table) / f"{name}{'.nii.gz' if is_nifti else '.png'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.relative_to(table.parent)
    if is_nifti:
        mask.to_filename(target)
        return file.as_posix()
    picture = Image.fromarray(mask)
    # Makes a grey image one of colours by number, and leaves the numbers.
    picture.putpalette(PALETTE)
    picture.save(target)
    return file.as_posix()


def names_of(model: PreTrainedModel) -> list[str]:
    """The names of what a model answers, in their order.

    Args:
        model (`transformers.PreTrainedModel`): The model.

    Returns:
        `list[str]`
    """
    names: Any = model.config.id2label
    return [str(names[i]) for i in sorted(names)]


def fingerprint(model: PreTrainedModel) -> str:
    """Tells one set of weights from another.

    Args:
        model (`transformers.PreTrainedModel`): The model.

    Returns:
        `str`: eight characters.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:8]
