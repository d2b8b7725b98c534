"""The workers of a comparison: this process, or processes of their own on this machine, each with one run at a time."""

from __future__ import annotations

import os
import pickle
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import torch
from cloudpickle import dumps
from joblib.externals.loky import ProcessPoolExecutor
from joblib.externals.loky.process_executor import BrokenProcessPool

from ...messages import first_line

# A run whose process was killed is tried again, but not for ever: it may be the run that exhausts the memory.
TRIES = 2

Work = Callable[[Any], Any]


@dataclass(frozen=True)
class Lost:
    """What stands in place of a result if the process of a run was killed at every try.

    Args:
        reason (`str`): What is known of it.
    """

    reason: str


class Worker(ABC):
    """Does one run at a time.

    Attributes:
        name (`str`): What the progress display calls it.
    """

    name: str

    @abstractmethod
    def run(self, item: Any) -> Any:
        """Calls the work with an item and waits for it.

        Args:
            item: What to call the work with.

        Returns:
            What the work returned, or [`Lost`].
        """

    def stop(self) -> None:  # noqa: B027 (there may be nothing to stop)
        """Ends what is running, at once, from another thread."""

    def close(self) -> None:  # noqa: B027 (there may be nothing to close)
        """Lets go of what the worker holds, after all workers have stopped."""


class InlineWorker(Worker):
    """This process.

    Args:
        work (`Callable`): What to call with each item.
    """

    name = "this process"

    def __init__(self, work: Work):
        self.work = work

    def run(self, item: Any) -> Any:
        return self.work(item)


class ProcessWorker(Worker):
    """A process of its own, started with its first run, and again if it is killed.

    Each has an executor to itself: if one process of an executor is killed, its other processes are ended too.

    Args:
        name (`str`): What the progress display calls it.
        work (`bytes`): The work, pickled.
        threads (`int`): Threads of the process.
        environment (`dict[str, str]`): Further environment variables of the process.
    """

    def __init__(self, name: str, work: bytes, threads: int, environment: dict[str, str]):
        self.name = name
        self.work = work
        self.threads = threads
        self.environment = {**environment, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.executor: ProcessPoolExecutor | None = None
        self.stopped = False
        self.lock = Lock()

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
                    1, initializer=_begin, initargs=(self.work, self.threads, os.getpid()), env=self.environment
                )
            return self.executor

    def stop(self) -> None:
        with self.lock:
            self.stopped, executor = True, self.executor
        if executor is not None:
            executor.shutdown(wait=True, kill_workers=True)


# In a process of its own: what it was sent when it started.
_kept: Work


def _begin(work: bytes, threads: int, parent: int) -> None:
    global _kept
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    # Ctrl-C in a terminal reaches every process; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    _kept = pickle.loads(work)


def _end_with(parent: int) -> None:
    """Ends this process if the one that started it is killed, for which it would go on training."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _call_kept(item: Any) -> Any:
    return _kept(item)


def local_workers(work: Work, count: int | None = None) -> list[Worker]:
    """Workers on this machine.

    Args:
        work (`Callable`): What to call with each item.
        count (`int`, *optional*): How many; by default one per GPU, or one.

    Returns:
        `list[Worker]`: one for this process, or so many processes, which share its threads and the GPUs.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import local_workers
    >>> [worker.name for worker in local_workers(abs, 2)]
    ['worker 1', 'worker 2']

    ```
    """
    gpus = _visible_gpus()
    count = count or max(1, len(gpus))
    # If several GPUs are visible, Trainer spreads a batch over them, which is another run.
    if count == 1 and len(gpus) <= 1:
        return [InlineWorker(work)]
    pickled, threads = dumps(work), max(1, torch.get_num_threads() // count)
    workers: list[Worker] = []
    for i in range(count):
        name, environment = f"worker {i + 1}", {}
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpu = gpus[i % len(gpus)]
            name += f" (GPU {gpu})"
        workers.append(ProcessWorker(name, pickled, threads, environment))
    return workers


def _visible_gpus() -> list[str]:
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def run_on_workers(
    workers: Sequence[Worker],
    items: Sequence[Hashable],
    on_start: Callable[[Any, str], None],
    on_end: Callable[[Any, Any], None],
) -> None:
    """Calls the work of the workers with every item, each of them with one at a time.

    If an error or Ctrl-C ends it, the workers are stopped, and `on_end` is still called for what had ended.

    Args:
        workers (`Sequence[Worker]`): Who does it.
        items (`Sequence`): What to call the work with, in the order in which to start.
        on_start (`Callable[[item, str], None]`): Called in this thread when an item starts, with the worker's name.
        on_end (`Callable[[item, result], None]`): Called in this thread when an item ends.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import local_workers, run_on_workers
    >>> run_on_workers(local_workers(abs, 1), [-3], lambda item, worker: None, lambda item, result: print(item, result))
    -3 3

    ```
    """
    if isinstance(workers[0], InlineWorker):
        # Without a thread, so that Ctrl-C ends the run and not only the wait for it.
        for item in items:
            on_start(item, workers[0].name)
            on_end(item, workers[0].run(item))
        return
    waiting = deque(items)
    # What has happened: a callback with its arguments, or an error.
    events: SimpleQueue[tuple[Callable[[Any, Any], None], Any, Any] | BaseException] = SimpleQueue()

    def serve(worker: Worker) -> None:
        try:
            while True:
                try:
                    item = waiting.popleft()
                except IndexError:
                    return
                events.put((on_start, item, worker.name))
                events.put((on_end, item, worker.run(item)))
        except BaseException as error:
            events.put(error)

    threads = [Thread(target=serve, args=(worker,), daemon=True) for worker in workers[: len(items)]]
    for thread in threads:
        thread.start()
    ended = 0
    try:
        while ended < len(items):
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            callback, item, said = event
            callback(item, said)
            ended += callback is on_end
    finally:
        waiting.clear()
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()
        for worker in workers:
            worker.close()
        while not events.empty():
            event = events.get()
            # A run that was lost may have been lost to being stopped.
            if isinstance(event, tuple) and event[0] is on_end and not isinstance(event[2], Lost):
                on_end(*event[1:])
