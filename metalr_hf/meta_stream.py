"""An endless, shuffled, sharded, resumable stream of validation batches."""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from transformers.utils import logging

from .hypergradient import preserve_random_state

logger = logging.get_logger(__name__)

# Seconds. datasets itself retries reads of remote files; other streams may not.
RETRY_AFTER = (1, 2, 4)
EMPTY = "meta_dataset is empty: there is nothing to tune on. Give labelled images, at least one for each process."


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
    >>> from metalr_hf.meta_stream import MetaStream
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
        process_index: int = 0,
        num_processes: int = 1,
        shuffle_buffer_size: int = 1000,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1: the rows of a validation batch.")
        if not 0 <= process_index < num_processes:
            raise ValueError(f"process_index={process_index} must be in [0, num_processes={num_processes}).")
        self.position = 0
        self._place: dict[str, int] = {}
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
            self._source: Any = _IterableBatches(dataset, collate_fn, seed, process_index, batch_size, num_processes)
        else:
            if len(dataset) == 0:
                raise ValueError(EMPTY)
            self._source = _MapBatches(dataset, collate_fn, seed, process_index)
            self._rows_after = partial(_numbered_rows, len(dataset), batch_size, seed, process_index, num_processes)
        self._num_workers = num_workers

    def __iter__(self) -> MetaStream:
        return self

    def __next__(self) -> Any:
        for wait in (*RETRY_AFTER, None):
            if self._iterator is None:
                self._iterator = self._start()
            try:
                batch, self._place = next(self._iterator)
                self.position += 1
                return batch
            except Exception as error:
                # Workers would go on with the batch after, and the position would be one short.
                self._iterator = None
                if wait is None or not isinstance(error.__cause__, (ConnectionError, TimeoutError)):
                    raise
                logger.warning(f"{error} Trying again in {wait} s.")
                time.sleep(wait)
        raise AssertionError

    def state_dict(self) -> dict[str, int]:
        """The position: how many batches were taken, of an iterable dataset also the epoch and the rows read in it."""
        return {"position": self.position, **self._place}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on after the batches taken before; an iterable dataset is read again from its epoch's start."""
        self._place = dict(state_dict)
        self.position = self._place.pop("position")
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        if self._rows_after is None:
            self._source.place = self._place
        sampler = None if self._rows_after is None else self._rows_after(self.position)
        # Without a generator, every iterator draws a seed from the global one.
        generator = torch.Generator().manual_seed(0)
        options: dict[str, Any] = {"num_workers": self._num_workers, "collate_fn": _as_it_is, "generator": generator}
        return iter(DataLoader(self._source, batch_size=None, sampler=sampler, **options))


def _numbered_rows(
    rows: int, batch_size: int, seed: int, process_index: int, num_processes: int, first: int
) -> Iterator[tuple[int, list[int]]]:
    """Numbers and rows of this process's batches: the epochs' permutations one after the other, dealt out in turn."""
    epoch, order = -1, [0]
    for number in itertools.count(first):
        start = (number * num_processes + process_index) * batch_size
        batch = []
        for place in range(start, start + batch_size):
            if place // rows != epoch:
                epoch = place // rows
                order = np.random.default_rng([seed, epoch]).permutation(rows).tolist()
            batch.append(order[place % rows])
        yield number, batch


@dataclass(eq=False)
class _MapBatches(Dataset[Any]):
    """Batch number and rows to the collated batch."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    seed: int
    process_index: int

    def __getitem__(self, batch: tuple[int, list[int]]) -> tuple[Any, dict[str, int]]:
        number, indices = batch
        with preserve_random_state():
            _seed_generators(self.seed, number, self.process_index)
            try:
                return self.collate_fn(self._fetch(indices)), {}
            except Exception as error:
                row = next((i for i in indices if self._fails(i)), indices)
                raise _unusable(f"Row {row} (validation batch {number})", error) from error

    def _fetch(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self.dataset[i] for i in indices]

    def _fails(self, index: int) -> bool:
        with suppress(Exception):
            self._fetch([index])
            return False
        return True


@dataclass(eq=False)
class _IterableBatches(IterableDataset[Any]):
    """Collated batches of an iterable dataset, epoch after epoch, each shuffled anew; and the place after each."""

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    seed: int
    process_index: int
    batch_size: int
    num_processes: int
    place: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, int]]]:
        rows = self._rows(self.place.get("epoch", 0), self.place.get("row", 0))
        while True:
            with preserve_random_state():
                taken = [next(rows) for _ in range(self.batch_size)]
                batch = self.collate_fn([row for row, _ in taken])
            yield batch, taken[-1][1]

    def _rows(self, epoch: int, read_before: int) -> Iterator[tuple[Any, dict[str, int]]]:
        # datasets' own streams are dealt out already.
        deal = 1 if isinstance(self.dataset, datasets.IterableDataset) else self.num_processes
        while True:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            rows = iter(self.dataset)
            for count in itertools.count():
                # For each row anew, so that reading an epoch again up to a place makes the same rows.
                _seed_generators(self.seed, self.process_index, epoch, count)
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except Exception as error:
                    raise _unusable(f"Row {count} of epoch {epoch}", error) from error
                # Each epoch deals from another process on, or few rows would leave some processes without any.
                if count >= read_before and (count + epoch - self.process_index) % deal == 0:
                    yield row, {"epoch": epoch, "row": count + 1}
            if count == 0:
                raise ValueError(EMPTY)
            epoch, read_before = epoch + 1, 0


def _one_shard_at_a_time(dataset: datasets.IterableDataset) -> dict[str, int]:
    # Versions that read several do so in threads, which would draw from the training's generators at any moment.
    name = "max_buffer_input_shards"
    return {name: 1} if name in inspect.signature(dataset.shuffle).parameters else {}


def _seed_generators(*seeds: int) -> None:
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    # Not torch.manual_seed, which seeds the accelerators too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def _unusable(what: str, error: Exception) -> RuntimeError:
    return RuntimeError(f"{what} of the meta set cannot be used: {error!r}. Repair the row or leave it out.")


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
            The column of the classes (integers or strings). Other labels, as masks or numbers to predict, are not
            stratified. Torch datasets have it, or `"labels"`, as a key of their rows.
        seed (`int`, *optional*, defaults to 0):
            Of the choice of rows.

    Returns:
        `tuple`: the rest to train on and the held-out rows, both in the order of the dataset.

    Raises:
        ValueError: if the dataset is a stream, has no such column, or no row would be held out.

    Example:

    ```python
    >>> from metalr_hf.meta_stream import split_meta_dataset
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
        ValueError: if it is empty, has no labels, or has other classes than the model.

    Example:

    ```python
    >>> from metalr_hf.meta_stream import check_meta_dataset
    >>> check_meta_dataset([{"label": 0}, {"label": 1}], label_column="label", num_classes=2)

    ```
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(EMPTY)
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
        raise ValueError(EMPTY)
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
