import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import small_cells
import timm
import torch
from sklearn.metrics import recall_score
from small_cells import Network, cell, comparison
from torch import nn

from metalr_hf.compare.results import read_results
from metalr_hf.compare.runs import compare
from metalr_hf.compare.strategies import STRATEGIES, register_strategy


def test_every_strategy_sees_the_same_images_and_takes_the_same_number_of_steps(tmp_path):
    pytest.importorskip("prodigyopt")
    pytest.importorskip("schedulefree")
    for module in ("dog", "GeN", "prodigyplus"):
        pytest.importorskip(module)
    results = compare([cell()], comparison(strategies=list(STRATEGIES), seeds=[0, 1], learning_rates=[1e-3]), tmp_path)
    assert {row["strategy"]: row["reason"] for row in results if row["status"] != "done"} == {}
    for seed in (0, 1):
        assert len({row["images"] for row in results if row["seed"] == seed}) == 1
    assert len({row["images"] for row in results}) == 2
    assert {row["steps"] for row in results} == {4}
    cost = {row["strategy"]: row["cost"] for row in results}
    assert cost["metalr_paper"] == 2.0
    assert cost["cosine"] == cost["metalr_uncalibrated"] == 1.0
    assert cost["gen"] == 1 + 3 / 3 / 4
    # At most a hundred steps of the range test, at least the fifteen that the valley rule leaves out.
    assert 1 + 15 / 4 < cost["lr_finder"] <= 1 + 100 / 4
    # Forward passes along the first three steps, in a run of four.
    assert 1.0 < cost["metalr"] < 1 + 3 * (1 + 2 * 13) / 3 / 4


def test_a_strategy_without_a_learning_rate_runs_once_a_seed(tmp_path):
    register_strategy("free", uses_learning_rate=False)(lambda job: job.trainer(learning_rate=1e-3))
    try:
        results = compare([cell()], comparison(strategies=["cosine", "free"]), tmp_path)
    finally:
        del STRATEGIES["free"]
    assert [(row["strategy"], row["learning_rate"]) for row in results] == [
        ("cosine", 1e-3),
        ("cosine", 1e-2),
        ("free", None),
    ]


def test_only_what_is_missing_runs_and_a_line_cut_off_is_run_again(tmp_path):
    seen = []
    compare([cell()], comparison(), tmp_path, progress=lambda done, total, left: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    whole = (tmp_path / "results.jsonl").read_bytes()
    (tmp_path / "results.jsonl").write_bytes(whole[:-20])
    compare([cell()], comparison(), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == whole
    assert len(compare([cell()], comparison(seeds=[0, 1]), tmp_path)) == 8
    histories = sorted(path.name for path in (tmp_path / "lr_history").iterdir())
    assert histories[0] == "small_metalr-uncalibrated_lr0.001_seed0.csv"
    assert len(histories) == 4


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_ends_with_the_same_results(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {os.path.dirname(small_cells.__file__)!r})
            from metalr_hf.compare import compare
            from small_cells import cell, comparison
            report = lambda done, total, left: print(done, flush=True)
            compare([cell()], comparison(steps=8), sys.argv[1], progress=report)
            """
        )
    )
    command = [sys.executable, str(script), str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "1"
    # Let the next run begin.
    process.stdout.flush()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(read_results(tmp_path / "killed")) < 4
    for name in ("killed", "whole"):
        compare([cell()], comparison(steps=8), tmp_path / name)
    killed, whole = ((tmp_path / name / "results.jsonl").read_bytes() for name in ("killed", "whole"))
    assert killed == whole


class WithLabels(Network):
    """A module that computes its own loss, as a Trainer takes it."""

    def forward(self, pixel_values, labels=None):
        logits = super().forward(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_a_module_with_a_loss_of_its_own_is_taken_as_it_is(tmp_path):
    own = replace(cell(), make_model=lambda classes: WithLabels(len(classes)))
    settings = comparison(learning_rates=[1e-3])
    assert compare([own], settings, tmp_path / "own") == compare([cell()], settings, tmp_path / "plain")


def test_a_second_process_is_refused(tmp_path):
    refusals = []

    def start_another(*_):
        with pytest.raises(BlockingIOError, match="Another process is at work in output_dir") as caught:
            compare([cell()], comparison(), tmp_path)
        refusals.append(caught)

    compare([cell()], comparison(strategies=["cosine"], learning_rates=[1e-3]), tmp_path, progress=start_another)
    assert len(refusals) == 1


def test_a_strategy_without_its_package_is_refused_before_the_first_run(tmp_path):
    register_strategy("elsewhere", packages=["no_such_package"])(lambda job: job.trainer())
    try:
        with pytest.raises(ImportError, match=r"strategies='elsewhere' .* pip install no_such_package"):
            compare([cell()], comparison(strategies=["cosine", "elsewhere"]), tmp_path)
    finally:
        del STRATEGIES["elsewhere"]
    assert read_results(tmp_path) == []


def test_a_run_that_diverges_is_a_row_and_one_that_an_error_ends_is_tried_again(tmp_path):
    mistake = KeyError("of the strategy's own")
    errors = [torch.OutOfMemoryError("too big"), mistake]

    def explode(job):
        if errors:
            raise errors.pop(0)
        return job.trainer()

    register_strategy("explode")(explode)
    register_strategy("diverge")(lambda job: job.trainer(lr_scheduler_type="constant", optim="sgd", learning_rate=1e30))
    settings = comparison(strategies=["explode", "diverge", "cosine"], learning_rates=[1e-3])
    try:
        results = compare([cell()], settings, tmp_path)
        assert [row["status"] for row in results] == ["failed", "diverged", "done"]
        assert results[0]["reason"] == "OutOfMemoryError: too big"
        assert results[1]["reason"].startswith(("training loss", "test outputs"))
        others = compare([cell()], replace(settings, strategies=["cosine"]), tmp_path)
        assert others == results, "what is not asked for is not forgotten"
        second = compare([cell()], settings, tmp_path)
        assert [row["reason"] for row in second if row["status"] == "failed"] == [f"KeyError: {mistake!s}"]
        seen = []
        again = compare([cell()], settings, tmp_path, progress=lambda done, total, left: seen.append((done, total)))
    finally:
        del STRATEGIES["explode"], STRATEGIES["diverge"]
    assert seen == [(3, 3)]
    assert [(row["strategy"], row["status"]) for row in again] == [
        ("explode", "done"),
        ("diverge", "diverged"),
        ("cosine", "done"),
    ]
    assert again == read_results(tmp_path)


def test_scores_agree_with_scikit_learn_and_folds_cover_every_row(tmp_path):
    kept = {}

    def keep(job):
        trainer = job.trainer(lr_scheduler_type="cosine")
        predict = trainer.predict

        def predicted(*args, **kwargs):
            kept[len(kept)] = predict(*args, **kwargs)
            return kept[len(kept) - 1]

        trainer.predict = predicted
        return trainer

    register_strategy("keep")(keep)
    try:
        results = compare([cell()], comparison(strategies=["keep"], learning_rates=[1e-2], folds=3), tmp_path)
    finally:
        del STRATEGIES["keep"]
    assert sum(len(prediction.label_ids) for prediction in kept.values()) == 48
    for row, prediction in zip(results, kept.values(), strict=True):
        expected = recall_score(prediction.label_ids, prediction.predictions.argmax(-1), average=None)
        assert list(row["class_accuracy"].values()) == pytest.approx(expected, abs=1e-6)
        assert list(row["class_accuracy"]) == ["red", "green", "blue"]
        assert row["accuracy"] == pytest.approx((prediction.predictions.argmax(-1) == prediction.label_ids).mean())


def test_a_bare_timm_network_is_taken_by_every_kind_of_strategy(tmp_path):
    own = replace(cell(), make_model=lambda classes: timm.create_model("test_resnet", num_classes=len(classes)))
    compare([own], comparison(learning_rates=[1e-3], steps=2), tmp_path)
    assert [row["status"] for row in read_results(tmp_path)] == ["done", "done"]


def test_noise_flips_the_asked_share_and_subsets_are_stratified(tmp_path):
    seen = {}

    def look(job):
        seen["labels"] = job.trainer_arguments["train_dataset"].with_format(None)["label"]
        return job.trainer(lr_scheduler_type="cosine")

    register_strategy("look")(look)
    try:
        settings = {"strategies": ["look"], "learning_rates": [1e-3], "train_size": 30}
        compare([cell()], comparison(**settings), tmp_path / "clean")
        clean = np.array(seen["labels"])
        compare([cell()], comparison(**settings, noise=0.2), tmp_path / "noisy")
    finally:
        del STRATEGIES["look"]
    assert np.bincount(clean).tolist() == [10, 10, 10]
    assert (clean != np.array(seen["labels"])).sum() == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategies": ["cosin"]}, "Did you mean 'cosine'"),
        ({"learning_rates": [-1e-3]}, "learning_rates=-0.001 is not a positive number"),
        ({"learning_rates": [0]}, "learning_rates=0 is not a positive number"),
        ({"noise": 1.0}, r"noise=1.0 must be in \[0, 1\)"),
        ({"folds": 1}, "folds=1 must be 2 or more"),
        ({"seeds": [0, -1]}, "seeds=-1 must be a whole number from 0 to"),
        ({"steps": 0}, "steps=0 must be 1 or more"),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        comparison(**settings)


def test_bad_cells_and_folders_are_refused_before_the_first_run(tmp_path):
    with pytest.raises(ValueError, match="folds=50 is more than the 48 rows of 'small'"):
        compare([cell()], comparison(folds=50), tmp_path)
    with pytest.raises(ValueError, match="train_size=50 is more than the 48 rows of 'small'"):
        compare([cell()], comparison(train_size=50), tmp_path)
    with pytest.raises(ValueError, match="group_column='video' is not a column of 'small'"):
        compare([cell()], comparison(folds=3, group_column="video"), tmp_path)
    with pytest.raises(ValueError, match="cells: 2 have 1 names"):
        compare([cell(), cell()], comparison(), tmp_path)
    without = cell()
    without.test = None
    with pytest.raises(ValueError, match="has no test split"):
        compare([without], comparison(), tmp_path)
    compare([cell()], comparison(strategies=["cosine"], learning_rates=[1e-3]), tmp_path)
    with pytest.raises(ValueError, match=r"holds a comparison with other settings .*'steps': \(4, 5\)"):
        compare([cell()], comparison(steps=5), tmp_path)
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 4
