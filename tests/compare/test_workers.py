"""Runs side by side, in processes of their own and on a real Dask cluster, give what one process gives."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_cells
from small_cells import cell, comparison

from metalr_hf.compare import compare
from metalr_hf.compare.results import read_results
from metalr_hf.compare.strategies import STRATEGIES, register_strategy
from metalr_hf.compare.workers import check_backend, find_places

ROOT, HELPERS = Path(__file__).parents[2], Path(small_cells.__file__).parent
# In the clusters below, so that what they compute is what this process computes with as many threads.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def contents(folder):
    histories = {path.name: path.read_text() for path in (folder / "lr_history").iterdir()}
    return (folder / "results.jsonl").read_text(), histories


def test_two_processes_give_the_file_that_one_gives_and_say_which_run_is_where(tmp_path):
    settings, seen, counts = comparison(seeds=[0, 1]), [], []
    compare([cell()], settings, tmp_path / "one")
    compare(
        [cell()],
        settings,
        tmp_path / "two",
        lambda done, total, left: counts.append((done, total)),
        workers=2,
        watch=lambda running, rows: seen.append((running, len(rows))),
    )
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert counts == [(i, 8) for i in range(1, 9)]
    assert {place for running, _ in seen for place in running} == {"worker 1", "worker 2"}
    assert any(len(set(running.values())) == 2 for running, _ in seen), "two at a time"
    assert seen[-1] == ({}, 8)


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


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_run_alone_which_is_tried_again(tmp_path):
    pids = tmp_path / "pids"

    def noted(job, make=STRATEGIES["cosine"].make_trainer):
        with pids.open("a") as lines:
            lines.write(f"{job.arguments['seed']}\n")
        time.sleep(1)  # So that it is at work while the other is killed.
        return make(job)

    with strategy("killed", kill_once(tmp_path / "flag")), strategy("beside", noted):
        settings = comparison(strategies=["killed", "beside"], learning_rates=[1e-3], seeds=[0, 1])
        rows = compare([cell()], settings, tmp_path / "out", workers=2)
    assert [row["status"] for row in rows] == ["done"] * 4
    assert rows == read_results(tmp_path / "out")
    assert Counter(pids.read_text().split()) == {"0": 1, "1": 1}, "what ran beside it ran once"
    by_seed = {row["seed"]: row["accuracy"] for row in rows if row["strategy"] == "killed"}
    assert by_seed == {row["seed"]: row["accuracy"] for row in rows if row["strategy"] == "beside"}


@pytest.mark.slow
def test_a_run_that_is_killed_each_time_is_a_failed_row(tmp_path):
    with strategy("killed", lambda job: os.kill(os.getpid(), signal.SIGKILL)):
        settings = comparison(strategies=["killed", "cosine"], learning_rates=[1e-3])
        rows = compare([cell()], settings, tmp_path, workers=2)
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows[0]["reason"].startswith("Its process ended 2 times: ")


SCRIPT = f"""
    import sys
    sys.path.insert(0, {str(HELPERS)!r})
    from metalr_hf.compare import compare
    from small_cells import cell, comparison
    if __name__ == "__main__":
        def report(done, total, left):
            print(done, flush=True)
        settings = comparison(steps=int(sys.argv[2]), seeds=list(range(8)))
        compare([cell()], settings, sys.argv[1], report, **eval(sys.argv[3]))
"""


def interrupted(tmp_path, keywords):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, str(script), str(tmp_path / "out"), "60", repr(keywords)]
    environment = {**os.environ, **ONE_THREAD}
    # In a group of its own, all of which gets the signal, as it is in a terminal.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for line in process.stdout:
        if line.strip() == "2":
            break
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    return process.pid


def left_of(group):
    """Processes of a group that are still at work; one that has ended and that nobody has asked after is not."""
    columns = ["ps", "-e", "-o", "pgid=,stat=,args="]
    found = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    processes = [line.split(maxsplit=2) for line in found.splitlines()]
    return [args for pgid, state, args in processes if pgid == str(group) and not state.startswith("Z")]


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_keeps_what_has_ended(tmp_path):
    group = interrupted(tmp_path, {"workers": 2})
    rows = read_results(tmp_path / "out")
    assert 2 <= len(rows) < 32
    assert {row["status"] for row in rows} == {"done"}
    deadline = time.monotonic() + 10  # The tracker of the processes' resources ends after them.
    while left := left_of(group):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_two_comparisons_on_one_folder_are_refused_whatever_their_workers(tmp_path):
    refused = []

    def start_another(*_):
        with pytest.raises(BlockingIOError, match="Another process is at work in output_dir") as caught:
            compare([cell()], comparison(), tmp_path, workers=2)
        refused.append(caught)

    settings = comparison(strategies=["cosine"])
    compare([cell()], settings, tmp_path, start_another, workers=2)
    assert len(refused) == 2


@contextmanager
def dask_cluster(tmp_path, *options):
    """A scheduler and two workers on 127.0.0.1, each a process of its own, as a user starts them."""
    pytest.importorskip("distributed")
    file = tmp_path / "scheduler.json"
    path = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": path}

    def start(*command):
        with (tmp_path / "dask.log").open("a") as log:
            command = [sys.executable, "-m", "distributed.cli." + command[0], *command[1:]]
            return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    address = ["--host", "127.0.0.1"]
    processes = [start("dask_scheduler", *address, "--port", "0", "--no-dashboard", "--scheduler-file", str(file))]
    try:
        deadline = time.monotonic() + 60
        while not file.exists() or not file.read_text():
            assert time.monotonic() < deadline, (tmp_path / "dask.log").read_text()
            time.sleep(0.1)
        where = json.loads(file.read_text())["address"]
        for _ in range(2):
            common = ["--no-dashboard", "--local-directory", str(tmp_path)]
            processes.append(start("dask_worker", where, *address, *(options or ("--nthreads", "1")), *common))
        from distributed import Client

        with Client(where, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield where
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Of distributed's own, about sockets that its processes leave to Python.
def test_a_dask_cluster_gives_the_file_that_one_process_gives_through_a_kill_and_ctrl_c(tmp_path):
    with strategy("killed", STRATEGIES["cosine"].make_trainer):
        settings = comparison(seeds=[0, 1], strategies=["killed", "metalr_uncalibrated"])
        compare([cell()], settings, tmp_path / "one")
    with dask_cluster(tmp_path) as address:
        seen = []
        with strategy("killed", kill_once(tmp_path / "flag")):
            compare(
                [cell()],
                settings,
                tmp_path / "many",
                backend="dask",
                scheduler=address,
                watch=lambda running, rows: seen.append(running),
            )
        assert (tmp_path / "flag").exists(), "a worker was killed"
        assert contents(tmp_path / "many") == contents(tmp_path / "one")
        assert len({place for running in seen for place in running}) == 2
        from distributed import Client

        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            interrupted(tmp_path, {"backend": "dask", "scheduler": address})
            deadline = time.monotonic() + 30
            while any(client.processing().values()):
                assert time.monotonic() < deadline, "the cluster is still at work"
                time.sleep(0.2)
    rows = read_results(tmp_path / "out")
    assert 2 <= len(rows) < 32
    assert {row["status"] for row in rows} == {"done"}


@pytest.mark.filterwarnings("ignore")
def test_dask_workers_of_several_threads_are_refused(tmp_path):
    with (
        dask_cluster(tmp_path, "--nthreads", "2") as address,
        pytest.raises(ValueError, match="has workers of several threads .*dask worker --nthreads 1"),
    ):
        compare([cell()], comparison(), tmp_path / "out", backend="dask", scheduler=address)
    assert read_results(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_ray_cluster_gives_the_file_that_one_process_gives_through_a_kill(tmp_path):
    ray = pytest.importorskip("ray")
    path = os.pathsep.join([str(ROOT), str(HELPERS), os.environ.get("PYTHONPATH", "")])
    with strategy("killed", STRATEGIES["cosine"].make_trainer):
        settings = comparison(seeds=[0, 1], strategies=["killed", "metalr_uncalibrated"])
        compare([cell()], settings, tmp_path / "one")
    environment = {"env_vars": {**ONE_THREAD, "PYTHONPATH": path}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    try:
        with strategy("killed", kill_once(tmp_path / "flag")):
            compare([cell()], settings, tmp_path / "many", backend="ray")
    finally:
        ray.shutdown()
    assert (tmp_path / "flag").exists(), "a worker was killed"
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, "local", None), "workers=0 must be 1 or more"),
        ((2, "dsk", None), r"backend='dsk' is not one. Did you mean 'dask'\? There are: local, dask, ray"),
        ((2, "local", "tcp://10.0.0.1:8786"), "scheduler='tcp://10.0.0.1:8786' is for the backends dask and ray"),
        ((2, "dask", None), "backend='dask' needs scheduler"),
    ],
)
def test_bad_workers_are_refused_by_name(given, message):
    with pytest.raises(ValueError, match=message):
        check_backend(*given)


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("metalr_hf.compare.workers.SECONDS_TO_CONNECT", 1)
    with pytest.raises(ConnectionError, match="scheduler='tcp://127.0.0.1:9' has no Dask workers to offer"):
        find_places(abs, None, "dask", "tcp://127.0.0.1:9")


def test_processes_share_the_threads_and_the_gpus_out(monkeypatch):
    import torch

    torch.set_num_threads(4)
    assert [place.threads for place in find_places(abs, 2, "local", None)] == [2, 2]
    assert [place.threads for place in find_places(abs, 8, "local", None)] == [1] * 8
    # No GPU is needed to see who would get which.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [place.name for place in find_places(abs, None, "local", None)] == ["worker 1 (GPU 3)", "worker 2 (GPU 5)"]
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in find_places(abs, 3, "local", None)] == [
        "3",
        "5",
        "3",
    ]
