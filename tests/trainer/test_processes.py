import json
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
import train_in_processes
from digits import save_image_folder, save_timm
from filelock import FileLock
from safetensors.torch import load_file
from small_runs import images, vit
from train_in_processes import META_ROWS, names, run
from volumes import QUICK, SMALL, save_folder

from metalr_hf import LRHistory, MetaLRTrainer, MetaLRTrainingArguments
from metalr_hf.cli import main
from metalr_hf.cli.train import RUN_FILES
from metalr_hf.data.splits import hold_out
from metalr_hf.models.loading import ModelArguments
from metalr_hf.tasks import get_task
from metalr_hf.tuning.calibration.search import LOOKS

pytestmark = pytest.mark.slow

LAYERS = 5
# Where a gradient is nothing but rounding (a ViT's key biases), Adam's step is as long as anywhere else.
STEADY = {"max_steps": 30, "adam_epsilon": 1e-3, "lr_scheduler_type": "warmup_stable_decay"}
# The head of an untrained network is fitted to features that hardly differ, and enlarges their rounding.
EXACT = {**STEADY, "fit_head": False}
COLLAPSES = {**EXACT, "max_steps": 14, "learning_rate": 1e-2, "killed_at": 2}
# Images whose number two processes cannot divide evenly.
STOPS_ITSELF = {"max_steps": -1, "stop_when_converged": True, "save_strategy": "steps", "evaluated_on": 23}
STOPS_ITSELF |= {"first_stop": 40, "holds_back": True}
SOURCES = ("stream", "next_batch")
SHARDED = {"transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
WAYS = {"ddp": {}, "fsdp": {"fsdp": True, "fsdp_config": SHARDED}}
STREAMS = {
    "streams": {"train": "stream", "meta": "stream"},
    # Each process reads its own share, instead of the first one reading for all.
    "shards": {
        "train": "stream",
        "meta": "rows",
        "accelerator_config": {"dispatch_batches": False},
        "gradient_accumulation_steps": 2,
    },
}


def launch(runs, folder, processes=2):
    """Runs one after the other in the same processes: starting them takes most of the time."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    command = [sys.executable, train_in_processes.__file__, str(file), str(processes)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def of_process(folder, process=0):
    return json.loads((folder / f"process_{process}.json").read_text())


def far_apart(folder, other, file="weights.safetensors"):
    """The largest difference between the weights of two runs."""
    a, b = load_file(folder / file), load_file(other / file)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module", params=WAYS)
def folder(request, tmp_path_factory):
    """What two processes make of the same runs, replicated and sharded. All workers of pytest share it."""
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / request.param
    with FileLock(f"{root}.lock"):
        if not root.exists():
            root.mkdir()
            launch(runs_of(request.param, root), root)
    return root


def runs_of(name, root):
    (root / "way").write_text(name)
    way, runs = WAYS[name], []
    common = {"per_device_train_batch_size": 4, "meta_source": "stream"}

    def saved_and_resumed(name, **options):
        saved = {"model": "vit with dropout", "save_strategy": "steps", "save_steps": 6, **common, **options}
        checkpoint = str(root / f"{name}-whole" / "checkpoint-6")
        return [
            {"folder": str(root / f"{name}-whole"), **saved, "slow_to_save": True},
            {"folder": str(root / f"{name}-resumed"), **saved, "resume": checkpoint},
        ]

    for source in SOURCES:
        half = {**way, **common, "meta_source": source}
        runs.append({"folder": str(root / source), **EXACT, **half})
        runs += saved_and_resumed(source, **half)
    runs.append({**runs[0], "folder": str(root / "spoiled"), "max_steps": 6, "spoiled_step": 3, "calibrate": False})
    averaged = {**way, **common, "meta_source": "next_batch", "average_weights": "polynomial"}
    runs.append({"folder": str(root / "averaged"), **EXACT, **averaged})
    runs.append({"folder": str(root / "fitted"), **STEADY, **common, **way})
    runs.append({"folder": str(root / "refined"), **STEADY, **averaged})
    runs += saved_and_resumed("averaged", **averaged, model="resnet" if not way else "vit with dropout")
    runs.append({"folder": str(root / "collapsed"), **COLLAPSES, **common, **way})
    runs.append({"folder": str(root / "stopped"), "per_device_train_batch_size": 4, **STOPS_ITSELF, **way})
    if not way:
        runs.append({**runs[0], "folder": str(root / "profiled"), "max_steps": 12, "profiled": True})
        unused = {"model": "vit with an unused layer", "ddp_find_unused_parameters": True}
        runs.append({**runs[0], "folder": str(root / "unused"), "max_steps": 12, **unused})
        for name, sets in STREAMS.items():
            runs += saved_and_resumed(name, **sets, dataloader_num_workers=2)
    return runs


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_of_a_batch_are_one_of_a_batch_twice_as_large(folder, tmp_path, source):
    run(str(tmp_path), per_device_train_batch_size=8, meta_source=source, **EXACT)
    one, two = torch.tensor(of_process(tmp_path)["rates"]), torch.tensor(of_process(folder / source)["rates"])
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    assert far_apart(tmp_path, folder / source) < 1e-6
    assert (of_process(folder / source)["sharded"] > 0) == (not is_ddp(folder))
    # Of a model that is sharded, the backbone is run for each rate of the head too.
    alone, together = (of_process(place)["calibration_forwards"] for place in (tmp_path, folder / source))
    assert alone == together if is_ddp(folder) else alone < together


def test_the_average_of_two_processes_is_that_of_one(folder, tmp_path):
    options = {"meta_source": "next_batch", "average_weights": "polynomial", **EXACT}
    run(str(tmp_path), per_device_train_batch_size=8, **options)
    assert far_apart(tmp_path, folder / "averaged") < 1e-6
    # The statistics of batch norm, estimated from batches of all processes, among it.
    assert far_apart(folder / "averaged-whole", folder / "averaged-resumed") == 0.0


def test_two_processes_fit_the_head_that_one_does(folder, tmp_path):
    run(str(tmp_path), per_device_train_batch_size=8, meta_source="stream", **STEADY)
    fitted_to = [of_process(folder / "fitted", process)["fitted_to"] for process in (0, 1)]
    assert fitted_to == [48, 48]
    assert of_process(tmp_path)["fitted_to"] == 48
    assert far_apart(tmp_path, folder / "fitted") < 1e-3


def test_two_processes_end_with_the_head_that_one_does(folder, tmp_path):
    # Of whole steps of both: no image is missed, and none counted twice.
    options = {"meta_source": "next_batch", "average_weights": "polynomial", **STEADY}
    run(str(tmp_path), per_device_train_batch_size=8, **options)
    refined_on = [of_process(folder / "refined", process)["refined_on"] for process in (0, 1)]
    assert refined_on == [of_process(tmp_path)["refined_on"]] * 2
    assert refined_on[0] > 0
    assert far_apart(tmp_path, folder / "refined") < 1e-2


def test_two_processes_stop_at_the_step_at_which_one_does(folder, tmp_path):
    run(str(tmp_path), per_device_train_batch_size=8, **STOPS_ITSELF)
    one, two = of_process(tmp_path), of_process(folder / "stopped")
    assert two["steps"] == of_process(folder / "stopped", 1)["steps"] == one["steps"]
    assert "with the images too that it had been evaluated on" in one["stopped_because"]
    assert two["stopped_because"] == one["stopped_because"]
    assert far_apart(tmp_path, folder / "stopped") < 1e-3


def test_two_processes_go_back_from_a_collapse_as_one_does(folder, tmp_path):
    run(str(tmp_path), per_device_train_batch_size=8, meta_source="stream", **COLLAPSES)
    assert of_process(tmp_path)["restarted_at"] == 10
    assert [of_process(folder / "collapsed", process)["restarted_at"] for process in (0, 1)] == [10, 10]
    assert far_apart(tmp_path, folder / "collapsed") < 1e-5


def test_a_layer_without_gradients_changes_nothing(folder, tmp_path):
    if not is_ddp(folder):
        pytest.skip("find_unused_parameters is DDP's")
    unused = {"model": "vit with an unused layer", "meta_source": "stream", **EXACT, "max_steps": 12}
    run(str(tmp_path), per_device_train_batch_size=8, **unused)
    one, two = torch.tensor(of_process(tmp_path)["rates"]), torch.tensor(of_process(folder / "unused")["rates"])
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    assert far_apart(tmp_path, folder / "unused") < 1e-6


@pytest.mark.parametrize("source", SOURCES)
def test_every_process_has_the_same_rates(folder, source):
    assert of_process(folder / source, 0)["rates"] == of_process(folder / source, 1)["rates"]


@pytest.mark.parametrize("name", [*SOURCES, "averaged", *STREAMS])
def test_a_resumed_run_ends_bitwise_as_the_one_that_was_not_interrupted(folder, name):
    if name in STREAMS and not is_ddp(folder):
        pytest.skip("the loaders are those of DDP")
    whole, resumed = folder / f"{name}-whole", folder / f"{name}-resumed"
    for process in (0, 1):
        a, b = of_process(whole, process), of_process(resumed, process)
        assert a["history"] == b["history"]
        for rows in ("train_rows", "meta_rows"):
            assert a[rows][len(a[rows]) - len(b[rows]) :] == b[rows]
    assert far_apart(whole, resumed) == 0.0


@pytest.mark.parametrize("source", SOURCES)
def test_a_checkpoint_is_complete_only_when_all_processes_have_written(folder, source):
    for checkpoint in (folder / f"{source}-whole").glob("checkpoint-*"):
        last, slow = (checkpoint / name for name in ("trainer_state.json", "rng_state_1.pth"))
        assert slow.stat().st_mtime_ns <= last.stat().st_mtime_ns


@pytest.mark.parametrize("name", STREAMS)
def test_processes_and_workers_share_the_rows_of_streams_without_overlap(folder, name):
    if not is_ddp(folder):
        pytest.skip("the loaders are those of DDP")
    seen = [of_process(folder / f"{name}-whole", process) for process in (0, 1)]
    all_rows, all_meta_rows = (sorted(names(data[:])) for data in (images(), images(META_ROWS, seed=1)))
    assert sorted(row for process in seen for row in process["train_rows"][:24]) == all_rows
    longer = META_ROWS - META_ROWS // 2
    assert sorted(seen[0]["meta_rows"][:longer] + seen[1]["meta_rows"][: META_ROWS - longer]) == all_meta_rows


def test_a_validation_batch_that_is_not_finite_in_one_process_tunes_nothing_in_any(folder):
    for process in (0, 1):
        result = of_process(folder / "spoiled", process)
        assert result["non_finite"] == 1
        assert result["rates"][3] == result["rates"][2] != result["rates"][4]
    assert of_process(folder / "spoiled", 0)["rates"] == of_process(folder / "spoiled", 1)["rates"]


def test_a_validation_sends_one_figure_a_layer(folder):
    if not is_ddp(folder):
        pytest.skip("sharded gradients are sent by the backward itself")
    sent = [math.prod(shapes[0]) for shapes in of_process(folder / "profiled")["reduced"]]
    model = vit()
    gradient = sum(p.numel() for p in model.parameters())
    steps = 12
    assert sent.count(gradient) == steps
    # The validation loss goes with the figures of the layers; a step that is calibrated sends losses alone, and the
    # look-out for a collapse one or two figures.
    assert steps - len(LOOKS) <= sent.count(LAYERS + 1) < steps
    # How far the first step moved every layer, and the norms of the layers.
    assert sent.count(2 * LAYERS) == 1
    assert set(sent) == {gradient, LAYERS + 1, 2 * LAYERS, 1, 2, len(list(model.parameters()))}


def test_one_process_may_save_the_average_alone(tmp_path):
    common = {"model": "resnet", "max_steps": 6, "per_device_train_batch_size": 8, "ddp_timeout": 60}
    folders = {class_loss: tmp_path / str(class_loss) for class_loss in (False, True)}
    runs = [{"folder": str(folder), "class_loss": loss, **common} for loss, folder in folders.items()]
    launch([{**run, "saves_alone": True} for run in runs], tmp_path)
    for folder in folders.values():
        saved = load_file(folder / "alone" / "model.safetensors")
        assert all(value.isfinite().all() for value in saved.values())


@pytest.mark.parametrize("way", WAYS)
def test_one_process_may_have_fewer_images_in_its_batches(tmp_path, way):
    # The batches of an accumulated step are enough to look at in one process, and not in the other.
    common = {"max_steps": 6, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "ddp_timeout": 60}
    launch([{"folder": str(tmp_path), "class_loss": True, "shorter_in_one": True, **common, **WAYS[way]}], tmp_path)
    one, two = (of_process(tmp_path, process) for process in (0, 1))
    assert one["steps"][0] == two["steps"][0] == 6
    assert one["rates"] == two["rates"]


def is_ddp(folder):
    return (folder / "way").read_text() == "ddp"


def in_two_processes(*arguments):
    """Runs a command as `accelerate launch -m metalr_hf.cli` does."""
    # accelerate's own --cpu starts one process, whatever the number.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "metalr_hf.cli"]
    command = list(map(str, [sys.executable, *launcher, *arguments]))
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_volumes_of_several_sizes_are_measured_in_two_processes_as_in_one(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    # Three of two sizes do not divide evenly either.
    data, output = save_folder(tmp_path / "scans", train=7, test=3), tmp_path / "run"
    arguments = ["--task", "segmentation", "--dataset_name", data, "--output_dir", output, *QUICK, *SMALL]
    arguments += ["--max_steps", "30", "--eval_strategy", "steps", "--eval_steps", "30", "--validation_share", "0.4"]
    in_two_processes("train", *arguments, "--report_to", "none")
    task = get_task("segmentation_3d")
    splits = task.load_splits(task.data_arguments(dataset_name=str(data)))
    splits = hold_out(splits, "validation", "validation_share", 0.4, 42, None)
    model, processor = task.load_trained(ModelArguments(str(output)))
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    options |= task.training_arguments
    needs = task.trainer_arguments(splits.class_names, [])
    trainer = MetaLRTrainer(model, MetaLRTrainingArguments(str(tmp_path / "one"), **options), **needs)
    prepared = task.prepare(splits, processor, "none")
    found = json.loads((output / "all_results.json").read_text())
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    found |= next(row for row in history if "eval_dice" in row)
    for prefix, rows in (("test", prepared.test), ("eval", prepared.validation)):
        assert len({row["labels"].shape for row in rows}) == 2
        measured = trainer.evaluate(rows, metric_key_prefix=prefix)
        names = [name for name in measured if "dice" in name or "hausdorff95" in name or name.endswith("_loss")]
        assert len(names) == 7
        assert measured[f"{prefix}_dice"] > 0.1
        for name in names:
            assert found[name] == pytest.approx(measured[name], abs=1e-5), name


def test_the_command_line_in_two_processes_is_the_one_in_one_and_its_checkpoint_too(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ["train", "--dataset_name", save_image_folder(tmp_path / "images"), "--augment", "none"]
    arguments += ["--model_name_or_path", save_timm(tmp_path / "timm", "test_vit")]
    arguments += ["--meta_split", "0.2", "--meta_every", "1"]
    arguments += ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "30"]
    arguments += ["--adam_epsilon", "1e-3", "--save_strategy", "steps", "--save_steps", "15"]
    arguments += ["--fit_head", "false", "--output_dir"]
    two, one, resumed = (tmp_path / name for name in ("two", "one", "resumed"))
    done = in_two_processes(*arguments, two, "--per_device_train_batch_size", "4")
    assert {file.name for file in two.iterdir()} >= set(RUN_FILES)
    assert done.stdout.count("On the test split") == 1
    assert (two / "checkpoint-15" / "rng_state_1.pth").exists()

    whole = [*map(str, arguments), str(one), "--per_device_train_batch_size", "8"]
    assert main(whole) == 0
    # The same from the middle on, after 15 steps in two processes.
    whole[-3] = str(resumed)
    assert main([*whole, "--resume_from_checkpoint", str(two / "checkpoint-15")]) == 0
    rates = LRHistory.load(two / "lr_history.csv").learning_rates
    assert len(rates) == 30
    assert (rates[29] != rates[0]).all()
    for other, tolerance in ((one, 1e-5), (resumed, 1e-4)):
        np.testing.assert_allclose(LRHistory.load(other / "lr_history.csv").learning_rates, rates, rtol=tolerance)
        assert far_apart(other, two, "model.safetensors") < tolerance
