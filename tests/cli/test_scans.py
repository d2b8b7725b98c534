"""Scans through the command line: trained, saved, and told of on the card, without what is nobody's business."""

import json

import pytest
from digits import save_timm, save_vit
from scans import NAME, PRIVATE, save_dicom_folder
from transformers import AutoImageProcessor, BitImageProcessor

from metalr_hf.cli import main
from metalr_hf.data.intensity import window_of

pytestmark = pytest.mark.usefixtures("offline")
QUICK = [
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "8", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--max_steps", "3", "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none"),
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    return str(save_dicom_folder(tmp_path_factory.mktemp("Mustermann-scans")))


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return str(save_vit(tmp_path_factory.mktemp("vit")))


def run(output, scans, model, *more):
    where = ["--output_dir", str(output), "--dataset_name", scans, "--model_name_or_path", str(model)]
    return main(["train", *where, *QUICK, *more])


@pytest.mark.parametrize("save_model", [save_vit, save_timm])
def test_the_window_is_saved_and_told(tmp_path, scans, save_model):
    model = save_model(tmp_path / "model")
    assert run(tmp_path / "run", scans, model, "--intensity_window", "-160", "900") == 0
    # For a timm model AutoImageProcessor makes one from config.json.
    processor = BitImageProcessor if save_model is save_timm else AutoImageProcessor
    window = window_of(processor.from_pretrained(tmp_path / "run"))
    assert (window.low, window.high, window.source) == (-160.0, 900.0, "given")
    assert "| intensity window | -160 to 900, as given |" in (tmp_path / "run" / "README.md").read_text()


def test_nothing_of_the_patient_leaves_the_files(tmp_path, scans, vit, capfd, caplog):
    caplog.set_level("DEBUG")
    assert run(tmp_path, scans, vit) == 0
    said = capfd.readouterr()
    told = [said.out, said.err, caplog.text]
    told += [file.read_bytes().decode("latin-1") for file in tmp_path.rglob("*") if file.is_file()]
    assert len(told) > 8
    for secret in (NAME, NAME.split("^")[0] + "^", PRIVATE, "patient-train-0", "19700101"):
        assert not [text for text in told if secret in text]
    # What goes to the Hub names no path either.
    for name in ("README.md", "config.json", "preprocessor_config.json", "all_results.json", "lr_history.csv"):
        assert "Mustermann" not in (tmp_path / name).read_text()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())["intensity_window"]
    assert saved["source"] == "training images"


def test_bad_scans_and_windows_are_one_line(tmp_path, scans, vit, capsys):
    assert run(tmp_path, scans, vit, "--intensity_window", "9") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "intensity_window='9' is no window" in error


def test_nothing_of_the_patient_goes_to_the_hub(tmp_path, scans, vit, hub, user):
    more = ["--group_column", "PatientID", "--train_split", "train", "--intensity_window", "-160", "900"]
    assert run(tmp_path / "run", scans, vit, *more) == 0
    done = user.metalr_hf("publish", tmp_path / "run", "--repo_id", "me/scans")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| groups | images with the same 'PatientID' are in the same split |" in card
    pushed = [hub.folder("me/scans") / name for name in hub.files("me/scans")]
    assert len(pushed) >= 7
    for file in pushed:
        text = file.read_bytes().decode("latin-1")
        for secret in ("Mustermann", PRIVATE, "patient-train-0", "19700101", str(tmp_path), scans):
            assert secret not in text
    window = json.loads((hub.folder("me/scans") / "preprocessor_config.json").read_text())["intensity_window"]
    assert window == {"low": -160.0, "high": 900.0, "source": "given"}
