import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from digits import save_image_folder, save_vit
from safetensors.torch import load_file
from test_trainer import vit
from train_in_processes import run

from metalr_hf import LRHistory
from metalr_hf.calibration import CALIBRATED_STEPS
from metalr_hf.run import RUN_FILES

LAYERS = 5
# Where a gradient is nothing but rounding (a ViT's key biases), Adam's step is as long as anywhere else.
EXACT = {"max_steps": 30, "adam_epsilon": 1e-3}
SOURCES = ("stream", "next_batch")
SHARDED = {"transformer_layer_cls_to_wrap": ["ViTLayer"], "state_dict_type": "SHARDED_STATE_DICT"}
WAYS = {"ddp": {}, "fsdp": {"fsdp": True, "fsdp_config": SHARDED}}


def launch(runs, folder, processes=2):
    """Runs one after the other in the same processes: starting them takes most of the time."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    script = Path(__file__).with_name("train_in_processes.py")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), script, file]
    done = subprocess.run(
        [sys.executable, *map(str, command)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)


def of_process(folder, process=0):
    return json.loads((folder / f"process_{process}.json").read_text())


def far_apart(folder, other):
    """The largest difference between the weights of two runs."""
    a, b = load_file(folder / "weights.safetensors"), load_file(other / "weights.safetensors")
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module", params=WAYS)
def folder(request, tmp_path_factory):
    """What two processes make of the same runs, replicated and sharded."""
    root = tmp_path_factory.mktemp(request.param)
    (root / "way").write_text(request.param)
    runs = []
    for source in SOURCES:
        half = {**WAYS[request.param], "per_device_train_batch_size": 4, "meta_source": source}
        saved = {**half, "model": "vit with dropout", "save_strategy": "steps", "save_steps": 6}
        runs += [
            {"folder": str(root / source), **EXACT, **half},
            {"folder": str(root / f"{source}-whole"), **saved},
            {
                "folder": str(root / f"{source}-resumed"),
                **saved,
                "resume": str(root / f"{source}-whole" / "checkpoint-6"),
            },
        ]
    runs.append({**runs[0], "folder": str(root / "spoiled"), "max_steps": 6, "spoiled_step": 3, "calibrate": False})
    if request.param == "ddp":
        runs.append({**runs[0], "folder": str(root / "profiled"), "max_steps": 12, "profiled": True})
    launch(runs, root)
    return root


@pytest.mark.parametrize("source", SOURCES)
def test_two_processes_of_a_batch_are_one_of_a_batch_twice_as_large(folder, tmp_path, source):
    run(str(tmp_path), per_device_train_batch_size=8, meta_source=source, **EXACT)
    one, two = torch.tensor(of_process(tmp_path)["rates"]), torch.tensor(of_process(folder / source)["rates"])
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0)
    assert far_apart(tmp_path, folder / source) < 1e-6
    assert (of_process(folder / source)["sharded"] > 0) == (not is_ddp(folder))


@pytest.mark.parametrize("source", SOURCES)
def test_every_process_has_the_same_rates(folder, source):
    assert of_process(folder / source, 0)["rates"] == of_process(folder / source, 1)["rates"]


@pytest.mark.parametrize("source", SOURCES)
def test_a_resumed_run_ends_bitwise_as_the_one_that_was_not_interrupted(folder, source):
    whole, resumed = folder / f"{source}-whole", folder / f"{source}-resumed"
    assert far_apart(whole, resumed) == 0.0
    assert of_process(whole)["history"] == of_process(resumed)["history"]


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
    assert steps - len(CALIBRATED_STEPS) <= sent.count(LAYERS + 1) < steps
    assert set(sent) == {gradient, LAYERS + 1, 1, 2, len(list(model.parameters()))}


def is_ddp(folder):
    return (folder / "way").read_text() == "ddp"


def test_the_command_line_in_two_processes_and_its_checkpoint_in_one(tmp_path):
    arguments = ["train", "--output_dir", tmp_path / "run", "--dataset_name", save_image_folder(tmp_path / "images")]
    arguments += ["--model_name_or_path", save_vit(tmp_path / "vit"), "--use_cpu", "true", "--report_to", "none"]
    arguments += ["--per_device_train_batch_size", "4", "--max_steps", "4", "--save_strategy", "steps"]
    arguments += ["--save_steps", "4", "--image_size", "16"]
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for command in (
        [*launcher, "-m", "metalr_hf.cli", *arguments],
        ["-m", "metalr_hf.cli", *arguments, "--max_steps", "6", "--resume_from_checkpoint", "true"],
    ):
        done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert {file.name for file in (tmp_path / "run").iterdir()} >= set(RUN_FILES)
        assert done.stdout.count("On the test split") == 1
    assert LRHistory.load(tmp_path / "run" / "lr_history.csv").steps.tolist() == list(range(6))
