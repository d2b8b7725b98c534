"""Collated batches of map-style and iterable datasets, from which the stream of validation batches is made."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from ...tuning.contexts import preserve_random_state

EMPTY = "meta_dataset is empty: there is nothing to tune on. Give labelled images, at least one for each process."
# By name, so that none of these has to be imported or even installed.
INTERRUPTIONS = {
    "builtins.ConnectionError",
    "builtins.TimeoutError",
    "asyncio.exceptions.TimeoutError",
    "httpx.RequestError",
    "httpx2.RequestError",
    "aiohttp.client_exceptions.ClientError",
    "requests.exceptions.ConnectionError",
    "requests.exceptions.Timeout",
    "urllib3.exceptions.HTTPError",
    "http.client.IncompleteRead",
}


class EmptyMetaSetError(ValueError):
    """The meta set has no rows."""


class UnusableRowError(RuntimeError):
    """A row of the meta set cannot be read or collated; the message names it.

    Raised where the batch is asked for: an error raised in a worker process would come out with the worker's traceback
    as its message, and without its cause.
    """


class InterruptedStreamError(UnusableRowError):
    """A row cannot be read because a connection is broken, which may pass."""


def numbered_rows(
    rows: int, batch_size: int, seed: int, process_index: int, num_processes: int, first: int
) -> Iterator[tuple[int, list[int]]]:
    """Yields the batches of this process: each epoch is a permutation, whose batches go to the processes in turn.

    Args:
        rows (`int`): Rows of the dataset.
        batch_size (`int`): Rows a batch.
        seed (`int`): Of the permutations.
        process_index (`int`): Which process this is.
        num_processes (`int`): Of how many.
        first (`int`): Number of the batch to begin with.

    Returns:
        `Iterator[tuple[int, list[int]]]`: number and rows of a batch, without end.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches.collated import numbered_rows
    >>> batches = numbered_rows(rows=4, batch_size=2, seed=0, process_index=0, num_processes=1, first=0)
    >>> sorted(row for _ in range(2) for row in next(batches)[1])
    [0, 1, 2, 3]

    ```
    """
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
class MapBatches(Dataset[Any]):
    """Batch number and rows to the collated batch, or to the error that it cannot be made."""

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
                return unusable(f"Row {row} (validation batch {number})", error), {}

    def _fetch(self, indices: list[int]) -> list[Any]:
        fetch = getattr(self.dataset, "__getitems__", None)
        return fetch(indices) if fetch else [self.dataset[i] for i in indices]

    def _fails(self, index: int) -> bool:
        with suppress(Exception):
            self._fetch([index])
            return False
        return True


@dataclass(eq=False)
class IterableBatches(IterableDataset[Any]):
    """Collated batches of an iterable dataset, epoch after epoch, each shuffled anew; and the place after each.

    The last may be the error that no more can be made.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any]
    seed: int
    process_index: int
    batch_size: int
    num_processes: int
    place: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Any, dict[str, int]]]:
        rows = self._rows(self.place.get("epoch", 0), self.place.get("row", 0))
        taken: list[tuple[Any, dict[str, int]]] = []
        batch: Any = None
        while not isinstance(batch, UnusableRowError):
            with preserve_random_state():
                try:
                    taken = [next(rows) for _ in range(self.batch_size)]
                    batch = self.collate_fn([row for row, _ in taken])
                except UnusableRowError as error:
                    batch = error
                except EmptyMetaSetError:
                    raise
                except Exception as error:
                    numbers = [place["row"] - 1 for _, place in taken]
                    batch = unusable(f"Rows {numbers} of epoch {taken[-1][1]['epoch']}", error)
            yield batch, taken[-1][1] if taken else {}

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
                    raise unusable(f"Row {count} of epoch {epoch}", error) from error
                # Each epoch deals from another process on, or few rows would leave some processes without any.
                if count >= read_before and (count + epoch - self.process_index) % deal == 0:
                    yield row, {"epoch": epoch, "row": count + 1}
            if count == 0:
                raise EmptyMetaSetError(EMPTY)
            epoch, read_before = epoch + 1, 0


def _seed_generators(*seeds: int) -> None:
    seed = int(np.random.SeedSequence(seeds).generate_state(1)[0])
    # Not torch.manual_seed, which seeds the accelerators too.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def unusable(what: str, error: Exception) -> UnusableRowError:
    """The error for a row that cannot be used.

    Args:
        what (`str`): Which row.
        error (`Exception`): Why.

    Returns:
        [`UnusableRowError`]: an [`InterruptedStreamError`] if a connection broke.

    Example:

    ```python
    >>> from metalr_hf.trainer.batches.collated import unusable
    >>> print(unusable("Row 7", OSError("truncated")))
    Row 7 of the meta set cannot be used: OSError('truncated'). Repair the row or leave it out.

    ```
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if names & INTERRUPTIONS:
        found: UnusableRowError = InterruptedStreamError(f"{what} of the meta set cannot be read: {error!r}.")
    else:
        found = UnusableRowError(f"{what} of the meta set cannot be used: {error!r}. Repair the row or leave it out.")
    found.__cause__ = error
    return found
