"""Runs on the workers of a real Dask or Ray cluster give what one process gives."""

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
from small_cells import cell, comparison
from worker_runs import HELPERS, ONE_THREAD, ROOT, contents, interrupted, kill_once, strategy

from metalr_hf.compare import compare
from metalr_hf.compare.results import read_results
from metalr_hf.compare.strategies import STRATEGIES
from metalr_hf.compare.workers.clusters import dask_workers


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
        assert len({worker for running in seen for worker in running}) == 2
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


@pytest.mark.slow
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


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_named(monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("metalr_hf.compare.workers.clusters.SECONDS_TO_CONNECT", 1)
    with pytest.raises(ConnectionError, match="scheduler='tcp://127.0.0.1:9' has no Dask workers to offer"):
        dask_workers(abs, None, "tcp://127.0.0.1:9")
