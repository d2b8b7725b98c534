"""What a user of the command line sees when an image is broken, or a run goes on with other settings."""

import json
import shutil

import pytest
from digits import save_image_folder, save_timm, save_vit
from open_files import LEFT_OPEN

from metalr_hf import LRHistory
from metalr_hf.cli import main
from metalr_hf.cli.train import RUN_FILES
from metalr_hf.trainer.checkpoints import checkpoints

COMMON = [
    *("--use_cpu", "true", "--disable_tqdm", "true", "--report_to", "none", "--image_size", "16", "--seed", "1"),
    *("--per_device_train_batch_size", "8", "--save_strategy", "steps", "--save_steps", "2", "--overwrite_output_dir"),
]


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    save_image_folder(root / "images")
    shutil.copytree(root / "images" / "test", root / "images" / "validation")
    save_vit(root / "vit")
    save_timm(root / "timm")
    return root


def damaged(file):
    """Broken between its beginning and its end, which are all that is looked at before training."""
    content = file.read_bytes()
    file.write_bytes(content[:60] + content[-12:])


def train(root, output, *more, images="images", model="vit"):
    names = ["--output_dir", output, "--dataset_name", root / images, "--model_name_or_path", root / model]
    return main(["train", *map(str, names), *COMMON, *more])


@LEFT_OPEN
@pytest.mark.usefixtures("open_files_are_left_here")
@pytest.mark.parametrize("more", ["", "--meta_source stream", "--streaming true", "--dataloader_num_workers 1"])
def test_a_broken_image_is_named(root, tmp_path, capsys, more):
    shutil.copytree(root / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images" / "train" / "one").iterdir())[3]
    damaged(broken)
    row = len(list((tmp_path / "images" / "train" / "nil").iterdir())) + 3
    assert train(tmp_path, tmp_path / "run", "--max_steps", "20", *more.split(), model=root / "vit") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    file = "" if "streaming" in more else f" ({broken})"
    assert f"Row {row} of the training images{file} cannot be read: image file is truncated" in said


@LEFT_OPEN
@pytest.mark.usefixtures("open_files_are_left_here")
@pytest.mark.parametrize("more", ["", "--streaming true --dataloader_num_workers 1"])
def test_a_broken_test_image_is_named_and_costs_no_more_than_the_test(root, tmp_path, capsys, more):
    shutil.copytree(root / "images", tmp_path / "images")
    broken = sorted((tmp_path / "images" / "test" / "nil").iterdir())[2]
    damaged(broken)
    run = tmp_path / "run"
    assert train(tmp_path, run, "--max_steps", "4", *more.split(), model=root / "vit") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    file = "" if "streaming" in more else f" ({broken})"
    assert f"Row 2 of the test images{file} cannot be read: image file is truncated" in said
    assert {path.name for path in run.iterdir()} >= set(RUN_FILES)
    assert LRHistory.load(run / "lr_history.csv").steps.tolist() == list(range(4))
    results = json.loads((run / "all_results.json").read_text())
    assert results["train_loss"] > 0
    assert not [name for name in results if name.startswith("test_")]
    if "streaming" in more:
        return
    shutil.copy(root / "images" / "test" / "nil" / broken.name, broken)
    left = {name: (run / name).read_bytes() for name in ("model.safetensors", "lr_history.csv")}
    go_on = ["--max_steps", "4", "--resume_from_checkpoint", "true"]
    assert train(tmp_path, run, *go_on, model=root / "vit") == 0
    assert left == {name: (run / name).read_bytes() for name in left}
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    tested = json.loads((run / "all_results.json").read_text())
    assert tested["train_loss"] == results["train_loss"]
    assert tested["test_loss"] > 0


@LEFT_OPEN
@pytest.mark.usefixtures("open_files_are_left_here")
def test_an_image_that_is_listed_and_not_there_is_named(root, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(root / "images" / split, tmp_path / "images" / split)
        files = sorted((tmp_path / "images" / split).rglob("*.png"))
        rows = [f"{file.relative_to(tmp_path / 'images' / split)},{file.parent.name}" for file in files]
        (tmp_path / "images" / split / "metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    files[3].unlink()
    assert train(tmp_path, tmp_path / "run", "--max_steps", "2", model=root / "vit") == 2
    assert not (tmp_path / "run" / "config.json").exists()
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"row 3 ({files[3]}): there is no such file" in said


def test_a_run_goes_on_with_what_it_can_and_says_what_it_cannot(root, tmp_path, capsys):
    assert train(root, tmp_path / "run", "--max_steps", "4") == 0
    go_on = ["--max_steps", "6", "--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-4")]
    refused = {
        "The checkpoint's optimizer is AdamW, that of this run SGD. Resume with the same `optim`": ["--optim", "sgd"],
        "only there ['layers.0', 'layers.1'], only here ['layer1',": ["--model_name_or_path", str(root / "timm")],
    }
    for message, more in refused.items():
        assert train(root, tmp_path / "other", *go_on, *more) == 2
        assert message in capsys.readouterr().err
    assert train(root, tmp_path / "other", *go_on, "--lr_rule", "adam", "--meta_source", "stream") == 0
    before, after = (LRHistory.load(tmp_path / run / "lr_history.csv") for run in ("run", "other"))
    assert after.steps.tolist() == list(range(6))
    assert (after.learning_rates[:4] == before.learning_rates).all()


@pytest.mark.parametrize("more", ["", "--meta_split_name validation"])
def test_a_run_on_streams_goes_on_bitwise(root, tmp_path, more):
    stream = ["--max_steps", "12", "--streaming", "true", "--dataloader_num_workers", "1", *more.split()]
    assert train(root, tmp_path / "run", *stream) == 0
    go_on = ["--resume_from_checkpoint", str(tmp_path / "run" / "checkpoint-8")]
    assert train(root, tmp_path / "other", *stream, *go_on) == 0
    for file in ("lr_history.csv", "model.safetensors"):
        assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_deepspeed_is_refused_before_it_is_imported(root, tmp_path, capsys, monkeypatch):
    assert train(root, tmp_path, "--deepspeed", "zero2.json") == 2
    assert "deepspeed='zero2.json': DeepSpeed steps the optimizer inside its backward" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert train(root, tmp_path) == 2
    assert "Use FSDP instead" in capsys.readouterr().err
