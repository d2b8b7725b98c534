"""Comparisons on several workers: strategies that are killed, a script that is interrupted."""

import os
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

from metalr_hf.compare.strategies import STRATEGIES, register_strategy

ROOT, HELPERS = Path(__file__).parents[2], Path(__file__).parent
# In the processes of a cluster, so that they compute what this process computes with as many threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def contents(folder):
    histories = {path.name: path.read_text() for path in (folder / "lr_history").iterdir()}
    return (folder / "results.jsonl").read_text(), histories


def kill_once(flag):
    """A strategy whose first run is killed, as the kernel does where memory is short."""

    def make(job):
        if not flag.exists():
            flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job.trainer(lr_scheduler_type="cosine")

    return make


@contextmanager
def strategy(name, make):
    register_strategy(name)(make)
    try:
        yield
    finally:
        del STRATEGIES[name]


SCRIPT = f"""
    import signal, sys
    sys.path.insert(0, {str(HELPERS)!r})
    from metalr_hf.compare import compare
    from small_cells import cell, comparison
    if __name__ == "__main__":
        # A process that a shell starts in the background ignores it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def report(done, total, left):
            print(done, flush=True)
        settings = comparison(steps=int(sys.argv[2]), seeds=list(range(8)))
        compare([cell()], settings, sys.argv[1], report, **eval(sys.argv[3]))
"""


def started(tmp_path, keywords):
    """A comparison in a group of processes of its own, after its second run."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "out"), "60", repr(keywords)]
    environment = {**os.environ, **ONE_THREAD}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.strip() == "2":
            break
    return process


def interrupted(tmp_path, keywords):
    process = started(tmp_path, keywords)
    # The whole group gets the signal, as it does in a terminal.
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    return process.pid
