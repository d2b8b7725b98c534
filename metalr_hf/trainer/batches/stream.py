"""An endless, shuffled, sharded, resumable stream of validation batches."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers.utils import logging

from ...data.splits.several_labels import divide_rows
from ...tuning.contexts import preserve_random_state
from .collated import (
    EMPTY,
    EmptyMetaSetError,
    InterruptedStreamError,
    IterableBatches,
    MapBatches,
    UnusableRowError,
    numbered_rows,
)

logger = logging.get_logger(__name__)

# Seconds. datasets itself retries reads of remote files; other streams may not.
RETRY_AFTER = (1, 2, 4)


class MetaStream:
    """An endless iterator over validation batches.

    Reshuffled each epoch by a generator of its own; a batch may run over the end of an epoch, so all are of the same
    size however small the set is. What batch number n holds, random augmentation included, depends on the seed, n and
    the rank alone: not on the number of workers, nor on random numbers drawn elsewhere, and drawing it changes none.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or torch dataset):
            Where the rows come from.
        batch_size (`int`):
            Rows a batch.
        collate_fn (`Callable`):
            A list of rows to a batch.
        seed (`int`, *optional*, defaults to 0):
            Of the shuffling and of random augmentation.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that load ahead. An iterable dataset is read by one at most, that of `datasets` by none, to keep
            the order.
        pin_memory (`bool`, *optional*, defaults to `False`):
            Whether batches come in page-locked memory, from which they go to a GPU while it is at work.
        process_index (`int`, *optional*, defaults to 0), num_processes (`int`, *optional*, defaults to 1):
            Which of how many processes this is; each gets batches of its own.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000):
            Rows that `datasets.IterableDataset.shuffle` holds in memory. Other iterable datasets keep their own order.

    Raises:
        ValueError: if the dataset is empty (an iterable one: when it is read), or a number makes no sense.
        RuntimeError: from `next`, if a row cannot be read; it names the row. The next call tries the same batch again.
            A connection that breaks is tried again three times before.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches import MetaStream
    >>> stream = MetaStream(range(5), batch_size=3, collate_fn=list)
    >>> sorted(row for _ in range(5) for row in next(stream))
    [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]

    ```
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        *,
        seed: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer_size: int = 1000,
    ):
        self.batch_size = batch_size
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1: the rows of a validation batch.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} must be in [0, num_processes={num_processes}).")
        self.position = 0
        self._place: dict[str, int] = {}
        self._places: tuple[int, list[dict[str, int]]] = (-1, [])
        self._process_index, self._num_processes = process_index, num_processes
        self._iterator: Iterator[Any] | None = None
        self._rows_after: Callable[[int], Iterator[tuple[int, list[int]]]] | None = None
        if isinstance(dataset, IterableDataset):
            num_workers = min(num_workers, 1)
            if isinstance(dataset, datasets.IterableDataset):
                # In a worker it would shuffle in another order, whatever the seed.
                num_workers = 0
                dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer_size, **_one_shard_at_a_time(dataset))
                dataset = split_dataset_by_node(dataset, process_index, num_processes)
            # A copy, so that set_epoch does not move a training set that is read at the same time.
            dataset = copy.copy(dataset)
            self._source: Any = IterableBatches(dataset, collate_fn, seed, process_index, batch_size, num_processes)
        else:
            if len(dataset) == 0:
                raise EmptyMetaSetError(EMPTY)
            self._source = MapBatches(dataset, collate_fn, seed, process_index)
            self._rows_after = partial(numbered_rows, len(dataset), batch_size, seed, process_index, num_processes)
        self._num_workers, self._pin_memory = num_workers, pin_memory

    def __iter__(self) -> MetaStream:
        return self

    def __next__(self) -> Any:
        for wait in (*RETRY_AFTER, None):
            if self._iterator is None:
                self._iterator = self._start()
            try:
                batch, place = next(self._iterator)
                if isinstance(batch, UnusableRowError):
                    raise batch
                self._place = place
                self.position += 1
                return batch
            except Exception as error:
                # Workers would continue with the batch after it, and the stored position would be one batch behind.
                self._iterator = None
                if wait is None or not isinstance(error, InterruptedStreamError):
                    raise
                logger.warning(f"{error} Trying again in {wait} s.")
                time.sleep(wait)
        raise AssertionError

    def gather_places(self, gather: Callable[[list[Any]], list[Any]]) -> None:
        """Has the next `state_dict()` say where every process stands; all of them have to call it.

        Rows do not divide evenly over processes, so that one may be in another epoch of an iterable dataset already.

        Args:
            gather (`Callable`): Joins the lists of all processes, as `accelerate.utils.gather_object` does.
        """
        self._places = (self.position, gather([self._place]))

    def state_dict(self) -> dict[str, Any]:
        """The position: how many batches were taken, of an iterable dataset also the epoch and the rows read in it."""
        position, places = self._places
        of_all = {"places": places} if position == self.position else {}
        return {"position": self.position, **self._place, **of_all}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on after the batches taken before; an iterable dataset is read again from its epoch's start."""
        place = dict(state_dict)
        self.position = place.pop("position")
        places = place.pop("places", [])
        # Other numbers of processes go on where the first one stood.
        self._place = dict(places[self._process_index]) if len(places) == self._num_processes else place
        self._places = (-1, [])
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        if self._rows_after is None:
            self._source.place = self._place
        sampler = None if self._rows_after is None else self._rows_after(self.position)
        # Without a generator, every iterator draws a seed from the global one.
        generator = torch.Generator().manual_seed(0)
        return iter(
            DataLoader(
                self._source,
                batch_size=None,
                sampler=sampler,
                num_workers=self._num_workers,
                collate_fn=_as_it_is,
                pin_memory=self._pin_memory,
                generator=generator,
            )
        )


def _one_shard_at_a_time(dataset: datasets.IterableDataset) -> dict[str, int]:
    # Versions that read several do so in threads, which would draw from the training's generators at any moment.
    name = "max_buffer_input_shards"
    return {name: 1} if name in inspect.signature(dataset.shuffle).parameters else {}


def split_meta_dataset(
    dataset: Any, meta_split: float, *, label_column: str = "label", seed: int = 0
) -> tuple[Any, Any]:
    """Holds out a share of a training set for validation batches, stratified by label.

    Args:
        dataset (`datasets.Dataset` or map-style torch dataset):
            The training set.
        meta_split (`float`):
            The share to hold out, in (0, 1). Each class gives its part of it, rounded, and keeps at least one row.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column of the classes (integers or strings), or of lists of 0, 1 and -100 (unknown), which are
            stratified too if `dataset` is a `datasets.Dataset`. Other labels, as masks or numbers to predict, are not.
            Torch datasets have it, or `"labels"`, as a key of their rows.
        seed (`int`, *optional*, defaults to 0):
            Of the choice of rows.

    Returns:
        `tuple`: the rest to train on and the held-out rows, both in the order of the dataset.

    Raises:
        ValueError: if the dataset is a stream, has no such column, or no row would be held out.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches import split_meta_dataset
    >>> train, meta = split_meta_dataset([{"label": i % 2} for i in range(10)], 0.2)
    >>> len(train), len(meta)
    (8, 2)

    ```
    """
    if not 0 <= meta_split < 1:
        raise ValueError(f"meta_split={meta_split!r} must be in [0, 1): the share of the training set to hold out.")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(f"meta_split={meta_split}: a stream cannot be split. Pass rows to tune on as meta_dataset.")
    labels = _labels(dataset, label_column)
    size = round(meta_split * len(labels))
    if isinstance(dataset, datasets.Dataset) and 0 < size < len(labels):
        parts = divide_rows(dataset, (len(labels) - size, size), seed, column=label_column)
        if parts is not None:
            return dataset.select(np.flatnonzero(parts == 0)), dataset.select(np.flatnonzero(parts == 1))
    generator = np.random.default_rng(seed)
    classes, members = np.unique(labels, return_inverse=True)
    order = generator.permutation(len(classes))
    # Rounding the running sum, not each class, holds out the asked number of rows in all.
    due = np.floor(np.cumsum(meta_split * np.bincount(members, minlength=len(classes))[order]) + 0.5)
    held_out: list[int] = []
    for label, count in zip(order, np.diff(due, prepend=0), strict=True):
        rows = generator.permutation(np.flatnonzero(members == label))
        held_out += rows[: min(int(count), len(rows) - 1)].tolist()
    if not held_out:
        raise ValueError(
            f"meta_split={meta_split} of {len(labels)} rows holds out none. Raise it, or pass a meta_dataset."
        )
    meta = sorted(held_out)
    train = sorted(set(range(len(labels))).difference(meta))
    if isinstance(dataset, datasets.Dataset):
        return dataset.select(train), dataset.select(meta)
    return Subset(dataset, train), Subset(dataset, meta)


def check_meta_dataset(dataset: Any, *, label_column: str, num_classes: int | None = None) -> None:
    """Raises unless a meta set can be tuned on.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or torch dataset):
            The meta set. Of any but a `datasets.Dataset` only the columns and the first row are looked at.
        label_column (`str`):
            The column of the classes.
        num_classes (`int`, *optional*):
            How many classes the model has.

    Raises:
        TypeError: if it is no set of rows.
        ValueError: if it is empty, has no labels, or has other classes than the model.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches import check_meta_dataset
    >>> check_meta_dataset([{"label": 0}, {"label": 1}], label_column="label", num_classes=2)

    ```
    """
    is_set = isinstance(dataset, IterableDataset) or hasattr(dataset, "__getitem__")
    if not is_set or isinstance(dataset, (str, Mapping)):
        raise TypeError(
            f"meta_dataset is a {type(dataset).__name__}: give rows, such as a datasets.Dataset, a torch dataset or a "
            "list of dictionaries, prepared like the training set. Of several splits, give one."
        )
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise EmptyMetaSetError(EMPTY)
    feature, features = None, getattr(dataset, "features", None)
    if isinstance(features, datasets.Features):
        feature = features[_label_name(features, [label_column], "meta_dataset")]
    if isinstance(feature, datasets.ClassLabel) and num_classes is not None and feature.num_classes != num_classes:
        raise ValueError(
            f"meta_dataset has {feature.num_classes} classes ({', '.join(feature.names[:5])}, ...), but the model has "
            f"{num_classes}. Validation images need the classes of the training images."
        )
    if isinstance(dataset, datasets.Dataset):
        labels = set(_column(dataset, label_column)) if _is_class(feature) else set()
    else:
        labels = _first_label(dataset, label_column)
    unlabelled = [label for label in labels if label is None or label == -1]
    if unlabelled:
        raise ValueError(f"meta_dataset has rows without a label ({label_column}={unlabelled[0]}). Leave them out.")
    numbers = [label for label in labels if isinstance(label, int)]
    if num_classes is not None and numbers and max(numbers) >= num_classes:
        raise ValueError(f"meta_dataset has the label {max(numbers)}, but the model has {num_classes} classes.")


def _first_label(dataset: Any, label_column: str) -> set[Any]:
    with preserve_random_state():
        row = next(iter(dataset), None) if isinstance(dataset, IterableDataset) else dataset[0]
    if row is None:
        raise EmptyMetaSetError(EMPTY)
    label = _row_label(row, label_column, "meta_dataset") if isinstance(row, Mapping) else ()
    return {label} if label is None or isinstance(label, (int, str)) else set()


def _labels(dataset: Any, label_column: str) -> np.ndarray:
    what = "meta_split: the training set"
    if isinstance(dataset, datasets.Dataset):
        name = _label_name(dataset.features, [label_column], what)
        # Other columns are not even read: masks would be decoded.
        labels = _column(dataset, name) if _is_class(dataset.features[name]) else [0] * len(dataset)
    else:
        with preserve_random_state():
            labels = [_row_label(dataset[i], label_column, what) for i in range(len(dataset))]
        if not all(label is None or isinstance(label, (int, str)) for label in labels):
            labels = [0] * len(labels)
    if None in labels:
        raise ValueError(f"{what} has no label in row {labels.index(None)} ({label_column}=None). Leave such rows out.")
    return np.asarray(labels)


def _row_label(row: Any, label_column: str, what: str) -> Any:
    if not isinstance(row, Mapping):
        raise ValueError(f"{what} has rows of {type(row)}; give rows as dicts with the class as {label_column!r}.")
    label = row[_label_name(row, (label_column, "label", "labels"), what)]
    return label.tolist() if isinstance(label, (torch.Tensor, np.ndarray, np.generic)) else label


def _label_name(columns: Mapping[str, Any], names: Sequence[str], what: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise ValueError(
        f"{what} has no column {names[0]!r} to take the classes from; its columns are {list(columns)}. Rename the "
        "column of the classes to 'label' or 'labels', or name it in args.label_names."
    )


def _is_class(feature: Any) -> bool:
    kinds = ("int", "uint", "string", "large_string", "bool")
    return isinstance(feature, (datasets.ClassLabel, datasets.Value)) and feature.dtype.startswith(kinds)


def _column(dataset: datasets.Dataset, name: str) -> list[Any]:
    # As arrow, so that neither images are decoded nor a transform runs, and 20 times as fast as row by row.
    return dataset.select_columns(name).with_format("arrow")[:][name].to_pylist()


def _as_it_is(batch: Any) -> Any:
    return batch
