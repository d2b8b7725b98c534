import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import turn_takers
from turn_takers import peak_with, take_steps

from metalr_hf.benchmark.turns import run_in_turn


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


@pytest.mark.slow
def test_those_whose_caller_was_killed_end_too(tmp_path):
    code = (
        "import sys; from pathlib import Path; from metalr_hf.benchmark.turns import run_in_turn; "
        "from turn_takers import never_their_turn; run_in_turn(never_their_turn, [(Path(sys.argv[1]),)] * 2)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    ended = subprocess.run(command, cwd=Path(turn_takers.__file__).parent, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    first, second = (path.name for path in sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime))
    deadline = time.monotonic() + 10
    try:
        while os.path.exists(f"/proc/{first}") and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not os.path.exists(f"/proc/{first}")
    finally:
        # It would wait for ever for its executor, and the server that forked it would wait for it.
        os.kill(int(second), signal.SIGKILL)


def test_each_has_a_process_and_a_peak_of_its_own():
    (first, high), (second, low) = run_in_turn(peak_with, [(400,), (1,)])
    assert len({first, second, os.getpid()}) == 3
    assert high - low == pytest.approx(399 * 2**20, rel=0.1)
