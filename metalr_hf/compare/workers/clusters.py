"""The workers of a Dask or Ray cluster."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import lru_cache
from typing import Any
from uuid import uuid4

from cloudpickle import dumps

from ...messages import first_line
from .local import TRIES, Lost, Work, Worker

SECONDS_TO_CONNECT = 10


class DaskWorker(Worker):
    """A worker of a Dask cluster. If it is gone, the scheduler tries its run again on another.

    Args:
        client (`distributed.Client`): Of the cluster.
        address (`str`): Of the worker.
        work (`bytes`): The work, pickled.
    """

    def __init__(self, client: Any, address: str, work: bytes):
        self.client, self.name, self.work = client, address, work
        self.future: Any = None

    def run(self, item: Any) -> Any:
        from distributed import KilledWorker

        self.future = self.client.submit(
            call_pickled,
            self.work,
            item,
            key=f"{getattr(item, 'label', 'run')}-{uuid4().hex}",
            # Left to the scheduler alone, it would not be known which worker a run is on.
            workers=[self.name],
            allow_other_workers=True,
        )
        try:
            return self.future.result()
        except KilledWorker as error:
            return Lost(f"Its workers ended: {first_line(error)}")

    def stop(self) -> None:
        if self.future is None or self.future.done():
            return
        busy = [address for address, keys in self.client.processing().items() if self.future.key in keys]
        self.future.cancel()
        # A cancelled task goes on to its end. It is the only one of its worker, which has one thread.
        self.client.restart_workers(busy, timeout=SECONDS_TO_CONNECT, raise_for_error=False)

    def close(self) -> None:
        self.client.close()


class RayWorker(Worker):
    """A share of a Ray cluster.

    Args:
        name (`str`): What the progress display calls it.
        work (`ray.ObjectRef`): The work, pickled.
        gpus (`float`): Its share of the GPUs.
    """

    def __init__(self, name: str, work: Any, gpus: float):
        import ray

        self.name, self.work = name, work
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)(call_pickled)
        self.reference: Any = None

    def run(self, item: Any) -> Any:
        import ray

        self.reference = self.remote.remote(self.work, item)
        try:
            return ray.get(self.reference)
        except ray.exceptions.WorkerCrashedError as error:
            return Lost(f"Its process ended {TRIES} times: {first_line(error)}")

    def stop(self) -> None:
        import ray

        if self.reference is not None:
            ray.cancel(self.reference, force=True)


@lru_cache(maxsize=1)
def _unpickled(work: bytes) -> Work:
    return pickle.loads(work)


def call_pickled(work: bytes, item: Any) -> Any:
    """Calls pickled work, which a process unpickles once.

    Args:
        work (`bytes`): The work, pickled.
        item: What to call it with.

    Returns:
        What the work returned.

    Example:

    ```python
    >>> import pickle
    >>> from metalr_hf.compare.workers.clusters import call_pickled
    >>> call_pickled(pickle.dumps(abs), -3)
    3

    ```
    """
    return _unpickled(work)(item)


def dask_workers(work: Callable[[Any], Any], count: int | None, address: str) -> list[Worker]:
    """The workers of a Dask cluster.

    Args:
        work (`Callable`): What to call with each item.
        count (`int`, *optional*): How many at most; by default all.
        address (`str`): Of the scheduler.

    Returns:
        `list[Worker]`

    Raises:
        ValueError: if its workers have several threads.
        ConnectionError: if no scheduler answers, or it has no workers.
    """
    from distributed import Client

    try:
        client = Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"scheduler={address!r} has no Dask workers to offer: {first_line(error)}") from error
    threads: dict[str, int] = client.nthreads()
    # A run seeds and counts what belongs to its whole process, so that two in one process would disturb each other.
    if many := [worker for worker, number in threads.items() if number > 1]:
        client.close()
        raise ValueError(
            f"scheduler={address!r} has workers of several threads ({', '.join(many[:3])}), which would run several "
            "runs in one process: start them with `dask worker --nthreads 1`, and --nworkers for more at a time."
        )
    pickled = dumps(work)
    return [DaskWorker(client, worker, pickled) for worker in list(threads)[:count]]


def ray_workers(work: Callable[[Any], Any], count: int | None, address: str | None) -> list[Worker]:
    """Shares of a Ray cluster.

    Args:
        work (`Callable`): What to call with each item.
        count (`int`, *optional*): How many; by default one per GPU of the cluster, or one per processor.
        address (`str`, *optional*): Of the cluster; by default a new one on this machine, or that of `ray.init`.

    Returns:
        `list[Worker]`

    Raises:
        ConnectionError: if no cluster answers.
    """
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ConnectionError(f"scheduler={address!r} is no Ray cluster: {first_line(error)}") from error
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    count = count or gpus or max(1, int(resources.get("CPU", 1)))
    pickled = ray.put(dumps(work))
    return [RayWorker(f"Ray {i + 1}", pickled, min(1.0, gpus / count)) for i in range(count)]
