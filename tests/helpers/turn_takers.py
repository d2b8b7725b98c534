"""What the processes of `run_in_turn` run in the tests: a process that is not forked imports it by this name."""

import multiprocessing
import os
import signal
import time

import torch
from transformers import TrainerControl, TrainerState

from metalr_hf.benchmark.turns import StopWatch, peak_memory


class Scheduler:
    extra_passes = 0.0


def take_steps(file, name, steps, fails_at=None):
    """Writes down who begins and ends a step; each is long enough to be overtaken."""

    def write(text):
        with open(file, "a") as log:
            log.write(text + "\n")

    watch = StopWatch(torch.device("cpu"))
    state = TrainerState(max_steps=steps)
    for step in range(1, steps + 1):
        if step == fails_at:
            raise ArithmeticError(f"{name} fails")
        write(f"{name} begins")
        time.sleep(0.05)
        write(f"{name} ends")
        watch.on_optimizer_step()
        state.global_step = step
        watch.on_step_end(None, state, TrainerControl(), lr_scheduler=Scheduler())
    return [row["wall"] for row in watch.steps]


def never_their_turn(file):
    """Kills who asked while the first waits for the second, which never comes to its first step."""
    os.mkdir(file / str(os.getpid()))
    if len(os.listdir(file)) == 1:
        StopWatch(torch.device("cpu"))
    else:
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        time.sleep(20)


def peak_with(megabytes):
    held = torch.ones(megabytes, 2**18)
    return os.getpid(), peak_memory(held.device)
