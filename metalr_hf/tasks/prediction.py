"""A table of predictions: a row an image, written while it is made, and gone on with by a second run."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..data.files import look_at
from ..data.files.folders import OTHER_ENDINGS
from ..data.files.reading import file_bytes
from ..data.intensity import VOI, channels_of, window_of
from ..data.listing import ImageList
from ..messages import first_line
from ..models.losses import first_logits
from .base import Task

# What every table has: which image, by which model, why the answer may mislead, what is wrong with the file, and a
# fingerprint of what it holds.
FILE, MODEL, WARNING, ERROR, CONTENT = "file", "model", "warning", "error", "content"
# Less than one of 256 levels, and more than what resizing an even image leaves of rounding.
EVEN = 1e-3
FINGERPRINT_BYTES = 8
NIFTI_ENDINGS = (".nii.gz", ".nii")
# What a mask of an image that is no NIfTI file need not have in its name.
IMAGE_ENDINGS = {*ImageFolder.EXTENSIONS, *OTHER_ENDINGS} - {*NIFTI_ENDINGS}
# Colours of classes 0, 1, ... in saved masks, whose values are the class numbers.
COLOURS = ["#000000", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7"]
PALETTE = bytes.fromhex("".join(COLOURS).replace("#", ""))


class PredictionTable:
    """A CSV file of predictions.

    A row is kept while its file has the same name and the same content and the model is the same.

    Args:
        file (`Path`): Where it is, or will be.
        columns (`Sequence[str]`): The columns of the answers.
        model_name (`str`): Which model answers.
        overwrite (`bool`, *optional*, defaults to `False`): Start again, whatever is there.

    Attributes:
        done (`dict[str, dict[str, str]]`): The rows without an error, by the name of their image.
        replaced (`int`): How many rows [`~PredictionTable.to_do`] took out.

    Raises:
        FileExistsError: if there is another table.
    """

    def __init__(self, file: Path, columns: Sequence[str], model_name: str, overwrite: bool = False):
        self.file, self.model_name = file, model_name
        self.columns = [FILE, *columns, WARNING, ERROR, CONTENT, MODEL]
        self.done: dict[str, dict[str, str]] = {} if overwrite else self._kept()
        self.replaced = 0
        file.parent.mkdir(parents=True, exist_ok=True)
        # A run that was killed may have left half a row, and rows with an error are tried again.
        self._write()

    def _write(self) -> None:
        part = self.file.with_name(f"{self.file.name}.part")
        with open(part, "w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, self.columns)
            writer.writeheader()
            writer.writerows(self.done.values())
        os.replace(part, self.file)

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

    def to_do(self, images: ImageList, report: Callable[[int], None] = lambda done: None) -> list[int]:
        """The images that are to be predicted, and takes out the rows of others that had the names of these.

        Args:
            images ([`~metalr_hf.data.listing.ImageList`]): The images.
            report (`Callable`, *optional*): Is told of each image that is in the table.

        Returns:
            `list[int]`: their numbers.
        """
        numbers = []
        for number, name in enumerate(images.names):
            # Names alone do not tell images apart: those of another folder are often numbered alike.
            if name in self.done and self.done[name][CONTENT] == content_of(images.entry(number)):
                report(1)
            else:
                numbers.append(number)
        other = [images.names[number] for number in numbers if images.names[number] in self.done]
        for name in other:
            del self.done[name]
        if other:
            self.replaced = len(other)
            self._write()
        return numbers

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

    def __getitem__(self, index: int) -> tuple[dict[str, Any], Any, Any]:
        """What is known of a row before the model answers, the model's input, and what the answer has to know."""
        number = self.numbers[index]
        name = self.images.names[number]
        entry = self.images.entry(number)
        if entry is None:
            return {FILE: name, ERROR: "there is no image"}, None, None
        row = {FILE: name, ERROR: "", CONTENT: content_of(entry)}
        try:
            pixels, source = self.task.read(entry, self.processor)
            return row | {WARNING: _warning(entry, pixels, self.processor)}, pixels, source
        except ImportError:
            # True of every such file.
            raise
        except Exception as error:
            return row | {ERROR: _without_path(error, entry, name)}, None, None


def content_of(entry: Any) -> str:
    """A fingerprint of what an image's file holds.

    Args:
        entry (`Mapping`, or a list of these): `bytes` and `path` of its file, or of its channels.

    Returns:
        `str`: 16 hexadecimal digits, equal for equal content; empty if the file cannot be read.

    Example:

    ```python
    >>> from metalr_hf.tasks.prediction import content_of
    >>> content_of({"bytes": b"one", "path": None}) == content_of({"bytes": b"another", "path": None})
    False

    ```
    """
    files = entry if isinstance(entry, (list, tuple)) else [entry]
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES)
    try:
        for file in files:
            # That of each by itself, for the end of one may be the beginning of the next.
            digest.update(hashlib.blake2b(file_bytes(file) if file else b"").digest())
    except OSError:
        # Who reads it to predict says why.
        return ""
    return digest.hexdigest()


def _warning(entry: Any, pixels: Any, processor: BaseImageProcessor) -> str:
    """Why the answer to an image that can be read may mislead; empty if nothing is known."""
    levels = torch.as_tensor(pixels).flatten(1)
    if bool((levels.amax(1) - levels.amin(1) < EVEN).all()):
        return "the model sees one even colour"
    window, is_one = window_of(processor), not isinstance(entry, (list, tuple))
    if window is not None and window.source != VOI and is_one and not look_at(entry, channels_of(processor)).deep:
        return f"the image has 8 bits; the model was trained on more, of which {window.low:g} to {window.high:g} count"
    return ""


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
    numbers: Sequence[int],
    table: PredictionTable,
    *,
    batch_size: int = 32,
    num_workers: int = 0,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[int, int]:
    """Writes what a model says of images into a table.

    Args:
        task ([`~metalr_hf.tasks.base.Task`]): What the model was trained for.
        model (`transformers.PreTrainedModel`): The model, on the device that it is to run on.
        processor (`transformers.BaseImageProcessor`): The image processor that it was saved with.
        images ([`~metalr_hf.data.listing.ImageList`]): The images.
        numbers (`Sequence[int]`): Which of them, as [`~PredictionTable.to_do`] gives them.
        table ([`PredictionTable`]): The table; masks go into a folder beside it.
        batch_size (`int`, *optional*, defaults to 32): Images at a time.
        num_workers (`int`, *optional*, defaults to 0): Processes that read files; 0 is this one.
        report (`Callable`, *optional*): Is told how many images are done each time.

    Returns:
        `tuple[int, int]`: how many images could not be read, and of how many the answer may mislead.
    """
    names = names_of(model)
    # Those of the table too, which a mask of another image must not take the place of.
    stems = mask_stems({*images.names, *table.done})
    loader: DataLoader[Any] = DataLoader(
        _Inputs(images, numbers, task, processor), batch_size, num_workers=num_workers, collate_fn=list
    )
    device, broken, doubtful = next(model.parameters()).device, 0, 0
    model.eval()
    for batch in loader:
        rows = {row[FILE]: row for row, _, _ in batch}
        with torch.inference_mode():
            for name, answer in _answers(task, model, batch, names, device):
                rows[name] |= {
                    column: _saved(value, table.file, name, stems[name]) if _is_mask(value) else value
                    for column, value in answer.items()
                }
        table.add(list(rows.values()))
        broken += sum(bool(row[ERROR]) for row in rows.values())
        doubtful += sum(bool(row.get(WARNING)) for row in rows.values())
        report(len(batch))
    return broken, doubtful


def _answers(
    task: Task, model: PreTrainedModel, batch: Sequence[Any], names: Sequence[str], device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    read = [(row[FILE], pixels, source) for row, pixels, source in batch if not row[ERROR]]
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


def mask_stems(names: Collection[str]) -> dict[str, str]:
    """The names of the masks of images, but for their ending: those of the images, without theirs where that is enough.

    Args:
        names (`Collection[str]`): The names of the images.

    Returns:
        `dict[str, str]`: image to mask. No two images have one mask, also where upper and lower case are the same.

    Example:

    ```python
    >>> from metalr_hf.tasks.prediction import mask_stems
    >>> mask_stems(["a/000.png", "b.png", "b.jpg"])
    {'a/000.png': 'a/000', 'b.png': 'b.png', 'b.jpg': 'b.jpg'}

    ```
    """
    short = {name: _without_ending(name) for name in names}
    times = Counter(stem.casefold() for pair in short.items() for stem in {*pair})
    return {name: stem if times[stem.casefold()] == 1 else name for name, stem in short.items()}


def _without_ending(name: str) -> str:
    stem, ending = os.path.splitext(name)
    return stem if ending.lower() in IMAGE_ENDINGS else name


def _is_mask(value: Any) -> bool:
    return isinstance(value, np.ndarray) or hasattr(value, "to_filename")


def _saved(mask: Any, table: Path, name: str, stem: str) -> str:
    """Saves a mask of class numbers in a folder beside the table, and returns where, as seen from there."""
    is_nifti = not isinstance(mask, np.ndarray)
    if is_nifti:
        ending = next((ending for ending in NIFTI_ENDINGS if name.lower().endswith(ending)), "")
        stem = name[: len(name) - len(ending)]
    target = masks_folder(table) / f"{stem}{'.nii.gz' if is_nifti else '.png'}"
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
