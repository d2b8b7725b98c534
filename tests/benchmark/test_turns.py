import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import TrainerControl, TrainerState

from metalr_hf.benchmark.turns import StopWatch, peak_memory, run_in_turn


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


def test_processes_take_turns_and_do_not_count_the_steps_of_others(tmp_path):
    file = tmp_path / "log"
    times = run_in_turn(take_steps, [(file, "a", 3), (file, "b", 3)])
    assert file.read_text().split("\n")[:-1] == ["a begins", "a ends", "b begins", "b ends"] * 3
    for own in times:
        # Without turns a step would begin while the other is still in its own, and with its time it would be 0.1.
        assert sorted(own)[1] < 0.1


@pytest.mark.parametrize("name", ["a", "b"])
def test_one_that_fails_does_not_leave_the_other_waiting(tmp_path, name):
    calls = [(tmp_path / "log", key, 3, 2 if key == name else None) for key in ("a", "b")]
    with pytest.raises(ArithmeticError, match=f"{name} fails"):
        run_in_turn(take_steps, calls)


def never_their_turn(file):
    """Kills who asked while the first waits for the second, which never comes to its first step."""
    os.mkdir(file / str(os.getpid()))
    if len(os.listdir(file)) == 1:
        StopWatch(torch.device("cpu"))
    else:
        os.kill(multiprocessing.parent_process().pid, signal.SIGKILL)
        time.sleep(20)


@pytest.mark.slow
def test_those_whose_caller_was_killed_end_too(tmp_path):
    code = "from pathlib import Path; from test_turns import *; calls = [(Path(sys.argv[1]),)] * 2"
    command = [sys.executable, "-c", f"import sys; {code}; run_in_turn(never_their_turn, calls)", str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(__file__).parent, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    first = min(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime).name
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{first}") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not os.path.exists(f"/proc/{first}")


def peak_with(megabytes):
    held = torch.ones(megabytes, 2**18)
    return os.getpid(), peak_memory(held.device)


def test_each_has_a_process_and_a_peak_of_its_own():
    (first, high), (second, low) = run_in_turn(peak_with, [(400,), (1,)])
    assert len({first, second, os.getpid()}) == 3
    assert high - low == pytest.approx(399 * 2**20, rel=0.1)
