"""An endless, shuffled, sharded, resumable stream of validation batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, Subset

from .hypergradient import preserve_random_state

LABEL_CANDIDATES = ("label", "labels")


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
            Processes that load ahead. Iterable datasets are read by one at most, to keep their order.
        process_index (`int`, *optional*, defaults to 0), num_processes (`int`, *optional*, defaults to 1):
            Which of how many processes this is; each gets batches of its own.
        shuffle_buffer_size (`int`, *optional*, defaults to 1000):
            Rows that `datasets.IterableDataset.shuffle` holds in memory.

    Example:

    ```python
    >>> from metalr_hf.meta_stream import MetaStream
    >>> stream = MetaStream(range(5), batch_size=3, collate_fn=list)
    >>> batches = [next(stream) for _ in range(5)]
    >>> [len(batch) for batch in batches]
    [3, 3, 3, 3, 3]
    >>> sorted(sum(batches, []))
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
        self.position = 0
        self._iterator: Iterator[Any] | None = None
        if isinstance(dataset, IterableDataset):
            rows = _IterableRows(dataset, seed, process_index, num_processes, shuffle_buffer_size)
            self._source: Any = _IterableBatches(rows, batch_size, collate_fn, seed, process_index)
            self._sampler = None
            num_workers = min(num_workers, 1)
        else:
            self._source = _MapBatches(dataset, collate_fn, seed, process_index)
            self._sampler = _BatchSampler(len(dataset), batch_size, seed, process_index, num_processes)
        self._num_workers = num_workers

    def __iter__(self) -> MetaStream:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position: how many batches were taken."""
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on after the batches taken before; an iterable dataset is read again up to there."""
        self.position = state_dict["position"]
        self._iterator = None

    def _start(self) -> Iterator[Any]:
        (self._source if self._sampler is None else self._sampler).first = self.position
        loader: DataLoader[Any] = DataLoader(
            self._source,
            batch_size=None,
            sampler=self._sampler,
            num_workers=self._num_workers,
            # Without one, every iterator draws a seed from the global generator.
            generator=torch.Generator().manual_seed(0),
            collate_fn=_as_it_is,
        )
        return iter(loader)


class _BatchSampler(Sampler[tuple[int, list[int]]]):
    """Numbers and rows of this process's batches: the epochs' permutations one after the other, dealt out in turn."""

    def __init__(self, rows: int, batch_size: int, seed: int, process_index: int, num_processes: int):
        if rows == 0:
            raise ValueError("meta_dataset is empty: there is nothing to tune on. Give labelled images.")
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.process_index, self.num_processes = process_index, num_processes
        self.first = 0

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        number, epoch, order = self.first, -1, [0]
        while True:
            start = (number * self.num_processes + self.process_index) * self.batch_size
            batch = []
            for place in range(start, start + self.batch_size):
                if place // self.rows != epoch:
                    epoch = place // self.rows
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.rows).tolist()
                batch.append(order[place % self.rows])
            yield number, batch
            number += 1


class _MapBatches(Dataset[Any]):
    """Batch number and rows to the collated batch."""

    def __init__(self, dataset: Any, collate_fn: Callable[[list[Any]], Any], seed: int, process_index: int):
        self.dataset, self.collate_fn, self.seed, self.process_index = dataset, collate_fn, seed, process_index

    def __getitem__(self, batch: tuple[int, list[int]]) -> Any:
        number, indices = batch
        with _own_random_numbers(self.seed, number, self.process_index):
            try:
                return self.collate_fn(self._rows(indices))
            except Exception as error:
                raise RuntimeError(f"Validation batch {number}, rows {indices} of the meta set: {error}") from error

    def _rows(self, indices: list[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[i] for i in indices]


class _IterableRows:
    """This process's rows of an iterable dataset, epoch after epoch, each shuffled anew."""

    def __init__(self, dataset: Any, seed: int, process_index: int, num_processes: int, shuffle_buffer_size: int):
        self.deal = num_processes
        self.process_index = process_index
        if isinstance(dataset, datasets.IterableDataset):
            dataset = dataset.shuffle(seed=seed, buffer_size=shuffle_buffer_size)
            if num_processes > 1:
                dataset = datasets.distributed.split_dataset_by_node(dataset, process_index, num_processes)
            self.deal = 1
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        epoch = 0
        while True:
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(epoch)
            count = 0
            for count, row in enumerate(self.dataset, start=1):
                if (count - 1) % self.deal == self.process_index % self.deal:
                    yield row
            if count == 0:
                raise ValueError("meta_dataset is empty: its stream ended without a row. Give labelled images.")
            epoch += 1


class _IterableBatches(IterableDataset[Any]):
    """Collated batches of endless rows."""

    def __init__(
        self,
        rows: _IterableRows,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        seed: int,
        process_index: int,
    ):
        self.rows, self.batch_size, self.collate_fn = rows, batch_size, collate_fn
        self.seed, self.process_index = seed, process_index
        self.first = 0

    def __iter__(self) -> Iterator[Any]:
        rows, number = iter(self.rows), 0
        while True:
            with _own_random_numbers(self.seed, number, self.process_index):
                try:
                    batch = [next(rows) for _ in range(self.batch_size)]
                    # Batches before the first are read to come to the same place in the shuffle buffer.
                    collated = self.collate_fn(batch) if number >= self.first else None
                except ValueError:
                    raise
                except Exception as error:
                    raise RuntimeError(f"Validation batch {number} of the meta set: {error}") from error
            if number >= self.first:
                yield collated
            number += 1


@contextmanager
def _own_random_numbers(*seeds: int) -> Iterator[None]:
    """Random numbers that depend on the given seeds alone; the global generators are put back."""
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    with preserve_random_state():
        # Not torch.manual_seed, which seeds the accelerators too.
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def split_meta_dataset(
    dataset: Any, meta_split: float, *, label_column: str = "label", seed: int = 0
) -> tuple[Any, Any]:
    """Holds out a share of a training set for validation batches, stratified by label.

    Args:
        dataset (`datasets.Dataset` or map-style torch dataset):
            The training set.
        meta_split (`float`):
            The share to hold out, in (0, 1). Each class keeps at least one row to train on.
        label_column (`str`, *optional*, defaults to `"label"`):
            The column of the classes.
        seed (`int`, *optional*, defaults to 0):
            Of the choice of rows.

    Returns:
        `tuple`: the rest to train on and the held-out rows, both in the order of the dataset.

    Raises:
        ValueError: if the dataset is a stream, has no such column, or no row would be held out.
    """
    if not 0 <= meta_split < 1:
        raise ValueError(
            f"meta_split={meta_split!r} must be in [0, 1): the share of the training set held out to tune on."
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"meta_split={meta_split} needs a training set with a length; a stream cannot be split. Pass the rows to "
            "tune on as meta_dataset."
        )
    labels = _labels(dataset, label_column)
    generator = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in np.unique(labels):
        rows = generator.permutation(np.flatnonzero(labels == label))
        # The fraction of a row that is due is given to a class by chance, or rare classes would never be held out.
        due = meta_split * len(rows)
        count = min(int(due) + int(generator.random() < due % 1), len(rows) - 1)
        held_out += rows[:count].tolist()
    if not held_out:
        raise ValueError(
            f"meta_split={meta_split} of {len(labels)} training rows holds out none. Make it larger, or pass a "
            "meta_dataset."
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
            The meta set. Of a stream only the description of its columns is looked at.
        label_column (`str`):
            The column of the classes.
        num_classes (`int`, *optional*):
            How many classes the model has.

    Raises:
        ValueError: if it is empty, has no labels, or has other classes than the model.
    """
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError("meta_dataset is empty: there is nothing to tune on. Give labelled images.")
    features = getattr(dataset, "features", None)
    if features is not None and label_column not in features:
        raise ValueError(
            f"meta_dataset has no column {label_column!r} to tune on; its columns are {list(features)}. Rename the "
            "column of the classes to 'label' or 'labels', or name it in args.label_names."
        )
    feature = None if features is None else features[label_column]
    if isinstance(feature, datasets.ClassLabel) and num_classes is not None and feature.num_classes != num_classes:
        raise ValueError(
            f"meta_dataset has {feature.num_classes} classes ({', '.join(feature.names[:5])}, ...), but the model has "
            f"{num_classes}. Validation images need the classes of the training images."
        )
    if not isinstance(dataset, datasets.Dataset):
        return
    values = dataset.unique(label_column) if isinstance(feature, (datasets.ClassLabel, datasets.Value)) else []
    unlabelled = [value for value in values if value is None or value == -1]
    if unlabelled:
        raise ValueError(f"meta_dataset has rows without a label ({label_column}={unlabelled[0]}). Leave them out.")
    if num_classes is not None and any(isinstance(value, int) and value >= num_classes for value in values):
        raise ValueError(f"meta_dataset has the label {max(values)}, but the model has {num_classes} classes.")


def _labels(dataset: Any, label_column: str) -> np.ndarray:
    if isinstance(dataset, datasets.Dataset):
        if label_column not in dataset.column_names:
            raise ValueError(
                f"meta_split needs the column of the classes, {label_column!r}, to hold out a share of each; the "
                f"columns are {dataset.column_names}. Name it in args.label_names."
            )
        # Without the format, so that no image is decoded.
        return np.asarray(dataset.with_format(None)[label_column])
    rows = [dataset[i] for i in range(len(dataset))]
    names = [name for name in (label_column, *LABEL_CANDIDATES) if isinstance(rows[0], dict) and name in rows[0]]
    if not names:
        raise ValueError(f"meta_split needs rows with {label_column!r}, but the training set's are {type(rows[0])}.")
    return np.asarray([int(row[names[0]]) for row in rows])


def _as_it_is(batch: Any) -> Any:
    return batch
