"""Who does the runs of a comparison: this process, others of this machine, or those of a cluster."""

from .backends import LOCAL, check_backend, find_workers
from .local import Lost, Work, Worker, local_workers, run_on_workers

__all__ = [
    "LOCAL",
    "Lost",
    "Work",
    "Worker",
    "check_backend",
    "find_workers",
    "local_workers",
    "run_on_workers",
]
