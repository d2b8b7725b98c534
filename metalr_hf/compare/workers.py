"""Where the runs of a comparison run: in this process, in several on this machine, or on a Dask or Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import pickle
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue
from typing import Any
from uuid import uuid4

import torch
from cloudpickle import dumps
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from ..messages import did_you_mean, first_line
from ..settings import check_count

LOCAL, DASK, RAY = "local", "dask", "ray"
# Backend to the package that it needs.
BACKENDS = {LOCAL: "joblib", DASK: "distributed", RAY: "ray"}
# A run whose process was killed is tried again, but not for ever: it may be the run that exhausts the memory.
TRIES = 2
SECONDS_TO_CONNECT = 10

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Lost:
    """What stands in place of a result where the process was gone each time.

    Args:
        reason (`str`): What is known of it.
    """

    reason: str


class Place(ABC):
    """Something that does one piece of work at a time.

    Attributes:
        name (`str`): What the progress display calls it.
    """

    name: str

    @abstractmethod
    def run(self, item: Any) -> Any:
        """Does a piece of work and waits for it.

        Args:
            item: What to call the work with.

        Returns:
            What the work returned, or [`Lost`].
        """

    def stop(self) -> None:  # noqa: B027 (there may be nothing to stop)
        """Ends what is at work, at once."""

    def close(self) -> None:  # noqa: B027 (there may be nothing to close)
        """Lets go of what it holds, after all are stopped."""


class ThisProcess(Place):
    """This process."""

    name = "this process"

    def __init__(self, work: Work):
        self.work = work

    def run(self, item: Any) -> Any:
        return self.work(item)


class OwnProcess(Place):
    """A process of its own, started at its first piece of work, and again if it is killed.

    An executor each rather than one for all: where a process of an executor is killed, those beside it are ended too.
    """

    def __init__(self, name: str, work: bytes, threads: int, environment: dict[str, str]):
        self.name = name
        self.work = work
        self.threads = threads
        self.environment = {**environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.executor: ProcessPoolExecutor | None = None
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, item: Any) -> Any:
        reason = ""
        for _ in range(TRIES):
            try:
                return self._started().submit(_call_kept, item).result()
            except BrokenProcessPool as error:
                reason = first_line(error)
                with self.lock:
                    self.executor = None
        return Lost(f"Its process ended {TRIES} times: {reason}")

    def _started(self) -> ProcessPoolExecutor:
        with self.lock:
            if self.stopped:
                raise CancelledError
            if self.executor is None:
                self.executor = ProcessPoolExecutor(
                    1, initializer=_begin, initargs=(self.work, self.threads), env=self.environment
                )
            return self.executor

    def stop(self) -> None:
        with self.lock:
            self.stopped, executor = True, self.executor
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


class DaskWorker(Place):
    """A worker of a Dask cluster. The scheduler tries again elsewhere what a worker that is gone had begun."""

    def __init__(self, client: Any, address: str, name: str, work: bytes):
        self.client, self.address, self.name, self.work = client, address, name, work
        self.future: Any = None

    def run(self, item: Any) -> Any:
        from distributed import KilledWorker

        self.future = self.client.submit(
            _call_sent,
            self.work,
            item,
            key=f"{getattr(item, 'label', 'run')}-{uuid4().hex}",
            # Else the scheduler would know which worker the run is at, and the user would not.
            workers=[self.address],
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
        # A cancelled task would go on to its end. It is the only one of its worker, which has one thread.
        self.client.restart_workers(busy, timeout=SECONDS_TO_CONNECT, raise_for_error=False)

    def close(self) -> None:
        self.client.close()


class RayWorker(Place):
    """A share of a Ray cluster."""

    def __init__(self, name: str, work: Any, gpus: float):
        import ray

        self.name, self.work = name, work
        self.remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=TRIES - 1)(_call_sent)
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


# In a process of its own: what it was sent when it began.
_kept: Work


def _begin(work: bytes, threads: int) -> None:
    global _kept
    # Ctrl-C in a terminal reaches every process; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _kept = pickle.loads(work)


def _call_kept(item: Any) -> Any:
    return _kept(item)


@lru_cache(maxsize=1)
def _unpickled(work: bytes) -> Work:
    return pickle.loads(work)


def _call_sent(work: bytes, item: Any) -> Any:
    return _unpickled(work)(item)


def check_backend(workers: int | None, backend: str, scheduler: str | None) -> None:
    """Whether runs can be spread as asked.

    Args:
        workers (`int`, *optional*): How many at a time.
        backend (`str`): `"local"`, `"dask"` or `"ray"`.
        scheduler (`str`, *optional*): Address of Dask's scheduler or of the Ray cluster.

    Raises:
        ValueError, TypeError: if an argument has a value that it cannot have.
        ImportError: if the backend's package is not installed.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import check_backend
    >>> check_backend(2, "local", None)

    ```
    """
    if workers is not None:
        check_count("workers", workers)
    if backend not in BACKENDS:
        raise ValueError(
            f"backend={backend!r} is not one.{did_you_mean(backend, BACKENDS)} There are: local, dask, ray."
        )
    if backend == LOCAL and scheduler is not None:
        raise ValueError(f"scheduler={scheduler!r} is for the backends dask and ray: give one of them as backend.")
    if backend == DASK and scheduler is None:
        raise ValueError(
            "backend='dask' needs scheduler, the address of Dask's scheduler, such as tcp://10.0.0.1:8786."
        )
    if importlib.util.find_spec(package := BACKENDS[backend]) is None:
        raise ImportError(f"backend={backend!r} needs a package more: pip install {package}")


def find_places(work: Work, workers: int | None, backend: str, scheduler: str | None) -> list[Place]:
    """The places where runs can run at the same time.

    Args:
        work (`Callable`): What each does with what it is given.
        workers (`int`, *optional*):
            How many places at most. By default one a GPU on this machine, or one; all that a cluster has.
        backend (`str`): `"local"`, `"dask"` or `"ray"`.
        scheduler (`str`, *optional*): Address of the cluster.

    Returns:
        `list[Place]`: one or more.

    Raises:
        ValueError, TypeError, ImportError: as [`check_backend`] does, and for Dask workers of several threads.
        ConnectionError: if no cluster answers, or it has no workers.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import find_places
    >>> [place.name for place in find_places(abs, 2, "local", None)]
    ['worker 1', 'worker 2']

    ```
    """
    check_backend(workers, backend, scheduler)
    if backend == DASK:
        assert scheduler is not None
        return _dask_workers(work, workers, scheduler)
    if backend == RAY:
        return _ray_workers(work, workers, scheduler)
    gpus = _visible_gpus()
    count = workers or max(1, len(gpus))
    # With several GPUs in sight Trainer would spread a batch over them, which is another run.
    if count == 1 and len(gpus) <= 1:
        return [ThisProcess(work)]
    sent, threads = dumps(work), max(1, torch.get_num_threads() // count)
    places: list[Place] = []
    for i in range(count):
        gpu = gpus[i % len(gpus)] if gpus else None
        environment = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        name = f"worker {i + 1}" + ("" if gpu is None else f" (GPU {gpu})")
        places.append(OwnProcess(name, sent, threads, environment))
    return places


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def _dask_workers(work: Work, workers: int | None, scheduler: str) -> list[Place]:
    from distributed import Client

    try:
        client = Client(scheduler, timeout=SECONDS_TO_CONNECT, set_as_default=False)
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"scheduler={scheduler!r} has no Dask workers to offer: {first_line(error)}") from error
    threads: dict[str, int] = client.nthreads()
    # A run seeds and counts what belongs to its whole process, so that two in one process would disturb each other.
    if many := [address for address, count in threads.items() if count > 1]:
        raise ValueError(
            f"scheduler={scheduler!r} has workers of several threads ({', '.join(many[:3])}), which would run several "
            "runs in one process: start them with `dask worker --nthreads 1`, and --nworkers for more at a time."
        )
    sent = dumps(work)
    return [DaskWorker(client, address, address, sent) for address in list(threads)[:workers]]


def _ray_workers(work: Work, workers: int | None, address: str | None) -> list[Place]:
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise ConnectionError(f"scheduler={address!r} is no Ray cluster: {first_line(error)}") from error
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    count = workers or gpus or max(1, int(resources.get("CPU", 1)))
    sent = ray.put(dumps(work))
    return [RayWorker(f"Ray {i + 1}", sent, min(1.0, gpus / count)) for i in range(count)]


def spread(
    places: Sequence[Place],
    items: Sequence[Hashable],
    on_start: Callable[[Any, str], None],
    on_end: Callable[[Any, Any], None],
) -> None:
    """Does a piece of work an item, as many at a time as there are places.

    Args:
        places (`Sequence[Place]`): Where.
        items (`Sequence`): What, in the order in which to begin.
        on_start (`Callable[[item, str], None]`): Called before each with the item and the place, maybe in a thread.
        on_end (`Callable[[item, result], None]`): Called after each, in this thread, in the order in which they end.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import find_places, spread
    >>> places = find_places(abs, 1, "local", None)
    >>> spread(places, [-3], lambda item, place: None, lambda item, result: print(item, result))
    -3 3

    ```
    """
    if isinstance(places[0], ThisProcess):
        # Without a thread, so that Ctrl-C ends the run and not the wait for it.
        for item in items:
            on_start(item, places[0].name)
            on_end(item, places[0].run(item))
        return
    free: SimpleQueue[Place] = SimpleQueue()
    for place in places:
        free.put(place)

    def at_a_free_place(item: Hashable) -> Any:
        place = free.get()
        try:
            on_start(item, place.name)
            return place.run(item)
        finally:
            free.put(place)

    pool = ThreadPoolExecutor(len(places))
    waiting = {pool.submit(at_a_free_place, item): item for item in items}
    try:
        for future in as_completed(list(waiting)):
            item = waiting.pop(future)
            on_end(item, future.result())
    finally:
        # Ctrl-C and errors end what is at work; what has ended meanwhile is not lost.
        ended = [future for future in waiting if future.done() and future.exception() is None]
        for future in waiting:
            future.cancel()
        for place in places:
            place.stop()
        pool.shutdown(wait=True)
        for place in places:
            place.close()
        for future in ended:
            on_end(waiting[future], future.result())
