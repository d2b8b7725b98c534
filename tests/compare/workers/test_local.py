"""Runs in processes of their own give what one process gives."""

import os
import signal
import subprocess
import time
from collections import Counter

import pytest
import torch
from small_cells import cell, comparison
from worker_runs import contents, interrupted, kill_once, started, strategy

from metalr_hf.compare import compare
from metalr_hf.compare.results import read_results
from metalr_hf.compare.strategies import STRATEGIES
from metalr_hf.compare.workers import local_workers


@pytest.mark.slow
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
    assert {worker for running, _ in seen for worker in running} == {"worker 1", "worker 2"}
    assert any(len(set(running.values())) == 2 for running, _ in seen), "two at a time"
    assert seen[-1] == ({}, 8)


@pytest.mark.slow
def test_a_process_that_is_killed_costs_its_run_alone_which_is_tried_once_more(tmp_path):
    pids = tmp_path / "pids"

    def noted(job, make=STRATEGIES["cosine"].make_trainer):
        with pids.open("a") as lines:
            lines.write(f"{job.arguments['seed']}\n")
        time.sleep(1)  # So that it is at work while the other is killed.
        return make(job)

    killed_once = kill_once(tmp_path / "flag")

    def killed(job):
        if job.arguments["seed"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return killed_once(job)

    with strategy("killed", killed), strategy("beside", noted):
        settings = comparison(strategies=["killed", "beside"], learning_rates=[1e-3], seeds=[0, 1])
        rows = compare([cell()], settings, tmp_path / "out", workers=2)
    assert rows == read_results(tmp_path / "out")
    assert Counter(pids.read_text().split()) == {"0": 1, "1": 1}, "what ran beside it ran once"
    once, each_time = (row for row in rows if row["strategy"] == "killed")
    beside = next(row for row in rows if row["strategy"] == "beside")
    assert (once["status"], once["accuracy"]) == ("done", beside["accuracy"])
    assert each_time["status"] == "failed"
    assert each_time["reason"].startswith("Its process ended 2 times: ")


def left_of(group):
    """Processes of a group that are still at work; one that has ended and that nobody has asked after is not."""
    columns = ["ps", "-e", "-o", "pgid=,stat=,args="]
    found = subprocess.run(columns, capture_output=True, text=True, check=True).stdout
    processes = [line.split(maxsplit=2) for line in found.splitlines()]
    return [args for pgid, state, args in processes if pgid == str(group) and not state.startswith("Z")]


def expect_none_left(group):
    deadline = time.monotonic() + 20  # The tracker of the processes' resources ends after them.
    while left := left_of(group):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c_ends_every_process_and_keeps_what_has_ended(tmp_path):
    group = interrupted(tmp_path, {"workers": 2})
    rows = read_results(tmp_path / "out")
    assert 2 <= len(rows) < 32
    assert {row["status"] for row in rows} == {"done"}
    expect_none_left(group)


@pytest.mark.slow
def test_the_processes_end_with_the_first_one_if_it_is_killed(tmp_path):
    process = started(tmp_path, {"workers": 2})
    process.kill()
    process.communicate(timeout=60)
    expect_none_left(process.pid)
    assert len(read_results(tmp_path / "out")) >= 2


def test_two_comparisons_on_one_folder_are_refused_whatever_their_workers(tmp_path):
    refused = []

    def start_another(*_):
        with pytest.raises(BlockingIOError, match="Another process is at work in output_dir") as caught:
            compare([cell()], comparison(), tmp_path, workers=2)
        refused.append(caught)

    settings = comparison(strategies=["cosine"])
    compare([cell()], settings, tmp_path, start_another)
    assert len(refused) == 2


def test_processes_share_the_threads_and_the_gpus_out(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [worker.threads for worker in local_workers(abs, 2)] == [2, 2]
    assert [worker.threads for worker in local_workers(abs, 8)] == [1] * 8
    # No GPU is needed to see who would get which.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [worker.name for worker in local_workers(abs, None)] == [
        "worker 1 (GPU 3)",
        "worker 2 (GPU 5)",
    ]
    assert [worker.environment["CUDA_VISIBLE_DEVICES"] for worker in local_workers(abs, 3)] == [
        "3",
        "5",
        "3",
    ]
