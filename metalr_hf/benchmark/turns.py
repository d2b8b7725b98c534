"""Alternates the steps of several processes, and measures the time and memory of each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback, TrainerState

T = TypeVar("T")


class _Turn:
    """Passes the permission to run from one process to the next."""

    def __init__(self, mine: Any, next: Any, over: Any):
        # Semaphores, released when it is this process's turn and the next one's, and what says that nobody waits.
        self.mine, self.next, self.over = mine, next, over

    def take(self) -> None:
        caller = multiprocessing.parent_process()
        while not self.mine.acquire(timeout=1) and not self.over.is_set():
            if caller is None or not caller.is_alive():
                # The executor would catch an exception, and wait for ever for the next call.
                os._exit(1)

    def hand_over(self) -> None:
        self.next.release()


# The instance of this process, set when it starts: semaphores cannot be sent to it later.
_turn: _Turn | None = None


def _take_part(turn: _Turn) -> None:
    global _turn
    _turn = turn


class StopWatch(TrainerCallback):
    """Wall and processor time of every step of a Trainer, and what the learning-rate scheduler took of it.

    Made when all is ready: the first step is with everything from there on. In [`run_in_turn`] it waits before each
    step until the other processes have taken theirs.

    Args:
        device (`torch.device`): Where the model is.

    Attributes:
        steps (`list[dict]`): A row per step: `wall` and `cpu` seconds, those of the `tuning` in it, and the `passes`
            (forward and backward) that it had more.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.steps: list[dict[str, Any]] = []
        self.passes = 0.0
        # One round before the first step, so that no process is still loading while another one is measured.
        self._take_turn()
        self._hand_over()
        self._take_turn()
        self.started = self._now()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.stepped = self._now()

    def on_step_end(self, args: Any, state: TrainerState, *others: Any, **kwargs: Any) -> None:
        now = self._now()
        passes = getattr(kwargs["lr_scheduler"], "extra_passes", 0.0)
        tuning = _difference(now, self.stepped)
        self.steps.append({**_difference(now, self.started), "tuning": tuning, "passes": passes - self.passes})
        self.passes = passes
        self._hand_over()
        if state.global_step < state.max_steps:
            self._take_turn()
        self.started = self._now()

    def _take_turn(self) -> None:
        if _turn is not None:
            _turn.take()

    def _hand_over(self) -> None:
        if _turn is not None:
            _turn.hand_over()

    def _now(self) -> dict[str, float]:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return {"wall": time.perf_counter(), "cpu": time.process_time()}


def _difference(later: dict[str, float], earlier: dict[str, float]) -> dict[str, float]:
    return {name: later[name] - earlier[name] for name in later}


def run_in_turn(function: Callable[..., T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """Calls a function with several arguments at once, in fresh processes whose [`StopWatch`] takes turns.

    Args:
        function (`Callable`): A function of a module.
        calls (`Sequence[tuple]`): The arguments of each call. Each has to take the same number of steps.

    Returns:
        `list`: what the calls gave.
    """
    context = _context()
    turns = [context.Semaphore(int(place == 0)) for place in range(len(calls))]
    over = context.Event()
    with ExitStack() as stack:
        futures = []
        for place, call in enumerate(calls):
            turn = _Turn(turns[place], turns[(place + 1) % len(calls)], over)
            # It has imported everything, but has not yet used any memory of its own.
            executor = ProcessPoolExecutor(1, mp_context=context, initializer=_take_part, initargs=(turn,))
            process = stack.enter_context(executor)
            futures.append(process.submit(function, *call))
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            # Releases processes that wait for one that has failed.
            over.set()
        return [future.result() for future in futures]


def _context() -> BaseContext:
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["metalr_hf.benchmark.cases"])
    return context


def peak_memory(device: torch.device) -> int:
    """Bytes of memory that were in use at most, of the accelerator or of this process.

    Args:
        device (`torch.device`): Where the model is.

    Returns:
        `int`: bytes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage tells may be of the process that this one was forked from.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
