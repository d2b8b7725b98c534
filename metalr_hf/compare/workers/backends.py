"""Where the runs of a comparison run: on this machine, or on a Dask or Ray cluster."""

from __future__ import annotations

import importlib.util

from ...messages import did_you_mean
from ...settings import check_count
from .clusters import dask_workers, ray_workers
from .local import Work, Worker, local_workers

LOCAL, DASK, RAY = "local", "dask", "ray"
# Backend to the package that it needs.
BACKENDS = {LOCAL: "joblib", DASK: "distributed", RAY: "ray"}


def check_backend(workers: int | None, backend: str, scheduler: str | None) -> None:
    """Checks where runs are to run.

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
            f"backend={backend!r} is not one.{did_you_mean(backend, BACKENDS)} There are: {', '.join(BACKENDS)}."
        )
    if backend == LOCAL and scheduler is not None:
        raise ValueError(f"scheduler={scheduler!r} is for the backends dask and ray: give one of them as backend.")
    if backend == DASK and scheduler is None:
        raise ValueError(
            "backend='dask' needs scheduler, the address of Dask's scheduler, such as tcp://10.0.0.1:8786."
        )
    if importlib.util.find_spec(package := BACKENDS[backend]) is None:
        raise ImportError(f"backend={backend!r} needs a package more: pip install {package}")


def find_workers(work: Work, workers: int | None, backend: str, scheduler: str | None) -> list[Worker]:
    """The workers that a comparison can use.

    Args:
        work (`Callable`): What each calls with what it is given.
        workers (`int`, *optional*):
            How many. By default one per GPU of this machine, or one; of a cluster all.
        backend (`str`): `"local"`, `"dask"` or `"ray"`.
        scheduler (`str`, *optional*): Address of the cluster.

    Returns:
        `list[Worker]`: one or more.

    Raises:
        ValueError, TypeError, ImportError: as [`check_backend`] does, and for Dask workers of several threads.
        ConnectionError: if no cluster answers, or it has no workers.

    Example:

    ```python
    >>> from metalr_hf.compare.workers import find_workers
    >>> [worker.name for worker in find_workers(abs, 1, "local", None)]
    ['this process']

    ```
    """
    check_backend(workers, backend, scheduler)
    if backend == DASK:
        assert scheduler is not None
        return dask_workers(work, workers, scheduler)
    if backend == RAY:
        return ray_workers(work, workers, scheduler)
    return local_workers(work, workers)
